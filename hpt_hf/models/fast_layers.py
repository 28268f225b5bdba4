"""The layers of transformers' CLIP computed with less work, to the same values within rounding (docs/performance.md).

Subclasses without parameters of their own, put in place by changing a module's class: checkpoints, names and wrappers
stay as they are.
"""

from __future__ import annotations

import ctypes
import sys

import torch
import torch.nn.functional as F
from transformers.activations import QuickGELUActivation
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.models.clip.modeling_clip import CLIPEncoderLayer

# Asked once: inside a compiled layer the question would break its graph. Without MKL (ARM) oneDNN is the slower one.
ONEDNN = torch.backends.mkldnn.is_available() and torch.backends.mkl.is_available()


def product(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
    """`F.linear`; on a CPU through oneDNN instead of MKL, which leaves half of an AMD processor's vector units idle.

    Args:
        x: (..., inputs).
        weight: (outputs, inputs).
        bias: (outputs,) or None.
    """
    # Convolutions of so few numbers torch does not give to oneDNN.
    if x.device.type != "cpu" or not ONEDNN or x.numel() <= 20_480:
        return F.linear(x, weight, bias)
    # The public way to oneDNN's float32 products with a backward pass: a 1 x 1 convolution, the rows as one image.
    pixels = x.reshape(1, -1, 1, x.shape[-1]).permute(0, 3, 1, 2)
    return F.conv2d(pixels, weight[:, :, None, None], bias).permute(0, 2, 3, 1).reshape(*x.shape[:-1], -1)


class _Linear(torch.nn.Linear):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return product(x, self.weight, self.bias)


class _PatchEmbedding(torch.nn.Conv2d):
    """The convolution as a matrix product, since its windows do not overlap: an attack's backward pass is faster."""

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        side = self.kernel_size[0]
        rows, columns = images.shape[2] // side, images.shape[3] // side
        whole = images[:, :, : rows * side, : columns * side]
        patches = whole.unflatten(3, (columns, side)).unflatten(2, (rows, side)).permute(0, 2, 4, 1, 3, 5).flatten(3)
        return product(patches, self.weight.flatten(1), self.bias).permute(0, 3, 1, 2)


class _ClassTokenLayer(CLIPEncoderLayer):
    """The vision tower's last layer for its class token, the only one that is read: a sixth of the layer's work."""

    def forward(self, hidden_states: torch.Tensor, attention_mask: None = None, **_) -> torch.Tensor:
        attention, normed = self.self_attn, self.layer_norm1(hidden_states)
        projected = attention.q_proj(normed[:, :1]), attention.k_proj(normed), attention.v_proj(normed)
        query, key, value = (t.unflatten(-1, (attention.num_heads, -1)).transpose(1, 2) for t in projected)
        dropout = attention.dropout if self.training else 0.0
        mixed = F.scaled_dot_product_attention(query, key, value, dropout_p=dropout, scale=attention.scale)
        token = hidden_states[:, :1] + attention.out_proj(mixed.transpose(1, 2).flatten(2))
        return token + self.mlp(self.layer_norm2(token))


class _QuickGELUFunction(torch.autograd.Function):
    """x sigmoid(1.702 x) = silu(1.702 x) / 1.702: the factor cancels in the gradient, so each way is one pass."""

    @staticmethod
    def forward(ctx, x: torch.Tensor) -> torch.Tensor:
        scaled = 1.702 * x
        ctx.save_for_backward(scaled)
        return F.silu(scaled).div_(1.702)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, gradient: torch.Tensor) -> torch.Tensor:
        return torch.ops.aten.silu_backward(gradient, *ctx.saved_tensors)


class _QuickGELU(QuickGELUActivation):
    """OpenAI's activation."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return _QuickGELUFunction.apply(x)


def use_fast_layers(model: torch.nn.Module, *, class_token: bool) -> None:
    """Let a dual encoder compute with these layers, in place.

    Args:
        class_token: it is a CLIP, of whose vision tower the class token alone is read: the tower then gives no other.
    """
    if class_token:
        model.vision_model.encoder.layers[-1].__class__ = _ClassTokenLayer
    fast = {torch.nn.Linear: _Linear, QuickGELUActivation: _QuickGELU}
    for name, module in model.named_modules():
        if name.endswith("embeddings.patch_embedding") and type(module) is torch.nn.Conv2d:
            module.__class__ = _PatchEmbedding
        module.__class__ = fast.get(type(module), type(module))


def vision_layers(model: torch.nn.Module) -> list[torch.nn.Module]:
    """The transformer layers of its vision tower; none of a convolution."""
    tower = getattr(model, "vision_model", model)
    return [module for module in tower.modules() if isinstance(module, GradientCheckpointingLayer)]


def compile_layers(model: torch.nn.Module, **options) -> None:
    """`torch.compile` every layer of the vision tower, in place; layers of one shape share their code."""
    # First, inner and last layers of three models, in attack, loss and evaluation: more kinds than torch's eight.
    torch._dynamo.config.recompile_limit = max(32, torch._dynamo.config.recompile_limit)
    for layer in vision_layers(model):
        # At the proxy's shapes torch would compile the code again, for shapes of any size, and fails at that.
        layer.compile(dynamic=False, **options)


def keep_memory() -> None:
    """Let this process keep the memory it frees, where the allocator is glibc's; elsewhere nothing happens.

    A step frees and asks again for the same hundreds of MiB; by default glibc hands large blocks back to the kernel,
    which clears them page by page on their next use: a fifth of a step on a CPU.
    """
    if not sys.platform.startswith("linux"):
        return
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)  # musl has none
    if mallopt is not None:
        mallopt(-4, 0)  # M_MMAP_MAX: no block by a mapping of its own, which dies with it
        mallopt(-1, 2**31 - 1)  # M_TRIM_THRESHOLD: up to 2 GiB free at the end are kept
