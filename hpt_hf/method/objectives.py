"""Objectives: what the student minimises and what the attack maximises, each a few lines over the views of one batch.

Sources: HPT and GA (arXiv 2601.12865), TeCoA (2212.07016), FARE (2402.12336), PMG-AFT (2401.04350), UCAT (2512.12997),
AGFT (2603.29410), LORE (2505.18884).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import cached_property
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch.distributions import Dirichlet, kl_divergence

from hpt_hf.attacks.losses import cross_entropy
from hpt_hf.models.ensemble import mean_probabilities
from hpt_hf.types import Embeds, Images, Labels, Logits, PerExample, ZeroShotOutput

Terms = dict[str, torch.Tensor]
RHO = 0.1  # LORE's


class ModelViews:
    """What one model says of one batch, clean and adversarial: each forward runs at most once, and only when asked."""

    adversarial_images: Images

    def __init__(self, model: Callable[[Images], ZeroShotOutput], images: Images, *, gradients: bool):
        self.model, self.images, self.gradients = model, images, gradients

    def _forward(self, images: Images) -> ZeroShotOutput:
        with torch.set_grad_enabled(self.gradients and torch.is_grad_enabled()):
            return self.model(images)

    @cached_property
    def clean(self) -> ZeroShotOutput:
        return self._forward(self.images)

    @cached_property
    def adversarial(self) -> ZeroShotOutput:
        return self._forward(self.adversarial_images)


class Views:
    """One batch as every model sees it.

    Args:
        images: the clean batch.
        student: the wrapped model in training; its forwards carry gradients.
        proxy, anchor: references or None; their forwards never do.
        labels: class indices; None: what the reference (the proxy, else the anchor) predicts on the clean images.
        multiplier: of the objective's constraint; by how much it is violated is left in `violation`.
    """

    violation: torch.Tensor | None = None

    def __init__(
        self,
        images: Images,
        *,
        student: Callable,
        proxy=None,
        anchor=None,
        labels: Labels | None = None,
        multiplier=0.0,
    ):
        self._labels, self.multiplier = labels, multiplier
        self.student = ModelViews(student, images, gradients=True)
        self.proxy, self.anchor = (m and ModelViews(m, images, gradients=False) for m in (proxy, anchor))

    def attacked(self, adversarial_images: Images) -> Views:
        """Set the adversarial images, once; what was computed of the clean ones stays known. Returns self."""
        for model in filter(None, (self.student, self.proxy, self.anchor)):
            model.adversarial_images = adversarial_images
        return self

    @cached_property
    def labels(self) -> Labels:
        if self._labels is not None:
            return self._labels
        reference = self.proxy or self.anchor
        if reference is None:
            raise ValueError("these images have no labels, and there is neither a proxy nor an anchor to predict them")
        return reference.clean.logits.argmax(dim=1)


@dataclass(frozen=True)
class Divergence:
    """The Kullback-Leibler divergence between teacher and student, with softened logits; called: the batch's mean.

    Args:
        direction: `"forward"` is KL(teacher || student), the distillation loss of Hinton et al. 2015 and of the
            authors' code; `"reverse"` is KL(student || teacher), the paper's equation.
        student_temperature, teacher_temperature: each one's logits are divided by its own, the result multiplied by
            both, so gradients keep their size.
    """

    direction: str = "forward"
    student_temperature: float = 1.0
    teacher_temperature: float = 1.0

    def __post_init__(self) -> None:
        if self.direction not in ("forward", "reverse"):
            raise ValueError(f"kl_direction: got {self.direction!r}, expected 'forward' or 'reverse'")
        for name in ("student_temperature", "teacher_temperature"):
            if not getattr(self, name) > 0:
                raise ValueError(f"{name}: got {getattr(self, name)}, expected a positive number")

    def per_example(self, student: Logits, teacher: Logits) -> PerExample:
        log_s = F.log_softmax(student.float() / self.student_temperature, dim=-1)
        log_t = F.log_softmax(teacher.float() / self.teacher_temperature, dim=-1)
        if self.direction == "reverse":
            log_s, log_t = log_t, log_s
        kl = F.kl_div(log_s, log_t, reduction="none", log_target=True).sum(-1)
        return self.student_temperature * self.teacher_temperature * kl

    def __call__(self, student: Logits, teacher: Logits) -> torch.Tensor:
        return self.per_example(student, teacher).mean()


@dataclass(frozen=True)
class Teacher:
    """A frozen model, and the images on which it is asked."""

    model: str  # "proxy" or "anchor"
    images: str  # "clean" or "adversarial"

    def logits(self, views: Views, images: str | None = None) -> Logits:
        return getattr(getattr(views, self.model), images or self.images).logits


TEACHERS = {
    "anchor_clean": Teacher("anchor", "clean"),
    "proxy_clean": Teacher("proxy", "clean"),
    "proxy_adversarial": Teacher("proxy", "adversarial"),
}


@dataclass(frozen=True)
class Teachers:
    """One or more teachers as one: the mean of their probabilities.

    Args:
        names: of `TEACHERS`.
        weights: a positive number for each; empty: all alike.
        agreeing: teach only the images to which all of them give the same answer.

    Raises:
        ValueError: none, an unknown one, one twice, or weights that do not fit.
    """

    names: tuple[str, ...]
    weights: tuple[float, ...] = ()
    agreeing: bool = False

    def __post_init__(self) -> None:
        if not self.names or set(self.names) - set(TEACHERS) or len(set(self.names)) < len(self.names):
            raise ValueError(f"teachers: got {list(self.names)}, expected one or more of {', '.join(TEACHERS)}")
        if self.weights and (len(self.weights) != len(self.names) or not all(w > 0 for w in self.weights)):
            raise ValueError(f"teacher_weights: got {list(self.weights)}, expected {len(self.names)} numbers above 0")

    @property
    def references(self) -> tuple[str, ...]:
        return tuple(dict.fromkeys(TEACHERS[name].model for name in self.names))

    def logits(self, views: Views, images: str | None = None) -> Logits:
        """(batch, classes); `images`: those on which all of them are asked, instead of each on its own."""
        each = [TEACHERS[name].logits(views, images) for name in self.names]
        if len(each) == 1:
            return each[0]
        return mean_probabilities(torch.stack([logits.float() for logits in each]), self.weights or [1.0] * len(each))

    def taught(self, views: Views) -> PerExample:
        """(batch,) 1 for the images that are taught, else 0."""
        answers = torch.stack([TEACHERS[name].logits(views).argmax(1) for name in self.names])
        return (answers == answers[0]).all(0).float() if self.agreeing else torch.ones_like(answers[0]).float()


def distil(views: Views, objective: Objective) -> Terms:
    """The student on adversarial images learns the teachers' probabilities."""
    kl = objective.divergence.per_example(views.student.adversarial.logits, objective.teachers.logits(views))
    return {objective.name: (kl * objective.teachers.taught(views)).mean()}


