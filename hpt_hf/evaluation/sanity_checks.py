"""Checks, after every evaluation, of whether its robust accuracy can be believed; docs/evaluation.md explains each.

What to look for: Athalye et al. 2018 (arXiv 1802.00420), Carlini et al. 2019 (1902.06705), Croce & Hein 2020 (2003.01690).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import NamedTuple

import torch
from torch.nn.modules.module import register_module_forward_hook

from hpt_hf.attacks.engine import frozen, pixel_gradient
from hpt_hf.attacks.losses import cross_entropy
from hpt_hf.attacks.noise import Noise
from hpt_hf.attacks.suite import ATTACKS, TARGETED, EvaluationAttack
from hpt_hf.attacks.threat_model import ThreatModel
from hpt_hf.evaluation.result import EvalResult
from hpt_hf.models.logits_classifier import Classifier
from hpt_hf.types import Images, Logits

PROBE = 24  # images that the checks look at
TOLERATED_FRACTION = 0.1  # of them may always behave oddly
MIN_GAP_POINTS = 5.0  # by which a robust accuracy must be too high to be doubted
FEW_CLASSES, FEW_IMAGES = 4, 50  # below these an accuracy says little
BASELINE = 0.25  # of its right answers that an undefended model may keep

Batch = dict[str, torch.Tensor]  # images, image_ids and labels, of one size
Finding = tuple[bool | None, str]  # raised, not raised, or (None) not run; and what was seen
LEAST = 8  # images; fewer prove nothing


class Seen(NamedTuple):
    """What a check saw on images of one size: which of them behaved oddly, and how many may."""

    odd: torch.Tensor  # (batch,) bool
    what: str
    tolerated: float | None = TOLERATED_FRACTION  # share of them; None: until the robust accuracy is doubted by much


@dataclass(frozen=True)
class Probe:
    """What the checks look at."""

    classifier: Classifier
    attack: EvaluationAttack
    result: EvalResult
    clean_images: Batch  # some that are right
    robust_images: Batch  # some that withstood the attack
    baseline_images: Batch = field(default_factory=dict)  # some of either kind
    baseline: Classifier | None = None  # an undefended model

    def logits(self, images: Images) -> Logits:
        # None may be right, or robust, and vision towers take no empty batch.
        if not len(images):
            return images.new_zeros(0, len(self.classifier.classes))
        return self.classifier.classify(images).logits

    def attack_success(self, batch: Batch, name: str, steps: int, *, round: int = 0) -> torch.Tensor:
        """(batch,) bool: which images an attack breaks in the evaluation's ball."""
        attacks, goals = ATTACKS, batch["labels"]
        if self.attack.target:
            attacks, goals = TARGETED, torch.full_like(goals, self.classifier.classes.index(self.attack.target))
        noise = Noise(batch["image_ids"], self.attack.seed, round)
        with frozen(self.classifier):
            return attacks[name][0](self.logits, batch["images"], goals, self.attack.threat, steps, noise)[1]


def run_check(check: Check, probes: Sequence[Probe]) -> Finding:
    """A check over images of all sizes, added up: `probes` hold one size each."""
    first = check(probes[0])
    if not isinstance(first, Seen):
        return first
    odd = torch.cat([first.odd, *(check(probe).odd for probe in probes[1:])])
    count, n = int(odd.sum()), len(odd)
    if n < LEAST:
        return None, f"{n} images to look at, expected at least {LEAST}"
    if first.tolerated is not None:
        return count > first.tolerated * n, f"{count} of {n} images {first.what}"
    points = probes[0].result.robust * count / n
    seen = f"{count} of {n} robust images {first.what}: the accuracy may be {points:.1f} points too high"
    return count >= 2 and points >= MIN_GAP_POINTS, seen


