"""`hpt-hf transfer`: how models answer images that were attacked for another (arXiv 2601.12865), before any training.

A model that stays right on what fools the student, without being robust itself, can teach it: --model STUDENT
--proxies A B … ranks the candidates; --models A B … measures all against all.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch

from hpt_hf.attacks.suite import EvaluationAttack
from hpt_hf.commands.common import ImageArguments, ball, load_model, on_device, open_sets
from hpt_hf.commands.parser import HfArg, RecipeError, exit_on_user_error, parse
from hpt_hf.data.collator import Collator
from hpt_hf.data.dataset import LabelledImages
from hpt_hf.evaluation.evaluator import batches, sample
from hpt_hf.evaluation.html_report import write_html_report
from hpt_hf.evaluation.statistics import grouped, percent, wilson
from hpt_hf.models.zero_shot import ZeroShotClassifier
from hpt_hf.utils import markdown, progress_bar, write_json


@dataclass
class TransferArguments(ImageArguments):
    output_dir: str = HfArg(default="outputs/transfer", help="for transfer.json and report.html")
    model: str | None = HfArg(default=None, help="the student that is attacked; needs --proxies")
    proxies: list[str] = HfArg(default_factory=list, help="candidates for its proxy, to be ranked")
    models: list[str] = HfArg(default_factory=list, help="instead: all against all")
    attack_steps: int | None = HfArg(default=None, help="of PGD; default: 20")
    eps: str = "1/255"


Models = Mapping[str, ZeroShotClassifier]
Cells = Mapping[tuple[str, str], dict[str, float]]  # of (source, judge)


@dataclass(frozen=True)
class Transfer:
    """Accuracy of `judge` on images attacked for `source`, in percent, with Wilson's 95% interval."""

    source: str
    judge: str
    dataset: str
    n: int
    clean: float
    adversarial: float
    interval: tuple[float, float]
    kl: float  # mean KL( p_judge(x_adv) || p_judge(x) ) in nats; near 0, HPT and GA are the same objective


@torch.no_grad()
def transfer(
    source: str, models: Models, images: LabelledImages, attack: EvaluationAttack, *, batch_size=128, limit=None
) -> list[Transfer]:
    """Attack every image for `models[source]` with PGD at full length, then ask all models.

    Images are cut as the source's processor cuts them, and each model resizes for itself. ValueError without labels.
    """
    if not images.labelled:
        raise ValueError(f"{images.name} has no labels: accuracy cannot be measured on it")
    for model in models.values():
        model.eval()
        model.set_classes(images.classes, images.templates)
    attacked, n = models[source], len(sample(len(images), limit))
    clean, adversarial, kl = Counter(), Counter(), Counter()
    with progress_bar(f"{images.name}, attacked for {source}", n, "image") as bar:
        for batch in batches(images, Collator(attacked.processor, native=attack.native), batch_size, limit):
            batch = {k: v.to(attacked.device) for k, v in batch.items()}
            perturbed = attack.craft(attacked, batch["images"], batch["image_ids"], batch["labels"])
            for name, model in models.items():
                before, after = (model.classify(x).logits.log_softmax(1) for x in (batch["images"], perturbed))
                clean[name] += int((before.argmax(1) == batch["labels"]).sum())
                adversarial[name] += int((after.argmax(1) == batch["labels"]).sum())
                kl[name] += float((after.exp() * (after - before)).sum())
            bar.update(len(perturbed))
    found = []
    for name in models:
        accuracies = percent(clean[name], n), percent(adversarial[name], n), wilson(adversarial[name], n)
        found.append(Transfer(source, name, images.name, n, *accuracies, round(kl[name] / n, 4)))
    return found


def matrix(models: Models, sets: Sequence[LabelledImages], attack, *, sources=None, **sizes) -> list[Transfer]:
    """`transfer` from each of `sources` (None: of all models) to all models, set by set."""
    return [t for s in sources or models for images in sets for t in transfer(s, models, images, attack, **sizes)]


def means(found: Sequence[Transfer]) -> Cells:
    """Unweighted means over data sets, the share of its accuracy that the judge keeps (%), and n."""
    result = {}
    for cell, part in grouped(found, lambda t: (t.source, t.judge)).items():
        mean = {k: sum(getattr(t, k) for t in part) / len(part) for k in ("clean", "adversarial", "kl")}
        kept = 100 * mean["adversarial"] / mean["clean"] if mean["clean"] else 0.0
        result[cell] = mean | {"kept": kept, "n": sum(t.n for t in part)}
    return result


def ranking(cells: Cells, student: str) -> list[str]:
    """Candidate proxies, best first: by accuracy on the student's adversarial images."""
    judges = [judge for source, judge in cells if source == student != judge]
    return sorted(judges, key=lambda judge: -cells[student, judge]["adversarial"])


def run(args: TransferArguments) -> dict:
    """Measure, write `transfer.json` and the report of the folder; returns what the file holds."""
    if not (args.model and args.proxies or args.models) or (args.model or args.proxies) and args.models:
        raise RecipeError("expected --model STUDENT --proxies A B …, to rank proxies, or --models A B …, all with all")
    student = args.model
    names = list(dict.fromkeys([student, *args.proxies] if student else args.models))
    if len(names) < 2:
        raise RecipeError(f"transfer is between models: got {names[0]} alone, expected at least two")
    attack = EvaluationAttack(ball(args.norm, args.eps), "pgd", args.attack_steps, args.protocol, args.seed)
    sets = open_sets(args)
    models = {name: on_device(load_model(name)) for name in names}
    sources = [student] if student else names
    found = matrix(models, sets, attack, sources=sources, batch_size=args.batch_size, limit=args.limit)
    cells = means(found)
    result = {
        "title": f"{attack}, {attack.threat}, protocol “{attack.protocol}”, {len(sets)} sets",
        "student": student,
        "sources": sources,
        "judges": names,
        "cells": [{"source": s, "judge": j} | {k: round(v, 4) for k, v in c.items()} for (s, j), c in cells.items()],
        "ranking": ranking(cells, student) if student else None,
        "sets": [asdict(t) for t in found],
        "table": ranking_table(cells, student) if student else matrix_table(cells),
    }
    write_json(Path(args.output_dir) / "transfer.json", result)
    write_html_report(args.output_dir)
    return result


def matrix_table(cells: Cells) -> str:
    """Accuracy of each model (column) on images attacked for another (row), and under the worst of the other models."""
    names = list(dict.fromkeys(source for source, _ in cells))
    rows = [("(clean)", *(cells[names[0], j]["clean"] for j in names))]
    rows += [(s, *(cells[s, j]["adversarial"] for j in names)) for s in names]
    worst = [min(cells[s, j]["adversarial"] for s in names if s != j) for j in names]
    return markdown(("attacked for \\ asked", *names), [*rows, ("worst surrogate", *worst)])


def ranking_table(cells: Cells, student: str) -> str:
    """Candidate proxies, best first, and the student itself."""
    named = [(judge, cells[student, judge]) for judge in [*ranking(cells, student), student]]
    rows = [(j, c["clean"], c["adversarial"], c["kept"], f"{c['kl']:.2f}", str(c["n"])) for j, c in named]
    rows[-1] = (f"({student} itself)", *rows[-1][1:])
    return markdown((f"proxy for {student}", "clean %", "on its attack %", "kept %", "KL, nats", "n"), rows)


def main(argv: list[str] | None = None) -> None:
    with exit_on_user_error("hpt-hf transfer"):
        (args,) = parse((TransferArguments,), argv)
        result = run(args)
    print(result["table"])
