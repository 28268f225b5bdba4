"""Suspicions: checks, after every evaluation, of whether its robust accuracy can be believed; docs/evaluation.md has a paragraph for each.

What to look for: Athalye et al. 2018 (arXiv 1802.00420), Carlini et al. 2019 (arXiv 1902.06705), Croce & Hein 2020 (arXiv 2003.01690).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from itertools import pairwise

import torch
from torch.nn.modules.module import register_module_forward_hook

from hpt_hf.attacks.engine import LogitsFn, frozen, pixel_gradient
from hpt_hf.attacks.losses import cross_entropy
from hpt_hf.attacks.noise import Noise
from hpt_hf.attacks.suite import ATTACKS, TARGETED
from hpt_hf.attacks.threat_model import ThreatModel
from hpt_hf.types import ImageIds, Images, Labels

PROBE = 24  # pictures that the checks look at


TOLERATED_FRACTION = 0.1  # of the probe may always behave oddly


MIN_GAP_POINTS = 5.0  # by which a figure may turn out too high before it is doubted


FEW_CLASSES, FEW_SAMPLES = 4, 50


BASELINE = 0.25  # of its right answers that an undefended model may keep


@dataclass(frozen=True)
class Check:
    """What a check saw: raised, not raised, or (None) not run, and a sentence."""

    name: str
    raised: bool | None
    seen: str

    def to_json(self) -> dict:
        return asdict(self)


@dataclass(frozen=True)
class Batch:
    """Pictures of one size, with what an attack on them needs."""

    images: Images
    image_ids: ImageIds
    labels: Labels

    def __len__(self) -> int:
        return len(self.images)


@dataclass(frozen=True)
class Probe:
    """What the checks look at.

    Args:
        model: the model that was evaluated, classes set; `logits_fn`: how it was asked.
        standing: pictures that withstood the attack; `right`: pictures that were right when clean. At most `PROBE` of each.
        threat, seed: of the evaluation.
        robust: its robust accuracy in percent, and `clean`.
        n, classes, outside: how many pictures it had, how many classes, how many perturbed pictures lay outside the ball.
        broken_by: attack -> how many pictures it broke, in the order in which they ran.
        target: the number of the class that every picture should be taken for; None: any wrong answer did.
        baseline: attacks an undefended model in the same way, -> (attacked, standing); None: none was given.
    """

    model: torch.nn.Module
    logits_fn: LogitsFn
    standing: Batch
    right: Batch
    threat: ThreatModel
    seed: int
    clean: float
    robust: float
    n: int
    classes: int
    outside: int
    broken_by: dict[str, int]
    target: int | None = None
    baseline: Callable[[], tuple[int, int]] | None = None

    def falls(
        self, batch: Batch, name: str, steps: int, *, threat: ThreatModel | None = None, round: int = 0
    ) -> torch.Tensor:
        """(batch,) bool: which of the pictures an attack breaks."""
        goals = batch.labels if self.target is None else torch.full_like(batch.labels, self.target)
        attack, _ = (ATTACKS if self.target is None else TARGETED)[name]
        with frozen(self.model):
            noise = Noise(batch.image_ids, self.seed, round)
            return attack(self.logits_fn, batch.images, goals, threat or self.threat, steps, noise)[1]

    def stronger(self, name: str, broken: torch.Tensor, what: str) -> Check:
        """Raised if what broke these of the standing pictures means that the robust accuracy is too high by `MIN_GAP_POINTS` or more."""
        count, n = int(broken.sum()), len(self.standing)
        points = self.robust * count / max(n, 1)
        seen = f"{count} of {n} standing pictures {what}: the figure may be {points:.1f} points too high"
        return Check(name, count >= 2 and points >= MIN_GAP_POINTS, seen)


def _share(name: str, odd: torch.Tensor, what: str) -> Check:
    count, n = int(odd.sum()), len(odd)
    return Check(name, count > TOLERATED_FRACTION * n, f"{count} of {n} pictures {what}")


# --- the model: is it a function that gradients can follow? ---------------------------------------------------------------


@torch.no_grad()
def half_precision(probe: Probe) -> Check:
    """Weights, autocast or features in half precision: small gradients become 0, sign(0) = 0, and robustness looks higher than it is."""
    images = probe.right.images[:4]
    device = images.device.type
    seen = [
        f"weights in {d}"
        for d in sorted({str(p.dtype) for p in probe.model.parameters()} - {"torch.float32", "torch.float64"})
    ]
    seen += [f"autocast to {torch.get_autocast_dtype(device)}"] * torch.is_autocast_enabled(device)
    layers: set[torch.dtype | None] = set()
    with register_module_forward_hook(lambda module, given, answer: layers.add(getattr(answer, "dtype", None))):
        logits = probe.logits_fn(images)
    for half in (torch.bfloat16, torch.float16):
        # Autocast inside the model shows in what its layers answer.
        seen += [f"layers that answer in {half}"] * (half in layers)
        # A float32 tensor whose every value fits 16 bits was computed in them.
        if logits.numel() and torch.equal(logits.to(half).to(logits.dtype), logits):
            seen.append(f"logits with the precision of {half}")
    return Check("half_precision", bool(seen), ", ".join(seen) or "everything is computed in float32")


@torch.no_grad()
def stochastic(probe: Probe) -> Check:
    """Two calls, two answers: a random defence, or dropout left on. A gradient then shows where one draw points; the attack must average."""
    first, second = (probe.logits_fn(probe.right.images) for _ in range(2))
    return _share("stochastic", _differ(first, second, 1e-4), "get other logits when asked twice")


@torch.no_grad()
def batch_size(probe: Probe) -> Check:
    """Logits hang on the pictures beside: batch statistics, or a mean over the batch somewhere."""
    together = probe.logits_fn(probe.right.images)
    alone = torch.cat([probe.logits_fn(image[None]) for image in probe.right.images]) if len(probe.right) else together
    return _share("batch_size", _differ(together, alone, 1e-3), "get other logits alone than in a batch")


@torch.no_grad()
def quantised(probe: Probe) -> Check:
    """A hair's breadth changes nothing and a large change does: a staircase, whose slope is 0 wherever one stands."""
    images, noise = probe.right.images, Noise(probe.right.image_ids, probe.seed)
    signs = torch.where(noise.uniform(tuple(images.shape[1:])) < 0.5, -1.0, 1.0)
    at, near, far = (probe.logits_fn((images + size * signs).clamp(0, 1)) for size in (0, 1e-5, 0.2))
    return _share(
        "quantised",
        (at == near).all(1) & (at != far).any(1),
        "get the same logits to the last bit after a change of 1e-5",
    )