def half_precision(probe: Probe) -> Finding:
    """Small gradients become 0 in half precision, sign(0) = 0, and the model looks more robust than it is."""
    images, layers = probe.clean_images["images"][:4], set()
    device, halves = images.device.type, (torch.bfloat16, torch.float16)
    with register_module_forward_hook(lambda module, given, answer: layers.add(getattr(answer, "dtype", None))):
        logits = probe.logits(images)
    dtypes = {
        "weights": {p.dtype for p in probe.classifier.parameters()},
        "autocast": {torch.get_autocast_dtype(device)} if torch.is_autocast_enabled(device) else set(),
        "layers": layers,
        # A float32 tensor whose every value fits 16 bits was computed in them.
        "logits": {h for h in halves if logits.numel() and torch.equal(logits.to(h).to(logits.dtype), logits)},
    }
    seen = [f"{what} in {half}" for what, found in dtypes.items() for half in halves if half in found]
    return bool(seen), ", ".join(seen) or "everything is computed in float32"


def stochastic(probe: Probe) -> Seen:
    """Two calls, two answers: a random defence, or dropout left on; one gradient shows where one draw points."""
    first, second = (probe.logits(probe.clean_images["images"]) for _ in range(2))
    return Seen(_differ(first, second, 1e-4), "get other logits when asked twice")


def batch_size(probe: Probe) -> Seen:
    """Logits hang on the images beside: batch statistics, or a mean over the batch somewhere."""
    together = probe.logits(probe.clean_images["images"])
    alone = torch.cat([together[:0], *(probe.logits(image[None]) for image in probe.clean_images["images"])])
    return Seen(_differ(together, alone, 1e-3), "get other logits alone than in a batch")


def quantised(probe: Probe) -> Seen:
    """A hair's breadth changes nothing and a large change does: a staircase, whose slope is 0 wherever one stands."""
    images, noise = probe.clean_images["images"], Noise(probe.clean_images["image_ids"], probe.attack.seed)
    signs = torch.where(noise.uniform(tuple(images.shape[1:])) < 0.5, -1.0, 1.0)
    at, near, far = (probe.logits((images + size * signs).clamp(0, 1)) for size in (0, 1e-5, 0.2))
    odd = (at == near).all(1) & (at != far).any(1)
    return Seen(odd, "get the same logits to the last bit after a change of 1e-5")


def detached(probe: Probe) -> Seen:
    """Logits follow the pixels, the gradient does not: a step outside autograd, such as a conversion to bytes."""
    images = probe.clean_images["images"].detach().requires_grad_(True)
    with torch.enable_grad(), frozen(probe.classifier):
        logits = probe.logits(images)
        gradient = pixel_gradient(logits.square().sum(1), images)  # of the logits: no loss that could saturate
    moved = (probe.logits((images + 0.1).clamp(0, 1)) != logits).any(1)  # by more than a byte's step would hide
    return Seen(moved & ~gradient.flatten(1).any(1), "have logits that follow the pixels and no gradient")


