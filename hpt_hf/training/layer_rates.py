"""Learning rates that fall from layer to layer."""

from __future__ import annotations

import torch

from hpt_hf.models.fast_layers import vision_layers
from hpt_hf.models.zero_shot import ZeroShotClassifier


def depths(student: ZeroShotClassifier) -> dict[torch.nn.Parameter, int]:
    """For each parameter of the model how deep it lies: 0 before the first layer of the vision tower, 1 in it, …"""
    layers = vision_layers(student.model)
    deep = {p: depth for depth, layer in enumerate(layers, 1) for p in layer.parameters()}
    # What follows the last layer: norms and projections of the output.
    after = ("post_layernorm", "visual_projection", "visual.proj", "visual.ln_post", "head")
    for name, parameter in student.model.named_parameters():
        deep.setdefault(parameter, len(layers) + 1 if any(part in name for part in after) else 0)
    return deep


def split_by_depth(optimizer: torch.optim.Optimizer, student: ZeroShotClassifier, decay: float) -> None:
    """In place: each group becomes one a layer, the rate of depth d times `decay ** d`."""
    deep, groups = depths(student), []
    for group in optimizer.param_groups:
        for depth in sorted({deep[p] for p in group["params"]}):
            params = [p for p in group["params"] if deep[p] == depth]
            groups.append(group | {"params": params, "share": decay**depth})
    optimizer.param_groups[:] = groups
