"""Attacks by name, and `standard`: the worst case of several, image by image."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

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
    frozen,
    search,
)
from hpt_hf.attacks.losses import cross_entropy, margin
from hpt_hf.attacks.noise import Noise
from hpt_hf.attacks.pgd import even_steps, pgd
from hpt_hf.attacks.square import Square
from hpt_hf.attacks.threat_model import PROTOCOLS, ThreatModel
from hpt_hf.types import ImageIds, Images, Labels, Logits, PerExample
from hpt_hf.utils import did_you_mean


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


@dataclass(frozen=True)
class EvaluationAttack:
    """An attack by the field's name, in a ball, under a protocol.

    Args:
        threat: the ball.
        name: a row of `hpt_hf.attacks.suite.ATTACKS`, or `"standard"`: APGD-CE, APGD-T and Square, the worst case of the three.
        steps: gradient steps, or queries of Square; None: each attack's own number (PGD and CW 20, APGD 100, Square 5000, in `standard` 500).
        protocol: a row of `PROTOCOLS`.
        seed: of the random starts.
        target: the class that every picture shall be taken for; None: any wrong answer will do.
    """

    threat: ThreatModel
    name: str = "pgd"
    steps: int | None = None
    protocol: str = "input"
    seed: int = 0
    target: str | None = None

    def __post_init__(self) -> None:
        known = (*ATTACKS, "standard") if self.target is None else tuple(TARGETED)
        if self.name not in known:
            raise ValueError(
                f"no attack {'towards a target ' * (self.target is not None)}is called {self.name!r}"
                + did_you_mean(self.name, known, f"there are {', '.join(known)}")
            )
        if self.protocol not in PROTOCOLS:
            raise ValueError(
                f"protocol={self.protocol!r}: expected " + " or ".join(f"{k!r} ({v})" for k, v in PROTOCOLS.items())
            )
        if self.steps is not None and self.steps < 1:
            raise ValueError(f"steps={self.steps}: expected at least 1")

    @property
    def stages(self) -> tuple[str, ...]:
        """The attacks it consists of, in the order in which they run."""
        return tuple(STANDARD) if self.name == "standard" else (self.name,)

    @property
    def native(self) -> bool:
        return self.protocol == "native"

    @property
    def pgd_steps(self) -> int:
        """Steps of `craft`."""
        return self.steps or ATTACKS["pgd"][1]

    @property
    def robust_is(self) -> str:
        goal = (
            "on every iterate of the attack"
            if self.target is None
            else f"never taken for {self.target!r} on any iterate"
        )
        return f"right on the clean picture and {goal}"

    def notes(self, classes: int) -> tuple[str, ...]:
        """What a reader must know of this attack on so many classes."""
        if "apgd-t" in self.stages and classes < 4:
            return (
                f"apgd-t: the DLR loss needs four classes and there are {classes}; the plain difference of logits took its place",
            )
        return ()

    def run(
        self, classifier: torch.nn.Module, images: Images, image_ids: ImageIds, labels: Labels
    ) -> tuple[Images, torch.Tensor]:
        """(perturbed images, (batch,) which of `stages` broke each; -1: it stands). A picture is lost at the first query that succeeds."""
        attacks, goals = (
            (ATTACKS, labels)
            if self.target is None
            else (TARGETED, torch.full_like(labels, classifier.classes.index(self.target)))
        )

        def part(name):
            attack, own = attacks[name]
            steps = self.steps or (STANDARD[name] if self.name == "standard" else own)
            return lambda x, rows, noise: attack(logits_fn, x, goals[rows], self.threat, steps, noise)

        def logits_fn(x):
            return classifier.classify(x).logits

        with frozen(classifier):
            return worst_case([part(name) for name in self.stages], images, Noise(image_ids, self.seed))

    def craft(self, classifier: torch.nn.Module, images: Images, image_ids: ImageIds, labels: Labels) -> Images:
        """The last iterates of PGD on the cross-entropy, whatever the name: for showing, and for transfer to other models.

        What stops at its first success is as weak as its source allows, so transfer needs the whole length.
        """
        with frozen(classifier):
            return pgd(
                lambda perturbed: cross_entropy(classifier.classify(perturbed).logits, labels),
                images,
                self.threat,
                steps=self.pgd_steps,
                step_size=even_steps(self.pgd_steps, self.threat).step_size,
                noise=Noise(image_ids, self.seed),
            )

    def __str__(self) -> str:
        """`pgd-20`, `apgd-ce-100`, `standard`, `pgd-20 towards cat`: the name, with the number of steps where it is one."""
        steps = self.steps or (None if self.name == "standard" else ATTACKS[self.name][1])
        return (self.name if steps is None else f"{self.name}-{steps}") + (
            f" towards {self.target}" if self.target else ""
        )
