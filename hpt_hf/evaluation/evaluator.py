"""Clean and robust zero-shot accuracy of a model on a data set.

Attacks run in float32 with random starts that hang on the image: a result hangs on no batch size or number of processes.
"""

from __future__ import annotations

import base64
import hashlib
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path

import numpy as np
import torch
from accelerate.utils import gather_object

from hpt_hf.attacks.suite import EvaluationAttack
from hpt_hf.data.collator import Collator, to_png
from hpt_hf.data.dataset import LabelledImages
from hpt_hf.evaluation.adversarial_images import save_images as save_adversarial
from hpt_hf.evaluation.metric import RobustAccuracy
from hpt_hf.evaluation.result import EvalResult
from hpt_hf.evaluation.resume import Findings
from hpt_hf.evaluation.sanity_checks import CHECKS, PROBE, Probe, run_check
from hpt_hf.models.logits_classifier import Classifier
from hpt_hf.models.zero_shot import digest, fingerprint
from hpt_hf.types import ImageIds
from hpt_hf.utils import hardware, processes, progress_bar, slug, versions, write_json

# How an image ended, if no stage of the attack broke it: wrong already when clean, or right to the end.
WRONG, ROBUST = -2, -1
Batch = dict[str, torch.Tensor]


def sample(size: int, limit: int | None) -> list[int]:
    """Which images `limit` keeps: a fixed random sample, in order, since many sets are sorted by class."""
    if limit is None or limit >= size:
        return list(range(size))
    return sorted(np.random.default_rng(0).permutation(size)[:limit].tolist())


def batches(images: LabelledImages, collate: Collator, batch_size: int, limit: int | None = None) -> Iterator[Batch]:
    """The set in order, with `indices`; at native resolution a batch ends where the size of the images changes."""
    rows: list[dict] = []
    for index in [*sample(len(images), limit), None]:
        row = {} if index is None else images[index] | {"index": index}
        full = len(rows) == batch_size or index is None
        if rows and (full or (collate.native and row["image"].size != rows[0]["image"].size)):
            yield collate(rows) | {"indices": torch.tensor([row["index"] for row in rows])}
            rows = []
        rows.append(row)


def shared(tasks: Iterable[tuple[str, Callable[[], dict]]], known: Findings, done: Callable) -> list[dict]:
    """What each named task finds, in order, on every process: they take turns, and nothing known is done again.

    Args:
        done: is told each finding.
    """
    state, mine = processes(), []
    for number, (name, task) in enumerate(tasks):
        if number % state.num_processes == state.process_index:
            mine.append((number, known.get(name) or known.note(name, task())))
            done(mine[-1][1])
    return [finding for _, finding in sorted(gather_object(mine), key=lambda item: item[0])]


@dataclass(frozen=True)
class Outcomes:
    """How an attack on a set ended, image by image, in the order of the set."""

    attack: EvaluationAttack
    indices: torch.Tensor
    labels: torch.Tensor
    ends: torch.Tensor  # `WRONG`, `ROBUST`, or the number of the stage that broke it
    images_digest: str
    seconds: float
    examples: list[dict]  # of broken images, see `example`

    def after(self, stage: int) -> dict:
        """`RobustAccuracy` after that stage of the attack; -1 stands for any wrong answer."""
        robust = (self.ends == ROBUST) | (self.ends > stage)
        clean_answers, answers = (self.labels.where(right, -1) for right in (self.ends != WRONG, robust))
        metric = RobustAccuracy(keep_in_memory=True)
        return metric.compute(predictions=clean_answers, adv_predictions=answers, references=self.labels)


@torch.no_grad()
def attack_all(
    classifier: Classifier,
    images: LabelledImages,
    attack: EvaluationAttack,
    *,
    batch_size: int = 128,
    limit: int | None = None,
    known: Findings | None = None,
    keep: Path | None = None,
) -> Outcomes:
    """Attack every image that is right; the processes of a launch share the batches. ValueError: logits not finite.

    Args:
        keep: a folder for the adversarial images, a parquet file a batch.
    """
    collate = Collator(classifier.processor, native=attack.native)
    seen: list[Batch] = []

    def tasks():
        for number, batch in enumerate(batches(images, collate, batch_size, limit)):
            seen.append({k: v for k, v in batch.items() if k != "images"})
            # Named by its images and labels, too: a set that was changed since is attacked afresh.
            name = f"batch {number} {images_digest(torch.cat([batch['image_ids'], batch['labels']]))}"
            # Two batches have enough to show, also where the first is all wrong.
            file = keep and keep / f"{number:05d}.parquet"
            yield name, partial(attack_batch, classifier, batch, attack, show=2 if number < 2 else 0, file=file)

    with progress_bar(f"{images.name}, {attack}", len(sample(len(images), limit)), "image") as bar:
        standing = []

        def done(finding: dict) -> None:
            standing.extend(end == ROBUST for end in finding["ends"])
            bar.set_postfix_str(f"robust {100 * sum(standing) / len(standing):.1f}%", refresh=False)
            bar.update(len(finding["ends"]) * processes().num_processes)

        found = shared(tasks(), known or Findings(None, {}), done)
    indices, labels, image_ids = (torch.cat([batch[k] for batch in seen]) for k in ("indices", "labels", "image_ids"))
    ends, examples = (sum((finding[k] for finding in found), []) for k in ("ends", "examples"))
    seconds = sum(finding["seconds"] for finding in found)
    return Outcomes(attack, indices, labels, torch.tensor(ends), images_digest(image_ids), seconds, examples[:2])


