"""Transfer: how models answer pictures that were attacked for another; proxy adversarial robustness (arXiv 2601.12865), before any training.

A model that stays right on what fools the student, without being robust itself, can teach it. `recipes/transfer.py` measures all against all, or
with --student ranks the candidates.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

import torch

from hpt_hf.attacks.suite import EvaluationAttack
from hpt_hf.attacks.threat_model import ThreatModel
from hpt_hf.commands.common import ImageArguments, load_model, on_device, open_sets
from hpt_hf.commands.parser import RecipeError, exit_on_user_error, parse
from hpt_hf.data.collator import Collator
from hpt_hf.data.dataset import LabelledImages
from hpt_hf.evaluation.evaluator import batches
from hpt_hf.evaluation.html_report import write_html_report
from hpt_hf.evaluation.statistics import percent, wilson
from hpt_hf.models.zero_shot import ZeroShotClassifier
from hpt_hf.utils import markdown, write_json


@dataclass
class TransferArguments(ImageArguments):
    """What `recipes/transfer.py` measures: every model on pictures attacked for others."""

    models: list[str] = field(default_factory=list, metadata={"help": "folders or Hub ids"})
    student: str | None = field(
        default=None, metadata={"help": "pre-flight: attack only for this one, and rank the models as its proxies"}
    )
    attack_steps: int | None = field(default=None, metadata={"help": "of PGD; left out: 20"})
    eps: str = "1/255"


@dataclass(frozen=True)
class Transfer:
    """Accuracy of `judge` on pictures attacked for `source`, in percent, with Wilson's 95% interval.

    Args:
        kl: mean KL( p_judge(x_adv) || p_judge(x) ) in nats. Near 0, HPT and GA are the same objective.
    """

    source: str
    judge: str
    dataset: str
    n: int
    clean: float
    adversarial: float
    interval: tuple[float, float]
    kl: float
    attack: str
    norm: str
    eps: str
    protocol: str

    @property
    def kept(self) -> float:
        """Share of its accuracy that the judge keeps, in percent."""
        return 100 * self.adversarial / self.clean if self.clean else 0.0

    def to_json(self) -> dict:
        return asdict(self)


@torch.no_grad()
def transfer(
    source: tuple[str, ZeroShotClassifier],
    judges: Mapping[str, ZeroShotClassifier],
    pictures: LabelledImages,
    attack: EvaluationAttack,
    *,
    batch_size: int = 128,
    limit: int | None = None,
) -> list[Transfer]:
    """Attack every picture for `source` with PGD at full length, then ask all judges, the source among them if it is one.

    The pictures are cut as the source's processor cuts them, and each judge resizes for itself.

    Raises:
        ValueError: the set has no labels.
    """
    if not pictures.labelled:
        raise ValueError(f"{pictures.name} has no labels: accuracy cannot be measured on it")
    source_name, crafted_on = source
    for model in (crafted_on, *judges.values()):
        model.eval()
        model.set_classes(pictures.classes, pictures.templates)
    collate = Collator(crafted_on.processor, native=attack.native)
    n, clean, adversarial, kl = 0, dict.fromkeys(judges, 0), dict.fromkeys(judges, 0), dict.fromkeys(judges, 0.0)
    for batch in batches(pictures, collate, batch_size, limit):
        batch = {k: v.to(crafted_on.device) for k, v in batch.items()}
        perturbed = attack.craft(crafted_on, batch["images"], batch["image_ids"], batch["labels"])
        n += len(perturbed)
        for name, judge in judges.items():
            before, after = judge.classify(batch["images"]).logits, judge.classify(perturbed).logits
            clean[name] += int((before.argmax(1) == batch["labels"]).sum())
            adversarial[name] += int((after.argmax(1) == batch["labels"]).sum())
            log_after = after.log_softmax(1)
            kl[name] += float((log_after.exp() * (log_after - before.log_softmax(1))).sum())
    crafted = str(attack)
    return [
        Transfer(
            source=source_name,
            judge=name,
            dataset=pictures.name,
            n=n,
            clean=percent(clean[name], n),
            adversarial=percent(adversarial[name], n),
            interval=wilson(adversarial[name], n),
            kl=round(kl[name] / n, 4),
            attack=crafted,
            norm=attack.threat.norm,
            eps=str(attack.threat.eps),
            protocol=attack.protocol,
        )
        for name in judges
    ]


def matrix(
    models: Mapping[str, ZeroShotClassifier],
    sets: Sequence[LabelledImages],
    attack: EvaluationAttack,
    *,
    sources: Sequence[str] | None = None,
    **sizes,
) -> list[Transfer]:
    """`transfer` from each of `sources` (None: of all models) to all models, set by set."""
    names = list(models) if sources is None else sources
    return [
        found
        for s in names
        for pictures in sets
        for found in transfer((s, models[s]), models, pictures, attack, **sizes)
    ]


def means(found: Sequence[Transfer]) -> dict[tuple[str, str], dict[str, float]]:
    """(source, judge) -> unweighted means over sets of clean, adversarial and kl, the share kept, and the number of pictures."""
    cells: dict[tuple[str, str], list[Transfer]] = {}
    for one in found:
        cells.setdefault((one.source, one.judge), []).append(one)
    result = {}
    for cell, part in cells.items():
        mean = {k: sum(getattr(t, k) for t in part) / len(part) for k in ("clean", "adversarial", "kl")}
        result[cell] = mean | {
            "kept": 100 * mean["adversarial"] / max(mean["clean"], 1e-9),
            "n": sum(t.n for t in part),
        }
    return result


def ranking(found: Sequence[Transfer], student: str) -> list[tuple[str, dict[str, float]]]:
    """Candidate proxies for a student, best first: by accuracy on its adversarial pictures. The student itself is none."""
    cells = {judge: cell for (source, judge), cell in means(found).items() if source == student and judge != student}
    return sorted(cells.items(), key=lambda item: -item[1]["adversarial"])


def run(args: TransferArguments) -> dict:
    """Measure, write `transfer.json` and the report of the folder; returns what the file holds.

    Processes of a launch all do the same: start one.
    """
    names = list(dict.fromkeys([*([args.student] if args.student else []), *args.models]))
    if len(names) < 2:
        raise RecipeError(
            "name at least two models: --models A B …, or --student S --models P1 P2 … to rank proxies for S"
        )
    attack = EvaluationAttack(ThreatModel(args.norm, args.eps), "pgd", args.attack_steps, args.protocol, args.seed)
    sets = open_sets(args)
    models = {name: on_device(load_model(name)) for name in names}
    sources = [args.student] if args.student else names
    found = matrix(models, sets, attack, sources=sources, batch_size=args.batch_size, limit=args.limit)
    cells = means(found)
    result = {
        "title": f"{attack}, {attack.threat}, protocol “{attack.protocol}”, {len(sets)} sets",
        "student": args.student,
        "sources": sources,
        "judges": names,
        "adversarial": [[round(cells[s, j]["adversarial"], 2) for j in names] for s in sources],
        "cells": [
            {"source": s, "judge": j} | {k: round(v, 4) for k, v in cell.items()} for (s, j), cell in cells.items()
        ],
        "ranking": [judge for judge, _ in ranking(found, args.student)] if args.student else None,
        "sets": [t.to_json() for t in found],
    }
    result["table"] = ranking_table(found, args.student) if args.student else matrix_table(found)
    write_json(Path(args.output_dir) / "transfer.json", result)
    write_html_report(args.output_dir)
    return result


def matrix_table(found: Sequence[Transfer]) -> str:
    """Accuracy of each model (column) on pictures attacked for another (row), and the worst of the surrogates: the other models' attacks."""
    cells = means(found)
    sources, judges = (list(dict.fromkeys(names)) for names in zip(*cells, strict=True))
    rows = [("(clean)", *(cells[sources[0], j]["clean"] for j in judges))]
    rows += [(s, *(cells[s, j]["adversarial"] for j in judges)) for s in sources]
    worst = [[cells[s, j]["adversarial"] for s in sources if s != j] for j in judges]
    return markdown(
        ("attacked for \\ asked", *judges), [*rows, ("worst surrogate", *(min(w) if w else "" for w in worst))]
    )


def ranking_table(found: Sequence[Transfer], student: str) -> str:
    """Candidate proxies, best first."""
    rows = [
        (judge, c["clean"], c["adversarial"], c["kept"], f"{c['kl']:.2f}", str(c["n"]))
        for judge, c in ranking(found, student)
    ]
    own = means(found)[student, student]
    rows.append(
        (f"({student} itself)", own["clean"], own["adversarial"], own["kept"], f"{own['kl']:.2f}", str(own["n"]))
    )
    return markdown((f"proxy for {student}", "clean %", "on its attack %", "kept %", "KL, nats", "n"), rows)


def main(argv: list[str] | None = None) -> None:
    with exit_on_user_error("hpt-hf transfer"):
        (args,) = parse((TransferArguments,), argv)
        result = run(args)
    print(result["table"])
