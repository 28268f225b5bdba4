"""Proves that the faster layers compute what transformers' own do: values, gradients of pixels and of weights, in every precision and shape they meet."""

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

from hpt_hf.models import fast_layers as kernels
from hpt_hf.models.fast_layers import product, use_fast_layers
from hpt_hf.models.zero_shot import ZeroShotClassifier


def made(*shape, seed=0, dtype=torch.float64):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def gradients(function, *inputs):
    """The output, and the gradients of a sum that no two outputs enter alike."""
    leaves = [None if t is None else t.detach().clone().requires_grad_(True) for t in inputs]
    out = function(*leaves)
    asked = [t for t in leaves if t is not None]
    return out.detach(), torch.autograd.grad((out * made(*out.shape, seed=9, dtype=out.dtype)).sum(), asked)


@pytest.mark.parametrize(
    "shape", [(7, 24), (3, 5, 24), (0, 24), (900, 24), (40, 50, 24), (2, 30, 20, 24), (5, 17, 257, 24)], ids=str
)
@pytest.mark.parametrize("biased", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_product_is_the_linear_layers(shape, biased, dtype):
    inputs = (
        made(*shape, dtype=dtype),
        made(10, 24, seed=1, dtype=dtype),
        made(10, seed=2, dtype=dtype) if biased else None,
    )
    (ours, our_gradients), (stock, stock_gradients) = gradients(product, *inputs), gradients(F.linear, *inputs)
    assert ours.shape == stock.shape and ours.is_contiguous() and ours.dtype == dtype
    tolerance = {torch.float32: 2e-5, torch.float64: 1e-12}[dtype]
    torch.testing.assert_close(ours, stock, rtol=tolerance, atol=tolerance)
    assert len(our_gradients) == 2 + biased
    for a, b in zip(our_gradients, stock_gradients, strict=True):
        torch.testing.assert_close(a, b, rtol=10 * tolerance, atol=10 * tolerance)


def test_a_product_of_rows_that_do_not_lie_in_order():
    x, weight = made(24, 60, 50).permute(2, 1, 0), made(10, 24, seed=1)
    assert not x.is_contiguous()
    torch.testing.assert_close(product(x, weight), F.linear(x, weight))
    torch.testing.assert_close(product(x[:, :1], weight), F.linear(x[:, :1], weight))


def test_without_onednn_a_product_is_torchs_own(monkeypatch):
    x, weight = made(2000, 24), made(10, 24, seed=1)
    with monkeypatch.context() as patch:
        patch.setattr(F, "conv2d", None)
        with pytest.raises(TypeError):
            product(x, weight)
    monkeypatch.setattr(kernels, "ONEDNN", False)
    monkeypatch.setattr(F, "conv2d", None)  # whoever asks for it fails
    assert torch.equal(product(x, weight), F.linear(x, weight))


def test_quick_gelu_is_openais_to_the_last_digits():
    x = torch.cat([made(300, seed=3) * 4, torch.tensor([0.0, -0.0, 40, -40, 1e3, -1e3], dtype=torch.float64)])
    (ours, ours_gradient), (stock, stock_gradient) = (
        gradients(kernels._QuickGELU(), x),
        gradients(QuickGELUActivation(), x),
    )
    torch.testing.assert_close(ours, stock, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(ours_gradient, stock_gradient, rtol=1e-12, atol=1e-12)
    assert torch.autograd.gradcheck(kernels._QuickGELU(), (made(20).requires_grad_(True),))


def test_quick_gelu_leaves_its_input_and_works_in_half_precision():
    x = made(50, dtype=torch.bfloat16)
    before = x.clone()
    torch.testing.assert_close(kernels._QuickGELU()(x), QuickGELUActivation()(x), rtol=2e-2, atol=2e-2)
    assert torch.equal(x, before) and kernels._QuickGELU()(x).dtype == torch.bfloat16


@pytest.fixture(scope="module")
def stock(student_path) -> CLIPModel:
    """transformers' own CLIP with OpenAI's activation, as the published weights have it."""
    config = ZeroShotClassifier.from_pretrained(student_path).config
    config.vision_config.hidden_act = config.text_config.hidden_act = "quick_gelu"
    torch.manual_seed(5)
    return CLIPModel(config)


@pytest.fixture(scope="module")
def quick(stock) -> CLIPModel:
    twin = copy.deepcopy(stock)
    use_fast_layers(twin)
    return twin


def test_every_layer_is_replaced_and_no_parameter(stock, quick):
    kinds = {type(m) for m in quick.modules()}
    assert {kernels._Linear, kernels._QuickGELU, kernels._PatchEmbedding, kernels._ClassTokenLayer} <= kinds
    assert not kinds & {torch.nn.Linear, QuickGELUActivation}
    assert [(n, p.shape) for n, p in quick.named_parameters()] == [(n, p.shape) for n, p in stock.named_parameters()]


def test_a_clip_of_quick_layers_is_the_same_model(stock, quick):
    """Both towers: features, and gradients of pixels and of every weight; in float64, where no rounding hides a mistake."""
    torch.manual_seed(0)
    images, tokens = torch.rand(64, 3, 32, 32, dtype=torch.float64), torch.randint(3, 20, (80, 9))
    found = []
    for model in (copy.deepcopy(stock).double(), copy.deepcopy(quick).double()):
        pixels = images.clone().requires_grad_(True)
        image, text = model.get_image_features(pixel_values=pixels), model.get_text_features(input_ids=tokens)
        (image.pooler_output.sin().sum() + text.pooler_output.cos().sum()).backward()
        found.append(
            (
                image.pooler_output.detach(),
                text.pooler_output.detach(),
                pixels.grad,
                {n: p.grad for n, p in model.named_parameters()},
            )
        )
    for ours, theirs in zip(found[1][:3], found[0][:3], strict=True):
        assert theirs.abs().max() > 1e-4
        torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-12)
    trained = {n: g for n, g in found[0][3].items() if g is not None}
    assert len(trained) > 50
    for name, gradient in trained.items():
        torch.testing.assert_close(found[1][3][name], gradient, rtol=1e-8, atol=1e-12, msg=name)
        assert found[1][3][name].stride() == gradient.stride(), name  # DDP's buckets expect the parameter's own


def test_frozen_weights_get_no_gradient_and_pixels_do(quick):
    model = copy.deepcopy(quick).requires_grad_(False)
    pixels = torch.rand(2, 3, 32, 32, requires_grad=True)
    model.get_image_features(pixel_values=pixels).pooler_output.sum().backward()
    assert pixels.grad.abs().max() > 0 and all(p.grad is None for p in model.parameters())


def test_under_autocast_products_are_in_half_precision(stock, quick):
    images = torch.rand(2, 3, 32, 32)
    with torch.autocast("cpu", torch.bfloat16):
        ours, theirs = (m.get_image_features(pixel_values=images).pooler_output for m in (quick, stock))
        assert product(torch.rand(1000, 24), torch.rand(10, 24)).dtype == torch.bfloat16
    assert ours.dtype == theirs.dtype == torch.bfloat16
    torch.testing.assert_close(ours, theirs, rtol=5e-2, atol=2e-2)


FAULTS = """
import resource, sys, torch
from hpt_hf.models.fast_layers import keep_memory
if sys.argv[1] == "keep":
    keep_memory()
def work():
    return [torch.ones(12_000_000) for _ in range(3)]
work()
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(5):
    work()
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="the setting is glibc's")
def test_kept_memory_is_not_asked_for_again():
    """Fifteen blocks of 46 MiB: handed back, each page of each is faulted in anew."""
    faults = {
        w: int(subprocess.run([sys.executable, "-c", FAULTS, w], capture_output=True, text=True, check=True).stdout)
        for w in ("keep", "")
    }
    assert faults["keep"] < faults[""] / 10, faults


def test_where_there_is_nothing_to_set_keeping_memory_does_nothing(monkeypatch):
    monkeypatch.setattr(kernels.sys, "platform", "darwin")
    monkeypatch.setattr(kernels.ctypes, "CDLL", None)
    kernels.keep_memory()