def tecoa(views: Views, objective: Objective) -> Terms:
    """Text-guided contrastive adversarial training: cross-entropy over the class prompts."""
    return {"ce": F.cross_entropy(views.student.adversarial.logits, views.labels)}


def fare(views: Views, objective: Objective) -> Terms:
    """The adversarial embedding stays at the clean embedding of the vanilla model; no labels, no text."""
    return {"fare": squared_distance(views.student.adversarial, views.anchor.clean.embeds).mean()}


def lore(views: Views, objective: Objective) -> Terms:
    """FARE under the constraint that *clean* embeddings move by at most a share RHO of their squared length.

    The multiplier is one number, by dual ascent (`hpt_hf.method.multiplier`), where LORE learns one an image.
    """
    anchor = views.anchor.clean.embeds
    moved, length = squared_distance(views.student.clean, anchor), anchor.square().sum(-1)
    views.violation = (moved.detach() / length - RHO).mean()
    return fare(views, objective) | {"constraint": views.multiplier * (moved - RHO * length).mean()}


def pmg_aft(views: Views, objective: Objective) -> Terms:
    """TeCoA, held to the vanilla model on adversarial images and to itself on clean ones."""
    adversarial, kl = views.student.adversarial.logits, objective.divergence
    return {
        "ce": F.cross_entropy(adversarial, views.labels),
        "anchor": kl(adversarial, views.anchor.adversarial.logits),
        "clean": kl(adversarial, views.student.clean.logits),
    }


def pmg_anchor_clean(views: Views, objective: Objective) -> Terms:
    """PMG-AFT, and what the vanilla model says of the clean images, as `anchor_clean` learns it. Ours."""
    return pmg_aft(views, objective) | distil(views, objective)


def ucat(views: Views, objective: Objective) -> Terms:
    """TeCoA, and absolute cosines held by KL(Dir(adversarial) || Dir(clean, vanilla)), alpha = exp((c + 1) / 0.07).

    The divergence grows with the concentrations, about 1e8, and is divided by the vanilla model's: UCAT's weight is
    unknown to us.
    """
    student, anchor = (
        torch.exp((output.cosines.double() + 1) / 0.07) for output in (views.student.adversarial, views.anchor.clean)
    )
    kl = kl_divergence(Dirichlet(student, validate_args=False), Dirichlet(anchor, validate_args=False))
    return tecoa(views, objective) | {"dirichlet": (kl / anchor.sum(-1)).mean().float()}