@torch.no_grad()
def attack_batch(
    classifier: Classifier, batch: Batch, attack: EvaluationAttack, *, show: int = 0, file: Path | None = None
) -> dict:
    """`ends` of one batch, seconds, and up to `show` broken images; all in `file`. Wrong images are not attacked."""
    start = time.time()
    batch = {k: v.to(classifier.device) for k, v in batch.items()}
    logits = classifier.classify(batch["images"]).logits
    if not logits.isfinite().all():
        bad = batch["indices"][~logits.isfinite().all(1)].tolist()
        raise ValueError(f"the model's logits are not finite on images {bad[:5]}: it has no accuracy")
    clean = logits.argmax(1) == batch["labels"]
    ends, examples, adversarial = torch.full_like(batch["labels"], WRONG), [], batch["images"].clone()
    if clean.any():
        images, image_ids, labels = (batch[k][clean] for k in ("images", "image_ids", "labels"))
        perturbed, ends[clean] = attack.run(classifier, images, image_ids, labels)
        assert attack.threat.contains(perturbed, images).all(), "the attack left its ball"
        adversarial[clean] = perturbed
        for i in (ends[clean] >= 0).nonzero()[:show, 0].tolist():
            examples.append(example(classifier, images[i], perturbed[i], int(labels[i])))
    if file is not None:
        save_adversarial(file, classifier, batch["images"], adversarial, batch["labels"], letters(ends))
    return {"ends": ends.tolist(), "seconds": round(time.time() - start, 3), "examples": examples}


def letters(ends: torch.Tensor) -> list[str]:
    """How each image ended, as a result says it."""
    return [{WRONG: "w", ROBUST: "r"}.get(end, str(end)) for end in ends.tolist()]


def example(classifier: Classifier, image: torch.Tensor, perturbed: torch.Tensor, label: int) -> dict:
    """A broken image to show: clean, perturbation (scaled to black or white) and attacked, PNG in base64, and answers."""
    delta = perturbed - image
    perturbation = 0.5 + delta / (2 * delta.abs().max().clamp_min(1e-12))
    probabilities = classifier.classify(torch.stack([image, perturbed])).logits.softmax(1)
    said = [f"{classifier.classes[int(p.argmax())]} ({100 * p.max():.0f}%)" for p in probabilities]
    shown = {"clean": image, "perturbation": perturbation, "attacked": perturbed}
    pngs = {name: base64.b64encode(to_png(x)).decode() for name, x in shown.items()}
    return {"truth": classifier.classes[label], "said": said[0], "said_attacked": said[1], **pngs}


def images_digest(image_ids: ImageIds) -> str:
    """A digest of images in order."""
    return hashlib.sha256(image_ids.numpy().tobytes()).hexdigest()[:16]


