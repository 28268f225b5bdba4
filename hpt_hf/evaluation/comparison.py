"""Models compared on the same images: paired differences with intervals, means over sets and seeds, the Pareto front."""

from __future__ import annotations

import math
import os
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from hpt_hf.evaluation.result import EvalResult
from hpt_hf.evaluation.statistics import grouped
from hpt_hf.utils import markdown

KINDS = ("clean", "robust")


@dataclass(frozen=True)
class Difference:
    """Percentage points, with the 95% interval over images."""

    value: float
    low: float
    high: float

    def __str__(self) -> str:
        return f"{self.value:+.1f} ({self.low:+.1f} to {self.high:+.1f})"


@dataclass(frozen=True)
class Compared:
    """One model over all sets and seeds; `against`: its paired differences from the reference, None of itself."""

    model: str
    seeds: int
    sets: int
    n: int
    clean: float
    robust: float
    spread: tuple[float, float]  # standard deviation over seeds of both means; 0 of one
    against: dict[str, Difference] | None
    dominated_by: tuple[str, ...]  # better in one and no worse in the other, beyond the interval of the better one


def without_seed(model: str) -> str:
    """`runs/tecoa/seed1` and `runs/tecoa/seed2` are one model, `runs/tecoa`."""
    return re.sub(r"[/_-]?seed[_-]?\d+$", "", model.rstrip("/")) or model


def right(result: EvalResult, kind: str) -> np.ndarray:
    """(n,) 1 for each image that is right, clean or under attack.

    Raises:
        ValueError: the result does not say how each image ended, as older ones do not, or says it otherwise.
    """
    counts = (len(result.ends), result.n - result.ends.count("w"), result.ends.count("r"))
    if counts != (result.n, result.n_clean, result.n_robust):
        raise ValueError(f"{result.model} on {result.dataset} does not say how each image ended. Fix: evaluate again")
    ends = np.array(list(result.ends))
    return (ends == "r" if kind == "robust" else ends != "w").astype(float)


def shares(results: Sequence[EvalResult], kind: str) -> dict[str, np.ndarray]:
    """Data set -> (n,) for each image the share of seeds that are right."""
    by_set = grouped(results, lambda r: r.dataset)
    return {name: np.mean([right(r, kind) for r in part], axis=0) for name, part in by_set.items()}


def paired(ours: Sequence[EvalResult], theirs: Sequence[EvalResult], kind: str) -> Difference:
    """The unweighted mean over data sets of ours - theirs, image by image.

    The interval is Wald's for paired proportions with half a pair added to each cell (Agresti & Min 2005), so that sets
    without a differing image do not count as certain; sets are fixed, images a sample.
    """
    a, b = shares(ours, kind), shares(theirs, kind)
    means, variances = [], []
    for name in a:
        d = a[name] - b[name]
        n = len(d) + 2
        means.append(d.mean())
        variances.append(((d**2).sum() + 1) / n**2 - d.sum() ** 2 / n**3)
    value, half = 100 * float(np.mean(means)), 196 * math.sqrt(sum(variances)) / len(means)
    return Difference(round(value, 2), round(value - half, 2), round(value + half, 2))


def compare(results: Sequence[EvalResult], reference: str | None = None) -> list[Compared]:
    """All models of one question, the best mean of clean and robust accuracy first.

    Args:
        reference: the model, by its name or its folder's, that differences are taken from; None: the first.

    Raises:
        ValueError: fewer than two models, an unknown reference, or results that may not be compared.
    """
    models = grouped(results, lambda r: without_seed(r.model))
    check(models)
    wanted = [model for model in models if reference in (None, model, Path(model).name)]
    if reference is not None and len(wanted) != 1:
        raise ValueError(f"reference: got {reference!r}, expected one of {', '.join(models)}")
    rows = []
    for model, part in models.items():
        gaps = {o: [paired(models[o], part, kind) for kind in KINDS] for o in models if o != model}
        worse = [o for o, both in gaps.items() if any(g.low > 0 for g in both) and all(g.value >= 0 for g in both)]
        seeds = [*_by_seed(part).values()]
        means = [[np.mean([getattr(r, kind) for r in run]) for kind in KINDS] for run in seeds]
        clean, robust = (float(v) for v in np.mean(means, axis=0))
        spread = tuple(float(v) for v in np.std(means, axis=0, ddof=1)) if len(means) > 1 else (0.0, 0.0)
        against = None if model == wanted[0] else {kind: paired(part, models[wanted[0]], kind) for kind in KINDS}
        counts = (len(seeds), len(seeds[0]), sum(r.n for r in seeds[0]))
        rows.append(Compared(model, *counts, clean, robust, spread, against, tuple(worse)))
    return sorted(rows, key=lambda row: -(row.clean + row.robust))


def check(models: dict[str, list[EvalResult]]) -> None:
    """Raise ValueError for models that were not asked the same of the same images."""
    if len(models) < 2:
        raise ValueError(f"compare: got results of {list(models)}, expected two models or more")
    everyone = [r for part in models.values() for r in part]
    if len(questions := {str(r.question) for r in everyone}) > 1:
        raise ValueError(f"compare: got {sorted(questions)}, expected one attack, eps and protocol")
    sets = grouped(everyone, lambda r: r.dataset)
    for name, part in sets.items():
        if len({(r.n, *((label, counts[0]) for label, counts in r.per_class.items())) for r in part}) > 1:
            raise ValueError(f"compare: {name} holds other images or classes for one model than for another")
    for model, part in models.items():
        for seed, run in _by_seed(part).items():
            if missing := sets.keys() - {r.dataset for r in run}:
                raise ValueError(f"compare: {model} ({seed}) has no result on {sorted(missing)[0]}. Fix: evaluate it")


def _by_seed(results: Sequence[EvalResult]) -> dict[str, list[EvalResult]]:
    return grouped(results, lambda r: f"{r.model} {r.fingerprint}")


def named(rows: Sequence[Compared]) -> dict[str, str]:
    """Each model's last name, if no other has it; else its path behind the folders that all share."""
    parts = [Path(row.model).parts for row in rows]
    names = [p[-1] for p in parts]
    if len(set(names)) < len(names):
        shared = min(len(os.path.commonprefix(parts)), *(len(p) - 1 for p in parts))
        names = ["/".join(p[shared:]) for p in parts]
    return {row.model: name for row, name in zip(rows, names, strict=True)}


def table(rows: Sequence[Compared]) -> str:
    """Markdown: means, the spread over seeds, paired differences with intervals, and who is dominated by whom."""
    names, cells = named(rows), []
    for row in rows:
        means = [
            f"{value:.1f}" + (f" ± {spread:.1f}" if row.seeds > 1 else "")
            for value, spread in zip((row.clean, row.robust), row.spread, strict=True)
        ]
        gaps = [str(row.against[kind]) if row.against else "reference" for kind in KINDS]
        front = "dominated by " + ", ".join(names[m] for m in row.dominated_by) if row.dominated_by else "on the front"
        cells.append((names[row.model], row.seeds, row.sets, row.n, *means, *gaps, front))
    header = ("model", "seeds", "sets", "n", "clean %", "robust %", "clean, paired", "robust, paired", "front")
    return markdown(header, cells)
