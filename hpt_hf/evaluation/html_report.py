"""The page: all Scores of a folder as report.md and as one self-contained report.html, with plots, verdicts and attacked pictures."""

from __future__ import annotations

import io
import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import jinja2

from hpt_hf.attacks.threat_model import parse_eps
from hpt_hf.evaluation.result import EvalResult, mean, read_results
from hpt_hf.evaluation.tables import result_table
from hpt_hf.utils import write_text

COLOURS = ("#1f77b4", "#d62728", "#2ca02c", "#9467bd", "#ff7f0e", "#17becf", "#8c564b", "#7f7f7f")


EXAMPLES = 12  # shown at most


def write_html_report(folder: str | Path) -> Path:
    """`report.md` and `report.html` from `scores/`, `gallery/` and `transfer.json` of a folder. Returns the page.

    Raises:
        ValueError: no Scores and no transfer there, or Scores of another version.
    """
    folder = Path(folder)
    scores = sorted(
        read_results(folder / "scores"), key=lambda s: (*s.question[:3], parse_eps(s.eps), s.model, s.dataset)
    )
    examples = gallery(folder, scores)
    scores = labelled(scores)
    crossed = (
        json.loads((folder / "transfer.json").read_text(encoding="utf-8"))
        if (folder / "transfer.json").is_file()
        else None
    )
    if not scores and not crossed:
        raise ValueError(f"{folder} holds no scores/*.json and no transfer.json: nothing to report")
    questions = dict.fromkeys(s.question for s in scores)
    tables = [(str(q), [s for s in scores if s.question == q]) for q in questions]
    text = [
        f"# {', '.join(dict.fromkeys(s.model for s in scores)) or 'Transfer'}",
        "95% intervals: Wilson. Means: unweighted over data sets.",
    ]
    for heading, part in tables:
        text += [f"## {heading}", result_table(part)]
        text += [f"- {s.dataset} ({s.model}): {d['name']}: {d['seen']}" for s in part for d in s.suspicions]
        text += [f"- {note}" for note in dict.fromkeys(n for s in part for n in s.notes)]
    skipped = sum(len(s.skipped) for s in scores)
    text += [f"{skipped} unreadable pictures were skipped; the EvalResult files list them."] if skipped else []
    text += ["## Transfer", crossed["table"]] if crossed else []
    write_text(folder / "report.md", "\n\n".join(text) + "\n")
    page = _environment().get_template("report.html.j2")
    html = page.render(
        models=list(dict.fromkeys(s.model for s in scores)),
        summary=summary(scores),
        tables=tables,
        plots=plots(scores, crossed),
        gallery=examples,
        crossed=crossed,
        skipped=skipped,
    )
    return write_text(folder / "report.html", html)


def labelled(scores: Sequence[EvalResult]) -> list[EvalResult]:
    """The Scores, each model under the shortest name that no other has: its folder's, its path, its path with the weights' digest."""
    models = dict.fromkeys((s.model, s.fingerprint) for s in scores)
    names = [(_short(model), model, f"{model} ({weights[:6]})") for model, weights in models]
    level = next(i for i in range(3) if len({n[i] for n in names}) == len(names))
    label = {key: name[level] for key, name in zip(models, names, strict=True)}
    return [replace(s, model=label[s.model, s.fingerprint]) for s in scores]


def summary(scores: Sequence[EvalResult]) -> list[dict]:
    """One row a model and question: means over its sets, and how many of them are doubted."""
    rows = []
    for key in dict.fromkeys((s.question, s.model, s.fingerprint) for s in scores):
        part = [s for s in scores if (s.question, s.model, s.fingerprint) == key]
        verdicts = [s.verdict for s in part]
        worst = "suspicious" if "suspicious" in verdicts else "unchecked" if "unchecked" in verdicts else "clear"
        rows.append(
            {
                "title": str(key[0]),
                "question": key[0],
                "model": key[1],
                "fingerprint": key[2],
                "data": tuple(sorted((s.dataset, s.n) for s in part)),
                **mean(part),
                "sets": len(part),
                "n": sum(s.n for s in part),
                "verdict": worst,
                "doubted": verdicts.count("suspicious"),
            }
        )
    return rows


def gallery(folder: Path, scores: Sequence[EvalResult]) -> list[dict]:
    """Broken pictures to show, in turn over sets and models, each of them under the widest ball."""
    shown, seen = [], set()
    for place in (0, 1):
        for score in sorted(scores, key=lambda s: -parse_eps(s.eps)):
            key = (score.fingerprint, score.dataset, score.protocol, place)
            if key in seen:
                continue
            seen.add(key)
            file = folder / "gallery" / score.file_name
            examples = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else []
            if len(examples) > place:
                shown.append(
                    examples[place] | {"model": score.model, "dataset": score.dataset, "title": str(score.question)}
                )
    return shown[:EXAMPLES]


