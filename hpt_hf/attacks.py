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


# What an attack maximises on logits, by the name the field uses for the attack.
ATTACKS: dict[str, Callable[[Logits, Labels], PerExample]] = {"pgd": cross_entropy, "cw": margin}


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
    images, perturbed = _begin(images, threat, noise)
    with torch.enable_grad(), torch.autocast(images.device.type, enabled=False):
        for _ in range(steps):
            perturbed = perturbed.detach().requires_grad_(True)
            (gradient,) = torch.autograd.grad(loss_fn(perturbed).sum(), perturbed)
            step = step_size * threat.ascent_direction(gradient.detach())
            perturbed = threat.project(perturbed.detach() + step, images)
    return perturbed.detach()


def pgd_until_wrong(
    logits_fn: Callable[[Images], Logits],
    loss: Callable[[Logits, Labels], PerExample],
    images: Images,
    labels: Labels,
    threat: ThreatModel,
    *,
    steps: int,
    step_size: float,
    noise: Noise | None,
) -> tuple[Images, torch.Tensor]:
    """PGD as an evaluation needs it: an image is broken as soon as one iterate, the start included, is answered wrongly, and then rests.

    At least as strong as `pgd` with the same steps, whose last iterate may have walked back, and cheaper: broken images cost nothing more.
    For transfer to other models use `pgd`: what rests at the first success is as weak as the source allows.

    Args:
        logits_fn: perturbed images -> (batch, classes).
        loss: a row of `ATTACKS`.
        labels: (batch,) the right answers.

    Returns:
        Perturbed images, inside the ball and [0, 1] to the last bit, and (batch,) bool: is the answer wrong there?

    Raises:
        As `pgd`.
    """
    images, perturbed = _begin(images, threat, noise)
    found, broken = perturbed.clone(), torch.zeros(len(images), dtype=torch.bool, device=images.device)
    rows = torch.arange(len(images), device=images.device)
    with torch.enable_grad(), torch.autocast(images.device.type, enabled=False):
        for step in range(steps + 1):
            perturbed = perturbed.detach().requires_grad_(step < steps)
            logits = logits_fn(perturbed)
            wrong = logits.argmax(1) != labels[rows]
            found[rows], broken[rows] = perturbed.detach(), wrong
            if step == steps or wrong.all():
                break
            (gradient,) = torch.autograd.grad(loss(logits[~wrong], labels[rows[~wrong]]).sum(), perturbed)
            rows, direction = rows[~wrong], threat.ascent_direction(gradient.detach()[~wrong])
            perturbed = threat.project(perturbed.detach()[~wrong] + step_size * direction, images[rows])
    return found, broken


def _begin(images: Images, threat: ThreatModel, noise: Noise | None) -> tuple[Images, Images]:
    """Checked images and the point an attack starts from."""
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
    images = images.detach()
    return images, images if noise is None else threat.random_start(images, noise)
