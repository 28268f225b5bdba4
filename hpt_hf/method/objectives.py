"""Objectives: what the student minimises and what the attack maximises, each a few lines over the views of one batch.

Sources: HPT and GA (arXiv 2601.12865), TeCoA (2212.07016), FARE (2402.12336), PMG-AFT (2401.04350).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property

import torch
import torch.nn.functional as F

from hpt_hf.attacks.losses import cross_entropy
from hpt_hf.types import Embeds, Images, Labels, Logits, PerExample, ZeroShotOutput

Terms = dict[str, torch.Tensor]


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
    """

    def __init__(self, images: Images, *, student: Callable, proxy=None, anchor=None, labels: Labels | None = None):
        self._labels = labels
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
    """Mean over the batch of the Kullback-Leibler divergence between teacher and student, with softened logits.

    Args:
        direction: `"forward"` is KL(teacher || student), the distillation loss of Hinton et al. 2015 and of the
            authors' code; `"reverse"` is KL(student || teacher), the paper's equation.
        temperature: both logits are divided by it, the result multiplied by its square, so gradients keep their size.
    """

    direction: str = "forward"
    temperature: float = 1.0

    def __post_init__(self) -> None:
        if self.direction not in ("forward", "reverse"):
            raise ValueError(f"kl_direction: got {self.direction!r}, expected 'forward' or 'reverse'")
        if not self.temperature > 0:
            raise ValueError(f"temperature: got {self.temperature}, expected a positive number")

    def __call__(self, student: Logits, teacher: Logits) -> torch.Tensor:
        log_s, log_t = (F.log_softmax(logits.float() / self.temperature, dim=-1) for logits in (student, teacher))
        if self.direction == "reverse":
            log_s, log_t = log_t, log_s
        return self.temperature**2 * F.kl_div(log_s, log_t, reduction="batchmean", log_target=True)


def hpt(views: Views, kl: Divergence) -> Terms:
    """Student and proxy see the same adversarial images."""
    return {"hpt": kl(views.student.adversarial.logits, views.proxy.adversarial.logits)}


def ga(views: Views, kl: Divergence) -> Terms:
    """The student sees the adversarial images, the proxy the clean ones."""
    return {"ga": kl(views.student.adversarial.logits, views.proxy.clean.logits)}


def anchor_clean(views: Views, kl: Divergence) -> Terms:
    """The teacher is the student's own vanilla self: the control for whether another architecture is needed."""
    return {"anchor_clean": kl(views.student.adversarial.logits, views.anchor.clean.logits)}


def tecoa(views: Views, kl: Divergence) -> Terms:
    """Text-guided contrastive adversarial training: cross-entropy over the class prompts."""
    return {"ce": F.cross_entropy(views.student.adversarial.logits, views.labels)}


def fare(views: Views, kl: Divergence) -> Terms:
    """The adversarial embedding stays at the clean embedding of the vanilla model; no labels, no text."""
    return {"fare": squared_distance(views.student.adversarial, views.anchor.clean.embeds).mean()}


def pmg_aft(views: Views, kl: Divergence) -> Terms:
    """TeCoA, held to the vanilla model on adversarial images and to itself on clean ones."""
    adversarial = views.student.adversarial.logits
    return {
        "ce": F.cross_entropy(adversarial, views.labels),
        "anchor": kl(adversarial, views.anchor.adversarial.logits),
        "clean": kl(adversarial, views.student.clean.logits),
    }


def label_loss(output: ZeroShotOutput, labels: Labels) -> PerExample:
    return cross_entropy(output.logits, labels)


def squared_distance(output: ZeroShotOutput, embeds: Embeds) -> PerExample:
    return (output.embeds - embeds).square().sum(-1)


@dataclass(frozen=True)
class Objective:
    """A method: its loss, its attack and the models it refers to."""

    name: str
    loss: Callable[[Views, Divergence], Terms]  # named scalars of the attacked batch; their sum is minimised
    references: tuple[str, ...] = ()  # the frozen models that it needs, of "proxy" and "anchor"
    needs_labels: bool = False
    attack_loss: Callable[[ZeroShotOutput, torch.Tensor], PerExample] = label_loss  # what the attack maximises
    attack_target: Callable[[Views], torch.Tensor] = lambda views: views.labels  # of the clean batch, once a batch
    divergence: Divergence = Divergence()
    attack_on: str = "student"  # where adversarial images are crafted: "student" (the paper) or "proxy"
    needs_random_start: bool = False  # at the image itself the attack's loss is at its minimum, without a gradient

    def __post_init__(self) -> None:
        if self.attack_on not in {"student", *self.references} - {"anchor"}:
            raise ValueError(
                f"attack_on: got {self.attack_on!r}, expected 'student', or 'proxy' where {self.name} has one"
            )

    def __call__(self, views: Views) -> Terms:
        return self.loss(views, self.divergence)


OBJECTIVES: dict[str, Objective] = {
    "hpt": Objective("hpt", hpt, ("proxy",)),
    "ga": Objective("ga", ga, ("proxy",)),
    "anchor_clean": Objective("anchor_clean", anchor_clean, ("anchor",)),
    "tecoa": Objective("tecoa", tecoa, needs_labels=True),
    "fare": Objective(
        "fare",
        fare,
        ("anchor",),
        attack_loss=squared_distance,
        attack_target=lambda views: views.anchor.clean.embeds,
        needs_random_start=True,
    ),
    "pmg_aft": Objective("pmg_aft", pmg_aft, ("anchor",), needs_labels=True),
}