def zero_gradient(probe: Probe) -> Seen:
    """The cross-entropy rounds to 0, as with logits of too large a scale, or has no gradient at most pixels."""
    images = probe.clean_images["images"].detach().requires_grad_(True)
    with torch.enable_grad(), frozen(probe.classifier):
        loss = cross_entropy(probe.logits(images), probe.clean_images["labels"])
        gradient = pixel_gradient(loss, images)
    # At native resolution the model reads only the square in the middle of an image.
    top, left = ((length - min(images.shape[-2:])) // 2 for length in images.shape[-2:])
    read = gradient[..., top : images.shape[-2] - top, left : images.shape[-1] - left].flatten(1)
    odd = (loss < 1e-6) | ((read == 0).float().mean(1) > 0.5)
    return Seen(odd, "have a cross-entropy of 0, or none of its gradient at more than half of their pixels")


def more_steps(probe: Probe) -> Seen:
    """PGD with a hundred steps from another start breaks what the evaluation's attack left: it had not arrived."""
    return Seen(probe.attack_success(probe.robust_images, "pgd", 100, round=1), "fall to PGD-100", None)


def other_loss(probe: Probe) -> Seen:
    """The gradient that the attack followed is weak, or points past the nearest boundary."""
    broken, what = probe.attack_success(probe.robust_images, "cw", 50), "fall to CW-50"
    if not probe.attack.target and "apgd-t" not in probe.attack.stages:  # robust images have withstood it
        broken, what = broken | probe.attack_success(probe.robust_images, "apgd-t", 30), "fall to CW-50 or APGD-T-30"
    return Seen(broken, what, None)


def large_ball(probe: Probe) -> Seen:
    """In a ball that holds a grey image nothing can stay right; what does was not really attacked."""
    norm, pixels = probe.attack.threat.norm, probe.robust_images["images"][:1].numel()
    grey = ThreatModel(norm, 0.5 if norm == "linf" else 0.5 * pixels**0.5)
    anywhere = replace(probe, attack=replace(probe.attack, threat=grey, target=None))
    robust = ~anywhere.attack_success(probe.robust_images, "pgd", 100)
    return Seen(robust, f"withstand PGD-100 at eps {grey.eps:.3g}")


def black_box(probe: Probe) -> Finding | Seen:
    """Random search breaks what gradients left: the gradients lie."""
    if probe.attack.name == "square":
        return None, "the attack is Square itself"
    if "square" in probe.attack.stages:  # it ran after the others
        *_, before, after = probe.result.accuracy_after.values()
        points = before - after
        return points >= MIN_GAP_POINTS, f"Square broke {points:.1f} points of what the white-box attacks had left"
    return Seen(probe.attack_success(probe.robust_images, "square", 300), "fall to 300 queries of Square", None)


def few_images(probe: Probe) -> Finding:
    """Few classes, where guessing is often right, or an interval wider than any difference one would like to see."""
    n, classes = probe.result.n, probe.result.classes
    seen = f"{n} images, {classes} classes; expected at least {FEW_IMAGES} and {FEW_CLASSES}"
    return n < FEW_IMAGES or classes < FEW_CLASSES, seen


def collapsed(probe: Probe) -> Finding:
    """The model is at chance, or right on images of one class alone: a figure of it compares with nothing."""
    result, chance = probe.result, 100 / probe.result.classes
    right = [name for name, (_, clean, _) in result.per_class.items() if clean]
    seen = (
        f"clean {result.clean:.1f}% (chance {chance:.1f}%), right in {len(right)} of {len(result.per_class)} classes"
    )
    return result.clean_interval[0] <= chance or len(right) == 1 < len(result.per_class), seen


def baseline(probe: Probe) -> Finding | Seen:
    """An undefended model withstands the same attack: the attack is weak, or the ball too small."""
    if probe.baseline is None:
        return None, "no undefended model was given (--baseline)"
    labels = probe.baseline_images["labels"]
    known = labels < 0  # none, of no images: vision towers take no empty batch
    if len(labels):
        known = probe.baseline.classify(probe.baseline_images["images"]).logits.argmax(1) == labels
    batch = [probe.baseline_images[k][known] for k in ("images", "image_ids", "labels")]
    robust = torch.ones(len(batch[0]), dtype=torch.bool, device=known.device)
    # The first stage is often enough: then the rest of `standard` would be of no use.
    for attack in (replace(probe.attack, name=[*probe.attack.stages][0]), probe.attack):
        if len(robust) and robust.sum() > BASELINE * len(robust):
            robust = attack.run(probe.baseline, *batch)[1] < 0
    return Seen(robust, "that the undefended model knows withstand the attack on it", BASELINE)


Check = Callable[[Probe], Finding | Seen]
CHECKS: tuple[Check, ...]
CHECKS = (half_precision, stochastic, batch_size, quantised, detached, zero_gradient, more_steps, other_loss)
CHECKS += (large_ball, black_box, few_images, collapsed, baseline)


def _differ(one: torch.Tensor, other: torch.Tensor, tolerance: float) -> torch.Tensor:
    """(batch,) bool: do the logits of an image differ by more than rounding?"""
    return ((one - other).abs() > tolerance * (1 + one.abs().amax(1, keepdim=True))).any(1)
