"""Evaluation: clean and robust zero-shot accuracy of a model on a set, picture by picture, as Scores.

Attacks run in float32 with random starts that hang on the picture, so a EvalResult does not depend on batch size or process count; a journal lets
it go on after a kill. Every EvalResult is checked (`hpt_hf.evaluation.sanity_checks`).
"""

from __future__ import annotations

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
from hpt_hf.evaluation.result import EvalResult
from hpt_hf.evaluation.resume import Journal
from hpt_hf.evaluation.sanity_checks import BASELINE, CHECKS, PROBE, Batch, Check, Probe
from hpt_hf.evaluation.statistics import percent, wilson
from hpt_hf.models.zero_shot import ZeroShotClassifier, digest, fingerprint
from hpt_hf.types import ImageIds, Images, Logits
from hpt_hf.utils import hardware, processes, versions, write_json


def sample(size: int, limit: int | None) -> list[int]:
    """Which pictures `limit` keeps: a fixed random sample, in order. Many sets are sorted by class, so the first so many would not do."""
    if limit is None or limit >= size:
        return list(range(size))
    return sorted(np.random.default_rng(0).permutation(size)[:limit].tolist())


def batches(
    pictures: LabelledImages, collate: Collator, batch_size: int, limit: int | None = None
) -> Iterator[dict[str, torch.Tensor]]:
    """The set in order, in batches with their `indices`; at native resolution a batch ends where the picture size changes."""
    rows: list[dict] = []
    indices: list[int] = []
    for index in sample(len(pictures), limit):
        row = pictures[index]
        if rows and (len(rows) == batch_size or (collate.native and row["image"].size != rows[0]["image"].size)):
            yield collate(rows) | {"indices": torch.tensor(indices)}
            rows, indices = [], []
        rows.append(row)
        indices.append(index)
    if rows:
        yield collate(rows) | {"indices": torch.tensor(indices)}


def shared(tasks: Iterable[tuple[str, Callable[[], dict]]], journal: Journal) -> list[dict]:
    """What each of the named tasks finds, in their order, to every process. They take turns, and what the journal knows is not done again."""
    state, mine = processes(), []
    for number, (name, task) in enumerate(tasks):
        if number % state.num_processes == state.process_index:
            mine.append((number, journal.get(name) or journal.note(name, task())))
    return [finding for _, finding in sorted(gather_object(mine), key=lambda item: item[0])]


WRONG, STANDS = -2, -1


@dataclass(frozen=True)
class Answers:
    """Per picture, in the order of the set: its index and label, and how it ended: `WRONG` when clean, `STANDS`, or the part that broke it."""

    indices: torch.Tensor
    labels: torch.Tensor
    ends: torch.Tensor
    rows: str
    outside: int
    seconds: float
    examples: list[dict]  # of broken pictures, see `example`

    @property
    def clean(self) -> torch.Tensor:
        return self.ends != WRONG

    @property
    def robust(self) -> torch.Tensor:
        return self.ends == STANDS


@torch.no_grad()
def answer(
    model: ZeroShotClassifier,
    pictures: LabelledImages,
    attack: EvaluationAttack,
    *,
    batch_size: int = 128,
    limit: int | None = None,
    journal: Journal | None = None,
) -> Answers:
    """Run clean and attacked predictions. Pictures already wrong are not attacked: they cannot become right.

    The processes of a launch take turns at the batches, and every one returns all answers.

    Raises:
        ValueError: logits that are not finite.
    """
    collate = Collator(model.processor, native=attack.native)
    indices, labels, keys = [], [], []

    def tasks():
        for number, batch in enumerate(batches(pictures, collate, batch_size, limit)):
            for name, parts in (("indices", indices), ("labels", labels), ("image_ids", keys)):
                parts.append(batch[name])
            # Named by its pictures and labels too: a set that was changed since is answered afresh.
            name = f"batch {number} {images_digest(torch.cat([batch['image_ids'], batch['labels']]))}"
            # Two batches have enough to show, also where the first is answered all wrong.
            yield name, partial(answer_batch, model, batch, attack, show=2 * (number < 2))

    found = shared(tasks(), journal or Journal(None, {}))
    return Answers(
        torch.cat(indices),
        torch.cat(labels),
        torch.tensor([end for finding in found for end in finding["ends"]]),
        images_digest(torch.cat(keys)),
        sum(finding["outside"] for finding in found),
        sum(finding["seconds"] for finding in found),
        [example for finding in found for example in finding["examples"]][:2],
    )


