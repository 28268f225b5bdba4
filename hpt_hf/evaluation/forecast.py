"""How long an evaluation will take, told before it starts: what stands after ten steps of PGD will cost it every step."""

from __future__ import annotations

import time
from dataclasses import dataclass
from itertools import pairwise
from statistics import median

import torch

from hpt_hf.attacks.engine import frozen, misclassification, run_attack
from hpt_hf.attacks.losses import cross_entropy
from hpt_hf.attacks.noise import Noise
from hpt_hf.attacks.pgd import PGD
from hpt_hf.attacks.suite import EvaluationAttack
from hpt_hf.data.collator import Collator
from hpt_hf.data.dataset import LabelledImages
from hpt_hf.evaluation.evaluator import batches, sample
from hpt_hf.models.logits_classifier import Classifier
from hpt_hf.utils import processes

LOOKED_AT, STEPS = 64, 10  # images of a set, and steps of PGD on them


@dataclass(frozen=True)
class _Seen:
    """Of some images of a set: which shares are right, and stand; what PGD asked about one, and seconds of a pass of one."""

    right: float
    standing: float
    asked: float
    gradient: float
    forward: float


def forecast(
    classifier: Classifier, images: LabelledImages, attack: EvaluationAttack, *, limit: int | None, probe: int
) -> float:
    """Seconds that `evaluate` will take with these arguments, all processes of the launch working."""
    n = len(sample(len(images), limit))
    classifier.set_classes(images.classes, images.templates)
    seen = _look(classifier, images, attack, min(n, LOOKED_AT))
    gradients, queries = _of_a_survivor(attack, len(images.classes))
    seconds = n * (seen.forward + seen.gradient * (seen.asked - seen.standing * STEPS))
    seconds += n * seen.standing * (gradients * seen.gradient + queries * seen.forward)
    if probe:  # the checks of hpt_hf.evaluation.sanity_checks that attack again, on images that stand or are right
        again = 150 + (0 if "apgd-t" in attack.stages else 30 * _targets(len(images.classes)))
        asked = 0 if "square" in attack.stages else 300
        seconds += min(probe, n * seen.standing) * (again * seen.gradient + asked * seen.forward)
        seconds += min(probe, n * seen.right) * (4 * seen.forward + STEPS * seen.gradient)
    return seconds / processes().num_processes


def _look(classifier: Classifier, images: LabelledImages, attack: EvaluationAttack, count: int) -> _Seen:
    """A short PGD on `count` images, pass by pass on the clock. The median pass counts: the first ones are slower."""
    right = standing = asked = 0
    passes: dict[str, list[float]] = {"gradient": [0.0], "forward": [0.0]}
    for batch in batches(images, Collator(classifier.processor, native=attack.native), LOOKED_AT, count):
        x, image_ids, labels = (batch[k].to(classifier.device) for k in ("images", "image_ids", "labels"))
        calls: list[tuple[int, float]] = []

        def ask(x: torch.Tensor, calls=calls) -> torch.Tensor:
            calls.append((len(x), time.perf_counter()))
            return classifier.classify(x).logits

        with torch.no_grad():
            known = [ask(x).argmax(1) for _ in range(4)][0] == labels
        passes["forward"] += _clocked(calls)
        calls.clear()
        if known.any():
            goal, noise = misclassification(cross_entropy, labels[known]), Noise(image_ids[known], attack.seed)
            with frozen(classifier):
                broken = run_attack(ask, x[known], PGD(attack.threat, STEPS), noise=noise, criterion=goal)[1]
            passes["gradient"] += _clocked(calls)
            right, standing = right + int(known.sum()), standing + int((~broken).sum())
            asked += sum(size for size, _ in calls)
    seconds = {kind: median(found[1:] or found) for kind, found in passes.items()}
    return _Seen(right / count, standing / count, asked / count, **seconds)


def _clocked(calls: list[tuple[int, float]]) -> list[float]:
    """Seconds an image of each call but the last, which nothing ends."""
    return [(end - start) / size for (size, start), (_, end) in pairwise(calls)]


def _of_a_survivor(attack: EvaluationAttack, classes: int) -> tuple[int, int]:
    """Gradients and plain queries that an image costs which no stage breaks."""
    gradients = queries = 0
    for stage, own in zip(attack.stages, attack.own_steps, strict=True):
        steps = attack.steps or own
        if stage == "square":
            queries += steps
        else:
            gradients += steps * (_targets(classes) if stage == "apgd-t" else 1)
    return gradients, queries


def _targets(classes: int) -> int:
    """Of APGD-T: the nine likeliest wrong classes."""
    return min(9, classes - 1)
