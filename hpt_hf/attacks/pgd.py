"""Attacks: pure functions from images to adversarial images, used by training and evaluation alike.

PGD (Madry et al. 2018, arXiv 1706.06083) with any loss; the margin loss is Carlini & Wagner's (2017, arXiv 1608.04644).
Always float32, whatever autocast surrounds the call; gradients with respect to the pixels only.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch

from hpt_hf.attacks.engine import State, checked
from hpt_hf.attacks.noise import Noise
from hpt_hf.attacks.threat_model import ThreatModel
from hpt_hf.types import ImageIds, Images, PerExample


def pgd(
    loss_fn: Callable[[Images], PerExample],
    images: Images,
    threat: ThreatModel,
    *,
    steps: int,
    step_size: float,
    noise: Noise | None,
) -> Images:
    """Projected gradient ascent on `loss_fn` inside the ball around `images`.

    Args:
        loss_fn: perturbed images -> (batch,) losses, larger = worse for the model. It is evaluated with autocast switched off.
        images: (batch, 3, height, width) in [0, 1], float32.
        steps: number of gradient steps; 0 returns the start.
        step_size: length of a step, in the units of eps.
        noise: for the random start in the ball; None starts at `images`.

    Returns:
        Perturbed images, detached, inside the ball and [0, 1] to the last bit. Parameters, their `.grad`, the mode of the model and
        the global random state are as before.

    Raises:
        TypeError: images that are not float32.
        ValueError: images outside [0, 1]: they were normalised, or are still 0..255.
    """
    images = checked(images, noise)
    perturbed = images if noise is None else threat.random_start(images, noise)
    corners = threat.corners(images)
    with torch.enable_grad(), torch.autocast(images.device.type, enabled=False):
        for _ in range(steps):
            perturbed = perturbed.detach().requires_grad_(True)
            (gradient,) = torch.autograd.grad(loss_fn(perturbed).sum(), perturbed)
            step = step_size * threat.ascent_direction(gradient.detach())
            perturbed = threat.project(perturbed.detach() + step, images, corners)
    return perturbed.detach()


# --- strategies -----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class PGD:
    """Steps of one size along the ascent direction, from a random start."""

    steps: int
    step_size: float
    gradients = True

    @property
    def queries(self) -> int:
        return self.steps + 1

    def start(self, images: Images, threat: ThreatModel, noise: Noise) -> State:
        return {"x": threat.random_start(images, noise), **threat.corners(images)}

    def advance(self, query, state, seen, images, threat, noise):
        x = state["x"] + self.step_size * threat.ascent_direction(seen.gradient)
        return state | {"x": threat.project(x, images, state)}


def even_steps(steps: int, threat: ThreatModel) -> PGD:
    """PGD-N with steps of 2.5 eps / N (Madry et al. 2018)."""
    return PGD(steps, 2.5 * threat.radius / steps)


@dataclass(frozen=True)
class TrainingAttack:
    """PGD as training uses it: steps of `step_size` (None: the whole radius, as in the paper) from a random start or from the image itself."""

    threat: ThreatModel
    steps: int = 2
    step_size: float | None = None
    random_start: bool = True

    def __call__(self, loss_fn, images: Images, image_ids: ImageIds, *, seed: int, round: int) -> Images:
        size = self.threat.radius if self.step_size is None else self.step_size
        noise = Noise(image_ids, seed, round) if self.random_start else None
        return pgd(loss_fn, images, self.threat, steps=self.steps, step_size=size, noise=noise)