def plots(scores: Sequence[EvalResult], crossed: dict | None) -> list[tuple[str, str]]:
    """(caption, SVG) of those plots for which there is enough to draw."""
    rows = summary(scores)
    found = []
    curves: dict[tuple, dict[tuple, list[dict]]] = {}  # one plot a protocol and norm: the axis has one unit
    for row in rows:
        protocol, attack, norm, *_ = row["question"]
        lines = curves.setdefault((protocol, norm), {})
        lines.setdefault((row["model"], attack, row["fingerprint"], row["data"]), []).append(row)
    for (protocol, norm), lines in curves.items():
        lines = {k: sorted(v, key=lambda r: parse_eps(r["question"][3])) for k, v in lines.items() if len(v) > 1}
        if lines:
            caption = f"Robust accuracy over eps; at 0 stands clean accuracy: {norm}, protocol “{protocol}”. Means over data sets."
            found.append((caption, _svg(lambda axis, lines=lines, norm=norm: _draw_curves(axis, lines, norm))))
    # Means over different sets are not compared.
    for question, data in dict.fromkeys((r["question"], r["data"]) for r in rows):
        part = [r for r in rows if (r["question"], r["data"]) == (question, data)]
        if len(part) > 1:
            caption = f"Clean against robust accuracy: {question}. Means over data sets; on the line no other model is better in both."
            found.append((caption, _svg(lambda axis, part=part: _draw_pareto(axis, part))))
    if crossed:
        found.append(
            (
                "Accuracy (%) of each model (column) on pictures attacked for another (row). On the diagonal: its own attack.",
                _svg(lambda axis: _draw_matrix(axis, crossed)),
            )
        )
    return found


def _draw_curves(axis, lines, norm: str) -> None:
    scale = 255 if norm == "linf" else 1
    for (key, rows), colour in zip(lines.items(), COLOURS * len(lines), strict=False):
        eps = [0.0, *(parse_eps(r["question"][3]) for r in rows)]
        answers = [rows[0]["clean"], *(r["robust"] for r in rows)]
        axis.plot([e * scale for e in eps], answers, "o-", color=colour, label=f"{_short(key[0])}, {key[1]}")
    axis.set(xlabel="eps, in 255ths" if scale == 255 else "eps", ylabel="accuracy, %", ylim=(0, 100))
    axis.legend(
        handles=[*axis.lines], fontsize=8, frameon=False
    )  # without them a name that begins with _ has no entry


def _draw_pareto(axis, rows) -> None:
    both = [(r["clean"], r["robust"]) for r in rows]
    front = [
        r
        for r, (x, y) in zip(rows, both, strict=True)
        if not any(c >= x and d >= y and (c, d) != (x, y) for c, d in both)
    ]
    front.sort(key=lambda r: r["clean"])
    axis.plot([r["clean"] for r in front], [r["robust"] for r in front], "-", color="#bbbbbb", zorder=1)
    for row, colour in zip(rows, COLOURS * len(rows), strict=False):
        axis.scatter(row["clean"], row["robust"], color=colour, s=60, zorder=2)
        axis.annotate(
            _short(row["model"]),
            (row["clean"], row["robust"]),
            xytext=(-8, 4),
            textcoords="offset points",
            ha="right",
            fontsize=9,
            color=colour,
        )
    low, high = min(r["clean"] for r in rows), max(r["clean"] for r in rows)
    axis.set(xlabel="clean accuracy, %", ylabel="robust accuracy, %", xlim=(low - 0.35 * (high - low) - 6, high + 3))
    axis.set_ylim(-2, max(r["robust"] for r in rows) * 1.15 + 4)


def _draw_matrix(axis, crossed) -> None:
    sources, judges, values = crossed["sources"], crossed["judges"], crossed["adversarial"]
    axis.imshow(values, vmin=0, vmax=100, cmap="viridis", aspect="auto")
    axis.set_xticks(range(len(judges)), [_short(j) for j in judges], rotation=30, ha="right", fontsize=8)
    axis.set_yticks(range(len(sources)), [_short(s) for s in sources], fontsize=8)
    axis.set(ylabel="attacked for", xlabel="asked")
    axis.grid(False)
    for y, row in enumerate(values):
        for x, value in enumerate(row):
            axis.text(
                x, y, f"{value:.0f}", ha="center", va="center", color="white" if value < 60 else "black", fontsize=9
            )


def _svg(draw) -> str:
    """A plot as an <svg> element that scales with the page, the same bytes every time."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    with matplotlib.rc_context(
        {"svg.fonttype": "none", "svg.hashsalt": "hpt_hf", "font.family": "sans-serif", "text.parse_math": False}
    ):
        figure, axis = plt.subplots(figsize=(6, 3.8), layout="constrained")
        axis.grid(alpha=0.3)
        draw(axis)
        file = io.StringIO()
        figure.savefig(file, format="svg", metadata={"Date": None})
        plt.close(figure)
    text = file.getvalue()
    return text[text.index("<svg") :]


def _short(name: str) -> str:
    return Path(name).name or name


def _environment() -> jinja2.Environment:
    found = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    found.filters["short"] = _short
    return found