class AttackLoss(NamedTuple):
    """What the attack raises, image by image, and the target it takes of the clean batch, once a batch."""

    name: str
    loss: Callable[[Objective, ZeroShotOutput, torch.Tensor], PerExample]
    target: Callable[[Objective, Views], torch.Tensor]
    needs_random_start: bool = False  # at the image itself it is at its minimum, without a gradient


def squared_distance(output: ZeroShotOutput, embeds: Embeds) -> PerExample:
    return (output.embeds - embeds).square().sum(-1)


ATTACK_LOSSES = {
    "ce": AttackLoss("ce", lambda _, out, labels: cross_entropy(out.logits, labels), lambda _, views: views.labels),
    # The divergence from what the teachers say of the clean images: no labels anywhere.
    "kl": AttackLoss(
        "kl",
        lambda objective, output, target: objective.divergence.per_example(output.logits, target),
        lambda objective, views: objective.teachers.logits(views, "clean"),
        needs_random_start=True,
    ),
    "embedding": AttackLoss(
        "embedding",
        lambda _, output, embeds: squared_distance(output, embeds),
        lambda _, views: views.anchor.clean.embeds,
        needs_random_start=True,
    ),
}


@dataclass(frozen=True)
class Objective:
    """A method: its loss, its attack and the models it refers to.

    Raises:
        ValueError: an attack on, or by, a model that it does not have.
    """

    name: str
    loss: Callable[[Views, Objective], Terms]  # named scalars of the attacked batch; their sum is minimised
    teachers: Teachers | None = None  # whose probabilities are the target
    holds: tuple[str, ...] = ()  # the frozen models that it needs beside teachers, of "proxy" and "anchor"
    needs_labels: bool = False
    attack: AttackLoss = ATTACK_LOSSES["ce"]
    divergence: Divergence = Divergence()
    attack_on: str = "student"  # where adversarial images are crafted: "student" (the paper) or "proxy"

    def __post_init__(self) -> None:
        if self.attack_on not in {"student", *self.references} - {"anchor"}:
            raise ValueError(
                f"attack_on: got {self.attack_on!r}, expected 'student', or 'proxy' where {self.name} has one"
            )
        if self.attack.name == "kl" and self.teachers is None:
            raise ValueError(f"attack_loss: got 'kl', expected 'ce': {self.name} has no teacher")
        if self.attack.name == "embedding" and "anchor" not in self.references:
            raise ValueError(f"attack_loss: got 'embedding', expected 'ce' or 'kl': {self.name} has no anchor")

    @property
    def references(self) -> tuple[str, ...]:
        return tuple(dict.fromkeys((*(self.teachers.references if self.teachers else ()), *self.holds)))

    def __call__(self, views: Views) -> Terms:
        return self.loss(views, self)

    def attack_target(self, views: Views) -> torch.Tensor:
        return self.attack.target(self, views)

    def attack_loss(self, output: ZeroShotOutput, target: torch.Tensor) -> PerExample:
        """(batch,) what the attack raises; `target`: of `attack_target`."""
        return self.attack.loss(self, output, target)

    @property
    def settings(self) -> dict:
        """What of it decides the weights, as JSON."""
        told = {"objective": self.name, "attack_on": self.attack_on, "attack_loss": self.attack.name}
        return told | asdict(self.divergence) | {"teachers": self.teachers and asdict(self.teachers)}


_ANCHOR = Teachers(("anchor_clean",))


OBJECTIVES: dict[str, Objective] = {
    "hpt": Objective("hpt", distil, Teachers(("proxy_adversarial",))),
    "ga": Objective("ga", distil, Teachers(("proxy_clean",))),
    "anchor_clean": Objective("anchor_clean", distil, _ANCHOR),
    "agft": Objective(
        "agft",
        distil,
        _ANCHOR,
        attack=ATTACK_LOSSES["kl"],
        divergence=Divergence("forward", 100 / 180, 100 / 72),  # cosines times 180 and 72; a CLIP's scale is 100
    ),
    "distillation": Objective("distillation", distil, Teachers(("anchor_clean", "proxy_clean"))),
    "tecoa": Objective("tecoa", tecoa, needs_labels=True),
    "fare": Objective("fare", fare, holds=("anchor",), attack=ATTACK_LOSSES["embedding"]),
    "lore": Objective("lore", lore, holds=("anchor",), attack=ATTACK_LOSSES["embedding"]),
    "pmg_aft": Objective("pmg_aft", pmg_aft, holds=("anchor",), needs_labels=True),
    "pmg_anchor_clean": Objective("pmg_anchor_clean", pmg_anchor_clean, _ANCHOR, needs_labels=True),
    "ucat": Objective("ucat", ucat, holds=("anchor",), needs_labels=True),
}