def evaluate(
    classifier: Classifier,
    images: LabelledImages,
    attack: EvaluationAttack,
    *,
    name: str,
    revision: str | None = None,
    batch_size: int = 128,
    limit: int | None = None,
    probe: int = PROBE,
    baseline: Classifier | None = None,
    folder: str | Path | None = None,
    save_images: bool = False,
) -> EvalResult:
    """Clean and robust accuracy of `classifier`, whose classes become those of the set, and sanity checks of them.

    Args:
        name, revision: what the result calls the model.
        limit: a fixed random sample of so many images.
        probe: how many images the sanity checks look at; 0: none are run.
        baseline: an undefended model, which the attack must break.
        folder: for `progress/`, from which an evaluation that was killed goes on, and `gallery/`, images to show.
        save_images: all adversarial images in `folder`, under `images/`, with labels, answers and distances.

    Raises ValueError for a set without labels or without the attack's target, and for logits that are not finite.
    """
    if not images.labelled:
        raise ValueError(f"{images.name} has no labels: accuracy cannot be measured on it")
    images = images.without_class(attack.target)
    if not len(images):
        raise ValueError(f"{images.name} holds no image of another class than {attack.target!r}")
    for model in filter(None, (classifier, baseline)):
        model.eval()
        model.set_classes(images.classes, images.templates)
    weights = fingerprint(classifier)
    question = {
        "model": [weights, *classifier.identity()],
        "baseline": baseline and fingerprint(baseline),
        "heads": [digest({"head": (1e4 * m.head).round().short()}) for m in (classifier, baseline) if m],
        "data": [images.name, *images.classes, *images.templates],
        "attack": asdict(attack) | {"code": attack.code},
        "sample": [len(images), limit, batch_size, probe, save_images],
        "versions": versions(),
    }
    known = Findings(folder and Path(folder) / "progress", question, processes().process_index)
    place = None
    if save_images:
        place = Path(folder, "images", f"{slug(images.name)}--{slug(str(attack))}--{known.digest[:8]}")
    options = {"batch_size": batch_size, "limit": limit}
    outcomes = attack_all(classifier, images, attack, **options, known=known, keep=place)
    model = {"model": name, "revision": revision, "fingerprint": weights}
    result = EvalResult(**model, **_measured(images, outcomes, limit))
    if probe:
        checks = sanity_checks(classifier, images, outcomes, result, known, count=probe, baseline=baseline)
        result = replace(result, sanity_checks=tuple(checks))
    if folder is not None and processes().is_main_process:
        write_json(Path(folder) / "gallery" / result.file_name, outcomes.examples)
    return result


def _measured(images: LabelledImages, outcomes: Outcomes, limit: int | None) -> dict:
    """The fields of a result that say what was measured, and how."""
    attack = outcomes.attack
    after = {stage: outcomes.after(number) for number, stage in enumerate(attack.stages)}
    *_, total = after.values()
    return {
        "dataset": images.name,
        "source": dict(images.source, limit=limit),
        "classes": len(images.classes),
        "templates": tuple(images.templates),
        "images_digest": outcomes.images_digest,
        **{name: total[name] for name in ("n", "n_clean", "n_robust")},
        "n_after": {stage: found["n_robust"] for stage, found in after.items()},
        "per_class": {images.classes[label]: counts for label, counts in total["per_class"].items()},
        "attack": str(attack),
        "norm": attack.threat.norm,
        "eps": str(attack.threat.eps),
        **{name: getattr(attack, name) for name in ("steps", "protocol", "seed", "target")},
        "ends": "".join(letters(outcomes.ends)),
        "skipped": tuple(reason for _, reason in images.skipped),
        "seconds": round(outcomes.seconds, 2),
        "versions": versions(),
        "hardware": hardware(),
    }


@torch.no_grad()
def sanity_checks(
    classifier, images, outcomes: Outcomes, result: EvalResult, known: Findings, *, count: int, baseline
):
    """Findings of all checks on about `count` images. The processes of a launch share the checks."""
    collate = Collator(classifier.processor, native=outcomes.attack.native)

    def by_size(mask: torch.Tensor, count: int) -> dict[tuple[int, int] | None, Batch]:
        """At most `count` of those chosen, at random, the same ones every time: a batch for each size."""
        rows: dict = {}
        for index in np.random.default_rng(1).permutation(outcomes.indices[mask].numpy())[:count]:
            row = images[index]
            rows.setdefault(row["image"].size if collate.native else None, []).append(row)
        return {size: {k: v.to(classifier.device) for k, v in collate(part).items()} for size, part in rows.items()}

    clean, robust = (by_size(mask, count) for mask in (outcomes.ends != WRONG, outcomes.ends == ROBUST))
    known_to = by_size(outcomes.ends >= WRONG, 2 * count) if baseline is not None else {}
    none = {k: v[:0].to(classifier.device) for k, v in collate([images[0]]).items()}
    sizes = {**clean, **robust, **known_to} or {None: none}
    parts = [[part.get(size, none) for part in (clean, robust, known_to)] for size in sizes]
    probes = [Probe(classifier, outcomes.attack, result, *three, baseline) for three in parts]

    def run(check) -> dict:
        raised, detail = run_check(check, probes)
        return {"name": check.__name__, "raised": raised, "detail": detail}

    data = f"{result.images_digest} {images_digest(outcomes.labels)}"
    with progress_bar(f"{result.dataset}, sanity checks", len(CHECKS), "check") as bar:
        tasks = ((f"check {c.__name__} {data}", partial(run, c)) for c in CHECKS)
        return shared(tasks, known, lambda _: bar.update(processes().num_processes))
