"""Model families: for each `model_type` of transformers, how a dual encoder's features and scale are taken."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor
from transformers import CLIPModel, PreTrainedModel


@dataclass(frozen=True)
class Family:
    """What the rest of the package must know of a family.

    Args:
        model_class: opens and saves its checkpoints.
        image_features: (model, normalised pixels) -> (batch, dim), projected, not normalised.
        text_features: (model, tokens) -> (prompts, dim), projected, not normalised.
        scale: model -> the positive factor of the cosines.
        frozen_in_training: the modules and parameters that adversarial fine-tuning of the vision side leaves alone.
    """

    model_class: type[PreTrainedModel]
    image_features: Callable[[PreTrainedModel, Tensor], Tensor]
    text_features: Callable[[PreTrainedModel, dict[str, Tensor]], Tensor]
    scale: Callable[[PreTrainedModel], Tensor]
    frozen_in_training: tuple[str, ...]


FAMILIES: dict[str, Family] = {
    "clip": Family(
        model_class=CLIPModel,
        image_features=lambda m, pixels: m.visual_projection(m.vision_model(pixel_values=pixels).pooler_output),
        text_features=lambda m, tokens: m.get_text_features(**tokens).pooler_output,
        scale=lambda m: m.logit_scale.exp(),
        frozen_in_training=("text_model", "text_projection", "logit_scale"),
    )
}
