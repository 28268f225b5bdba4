"""Attacks by name, and `standard`: the worst case of several, image by image."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

import torch

from hpt_hf.attacks.apgd import APGD
from hpt_hf.attacks.engine import (
    LogitsFn,
    Misclassification,
    Outcome,
    Strategy,
    TargetedMisclassification,
    TargetReached,
    checked,
    search,
)
from hpt_hf.attacks.losses import cross_entropy, margin
from hpt_hf.attacks.noise import Noise
from hpt_hf.attacks.pgd import even_steps
from hpt_hf.attacks.square import Square
from hpt_hf.attacks.threat_model import ThreatModel
from hpt_hf.types import Images, Labels, Logits, PerExample


def any_answer(loss_fn: Callable[[Logits, Labels], PerExample], strategy: Callable[[int, ThreatModel], Strategy]):
    """The attack that raises `loss_fn` of the labels until the answer is wrong, by the strategy made of (steps, threat)."""

    def attack(
        logits_fn: LogitsFn, images: Images, labels: Labels, threat: ThreatModel, steps: int, noise: Noise
    ) -> Outcome:
        return search(
            logits_fn, Misclassification(labels, loss_fn), images, threat, strategy(steps, threat), noise=noise
        )

    return attack


def one_answer(loss_fn: Callable[[Logits, Labels], PerExample], strategy: Callable[[int, ThreatModel], Strategy]):
    """The attack that lowers `loss_fn` of the targets, given in the labels' place, until they are the answer."""

    def attack(
        logits_fn: LogitsFn, images: Images, targets: Labels, threat: ThreatModel, steps: int, noise: Noise
    ) -> Outcome:
        return search(logits_fn, TargetReached(targets, loss_fn), images, threat, strategy(steps, threat), noise=noise)

    return attack


def apgd_t(
    logits_fn: LogitsFn, images: Images, labels: Labels, threat: ThreatModel, steps: int, noise: Noise
) -> Outcome:
    """APGD towards each of the nine likeliest wrong classes, as AutoAttack does; an image is done with the first of them that breaks it.

    The pairs (image, target) wait in a queue and are taken `len(images)` at a time, so the batch stays full when few images stand.
    """
    images = checked(images, noise)
    with torch.no_grad(), torch.autocast(images.device.type, enabled=False):
        wrong_first = logits_fn(images).scatter(1, labels[:, None], -torch.inf).argsort(1, descending=True)
    found, broken = images.clone(), torch.zeros(len(images), dtype=torch.bool, device=images.device)
    ranks = min(9, wrong_first.shape[1] - 1)
    waiting = torch.cartesian_prod(torch.arange(ranks), torch.arange(len(images))).to(
        images.device
    )  # the likeliest class first
    while len(waiting):
        rank, rows = waiting[: len(images)].T
        goal = TargetedMisclassification(labels[rows], wrong_first[rows, rank])
        own = replace(noise, image_ids=noise.image_ids[rows] + 1_000_003 * rank)
        x, reached = search(logits_fn, goal, images[rows], threat, APGD(steps), noise=own)
        # One image may stand in the front with several targets: one of its outcomes is kept, a success if there is one.
        kept = {int(rows[i]): i for i in reached.int().argsort(stable=True).tolist()}
        chosen = torch.tensor([*kept.values()], device=images.device)
        found[rows[chosen]], broken[rows[chosen]] = x[chosen], reached[chosen]
        waiting = waiting[len(images) :]
        waiting = waiting[~broken[waiting[:, 1]]]
    return found, broken


def worst_case(
    parts: Sequence[Callable[[Images, torch.Tensor, Noise], Outcome]], images: Images, noise: Noise
) -> Outcome:
    """Attacks one after another, each on what those before it left standing: the worst case of all, image by image.

    Returns:
        Perturbed images, and (batch,) the number of the part that broke each; -1: it stands.
    """
    images = checked(images, noise)
    found, by = images.clone(), torch.full((len(images),), -1, device=images.device)
    for number, part in enumerate(parts):
        rows = (by < 0).nonzero()[:, 0]
        if not len(rows):
            break
        own = replace(noise, image_ids=noise.image_ids[rows], round=noise.round + number * 1_000_003)
        found[rows], broken = part(images[rows], rows, own)
        by[rows[broken]] = number
    return found, by


# name -> (loss, strategy, its steps unless said otherwise).
_PLAIN: dict[str, tuple[Callable[[Logits, Labels], PerExample], Callable[[int, ThreatModel], Strategy], int]] = {
    "pgd": (cross_entropy, even_steps, 20),
    "cw": (margin, even_steps, 20),  # Carlini & Wagner's loss (2017)
    "apgd-ce": (cross_entropy, lambda steps, _: APGD(steps), 100),
    "square": (margin, lambda steps, _: Square(steps), 5000),
}


# name -> (attack, its steps). `standard` is the worst case over the three, as AutoAttack without FAB.
ATTACKS: dict[str, tuple[Callable[..., Outcome], int]] = {
    **{name: (any_answer(loss_fn, strategy), steps) for name, (loss_fn, strategy, steps) in _PLAIN.items()},
    "apgd-t": (apgd_t, 100),
}


TARGETED: dict[str, tuple[Callable[..., Outcome], int]] = {
    name: (one_answer(loss_fn, strategy), steps) for name, (loss_fn, strategy, steps) in _PLAIN.items()
}


# 500 queries and not 5,000: two thirds of all time would go into pictures that the white-box attacks had left, and find nothing (docs/evaluation.md).
STANDARD = {"apgd-ce": 100, "apgd-t": 100, "square": 500}
