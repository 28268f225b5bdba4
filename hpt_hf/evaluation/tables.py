"""Reports: Scores as JSON files, and the tables and pictures made of them."""

from __future__ import annotations

from collections.abc import Sequence

from hpt_hf.evaluation.result import EvalResult, mean
from hpt_hf.utils import markdown


def result_table(scores: Sequence[EvalResult]) -> str:
    """One row a EvalResult, with intervals and verdict; the last rows are each model's unweighted mean over the sets.

    Raises:
        ValueError: no Scores, or Scores of different protocols, attacks or threats: their numbers may not stand in one table.
    """
    if not scores:
        raise ValueError("no Scores: there is nothing to make a table of")
    kinds = {s.question for s in scores}
    if len(kinds) > 1:
        raise ValueError(
            f"one table holds one protocol, attack and threat, these Scores have {sorted(kinds)}: make a table of each"
        )
    models = list(dict.fromkeys((s.model, s.fingerprint) for s in scores))
    rows = [
        (
            s.dataset,
            s.model,
            s.n,
            s.classes,
            s.clean,
            "{:.1f}–{:.1f}".format(*s.clean_interval),
            s.robust,
            "{:.1f}–{:.1f}".format(*s.interval),
            s.verdict,
        )
        for s in scores
    ]
    for model in models:
        part = [s for s in scores if (s.model, s.fingerprint) == model]
        doubted = sum(s.verdict == "suspicious" for s in part)
        means = mean(part)
        rows.append(
            (
                "mean",
                model[0],
                sum(s.n for s in part),
                "",
                means["clean"],
                "",
                means["robust"],
                "",
                f"{doubted} suspicious" if doubted else "",
            )
        )
    header = ("data set", "model", "n", "classes", "clean %", "95%", "robust %", "95%", "verdict")
    if len(models) == 1:  # its name stands in the heading
        header, *rows = ((row[0], *row[2:]) for row in (header, *rows))
    return markdown(header, rows)
