"""Model families: for each `model_type` of transformers, how a dual encoder's features and scale are taken."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor
from transformers import CLIPModel, PreTrainedModel


@dataclass(frozen=True)
class Family:
    """What the rest of the package must know of a family."""

    model_class: type[PreTrainedModel]  # opens and saves its checkpoints
    image_features: Callable[[PreTrainedModel, Tensor], Tensor]  # normalised pixels -> (batch, dim), not normalised
    text_features: Callable[[PreTrainedModel, dict[str, Tensor]], Tensor]  # tokens -> (prompts, dim), not normalised
    scale: Callable[[PreTrainedModel], Tensor]  # the positive factor of the cosines
    frozen_in_training: tuple[str, ...]  # modules and parameters that are not of the vision side


FAMILIES: dict[str, Family] = {
    "clip": Family(
        model_class=CLIPModel,
        image_features=lambda m, pixels: m.visual_projection(m.vision_model(pixel_values=pixels).pooler_output),
        text_features=lambda m, tokens: m.get_text_features(**tokens).pooler_output,
        scale=lambda m: m.logit_scale.exp(),
        frozen_in_training=("text_model", "text_projection", "logit_scale"),
    )
}
