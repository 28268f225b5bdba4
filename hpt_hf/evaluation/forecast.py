"""How long an evaluation will take, told before it starts: what stands after a short PGD will cost it every step."""

from __future__ import annotations

import time
from dataclasses import dataclass
from itertools import pairwise
from statistics import median

import torch

from hpt_hf.attacks.engine import frozen, misclassification, run_attack
from hpt_hf.attacks.losses import cross_entropy, margin
from hpt_hf.attacks.noise import Noise
from hpt_hf.attacks.pgd import PGD
from hpt_hf.attacks.suite import EvaluationAttack
from hpt_hf.data.collator import Collator
from hpt_hf.data.dataset import LabelledImages
from hpt_hf.evaluation.evaluator import batches, sample
from hpt_hf.models.logits_classifier import Classifier
from hpt_hf.utils import processes

LOOKED_AT, STEPS = 64, 10  # images of a set, and steps of each PGD on them


@dataclass(frozen=True)
class _Seen:
    """Of some images of a set: which shares are right and stand, passes until one fell, and seconds of a pass of one."""

    right: float
    standing: float  # after PGD on the cross-entropy
    standing_both: float  # and on the margin
    fell: float  # passes an image, of those that fell to the first
    gradient: float
    forward: float


def forecast(
    classifier: Classifier, images: LabelledImages, attack: EvaluationAttack, *, limit: int | None, probe: int
) -> float:
    """Seconds that `evaluate` will take with these arguments, all processes of the launch working."""
    n = len(sample(len(images), limit))
    classifier.set_classes(images.classes, images.templates)
    seen, targets = _look(classifier, images, attack, min(n, LOOKED_AT)), min(9, len(images.classes) - 1)
    passes, queries = seen.fell, 0.0
    for number, (stage, own) in enumerate(zip(attack.stages, attack.own_steps, strict=True)):
        steps = attack.steps or own
        if number == 0 and stage in ("pgd", "cw"):  # whose steps are the smaller, the more there are
            passes *= max(1, steps / STEPS)
        standing = seen.standing if stage in ("pgd", "apgd-ce") else seen.standing_both
        if stage == "square":
            queries += standing * steps
        else:
            passes += standing * steps * (targets if stage == "apgd-t" else 1)
    seconds = n * ((1 + queries) * seen.forward + passes * seen.gradient)
    if probe:  # the checks of hpt_hf.evaluation.sanity_checks that attack again, on images that stand or are right
        standing = seen.standing if attack.stages[-1] in ("pgd", "apgd-ce") else seen.standing_both
        again = 150 + (0 if "apgd-t" in attack.stages else 30 * targets)
        asked = 0 if "square" in attack.stages else 300
        seconds += min(probe, n * standing) * (again * seen.gradient + asked * seen.forward)
        seconds += min(probe, n * seen.right) * (10 * seen.forward + STEPS * seen.gradient)
    return seconds / processes().num_processes


def _look(classifier: Classifier, images: LabelledImages, attack: EvaluationAttack, count: int) -> _Seen:
    """Two short PGD on `count` images, pass by pass on the clock. The median pass counts: the first ones are slower."""
    right = standing = both = fell = 0
    passes: dict[str, list[float]] = {"gradient": [0.0], "forward": [0.0]}
    for batch in batches(images, Collator(classifier.processor, native=attack.native), LOOKED_AT, count):
        x, image_ids, labels = (batch[k].to(classifier.device) for k in ("images", "image_ids", "labels"))
        calls: list[tuple[int, float]] = []

        def ask(x: torch.Tensor, calls=calls) -> torch.Tensor:
            calls.append((len(x), time.perf_counter()))
            return classifier.classify(x).logits

        with torch.no_grad():
            left = ([ask(x).argmax(1) for _ in range(4)][0] == labels).nonzero()[:, 0]
        passes["forward"] += _clocked(calls)
        right += len(left)
        for loss in (cross_entropy, margin):
            calls.clear()
            if len(left):
                goal, noise = misclassification(loss, labels[left]), Noise(image_ids[left], attack.seed)
                with frozen(classifier):
                    broken = run_attack(ask, x[left], PGD(attack.threat, STEPS), noise=noise, criterion=goal)[1]
                left = left[~broken]
                passes["gradient"] += _clocked(calls)
            if loss is cross_entropy:
                standing += len(left)
                fell += sum(size for size, _ in calls) - len(left) * (STEPS + 1)
        both += len(left)
    seconds = {kind: median(found[1:] or found) for kind, found in passes.items()}
    return _Seen(*(number / count for number in (right, standing, both, fell)), **seconds)


def _clocked(calls: list[tuple[int, float]]) -> list[float]:
    """Seconds an image of each call but the last, which nothing ends."""
    return [(end - start) / size for (size, start), (_, end) in pairwise(calls)]
