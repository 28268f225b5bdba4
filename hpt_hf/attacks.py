"""Attacks: pure functions from images to adversarial images, used by training and evaluation alike.

PGD (Madry et al. 2018, arXiv 1706.06083) with any loss; the margin loss is Carlini & Wagner's (2017, arXiv 1608.04644).
Always float32, whatever autocast surrounds the call; gradients with respect to the pixels only.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
import torch.nn.functional as F

from hpt_hf.shapes import Images, Labels, Logits, PerExample
from hpt_hf.threat import Noise, ThreatModel


def cross_entropy(logits: Logits, labels: Labels) -> PerExample:
    """-log p(label): what PGD maximises."""
    return F.cross_entropy(logits, labels, reduction="none")


def margin(logits: Logits, labels: Labels) -> PerExample:
    """Best wrong logit minus the right one: what CW maximises; it does not saturate where the cross-entropy does."""
    right = logits.gather(1, labels[:, None])[:, 0]
    wrong = logits.scatter(1, labels[:, None], -torch.inf).amax(1)
    return wrong - right


def towards(logits: Logits, labels: Labels, targets: Labels) -> PerExample:
    """The target's logit minus the right one, in units of the spread between the best and the mean of the third and the fourth.

    The targeted DLR loss (Croce & Hein 2020, equation 7): no rescaling of the logits changes it. It needs four classes; with fewer the difference
    stands as it is, since no logit would be left that the loss does not move itself.
    """
    difference = (logits.gather(1, targets[:, None]) - logits.gather(1, labels[:, None]))[:, 0]
    if logits.shape[1] < 4:
        return difference
    top = logits.topk(4, dim=1).values
    return difference / (top[:, 0] - top[:, 2:].mean(1)).clamp_min(1e-12)


@contextmanager
def frozen(model: torch.nn.Module) -> Iterator[None]:
    """No parameter of `model` asks for gradients inside: no weight gradients, and nothing kept in memory for them."""
    parameters = [p for p in model.parameters() if p.requires_grad]
    for p in parameters:
        p.requires_grad_(False)
    try:
        yield
    finally:
        for p in parameters:
            p.requires_grad_(True)


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


def checked(images: Images, noise: Noise | None) -> Images:
    """`images`, detached, if an attack may start from them (raises as `pgd` says)."""
    if images.dtype != torch.float32:
        raise TypeError(
            f"the attack runs in float32, the images are {images.dtype}: half precision weakens attacks (sign(0) = 0)"
        )
    if len(images) and not (images.min() >= 0 and images.max() <= 1):  # also catches NaN
        raise ValueError(
            f"images must lie in [0, 1], got [{images.min().item():.3g}, {images.max().item():.3g}]: give them un-normalised, divided by 255"
        )
    if noise is not None and len(noise.keys) != len(images):
        raise ValueError(f"{len(noise.keys)} noise keys for {len(images)} images: every image needs its own")
    return images.detach()