@torch.no_grad()
def answer_batch(
    model: ZeroShotClassifier, batch: dict[str, torch.Tensor], attack: EvaluationAttack, *, show: int = 0
) -> dict:
    """`ends` of one batch, how many perturbed pictures lay `outside` the ball, seconds, and up to `show` broken pictures as `examples`."""
    start = time.time()
    batch = {k: v.to(model.device) for k, v in batch.items()}
    logits = model.classify(batch["images"]).logits
    if not logits.isfinite().all():
        bad = batch["indices"][~logits.isfinite().all(1)].tolist()
        raise ValueError(f"the model's logits are not finite on pictures {bad[:5]}: no accuracy of it means anything")
    right = logits.argmax(1) == batch["labels"]
    ends, outside, examples = torch.full_like(batch["labels"], WRONG), 0, []
    if right.any():
        images = batch["images"][right]
        perturbed, ends[right] = attack.run(model, images, batch["image_ids"][right], batch["labels"][right])
        outside = int((~attack.threat.contains(perturbed, images)).sum())
        for i in (ends[right] >= 0).nonzero()[:show, 0].tolist():
            examples.append(example(model, images[i], perturbed[i], int(batch["labels"][right][i])))
    return {"ends": ends.tolist(), "outside": outside, "seconds": round(time.time() - start, 3), "examples": examples}


def example(model: ZeroShotClassifier, image: torch.Tensor, perturbed: torch.Tensor, label: int) -> dict:
    """A broken picture to show: clean, perturbation (its largest value made black or white) and attacked, as PNG in base64, and the answers."""
    delta = perturbed - image
    shown = {
        "clean": image,
        "perturbation": 0.5 + delta / (2 * delta.abs().max().clamp_min(1e-12)),
        "attacked": perturbed,
    }
    sure = model.classify(torch.stack([image, perturbed])).logits.softmax(1)
    said = [f"{model.classes[int(p.argmax())]} ({100 * p.max():.0f}%)" for p in sure]
    return {
        "truth": model.classes[label],
        "said": said[0],
        "said_attacked": said[1],
        **{k: to_png(v) for k, v in shown.items()},
    }


def images_digest(image_ids: ImageIds) -> str:
    """A digest of pictures in order, from their keys."""
    return hashlib.sha256(image_ids.numpy().tobytes()).hexdigest()[:16]


def evaluate(
    model: ZeroShotClassifier,
    pictures: LabelledImages,
    attack: EvaluationAttack,
    *,
    name: str,
    revision: str | None = None,
    batch_size: int = 128,
    limit: int | None = None,
    probe: int = PROBE,
    baseline: ZeroShotClassifier | None = None,
    folder: str | Path | None = None,
) -> EvalResult:
    """Clean and robust accuracy of `model`, whose classes are set to the picture set's first, and the checks of them.

    Args:
        name, revision: what the EvalResult calls the model.
        limit: a fixed random sample of so many pictures (`sample`); the recorded digest says which.
        probe: how many pictures the checks look at; 0: no checks, and the verdict says so.
        baseline: an undefended model; the checks ask that the attack breaks it.
        folder: for `progress/`, the journals from which an evaluation that was killed goes on, and `gallery/`, pictures to show.

    Raises:
        ValueError: the set has no labels, it lacks the attack's target or all else, or logits that are not finite.
    """
    if not pictures.labelled:
        raise ValueError(f"{pictures.name} has no labels: accuracy cannot be measured on it")
    pictures = pictures.without_class(attack.target)
    if not len(pictures):
        raise ValueError(f"{pictures.name} holds no picture of another class than {attack.target!r}")
    for one in (model, baseline):
        if one is not None:
            one.eval()
            one.set_classes(pictures.classes, pictures.templates)
    weights = fingerprint(model)
    question = {
        "model": [weights, model.config.to_json_string(), digest({"mean": model.mean, "std": model.std})],
        "baseline": baseline and fingerprint(baseline),
        "data": [pictures.name, *pictures.classes, *pictures.templates],
        "attack": asdict(attack),
        "sample": [len(pictures), limit, batch_size, probe],
        "versions": versions(),
    }
    journal = Journal(folder and Path(folder) / "progress", question, processes().process_index)
    answers = answer(model, pictures, attack, batch_size=batch_size, limit=limit, journal=journal)
    checks = (
        examine(model, pictures, attack, answers, probe=probe, baseline=baseline, journal=journal) if probe else []
    )
    n, clean, robust = len(answers.ends), int(answers.clean.sum()), int(answers.robust.sum())
    raised = [c for c in checks if c.raised]
    score = EvalResult(
        model=name,
        fingerprint=weights,
        revision=revision,
        dataset=pictures.name,
        source=dict(pictures.source, limit=limit),
        classes=len(pictures.classes),
        templates=tuple(pictures.templates),
        n=n,
        rows=answers.rows,
        attack=str(attack),
        steps=attack.steps,
        norm=attack.threat.norm,
        eps=str(attack.threat.eps),
        protocol=attack.protocol,
        seed=attack.seed,
        target=attack.target,
        clean=percent(clean, n),
        robust=percent(robust, n),
        clean_interval=wilson(clean, n),
        interval=wilson(robust, n),
        robust_is=attack.robust_is,
        parts={
            p: percent(int(((answers.ends == STANDS) | (answers.ends > i)).sum()), n)
            for i, p in enumerate(attack.stages)
        },
        per_class=per_class(pictures, answers),
        verdict="unchecked" if not checks else "suspicious" if raised else "clear",
        suspicions=tuple(c.to_json() for c in raised),
        checks=tuple(c.to_json() for c in checks),
        notes=attack.notes(len(pictures.classes)),
        skipped=tuple(reason for _, reason in pictures.skipped),
        seconds=round(answers.seconds, 2),
        versions=versions(),
        hardware=hardware(),
    )
    if folder is not None and processes().is_main_process:
        write_json(Path(folder) / "gallery" / score.file_name, answers.examples)
    return score


