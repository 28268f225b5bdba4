"""Any torch module from images in [0, 1] to logits, on a pair of tensors."""

import torch

import hpt_hf

model = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(3 * 16 * 16, 4))
images, labels = torch.rand(64, 3, 16, 16), torch.randint(4, (64,))
results = hpt_hf.evaluate(model, (images, labels), attack=["pgd", "apgd-ce"], eps=["1/255", "4/255"])
print(results.to_pandas()[["attack", "eps", "clean", "robust", "robust_low", "robust_high", "verdict"]])
