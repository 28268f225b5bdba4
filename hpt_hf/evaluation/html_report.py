"""All results of a folder as report.md and as one self-contained report.html with curves, verdicts and attacked images."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import jinja2

from hpt_hf.attacks.threat_model import parse_eps
from hpt_hf.evaluation.comparison import Compared, compare, table
from hpt_hf.evaluation.result import REMARKS, EvalResult, read_results_of, told_apart
from hpt_hf.evaluation.sanity_checks import CHECKS
from hpt_hf.evaluation.statistics import grouped, percent, wilson
from hpt_hf.evaluation.tables import result_table
from hpt_hf.utils import escaped, write_text

TEMPLATE = Path(__file__).with_name("report.html.j2")
EXAMPLES = 12  # attacked images that are shown at most
VERDICTS = {
    "clear": "no sanity check raised anything",
    "remark": "the set-up says little: few images or classes, a ball in which an undefended model stands as well",
    "suspicious": "the figure itself is in doubt",
    "unchecked": "the sanity checks were not run",
}
MEANINGS = {check.__name__: check.__doc__ for check in CHECKS}  # what stands at a check is what the page says of it


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
    models = list(dict.fromkeys(r.model for r in results))
    skipped = sum(len(r.skipped) for r in results)
    text = [escaped(f"# {', '.join(models) or 'Transfer'}")]
    text += ["95% intervals: Wilson. Means: unweighted over data sets."]
    parts = grouped(results, lambda r: str(r.question))
    tables = [(question, part, differences(part)) for question, part in parts.items()]
    for question, part, rows in tables:
        text += [f"## {question}", result_table(part), *([table(rows)] if rows else [])]
        text += [escaped(f"- {r.dataset} ({r.model}): {c['name']}: {c['detail']}") for r in part for c in r.raised]
    if skipped:
        text.append(f"{skipped} unreadable images were left out; the files of the results list them.")
    if transfer:
        text += ["## Transfer", transfer["table"]]
    write_text(folder / "report.md", "\n\n".join(text) + "\n")
    rows = summary(results)
    plots = curves(rows)
    page = {"models": models, "summary": rows, "tables": tables, "plots": plots, "single": bars(results, rows, plots)}
    page |= {"gallery": examples, "transfer": transfer, "skipped": skipped, "verdicts": VERDICTS, "remarks": REMARKS}
    page |= {"raised": {c["name"]: MEANINGS.get(c["name"], "") for r in results for c in r.raised}}
    order = [*transfer["ranking"], transfer["student"]] if transfer and transfer.get("ranking") else []
    page["ranked"] = ranked(transfer["sets"], order) if order else None
    page["cells"] = sorted(transfer["cells"], key=lambda c: [*order, c["judge"]].index(c["judge"])) if transfer else []
    return write_text(folder / "report.html", rendered(TEMPLATE, page))


def rendered(template: Path, page: dict) -> str:
    """A page from its template; whatever stands in `page` is text, never HTML."""
    jinja = jinja2.Environment(autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    return jinja.from_string(template.read_text(encoding="utf-8")).render(page)


def _read(file: Path):
    return json.loads(file.read_text(encoding="utf-8")) if file.is_file() else None


def short_names(results: Sequence[EvalResult]) -> dict[tuple[str, str], str]:
    """(model, weights' digest) -> the shortest name that no other has: its folder's, its path, its path with the digest."""
    models = dict.fromkeys((r.model, r.fingerprint) for r in results)
    names = [(Path(model).name or model, model, f"{model} ({weights[:6]})") for model, weights in models]
    level = next(i for i in range(3) if len({n[i] for n in names}) == len(names))
    return {key: name[level] for key, name in zip(models, names, strict=True)}


def measured(counts: Sequence[tuple[int, int, int]]) -> dict:
    """Unweighted means over sets, each (images, right, robust), with 95% intervals: Wilson's ones combined.

    Zou & Donner (2008); of one set it is Wilson's. Sets are fixed, images a sample.
    """
    found: dict = {}
    for kind, place in (("clean", 1), ("robust", 2)):
        ends = [(percent(one[place], one[0]), *wilson(one[place], one[0])) for one in counts]
        value = sum(p for p, *_ in ends) / len(ends)
        below, above = (math.hypot(*(end[0] - end[side] for end in ends)) / len(ends) for side in (1, 2))
        found |= {kind: value, f"{kind}_interval": (value - below, value + above)}
    return found


def summary(results: Sequence[EvalResult]) -> list[dict]:
    """One row a question and model: means over its data sets, the worst verdict, and how many sets are doubted."""
    rows = []
    for (q, model), part in grouped(results, lambda r: (r.question, r.model)).items():
        verdicts, sets = [r.verdict for r in part], sorted((r.dataset, r.n) for r in part)
        worst = next((v for v in ("suspicious", "remark", "unchecked") if v in verdicts), "clear")
        row = {"question": q, "model": model, "n": sum(r.n for r in part), "data": tuple(sets)}
        row |= {"verdict": worst, "doubted": verdicts.count("suspicious")}
        rest = f", {q.limit} images a set" * bool(q.limit) + f", seed {q.seed}" * bool(q.seed)
        row["asked"] = f"{q.attack} on {sets[0][0] if len(sets) == 1 else f'{len(sets)} sets'}{rest}"
        rows.append(row | measured([(r.n, r.n_clean, r.n_robust) for r in part]))
    return rows


def differences(part: Sequence[EvalResult]) -> list[Compared]:
    """The best model of one question, then the others with their paired differences from it; [] if not comparable."""
    try:
        return compare(part, compare(part)[0].model)
    except ValueError:
        return []


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

    A line joins means over the same images of the same sets; where none has two radii there is no plot.
    """
    plots = []
    for part in grouped(rows, _axis).values():
        lines, ticks = [], {"0": 0.0} | {r["question"].eps: parse_eps(r["question"].eps) for r in part}
        for line in grouped(part, lambda r: (r["model"], r["data"], r["question"]._replace(eps=""))).values():
            points = [(0.0, line[0]["clean"], line[0]["clean_interval"])]
            points += [(parse_eps(r["question"].eps), r["robust"], r["robust_interval"]) for r in line]
            lines.append({"model": line[0]["model"], "asked": line[0]["asked"], "points": points})
        if any(len(line["points"]) > 2 for line in lines):
            widest, shown = max(ticks.values()) or 1, dict[str, float]()
            for name, eps in sorted(ticks.items(), key=lambda tick: -tick[1]):  # names that would overlap are left out
                shown |= {name: eps} if not shown or min(shown.values()) - eps > widest / 7 else {}
            plots.append({"question": part[0]["question"], "lines": lines, "ticks": shown, "widest": widest})
    return plots


def _axis(row: dict) -> tuple[str, str]:
    return row["question"].protocol, row["question"].norm


def bars(results: Sequence[EvalResult], rows: Sequence[dict], plots: Sequence[dict]) -> dict[str, list[dict]]:
    """Of each question that no plot shows: the data sets of one model and their mean, or the means of several models."""
    plotted, found = set(map(_axis, plots)), {}
    for question, means in grouped(rows, lambda r: r["question"]).items():
        if _axis(means[0]) in plotted:
            continue
        many = len({row["data"] for row in means}) > 1
        named = [row | {"name": f"{row['model']}, {row['asked']}" if many else row["model"]} for row in means]
        if len(means) == 1:
            sets = [r for r in results if r.question == question]
            named = [{"name": r.dataset, "model": r.model} | measured([(r.n, r.n_clean, r.n_robust)]) for r in sets]
            named += [means[0] | {"name": "mean"}] * (len(sets) > 1)
        found[str(question)] = named
    return found


def ranked(sets: Sequence[dict], order: Sequence[str]) -> tuple[list[dict], str]:
    """Candidate proxies, best first, and last the student, with their accuracy on its attack; and which one to take."""
    rows = []
    for name in order:
        part = [t for t in sets if t["judge"] == name]
        counts = [(t["n"], *(round(t[k] * t["n"] / 100) for k in ("clean", "adversarial"))) for t in part]
        rows.append({"name": name, "model": name} | measured(counts))
    best, *others, own = rows
    if best["robust_interval"][0] <= own["robust_interval"][1]:
        return rows, f"Take none: not even {best['name']} is better there than {own['name']} itself, beyond chance."
    said = f"Take {best['name']}: it is right on {best['robust']:.1f}% of the images attacked for {own['name']}."
    if close := [r["name"] for r in others if r["robust_interval"][1] >= best["robust_interval"][0]]:
        said += f" Chance may have put it before {', '.join(close)}: more images tell."
    return rows, said