def per_class(pictures: LabelledImages, answers: Answers) -> dict[str, tuple[int, int, int]]:
    """Class -> (pictures, right, robust), for the classes that have pictures."""
    found = {}
    for number, name in enumerate(pictures.classes):
        own = answers.labels == number
        if own.any():
            found[name] = tuple(int((own & part).sum()) for part in (own, answers.clean, answers.robust))
    return found


@torch.no_grad()
def examine(
    model: ZeroShotClassifier,
    pictures: LabelledImages,
    attack: EvaluationAttack,
    answers: Answers,
    *,
    probe: int,
    baseline: ZeroShotClassifier | None,
    journal: Journal,
) -> list[Check]:
    """Run all checks on a few pictures. The processes of a launch share the checks."""
    device, collate = model.device, Collator(model.processor, native=attack.native)

    def batch(chosen: torch.Tensor) -> Batch:
        rows = [pictures[i] for i in answers.indices[chosen].tolist()]
        # At native resolution one batch holds one size: that of the first.
        rows = [r for r in rows if not collate.native or r["image"].size == rows[0]["image"].size]
        if not rows:
            side = model.image_size
            return Batch(
                torch.zeros(0, 3, side, side, device=device), *(torch.zeros(0, dtype=torch.int64, device=device),) * 2
            )
        found = {k: v.to(device) for k, v in collate(rows).items()}
        return Batch(found["images"], found["image_ids"], found["labels"])

    right, standing = (batch(_some(mask, probe)) for mask in (answers.clean, answers.robust))

    def undefended() -> tuple[int, int]:
        some = batch(_some(torch.ones_like(answers.clean), 2 * probe))
        known = baseline.classify(some.images).logits.argmax(1) == some.labels
        first = replace(attack, name=attack.stages[0])  # if that is enough, the rest of `standard` would be of no use
        _, by = first.run(baseline, some.images[known], some.image_ids[known], some.labels[known])
        if int((by < 0).sum()) > BASELINE * int(known.sum()):
            _, by = attack.run(baseline, some.images[known], some.image_ids[known], some.labels[known])
        return int(known.sum()), int((by < 0).sum())

    def logits_fn(x: Images) -> Logits:
        # No picture may be right, or none may stand, and the towers take no empty batch.
        return model.classify(x).logits if len(x) else x.new_zeros(0, len(pictures.classes))

    n = len(answers.ends)
    seen = Probe(
        model=model,
        logits_fn=logits_fn,
        standing=standing,
        right=right,
        threat=attack.threat,
        seed=attack.seed,
        clean=percent(int(answers.clean.sum()), n),
        robust=percent(int(answers.robust.sum()), n),
        n=n,
        classes=len(pictures.classes),
        outside=answers.outside,
        broken_by={part: int((answers.ends == i).sum()) for i, part in enumerate(attack.stages)},
        target=None if attack.target is None else pictures.classes.index(attack.target),
        baseline=undefended if baseline is not None else None,
    )
    rows = f"{answers.rows} {images_digest(answers.labels)}"
    tasks = ((f"check {check.__name__} {rows}", lambda check=check: check(seen).to_json()) for check in CHECKS)
    return [Check(**finding) for finding in shared(tasks, journal)]


def _some(mask: torch.Tensor, count: int) -> torch.Tensor:
    """The places of at most `count` pictures out of those chosen, spread at random, the same ones every time."""
    places = mask.nonzero()[:, 0]
    return places[torch.from_numpy(np.random.default_rng(1).permutation(len(places))[:count].copy())]
