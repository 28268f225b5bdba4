"""Attacks by name, and `standard`: the worst case of several, image by image."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import torch

from hpt_hf.attacks.apgd import APGD
from hpt_hf.attacks.engine import LogitsFn, Outcome, checked, frozen, misclassification, run_attack, target_reached
from hpt_hf.attacks.losses import cross_entropy, margin, targeted_dlr
from hpt_hf.attacks.noise import Noise
from hpt_hf.attacks.pgd import PGD
from hpt_hf.attacks.square import Square
from hpt_hf.attacks.threat_model import PROTOCOLS, ThreatModel
from hpt_hf.types import ImageIds, Images, Labels
from hpt_hf.utils import did_you_mean, load_object, sha256


def plain(loss_fn, strategy, logits_fn, images, labels, threat, steps, noise, criterion=misclassification) -> Outcome:
    """One loss, one strategy."""
    return run_attack(logits_fn, images, strategy(threat, steps), noise=noise, criterion=criterion(loss_fn, labels))


def apgd_t(logits_fn: LogitsFn, images: Images, labels: Labels, threat: ThreatModel, steps: int, noise: Noise):
    """APGD towards each of the nine likeliest wrong classes, as AutoAttack does, until one breaks the image.

    The pairs (target, image) wait in a queue and are taken `len(images)` at a time, so the batch stays full.
    """
    images = checked(images, noise)
    with torch.no_grad(), torch.autocast(images.device.type, enabled=False):
        wrong_first = logits_fn(images).scatter(1, labels[:, None], -torch.inf).argsort(1, descending=True)
    found, broken = images.clone(), torch.zeros(len(images), dtype=torch.bool, device=images.device)
    ranks = torch.arange(min(9, wrong_first.shape[1] - 1), device=images.device)
    queue = torch.cartesian_prod(ranks, torch.arange(len(images), device=images.device))  # the likeliest class first
    while len(queue):
        rank, rows = queue[: len(images)].T
        goal = misclassification(targeted_dlr, labels[rows], wrong_first[rows, rank])
        own = replace(noise, image_ids=noise.image_ids[rows] + 1_000_003 * rank)
        x, reached = run_attack(logits_fn, images[rows], APGD(threat, steps), noise=own, criterion=goal)
        # An image may be here with several targets: one of its outcomes is kept, a success if there is one.
        kept = {int(rows[i]): i for i in reached.int().argsort(stable=True).tolist()}
        chosen = torch.tensor([*kept.values()], device=images.device)
        found[rows[chosen]], broken[rows[chosen]] = x[chosen], reached[chosen]
        queue = queue[len(images) :]
        queue = queue[~broken[queue[:, 1]]]
    return found, broken


def worst_case(stages, logits_fn: LogitsFn, images: Images, labels: Labels, threat: ThreatModel, noise: Noise):
    """The stages (attack, steps) in turn on what stands: images, and (batch,) the stage that broke each, else -1."""
    found, by = images.clone(), torch.full((len(images),), -1, device=images.device)
    for number, (attack, steps) in enumerate(stages):
        rows = (by < 0).nonzero()[:, 0]
        if not len(rows):
            break
        own = replace(noise, image_ids=noise.image_ids[rows], round=noise.round + number * 1_000_003)
        found[rows], broken = attack(logits_fn, images[rows], labels[rows], threat, steps, own)
        by[rows[broken]] = number
    return found, by


# name -> (attack of (logits_fn, images, labels, threat, steps, noise), its own number of steps).
Rows = dict[str, tuple[Callable[..., Outcome], int]]
ATTACKS: Rows = {
    "pgd": (partial(plain, cross_entropy, PGD), 20),
    "cw": (partial(plain, margin, PGD), 20),
    "apgd-ce": (partial(plain, cross_entropy, APGD), 100),
    "square": (partial(plain, margin, Square), 5000),
    "apgd-t": (apgd_t, 100),
}
# The same towards a target, given in the label's place.
TARGETED: Rows = {k: (partial(v, criterion=target_reached), n) for k, (v, n) in ATTACKS.items() if v is not apgd_t}
# AutoAttack without FAB, and 500 queries for 5,000: the others would cost two thirds of all time (docs/evaluation.md).
STANDARD = {"apgd-ce": 100, "apgd-t": 100, "square": 500}


@dataclass(frozen=True)
class OwnAttack:
    """An attack of the user's own, named by import path: `--attack my_file.py:my_attack`.

    Args:
        run: (logits_fn, images, labels, threat, steps, noise) -> `Outcome`; for a loss, `partial(plain, loss, PGD)`.
        steps: its own number of steps.
    """

    run: Callable[..., Outcome]
    steps: int


def named(name: str) -> tuple[Callable[..., Outcome], int]:
    """An attack and its own number of steps: a row of `ATTACKS`, or `OwnAttack` by import path."""
    if ":" not in name:
        return ATTACKS[name]
    own = load_object(name, OwnAttack)
    return own.run, own.steps


@dataclass(frozen=True)
class EvaluationAttack:
    """An attack by the field's name, in a ball, under a protocol."""

    threat: ThreatModel
    name: str = "pgd"  # a row of `ATTACKS`, "standard" (the worst case of `STANDARD`) or the path of an `OwnAttack`
    steps: int | None = None  # gradient steps, or queries of Square; None: each attack's own number
    protocol: str = "input"  # a row of `PROTOCOLS`
    seed: int = 0
    target: str | None = None  # the class that every image shall be taken for; None: any wrong answer will do

    def __post_init__(self) -> None:
        known, towards = (tuple(TARGETED), " towards a target") if self.target else ((*ATTACKS, "standard"), "")
        if ":" in self.name and not self.target:
            named(self.name)
        elif self.name not in known:
            hint = did_you_mean(self.name, known, f"there are {', '.join(known)}")
            raise ValueError(f"no attack{towards} is called {self.name!r}{hint}")
        if self.protocol not in PROTOCOLS:
            rows = " or ".join(f"{name!r} ({what})" for name, what in PROTOCOLS.items())
            raise ValueError(f"protocol={self.protocol!r}: expected {rows}")
        if self.steps is not None and self.steps < 1:
            raise ValueError(f"steps={self.steps}: expected at least 1")

    @property
    def stages(self) -> dict[str, int]:
        """The attacks it consists of, in the order in which they run, and the steps of each."""
        own = STANDARD if self.name == "standard" else {self.name: named(self.name)[1]}
        return {name: self.steps or steps for name, steps in own.items()}

    @property
    def code(self) -> str | None:
        """The digest of the user's own file: what was found with another version of it is another attack's."""
        file = Path(self.name.rpartition(":")[0])
        return sha256(file) if file.is_file() else None

    @property
    def native(self) -> bool:
        return self.protocol == "native"

    def run(self, classifier, images: Images, image_ids: ImageIds, labels: Labels) -> Outcome:
        """(perturbed images, (batch,) which of `stages` broke each, at its first success; -1: it stands)."""
        goals = torch.full_like(labels, classifier.classes.index(self.target)) if self.target else labels
        stages = [((TARGETED[n] if self.target else named(n))[0], steps) for n, steps in self.stages.items()]
        noise = Noise(image_ids, self.seed)
        with frozen(classifier):
            return worst_case(stages, lambda x: classifier.classify(x).logits, images, goals, self.threat, noise)

    def craft(self, classifier, images: Images, image_ids: ImageIds, labels: Labels) -> Images:
        """The last iterates of PGD, whatever the name: what stops at its first success transfers to no other model."""

        def loss_fn(x):
            return cross_entropy(classifier.classify(x).logits, labels)

        strategy, noise = PGD(self.threat, self.steps or ATTACKS["pgd"][1]), Noise(image_ids, self.seed)
        with frozen(classifier):
            return run_attack(loss_fn, images, strategy, noise=noise)[0]

    def __str__(self) -> str:
        """`pgd-20`, `apgd-ce-100`, `standard`, `standard-7`, `pgd-20 towards cat`."""
        steps = self.steps or (None if self.name == "standard" else self.stages[self.name])
        towards = f" towards {self.target}" if self.target else ""
        return (f"{self.name}-{steps}" if steps else self.name) + towards
