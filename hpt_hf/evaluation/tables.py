"""Tables of results: Markdown, and whatever pandas writes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import pandas as pd

from hpt_hf.evaluation.result import EvalResult, told_apart
from hpt_hf.evaluation.statistics import grouped, mean
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
    models = grouped(results, lambda r: (r.model, r.fingerprint))
    for (model, _), part in models.items():
        means, doubted = mean(part), sum(r.verdict == "suspicious" for r in part)
        verdict = f"{doubted} suspicious" if doubted else ""
        rows.append(("mean", model, sum(r.n for r in part), "", means["clean"], "", means["robust"], "", verdict))
    header = ("data set", "model", "n", "classes", "clean %", "95%", "robust %", "95%", "verdict")
    if len(models) == 1:  # its name stands in the heading
        header, *rows = ((row[0], *row[2:]) for row in (header, *rows))
    return markdown(header, rows)


@dataclass(frozen=True)
class Results(Sequence[EvalResult]):
    """What an evaluation returns: its results in order, and tables of them."""

    results: tuple[EvalResult, ...]

    def __getitem__(self, index):
        return self.results[index]

    def __len__(self) -> int:
        return len(self.results)

    def to_pandas(self) -> pd.DataFrame:
        """One row a result: what was asked, accuracies in percent with their 95% intervals, verdict."""
        rows = []
        for r in self.results:
            row = {"model": r.model, "dataset": r.dataset} | r.question._asdict() | {"n": r.n}
            for name, value, interval in (("clean", r.clean, r.clean_interval), ("robust", r.robust, r.interval)):
                row |= {name: value, f"{name}_low": interval[0], f"{name}_high": interval[1]}
            rows.append(row | {"verdict": r.verdict, "images_digest": r.images_digest, "fingerprint": r.fingerprint})
        return pd.DataFrame(rows)

    def to_markdown(self) -> str:
        """A table a question, with its heading, as in report.md."""
        parts = grouped(self.results, lambda r: str(r.question))
        return "\n\n".join(f"{question}\n\n{result_table(part)}" for question, part in parts.items())

    def to_latex(self) -> str:
        """One booktabs table of all results."""
        shown = ["model", "dataset", "attack", "eps", "n", "clean", "robust", "robust_low", "robust_high", "verdict"]
        return latex(self.to_pandas()[shown])


def latex(table: pd.DataFrame) -> str:
    """booktabs, one decimal, special characters escaped."""
    table = table.rename(columns=lambda name: name.replace("_", " "))
    return table.to_latex(index=False, escape=True, float_format="%.1f")
