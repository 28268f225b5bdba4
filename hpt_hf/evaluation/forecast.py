"""How long an evaluation will take, told before it starts: what stands after a short PGD will cost it every step."""

from __future__ import annotations

import time
from itertools import pairwise
from statistics import median
from typing import NamedTuple

import numpy as np
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

Call = tuple[int, float]  # how many images, and seconds or the time at which it began
LOOKED_AT, STEPS = 64, 10  # images of a set, and steps of each PGD on them


class _Seen(NamedTuple):
    """Of some images of a set: which shares are right and stand, passes until one fell, and what a pass takes."""

    right: float
    standing: float  # after PGD on the cross-entropy
    standing_both: float  # and on the margin
    fell: float  # passes an image, of those that fell to the first
    forward: float  # of a pass with a gradient
    start: float  # of a pass, in seconds, whatever its size
    each: float

    def gradient(self, size: float) -> float:
        """Seconds of an image in a pass of so many."""
        return self.each + self.start / max(size, 1)


def forecast(
    classifier: Classifier,
    images: LabelledImages,
    attack: EvaluationAttack,
    *,
    limit: int | None,
    probe: int,
    batch_size: int = 128,
) -> float:
    """Seconds that `evaluate` will take with these arguments, all processes of the launch working."""
    n = len(sample(len(images), limit))
    classifier.set_classes(images.classes, images.templates)
    seen, targets = _look(classifier, images, attack, min(n, LOOKED_AT)), min(9, len(images.classes) - 1)
    passes, queries = seen.fell, 0.0
    for stage, steps in attack.stages.items():
        if stage in ("pgd", "cw"):  # whose steps are the smaller, the more there are
            passes *= max(1, steps / STEPS)
        standing = seen.standing if stage in ("pgd", "apgd-ce") else seen.standing_both
        if stage == "square":
            queries += standing * steps
        else:
            passes += standing * steps * (targets if stage == "apgd-t" else 1)
    whole = n * ((1 + queries) * seen.forward + passes) * seen.gradient(min(batch_size, n) * standing)
    if probe:  # the checks of hpt_hf.evaluation.sanity_checks that attack again, on images that stand or are right
        again = 150 + (0 if "apgd-t" in attack.stages else 30 * targets)
        again += (0 if "square" in attack.stages else 300) * seen.forward
        robust, right = min(probe, n * standing), min(probe, n * seen.right)
        whole += robust * again * seen.gradient(robust) + right * STEPS * (1 + seen.forward) * seen.gradient(right)
    return whole / processes().num_processes


def _look(classifier: Classifier, images: LabelledImages, attack: EvaluationAttack, count: int) -> _Seen:
    """Two short PGD on `count` images, pass by pass on the clock. The median pass counts: the first ones are slower."""
    right = standing = both = fell = 0
    forward: list[Call] = []
    gradient: list[Call] = []
    for batch in batches(images, Collator(classifier.processor, native=attack.native), LOOKED_AT, count):
        x, image_ids, labels = (batch[k].to(classifier.device) for k in ("images", "image_ids", "labels"))
        calls: list[Call] = []

        def ask(x: torch.Tensor, calls=calls) -> torch.Tensor:
            calls.append((len(x), time.perf_counter()))
            return classifier.classify(x).logits

        with torch.no_grad():
            left = ([ask(x).argmax(1) for _ in range(4)][0] == labels).nonzero()[:, 0]
        forward += _clocked(calls)[1:]
        right += len(left)
        for loss in (cross_entropy, margin):
            calls.clear()
            if len(left):
                goal, noise = misclassification(loss, labels[left]), Noise(image_ids[left], attack.seed)
                with frozen(classifier):
                    broken = run_attack(ask, x[left], PGD(attack.threat, STEPS), noise=noise, criterion=goal)[1]
                left = left[~broken]
                gradient += _clocked(calls)
            if loss is cross_entropy:
                standing += len(left)
                fell += sum(size for size, _ in calls) - len(left) * (STEPS + 1)
        both += len(left)
    each, start = _line(gradient or forward)
    plain = median(seconds / size for size, seconds in forward) / (each + start / forward[0][0])
    return _Seen(*(number / count for number in (right, standing, both, fell)), plain, start, each)


def _clocked(calls: list[Call]) -> list[Call]:
    """Images and seconds of each call but the last, which nothing ends."""
    return [(size, end - start) for (size, start), (_, end) in pairwise(calls)]


def _line(calls: list[Call]) -> tuple[float, float]:
    """Seconds an image, and beside them a pass; without a slope that makes sense, all of it an image's."""
    sizes, seconds = zip(*calls, strict=True)
    if len(set(sizes)) > 2:
        each, start = np.polyfit(sizes, seconds, 1)
        if each > 0 and start > 0:
            return float(each), float(start)
    return median(s / n for n, s in calls), 0.0
