"""All results of a folder as report.md and as one self-contained report.html with plots, verdicts and attacked images."""

from __future__ import annotations

import io
import json
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path

import jinja2

from hpt_hf.attacks.threat_model import parse_eps
from hpt_hf.evaluation.result import EvalResult, read_results_of
from hpt_hf.evaluation.statistics import mean
from hpt_hf.evaluation.tables import result_table
from hpt_hf.utils import write_text

TEMPLATE = Path(__file__).with_name("report.html.j2")
EXAMPLES = 12  # attacked images that are shown at most


def write_html_report(folder: str | Path) -> Path:
    """From `results/`, `gallery/` and `transfer.json`; ValueError if there is none, or one that cannot be read."""
    folder = Path(folder)
    results = read_results_of(folder)
    results.sort(key=lambda r: (*r.question[:3], parse_eps(r.eps), r.model, r.dataset))
    transfer = _read(folder / "transfer.json")
    if not results and not transfer:
        raise ValueError(f"{folder} holds no results/*.json and no transfer.json: nothing to report")
    names = short_names(results)
    examples = gallery(folder, results, names)
    results = [replace(r, model=names[r.model, r.fingerprint]) for r in results]
    tables = [(str(part[0].question), part) for part in _grouped(results, lambda r: r.question)]
    models = list(dict.fromkeys(r.model for r in results))
    skipped = sum(len(r.skipped) for r in results)
    text = [f"# {', '.join(models) or 'Transfer'}", "95% intervals: Wilson. Means: unweighted over data sets."]
    for heading, part in tables:
        text += [f"## {heading}", result_table(part)]
        text += [f"- {r.dataset} ({r.model}): {c['name']}: {c['detail']}" for r in part for c in r.raised]
        text += [f"- {note}" for note in dict.fromkeys(note for r in part for note in r.notes)]
    if skipped:
        text.append(f"{skipped} unreadable images were left out; the files of the results list them.")
    if transfer:
        text += ["## Transfer", transfer["table"]]
    write_text(folder / "report.md", "\n\n".join(text) + "\n")
    page = {"models": models, "summary": summary(results), "tables": tables, "plots": plots(summary(results))}
    page |= {"gallery": examples, "transfer": transfer, "skipped": skipped}
    settings = {"autoescape": True, "undefined": jinja2.StrictUndefined, "trim_blocks": True, "lstrip_blocks": True}
    template = jinja2.Environment(**settings).from_string(TEMPLATE.read_text(encoding="utf-8"))
    return write_text(folder / "report.html", template.render(page))


def _read(file: Path):
    return json.loads(file.read_text(encoding="utf-8")) if file.is_file() else None


def short_names(results: Sequence[EvalResult]) -> dict[tuple[str, str], str]:
    """(model, weights' digest) -> the shortest name that no other has: its folder's, its path, its path with the digest."""
    models = dict.fromkeys((r.model, r.fingerprint) for r in results)
    names = [(Path(model).name or model, model, f"{model} ({weights[:6]})") for model, weights in models]
    level = next(i for i in range(3) if len({n[i] for n in names}) == len(names))
    return {key: name[level] for key, name in zip(models, names, strict=True)}


def _grouped(items: Iterable, key: Callable) -> list[list]:
    groups: dict = {}
    for item in items:
        groups.setdefault(key(item), []).append(item)
    return [*groups.values()]


def summary(results: Sequence[EvalResult]) -> list[dict]:
    """One row a question and model: means over its data sets, the worst verdict, and how many sets are doubted."""
    rows = []
    for part in _grouped(results, lambda r: (r.question, r.model)):
        verdicts = [r.verdict for r in part]
        worst = next((v for v in ("suspicious", "unchecked") if v in verdicts), "clear")
        row = {"question": part[0].question, "model": part[0].model, "n": sum(r.n for r in part), **mean(part)}
        row["data"] = tuple(sorted((r.dataset, r.n) for r in part))
        rows.append(row | {"verdict": worst, "doubted": verdicts.count("suspicious")})
    return rows


def gallery(folder: Path, results: Sequence[EvalResult], names: dict[tuple[str, str], str]) -> list[dict]:
    """Broken images to show, of each model and set under its widest ball; every first one before any second."""
    widest = {(r.fingerprint, r.dataset, r.protocol): r for r in sorted(results, key=lambda r: parse_eps(r.eps))}
    shown = [
        (place, one | {"model": names[r.model, r.fingerprint], "dataset": r.dataset, "title": str(r.question)})
        for r in widest.values()
        for place, one in enumerate(_read(folder / "gallery" / r.file_name) or [])
    ]
    return [one for _, one in sorted(shown, key=lambda pair: pair[0])][:EXAMPLES]


def plots(rows: Sequence[dict]) -> list[tuple[str, str]]:
    """(caption, SVG) of curves over eps, and of models side by side, where there are several of the same images."""
    found = []
    for part in _grouped(rows, lambda r: (r["question"].protocol, r["question"].norm)):  # an axis has one unit
        lines = [line for line in _grouped(part, _but_eps) if len(line) > 1]
        question = part[0]["question"]
        caption = f"Robust accuracy over eps, clean accuracy at 0: {question.norm}, protocol “{question.protocol}”"
        if lines:
            found.append((f"{caption}. Means over data sets.", _svg(partial(_draw_curves, lines))))
    for part in _grouped(rows, lambda r: (r["question"], r["data"])):
        caption = f"Clean against robust accuracy: {part[0]['question']}. Means over data sets."
        if len(part) > 1:
            found.append((caption, _svg(partial(_draw_models, part))))
    return found


def _but_eps(row: dict) -> tuple:
    return row["model"], row["data"], row["question"]._replace(eps="")


def _draw_curves(lines: list[list[dict]], axis) -> None:
    scale, unit = (255, "eps, in 255ths") if lines[0][0]["question"].norm == "linf" else (1, "eps")
    for line in lines:  # in the order of eps
        eps = [0.0, *(parse_eps(row["question"].eps) * scale for row in line)]
        label = f"{line[0]['model']}, {line[0]['question'].attack}"
        axis.plot(eps, [line[0]["clean"], *(row["robust"] for row in line)], "o-", label=label)
    axis.set(xlabel=unit, ylabel="accuracy, %", ylim=(0, 100))
    axis.legend(handles=[*axis.lines], fontsize=8, frameon=False)  # given, since a name may begin with _


def _draw_models(rows: list[dict], axis) -> None:
    for row in rows:
        place = row["clean"], row["robust"]
        axis.scatter(*place, s=60)
        axis.annotate(row["model"], place, xytext=(0, 7), textcoords="offset points", ha="center", fontsize=9)
    axis.margins(0.25)
    axis.set(xlabel="clean accuracy, %", ylabel="robust accuracy, %")


def _svg(draw: Callable) -> str:
    """A plot as an <svg> element that scales with the page, the same bytes every time."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    style = {"svg.fonttype": "none", "svg.hashsalt": "hpt_hf", "font.family": "sans-serif", "text.parse_math": False}
    with matplotlib.rc_context(style):
        figure, axis = plt.subplots(figsize=(6, 3.8), layout="constrained")
        axis.grid(alpha=0.3)
        draw(axis)
        file = io.StringIO()
        figure.savefig(file, format="svg", metadata={"Date": None})
        plt.close(figure)
    text = file.getvalue()
    return text[text.index("<svg") :]