def detached(probe: Probe) -> Check:
    """Logits follow the pixels, the gradient does not: a step outside autograd, such as a conversion to bytes or numpy."""
    images = probe.right.images.detach().requires_grad_(True)
    with torch.enable_grad(), frozen(probe.model):
        logits = probe.logits_fn(images)
        gradient = pixel_gradient(
            logits.square().sum(1), images
        )  # of the logits themselves: no loss that could saturate
    with torch.no_grad():
        # By more than a byte's step, or a conversion to bytes would hide it.
        moved = (probe.logits_fn((images + 0.1).clamp(0, 1)) != logits).any(1)
    return _share(
        "detached", moved & ~gradient.flatten(1).any(1), "have logits that follow the pixels and no gradient"
    )


def saturated(probe: Probe) -> Check:
    """p(label) rounds to 1, so the cross-entropy is 0 and has no direction: the logits' scale is too large for this loss."""
    with torch.no_grad():
        loss = cross_entropy(probe.logits_fn(probe.right.images), probe.right.labels)
    return _share("saturated", loss < 1e-6, "are answered with a probability that rounds to 1")


def zero_gradient(probe: Probe) -> Check:
    """The cross-entropy has no gradient at most pixels: an attack that follows its sign stays where it is."""
    images = probe.right.images.detach().requires_grad_(True)
    with torch.enable_grad(), frozen(probe.model):
        gradient = pixel_gradient(cross_entropy(probe.logits_fn(images), probe.right.labels), images)
    missing = (_centre(gradient) == 0).flatten(1).float().mean(1) if len(images) else gradient.flatten(1).sum(1)
    return _share(
        "zero_gradient", missing > 0.5, "have no gradient of the cross-entropy at more than half of their pixels"
    )


# --- the attack: had it found what there is to find? ----------------------------------------------------------------------


def more_steps(probe: Probe) -> Check:
    """A hundred steps of PGD break what the evaluation's attack left: it had not arrived."""
    return probe.stronger("more_steps", probe.falls(probe.standing, "pgd", 100), "fall to PGD-100")


def restarts(probe: Probe) -> Check:
    """Other random starts break what the first left: the loss is rugged, or the attack too short."""
    broken = probe.falls(probe.standing, "pgd", 20, round=1) | probe.falls(probe.standing, "pgd", 20, round=2)
    return probe.stronger("restarts", broken, "fall to PGD-20 from two other starts")


def other_loss(probe: Probe) -> Check:
    """The margin or the targeted DLR loss breaks what was left: the gradient that was followed is weak, or points past the nearest boundary."""
    broken, what = probe.falls(probe.standing, "cw", 50), "fall to CW-50"
    if probe.target is None and "apgd-t" not in probe.broken_by:  # what stands after it has withstood it
        broken, what = broken | probe.falls(probe.standing, "apgd-t", 30), "fall to CW-50 or APGD-T-30"
    return probe.stronger("other_loss", broken, what)


def smaller_ball(probe: Probe) -> Check:
    """Robust accuracy must fall with eps: what a ball of half the radius breaks, the attack in the whole one has missed."""
    half = ThreatModel(probe.threat.norm, probe.threat.radius / 2)
    return probe.stronger(
        "smaller_ball", probe.falls(probe.standing, "pgd", 40, threat=half), "fall to PGD-40 at half the radius"
    )


