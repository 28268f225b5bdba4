"""`hpt-hf compare RESULTS …`: models on the same images, with paired differences, seeds, and the Pareto front."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import pandas as pd

from hpt_hf.commands.parser import HfArg, RecipeError, exit_on_user_error, parse
from hpt_hf.evaluation.comparison import KINDS, Compared, Difference, compare, named, table
from hpt_hf.evaluation.result import read_results_of
from hpt_hf.evaluation.statistics import grouped
from hpt_hf.evaluation.tables import latex
from hpt_hf.utils import write_text

if TYPE_CHECKING:
    from matplotlib.figure import Figure


@dataclass
class CompareArguments:
    results: list[str] = HfArg(
        help="folders of evaluations or models; models whose names differ in a last `seedN` are one"
    )
    reference: str | None = HfArg(default=None, help="differences are taken from it; left out: the first")
    output_dir: str | None = HfArg(default=None, help="for comparison.md, .csv, .tex and .svg")


def run(args: CompareArguments) -> str:
    """The comparison of each question in Markdown; the same as files, if asked."""
    results = [result for folder in args.results for result in read_results_of(folder)]
    if not results:
        raise RecipeError(f"results: got {', '.join(args.results)}, expected folders with results/*.json")
    questions = grouped(results, lambda r: str(r.question))
    compared = {question: compare(part, args.reference) for question, part in questions.items()}
    text = "\n\n".join(f"## {question}\n\n{table(rows)}" for question, rows in compared.items())
    if args.output_dir:
        folder, frame = Path(args.output_dir), as_frame(compared)
        write_text(folder / "comparison.md", text + "\n")
        write_text(folder / "comparison.csv", frame.to_csv(index=False))
        write_text(folder / "comparison.tex", latex(frame))
        front(compared, folder / "comparison.svg")
    return text


def as_frame(compared: dict[str, list[Compared]]) -> pd.DataFrame:
    """All questions in one table of numbers."""
    rows = []
    for question, part in compared.items():
        for c in part:
            row = {"question": question, "model": c.model, "seeds": c.seeds, "sets": c.sets, "n": c.n}
            for kind, spread in zip(KINDS, c.spread, strict=True):
                gap = c.against[kind] if c.against else Difference(0.0, 0.0, 0.0)
                row |= {kind: getattr(c, kind), f"{kind}_sd": spread, f"{kind}_difference": gap.value}
                row |= {f"{kind}_low": gap.low, f"{kind}_high": gap.high}
            rows.append(row | {"dominated_by": ", ".join(c.dominated_by)})
    return pd.DataFrame(rows)


def front(compared: dict[str, list[Compared]], file: Path) -> None:
    """Clean over robust accuracy, a panel a question: hollow marks are dominated."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8 * len(compared), 4.5), layout="constrained")
    panels = figure.subplots(1, len(compared), squeeze=False)[0]
    for axes, (question, rows) in zip(panels, compared.items(), strict=True):
        names = named(rows)
        for number, row in enumerate(rows, 1):  # names of neighbours would overlap
            color = "tab:blue"
            style = {"mfc": "white" if row.dominated_by else color, "mec": color, "ecolor": color, "capsize": 2}
            x, y = row.spread
            style |= {"xerr": x or None, "yerr": y or None, "label": f"{number} {names[row.model]}"}
            axes.errorbar(row.clean, row.robust, fmt="o", **style)
            axes.annotate(str(number), (row.clean, row.robust), xytext=(5, 4), textcoords="offset points", size=8)
        axes.set(xlabel="clean accuracy %", ylabel="robust accuracy %")
        axes.set_title(question, fontsize=9)
        axes.margins(0.1)
        axes.legend(fontsize=7, loc="upper left", bbox_to_anchor=(1, 1), frameon=False)
        axes.grid(alpha=0.3)
    save(figure, file)


def save(figure: Figure, file: Path) -> None:
    """The same picture is the same SVG."""
    import matplotlib

    file.parent.mkdir(parents=True, exist_ok=True)
    with matplotlib.rc_context({"svg.hashsalt": "hpt_hf"}):
        figure.savefig(file, metadata={"Date": None})


def main(argv: list[str] | None = None) -> None:
    with exit_on_user_error("hpt-hf compare"):
        (args,) = parse((CompareArguments,), argv, positional=("results",))
        print(run(args))
