"""Proves that the faster layers compute what transformers' own do: values and gradients, at every precision."""

from __future__ import annotations

import copy
import platform
import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F
from transformers import CLIPModel
from transformers.activations import QuickGELUActivation

from hpt_hf.models import fast_layers
from hpt_hf.models.fast_layers import product, use_fast_layers
from hpt_hf.models.zero_shot import ZeroShotClassifier


def made(*shape, seed=0, dtype=torch.float64):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def gradients(function, *inputs):
    """The output, and the gradients of a sum that no two outputs enter alike."""
    leaves = [t.detach().clone().requires_grad_(True) for t in inputs]
    out = function(*leaves)
    return out.detach(), *torch.autograd.grad((out * made(*out.shape, seed=9, dtype=out.dtype)).sum(), leaves)


@pytest.mark.parametrize("shape", [(7, 24), (0, 24), (900, 24), (5, 17, 257, 24)])
@pytest.mark.parametrize("biased", [True, False])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 2e-5), (torch.float64, 1e-12)])
def test_a_product_is_the_linear_layers(shape, biased, dtype, tolerance):
    inputs = made(*shape, dtype=dtype), made(10, 24, seed=1, dtype=dtype), made(10, seed=2, dtype=dtype)
    ours, stock = (gradients(function, *inputs[: 2 + biased]) for function in (product, F.linear))
    assert ours[0].is_contiguous() and ours[0].dtype == dtype
    for a, b in zip(ours, stock, strict=True):
        torch.testing.assert_close(a, b, rtol=10 * tolerance, atol=10 * tolerance)


def test_rows_may_lie_in_any_order_and_without_onednn_a_product_is_torchs_own(monkeypatch):
    x, weight = made(24, 60, 50).permute(2, 1, 0), made(10, 24, seed=1)
    torch.testing.assert_close(product(x, weight), F.linear(x, weight))
    monkeypatch.setattr(F, "conv2d", None)  # whoever asks for it fails
    with pytest.raises(TypeError):
        product(x, weight)
    monkeypatch.setattr(fast_layers, "ONEDNN", False)
    assert torch.equal(product(x, weight), F.linear(x, weight))


@pytest.fixture(scope="module")
def stock(student_path) -> CLIPModel:
    """transformers' own CLIP with OpenAI's activation, as the published weights have it."""
    config = ZeroShotClassifier.from_pretrained(student_path).config
    config.vision_config.hidden_act = config.text_config.hidden_act = "quick_gelu"
    torch.manual_seed(5)
    return CLIPModel(config)


@pytest.fixture(scope="module")
def fast(stock) -> CLIPModel:
    twin = copy.deepcopy(stock)
    use_fast_layers(twin, class_token=True)
    return twin


def test_quick_gelu_is_openais_to_the_last_digits_and_leaves_its_input(stock, fast):
    ours, theirs = (model.vision_model.encoder.layers[0].mlp.activation_fn for model in (fast, stock))
    assert type(theirs) is QuickGELUActivation is not type(ours)
    x = torch.cat([made(300, seed=3) * 4, torch.tensor([0.0, -0.0, 40, -40, 1e3, -1e3], dtype=torch.float64)])
    for a, b in zip(gradients(ours, x), gradients(theirs, x), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)
    half = made(50, dtype=torch.bfloat16)
    before = half.clone()
    torch.testing.assert_close(ours(half), theirs(half), rtol=2e-2, atol=2e-2)
    assert torch.equal(half, before)


def test_every_layer_is_replaced_and_no_parameter(stock, fast):
    kinds = {type(m).__name__ for m in fast.modules()}
    assert {"_Linear", "_QuickGELU", "_PatchEmbedding", "_ClassTokenLayer"} <= kinds
    assert not kinds & {"Linear", "QuickGELUActivation"}
    assert [(n, p.shape) for n, p in fast.named_parameters()] == [(n, p.shape) for n, p in stock.named_parameters()]


@pytest.mark.parametrize("training", [False, True])
def test_a_clip_of_fast_layers_is_the_same_model(stock, fast, training):
    """Both towers, in float64, where no rounding hides a mistake."""
    images = torch.rand(64, 3, 32, 32, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    tokens = torch.randint(3, 20, (80, 9), generator=torch.Generator().manual_seed(0))
    found = []
    for model in (copy.deepcopy(m).double().train(training) for m in (fast, stock)):
        pixels = images.clone().requires_grad_(True)
        image, text = model.get_image_features(pixel_values=pixels), model.get_text_features(input_ids=tokens)
        (image.pooler_output.sin().sum() + text.pooler_output.cos().sum()).backward()
        values = {"image": image.pooler_output.detach(), "text": text.pooler_output.detach(), "pixels": pixels.grad}
        found.append(values | {n: p.grad for n, p in model.named_parameters() if p.grad is not None})
    ours, theirs = found
    assert ours.keys() == theirs.keys() and len(ours) > 50 and theirs["pixels"].abs().max() > 1e-4
    for name in theirs:
        torch.testing.assert_close(ours[name], theirs[name], rtol=1e-8, atol=1e-12, msg=name)
        assert ours[name].stride() == theirs[name].stride(), name  # DDP's buckets expect the parameter's own


def test_under_autocast_products_are_in_half_precision(stock, fast):
    images = torch.rand(2, 3, 32, 32)
    with torch.autocast("cpu", torch.bfloat16):
        ours, theirs = (m.get_image_features(pixel_values=images).pooler_output for m in (fast, stock))
        assert product(torch.rand(1000, 24), torch.rand(10, 24)).dtype == torch.bfloat16
    assert ours.dtype == theirs.dtype == torch.bfloat16
    torch.testing.assert_close(ours, theirs, rtol=5e-2, atol=2e-2)


FAULTS = """
import resource, sys, torch
from hpt_hf.models.fast_layers import keep_memory
if sys.argv[1] == "keep":
    keep_memory()
faults = []
for _ in range(10):
    faults.append(resource.getrusage(resource.RUSAGE_SELF).ru_minflt)
    [torch.ones(12_000_000) for _ in range(3)]
print(faults[-1] - faults[5])  # the heap grows in the first three or four rounds, not the same way each time
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="the setting is glibc's")
def test_kept_memory_is_not_asked_for_again():
    """Twelve blocks of 46 MiB: handed back, each page of each is faulted in anew."""
    kept, plain = (int(subprocess.check_output([sys.executable, "-c", FAULTS, how])) for how in ("keep", ""))
    assert kept < plain / 100


def test_where_there_is_nothing_to_set_keeping_memory_does_nothing(monkeypatch):
    monkeypatch.setattr(fast_layers.sys, "platform", "darwin")
    monkeypatch.setattr(fast_layers.ctypes, "CDLL", None)
    fast_layers.keep_memory()