def large_ball(probe: Probe) -> Check:
    """In a ball that holds a grey picture nothing can stay right; what does was not really attacked."""
    size = probe.standing.images[0].numel() if len(probe.standing) else 1
    grey = ThreatModel("linf", 0.5) if probe.threat.norm == "linf" else ThreatModel("l2", 0.5 * size**0.5)
    left = ~replace(probe, target=None).falls(probe.standing, "pgd", 100, threat=grey)  # grey need not be the target
    return _share("large_ball", left, f"withstand PGD-100 at eps {grey.eps:.3g}")


def black_box(probe: Probe) -> Check:
    """Random search breaks what gradients left: the gradients lie."""
    if "square" in probe.broken_by:
        # It ran already, after the white-box attacks or as the only one.
        if len(probe.broken_by) == 1:
            return Check("black_box", None, "the attack is Square itself")
        points = 100 * probe.broken_by["square"] / probe.n
        return Check(
            "black_box",
            points >= MIN_GAP_POINTS,
            f"Square broke {points:.1f} points of what the white-box attacks had left",
        )
    return probe.stronger("black_box", probe.falls(probe.standing, "square", 300), "fall to 300 queries of Square")


def attack_order(probe: Probe) -> Check:
    """The stronger attack must leave no more: APGD-T after APGD-CE, APGD-CE against PGD. Otherwise one of them is broken on this model."""
    order = {"PGD-20": ("pgd", 20), "APGD-CE": ("apgd-ce", 100)}
    if probe.target is None:  # towards one target there is no APGD-T: it chooses its own
        order["APGD-T"] = ("apgd-t", 30)
    left = {title: int((~probe.falls(probe.right, *attack)).sum()) for title, attack in order.items()}
    slack = max(1, TOLERATED_FRACTION * len(probe.right))
    raised = any(later > earlier + slack for earlier, later in pairwise(left.values()))
    return Check(
        "attack_order",
        raised,
        f"of {len(probe.right)} pictures stand " + ", ".join(f"{v} after {k}" for k, v in left.items()),
    )


# --- the experiment: could the figure be anything else? -------------------------------------------------------------------


def outside_ball(probe: Probe) -> Check:
    """The attack used more than it was allowed: the figure is too low, and a defect of the attack."""
    return Check(
        "outside_ball", probe.outside > 0, f"{probe.outside} of {probe.n} perturbed pictures left the ball or [0, 1]"
    )


def robust_above_clean(probe: Probe) -> Check:
    """An attack may leave every picture as it is, so robust accuracy cannot exceed clean accuracy."""
    return Check(
        "robust_above_clean", probe.robust > probe.clean, f"robust {probe.robust:.1f}%, clean {probe.clean:.1f}%"
    )


def few_classes(probe: Probe) -> Check:
    """With two or three classes guessing is half right and the DLR loss of APGD-T is not defined."""
    return Check(
        "few_classes",
        probe.classes < FEW_CLASSES,
        f"{probe.classes} classes; below {FEW_CLASSES} the DLR loss is a plain difference",
    )


def few_samples(probe: Probe) -> Check:
    """The interval is wider than any difference one would like to see."""
    return Check(
        "few_samples",
        probe.n < FEW_SAMPLES,
        f"{probe.n} pictures; below {FEW_SAMPLES} the interval spans up to 27 points",
    )


def baseline(probe: Probe) -> Check:
    """An undefended model withstands the same attack: it is weak, or the ball too small to tell a robust model from another."""
    if probe.baseline is None:
        return Check("baseline", None, "no undefended model was given (--baseline)")
    attacked, standing = probe.baseline()
    return Check(
        "baseline",
        standing > BASELINE * attacked if attacked else None,
        f"{standing} of {attacked} pictures that the undefended model knows withstand the attack on it",
    )


CHECKS: tuple[Callable[[Probe], Check], ...] = (
    half_precision,
    stochastic,
    batch_size,
    quantised,
    detached,
    saturated,
    zero_gradient,
    more_steps,
    restarts,
    other_loss,
    smaller_ball,
    large_ball,
    black_box,
    attack_order,
    outside_ball,
    robust_above_clean,
    few_classes,
    few_samples,
    baseline,
)


def _centre(images: torch.Tensor) -> torch.Tensor:
    """The square in the middle: at native resolution the model reads no more of a picture (`ZeroShotClassifier.fit`)."""
    height, width = images.shape[-2:]
    side = min(height, width)
    top, left = (height - side) // 2, (width - side) // 2
    return images[..., top : top + side, left : left + side]


def _differ(one: torch.Tensor, other: torch.Tensor, tolerance: float) -> torch.Tensor:
    """(batch,) bool: do the logits of a picture differ by more than rounding?"""
    return ((one - other).abs() > tolerance * (1 + one.abs().amax(1, keepdim=True))).any(1)
