"""Model families: for each `model_type` of transformers, and for open_clip, how features and scale are taken.

A proxy may be of any of them. A student, which is attacked, trained and exported, of those whose checkpoints
`pipeline` opens and whose forward pass is the same in training: no dropout, no statistics of the batch.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import transformers
from torch import Tensor
from transformers import PreTrainedModel

from hpt_hf.models.open_clip_models import OpenClipModel

Encoder = PreTrainedModel | OpenClipModel
PROMPTS = ("input_ids", "attention_mask", "token_type_ids")  # what a text tower may be given


def _images(model: PreTrainedModel, pixels: Tensor) -> Tensor:
    return model.get_image_features(pixel_values=pixels).pooler_output


def _vision_projected(model: PreTrainedModel, pixels: Tensor) -> Tensor:
    """Not `get_image_features`: sharded towers come together in their own forward."""
    return model.visual_projection(model.vision_model(pixel_values=pixels).pooler_output)


def _texts(model: PreTrainedModel, tokens: dict[str, Tensor]) -> Tensor:
    return model.get_text_features(**tokens).pooler_output


def patches_of(model: PreTrainedModel, pixels: Tensor) -> dict[str, Tensor]:
    """(batch, 3, height, width) as a NaFlex model reads it: (batch, patches, side * side * 3), mask and grid."""
    side, batch = model.config.vision_config.patch_size, len(pixels)
    rows, columns = pixels.shape[-2] // side, pixels.shape[-1] // side
    grid = pixels.unflatten(3, (columns, side)).unflatten(2, (rows, side)).permute(0, 2, 4, 3, 5, 1)
    return {
        "pixel_values": grid.reshape(batch, rows * columns, side * side * 3),
        "pixel_attention_mask": torch.ones(batch, rows * columns, dtype=torch.int32, device=pixels.device),
        "spatial_shapes": torch.tensor([[rows, columns]] * batch, device=pixels.device),
    }


@dataclass(frozen=True)
class Family:
    """What the rest of the package must know of a family."""

    called: str
    model_class: type[Any]  # opens and saves its checkpoints
    image_features: Callable[[PreTrainedModel, Tensor], Tensor] = _images  # normalised pixels -> (batch, dim)
    text_features: Callable[[PreTrainedModel, dict[str, Tensor]], Tensor] = _texts  # tokens -> (prompts, dim)
    scale: Callable[[PreTrainedModel], Tensor] = lambda model: model.logit_scale.exp()  # the factor of the cosines
    bias: Callable[[PreTrainedModel], Tensor | float] = lambda model: 0.0  # is added: the same to all classes
    sigmoid: bool = False  # `pipeline` gives a sigmoid of each logit
    vision_side: tuple[str, ...] = ("vision_model", "visual_projection")  # modules that a student trains
    padding: str | bool = True  # of prompts, as the tokenizer takes it
    context: int | None = None  # tokens; None: what the text tower's config says
    prompts: tuple[str, ...] = PROMPTS
    attention: str = "sdpa"  # transformers' own; a checkpoint's config may name code to download
    blank: Callable[[Any], Any] = lambda model: type(model)(model.config)  # the same architecture, other weights
    student: bool = False
    class_token: bool = False  # the embedding is made of the vision tower's first token alone


_SIGLIP = {
    "sigmoid": True,
    "bias": lambda model: model.logit_bias,
    "vision_side": ("vision_model",),
    # The embedding is that of the last of 64 tokens, and no mask tells which are padding.
    "padding": "max_length",
    "context": 64,
    "prompts": ("input_ids",),
    "student": True,
}
FAMILIES: dict[str, Family] = {
    "clip": Family("CLIP", transformers.CLIPModel, _vision_projected, student=True, class_token=True),
    "metaclip_2": Family("MetaCLIP 2", transformers.MetaClip2Model, _vision_projected, student=True, class_token=True),
    "siglip": Family("SigLIP", transformers.SiglipModel, **_SIGLIP),
    "siglip2": Family(
        "SigLIP 2",
        transformers.Siglip2Model,
        lambda model, pixels: model.get_image_features(**patches_of(model, pixels)).pooler_output,
        **_SIGLIP,
    ),
    "align": Family("ALIGN", transformers.AlignModel, attention="eager", scale=lambda model: 1 / model.temperature),
    "altclip": Family("AltCLIP", transformers.AltCLIPModel),
    "chinese_clip": Family("Chinese CLIP", transformers.ChineseCLIPModel),
    "vision-text-dual-encoder": Family("dual encoder", transformers.VisionTextDualEncoderModel, attention="eager"),
    "open_clip": Family(
        "open_clip model",
        OpenClipModel,
        lambda model, pixels: model.encode_image(pixels),
        lambda model, tokens: model.encode_text(tokens["input_ids"]),
        bias=lambda model: 0.0 if getattr(model, "logit_bias", None) is None else model.logit_bias,
        vision_side=("visual",),
        prompts=("input_ids",),
        attention="its own",
        blank=lambda model: model.blank(),
        student=True,
    ),
}
