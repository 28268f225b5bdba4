"""All results of a folder as report.md and as one self-contained report.html with curves, verdicts and attacked images."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from pathlib import Path

import jinja2

from hpt_hf.attacks.threat_model import parse_eps
from hpt_hf.evaluation.result import EvalResult, read_results_of, told_apart
from hpt_hf.evaluation.statistics import mean
from hpt_hf.evaluation.tables import result_table
from hpt_hf.utils import escaped, write_text

TEMPLATE = Path(__file__).with_name("report.html.j2")
EXAMPLES = 12  # attacked images that are shown at most


VERDICTS = (
    "Verdicts: *clear*: no sanity check raised anything; *remark*: the set-up says little (few images or classes, a ball "
    "in which an undefended model stands as well); *suspicious*: the figure itself is in doubt; *unchecked*: not checked."
)


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
    results = told_apart([replace(r, model=names[r.model, r.fingerprint]) for r in results])
    tables = [(str(part[0].question), part) for part in _grouped(results, lambda r: r.question)]
    models = list(dict.fromkeys(r.model for r in results))
    skipped = sum(len(r.skipped) for r in results)
    text = [
        escaped(f"# {', '.join(models) or 'Transfer'}"),
        "95% intervals: Wilson. Means: unweighted over data sets.",
    ]
    for heading, part in tables:
        text += [f"## {heading}", result_table(part)]
        text += [escaped(f"- {r.dataset} ({r.model}): {c['name']}: {c['detail']}") for r in part for c in r.raised]
    if skipped:
        text.append(f"{skipped} unreadable images were left out; the files of the results list them.")
    if transfer:
        text += ["## Transfer", transfer["table"]]
    write_text(folder / "report.md", "\n\n".join(text) + "\n")
    page = {"models": models, "summary": summary(results), "tables": tables, "plots": curves(summary(results))}
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
        worst = next((v for v in ("suspicious", "remark", "unchecked") if v in verdicts), "clear")
        row = {"question": part[0].question, "model": part[0].model, "n": sum(r.n for r in part), **mean(part)}
        row["data"] = tuple(sorted((r.dataset, r.n) for r in part))
        rows.append(row | {"verdict": worst, "doubted": verdicts.count("suspicious")})
    return rows


def gallery(folder: Path, results: Sequence[EvalResult], names: dict[tuple[str, str], str]) -> list[dict]:
    """Broken images to show, of each model and set under its widest ball; every first one before any second."""
    widest = {
        (r.fingerprint, r.dataset, r.protocol, r.images_digest, r.templates): r
        for r in sorted(results, key=lambda r: parse_eps(r.eps))
    }
    shown = [
        (place, one | {"model": names[r.model, r.fingerprint], "dataset": r.dataset, "title": str(r.question)})
        for r in widest.values()
        for place, one in enumerate(_read(folder / "gallery" / r.file_name) or [])
    ]
    return [one for _, one in sorted(shown, key=lambda pair: pair[0])][:EXAMPLES]


def curves(rows: Sequence[dict]) -> list[dict]:
    """Robust accuracy over eps, clean accuracy at 0: a plot a protocol and norm, since an axis has one unit.

    A line joins means over the same images of the same sets.
    """
    plots = []
    for part in _grouped(rows, lambda r: (r["question"].protocol, r["question"].norm)):
        lines = []
        for line in _grouped(part, lambda r: (r["model"], r["data"], r["question"]._replace(eps=""))):
            points = [(0.0, line[0]["clean"]), *((parse_eps(r["question"].eps), r["robust"]) for r in line)]
            if len(line) > 1:
                lines.append({"name": f"{line[0]['model']}, {line[0]['question'].attack}", "points": points})
        if lines:
            ticks = {"0": 0.0} | {r["question"].eps: parse_eps(r["question"].eps) for r in part}
            plots.append({"question": part[0]["question"], "lines": lines, "ticks": ticks})
    return plots
