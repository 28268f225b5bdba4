"""Adversarial images as PNG files. Usage: python save_adversarial_images.py MODEL my_images/ OUT"""

import sys
from pathlib import Path

from PIL import Image

import hpt_hf

model, out = hpt_hf.ZeroShotClassifier.from_pretrained(sys.argv[1]), Path(sys.argv[3])
images = hpt_hf.load_images(sys.argv[2])
model.set_classes(images.classes)
batch = hpt_hf.Collator(model.processor)(list(images))
adversarial = hpt_hf.attack(model, batch["images"], batch["labels"], "pgd", eps="8/255")
answers = model.classify(adversarial).logits.argmax(1)
out.mkdir(parents=True, exist_ok=True)
for i, (image, label, answer) in enumerate(zip(adversarial, batch["labels"], answers, strict=True)):
    Image.fromarray((image.permute(1, 2, 0) * 255).round().byte().cpu().numpy()).save(out / f"{i:05d}.png")
    print(f"{i:05d}.png: {images.classes[label]} -> {images.classes[answer]}")
