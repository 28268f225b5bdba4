"""Markdown tables of results."""

from __future__ import annotations

from collections.abc import Sequence

from hpt_hf.evaluation.result import EvalResult, told_apart
from hpt_hf.evaluation.statistics import mean
from hpt_hf.utils import markdown


def result_table(results: Sequence[EvalResult]) -> str:
    """One row a result, with intervals and verdict; the last rows are each model's unweighted mean over data sets.

    Raises:
        ValueError: no results, or results of different questions, whose numbers may not stand in one table.
    """
    if not results:
        raise ValueError("no results: there is nothing to make a table of")
    if len(questions := {str(r.question) for r in results}) > 1:
        raise ValueError(f"one table holds one protocol, attack and threat model, these are {sorted(questions)}")
    results, rows = told_apart(results), []
    for r in results:
        clean, robust = ("{:.1f}–{:.1f}".format(*interval) for interval in (r.clean_interval, r.interval))
        rows.append((r.dataset, r.model, r.n, r.classes, r.clean, clean, r.robust, robust, r.verdict))
    models = list(dict.fromkeys((r.model, r.fingerprint) for r in results))
    for model in models:
        part = [r for r in results if (r.model, r.fingerprint) == model]
        means, doubted = mean(part), sum(r.verdict == "suspicious" for r in part)
        verdict = f"{doubted} suspicious" if doubted else ""
        rows.append(("mean", model[0], sum(r.n for r in part), "", means["clean"], "", means["robust"], "", verdict))
    header = ("data set", "model", "n", "classes", "clean %", "95%", "robust %", "95%", "verdict")
    if len(models) == 1:  # its name stands in the heading
        header, *rows = ((row[0], *row[2:]) for row in (header, *rows))
    return markdown(header, rows)
