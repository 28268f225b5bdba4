"""Proves that the page says what the results say alone, needs nothing from outside, and is the same each time."""

from __future__ import annotations

import base64
import itertools
import re
from dataclasses import replace
from pathlib import Path
from xml.etree import ElementTree

import numpy as np
import pytest
import torch
from conftest import make_result

from hpt_hf.data.collator import to_png
from hpt_hf.evaluation import sanity_checks
from hpt_hf.evaluation.comparison import compare
from hpt_hf.evaluation.html_report import bars, curves, measured, short_names, summary, write_html_report
from hpt_hf.evaluation.statistics import mean, wilson
from hpt_hf.evaluation.tables import result_table
from hpt_hf.utils import write_json


class Page:
    """The page taken apart: tags, all text, text by tag, tables under headings. Fails on tags that do not nest."""

    def __init__(self, html: str):
        closed = re.sub(r"<(meta|br|img)\b([^>]*)>", r"<\1\2/>", html.replace("<!doctype html>", ""))
        elements, heading = list(ElementTree.fromstring(closed.strip()).iter()), ""
        self.tags = [(e.tag, e.attrib) for e in elements]
        self.text = " ".join("".join(elements[0].itertext()).split())
        self.tables, self.found = {}, {}
        for e in elements:
            heading = e.text if e.tag == "h2" else heading
            if e.tag == "tr":
                self.tables.setdefault(heading, []).append([" ".join("".join(cell.itertext()).split()) for cell in e])
            elif e.text:
                self.found.setdefault(e.tag, []).append(e.text.strip())

    def table(self, heading: str, columns: int) -> list[list[str]]:
        """The rows of that width under a heading, the header first."""
        return [row for row in self.tables[heading] if len(row) == columns]


def made(folder: Path, results=(), *, examples=None, transfer=None) -> Page:
    for result in results:
        write_json(folder / "results" / result.file_name, result.to_json())
        if examples:
            write_json(folder / "gallery" / result.file_name, examples)
    if transfer:
        write_json(folder / "transfer.json", transfer)
    return Page(write_html_report(folder).read_text(encoding="utf-8"))


def example(truth: str = "cat", said: str = "dog", shade: float = 0.5) -> dict:
    shades = {"clean": shade, "perturbation": 1.0, "attacked": shade / 2}
    png = {k: base64.b64encode(to_png(torch.full((3, 4, 4), value))).decode() for k, value in shades.items()}
    return {"truth": truth, "said": f"{truth} (90%)", "said_attacked": f"{said} (80%)", **png}


def check(name: str, raised, detail: str) -> dict:
    return {"name": name, "raised": raised, "detail": detail}


PASSED, RAISED = check("detached", False, "0 of 9 images"), check("more_steps", True, "5 of 9 robust images fall")
CHECKS = {"clear": (PASSED,), "unchecked": (), "suspicious": (PASSED, RAISED, check("baseline", None, "none given"))}
CELLS = [
    {"source": s, "judge": j, "clean": 70.0, "adversarial": a, "kept": 100 * a / 70, "kl": 1.25, "n": 40}
    for s, j, a in (("m/one", "m/one", 1.0), ("m/one", "two", 62.0), ("two", "m/one", 33.0), ("two", "two", 4.0))
]
TRANSFER = {"title": "pgd-20, linf 8/255", "cells": CELLS, "table": "| a |\n|---|"}
COUNTS = [{"cat": (30, 21, 13), "red car": (7, 7, 1)}, {"cat": (40, 39, 38), "dog": (10, 4, 4)}, {"dog": (60, 11, 0)}]


def many() -> list:
    """Three models (one on one set only), three radii, both protocols, one l2: no two questions in one table."""
    results = [
        make_result(model=f"models/{m}", fingerprint=m * 4, dataset=d, eps=e, per_class=COUNTS[i])
        for i, (m, d) in enumerate([("a", "cats"), ("b", "dogs"), ("b", "cats"), ("a", "dogs")], -1)
        for e in ("1/255", "2/255", "4/255")
    ]
    results += [make_result(model="models/c", fingerprint="cccc", per_class=COUNTS[1])]
    results += [make_result(protocol="native", dataset="mice", sanity_checks=CHECKS["suspicious"])]
    return [*results, make_result(norm="l2", eps="0.5", dataset="bees", attack="cw-20", per_class=COUNTS[0])]


MODELS = {"openai/clip-vit-base-patch32": (0.9, 4.0), "outputs/tecoa-vit-base-patch32-eps2": (0.7, 0.2)}
MODELS |= {"outputs/hpt_gpd": (0.78, 0.16)}  # which share is right, and how fast it falls
REMARK = check("few_images", True, "40 images, 8 classes; expected at least 50 and 4")


def simulated(model: str, dataset: str, attack: str = "pgd-20", eps: int = 1, checks=(PASSED,)):
    """What an evaluation would leave: models fail on much the same images, the robust ones on more of the clean."""
    share, lost = MODELS[model]
    counts = (120, round(120 * share), round(120 * share * np.exp(-lost * eps)))
    asked = {"dataset": dataset, "attack": attack, "eps": f"{eps}/255", "per_class": {f"{dataset} class": counts}}
    return make_result(model=model, fingerprint=f"{len(model):016x}", sanity_checks=checks, **asked)


def proxies(*figures: tuple[str, int, int]) -> dict:
    """`transfer.json` of a pre-flight, the student itself last: (name, right clean, right attacked) of 120."""
    student = figures[-1][0]
    same = {"source": student, "dataset": "digits", "interval": [0, 0], "kept": 80.0, "kl": 0.8, "n": 120}
    cells = [same | {"judge": name, "clean": a / 1.2, "adversarial": b / 1.2} for name, a, b in figures]
    best = sorted(cells[:-1], key=lambda cell: -cell["adversarial"])
    return TRANSFER | {"student": student, "ranking": [c["judge"] for c in best], "cells": cells, "sets": cells}


def row_of(r) -> list[str]:
    name, count, robust = r.worst_class
    shown = ["{:.1f} {:.1f}–{:.1f}".format(*v) for v in ((r.clean, *r.clean_interval), (r.robust, *r.interval))]
    return [r.dataset, Path(r.model).name, *shown, r.verdict, f"{name} {robust} of {count}", str(r.n), str(r.classes)]


def test_every_number_of_many_models_and_questions_is_a_results_and_each_stands_once(tmp_path):
    results = many()
    html = made(tmp_path, results)
    parts = dict(part.split("\n\n", 1) for part in (tmp_path / "report.md").read_text("utf-8").split("\n## ")[1:])
    assert parts.keys() == {str(r.question) for r in results}
    for heading, markdown in parts.items():
        part = sorted((r for r in results if str(r.question) == heading), key=lambda r: r.file_name)
        header, *rows = html.table(heading, 8)
        assert header[1] == "model" and rows == [row_of(r) for r in part]
        assert markdown.startswith(result_table([replace(r, model=Path(r.model).name) for r in part]))
    _, *short = html.table("In short", 7)
    assert len(short) == len({(r.question, r.model) for r in results}) == 9
    for model, clean, robust, verdict, heading, sets, n in short:
        part = [r for r in results if (str(r.question), Path(r.model).name) == (heading, model)]
        means = mean(part)
        assert [sets, n] == [str(len(part)), str(sum(r.n for r in part))]
        assert [clean.split()[0], robust.split()[0]] == [f"{means['clean']:.1f}", f"{means['robust']:.1f}"]
        assert verdict == ("suspicious (1 of 1 sets)" if heading.endswith("“native”") else part[0].verdict)


def test_the_verdict_over_several_sets_is_the_worst():
    for verdicts, worst in {"clear clear": 0, "unchecked clear": 0, "suspicious unchecked suspicious": 2}.items():
        sets = [make_result(dataset=f"{i}", sanity_checks=CHECKS[v]) for i, v in enumerate(verdicts.split())]
        (row,) = summary(sets)
        assert (row["verdict"], row["doubted"]) == (verdicts.split()[0], worst)


def test_models_of_one_name_are_told_apart_by_their_paths_or_weights():
    for models, names in (
        ("x/a:1 x/b:2 x/a:1", ["a", "b"]),
        ("x/a:1 y/a:2", ["x/a", "y/a"]),
        ("x/a:1 x/a:2", ["x/a (111111)", "x/a (222222)"]),
    ):
        pairs = (one.split(":") for one in models.split())
        assert [*short_names([make_result(model=m, fingerprint=f * 8) for m, f in pairs]).values()] == names


def test_doubts_are_told_by_name_with_what_was_seen_what_it_means_and_its_level(tmp_path):
    odd = check("few_images", True, "9 images"), check("of_old", True, "seen")
    clear = make_result(sanity_checks=CHECKS["clear"])
    html = made(tmp_path, [make_result(dataset="mice", sanity_checks=(*CHECKS["suspicious"], *odd)), clear])
    assert [h for h in html.found["h3"] if ":" in h] == ["mice: more_steps, few_images, of_old"]
    assert "more_steps" in html.found["b"] and html.text.count(RAISED["detail"]) == 2
    passed, doubt = ["detached", "passed", "0 of 9 images"], ["more_steps", "raised", RAISED["detail"]]
    rows = [row for row in html.table(str(clear.question), 3) if row[0] != "check"]
    assert rows[:4] == [passed, passed, doubt, ["baseline", "not run", "none given"]]
    meaning, old = sanity_checks.more_steps.__doc__, "A check of another version."
    few = ["few_images", "remark", sanity_checks.few_images.__doc__]
    raised = [["more_steps", "suspicious", meaning], few, ["of_old", "suspicious", old]]
    assert html.table("What was raised", 3)[1:] == raised
    assert f"- mice (ours): more_steps: {RAISED['detail']}" in (tmp_path / "report.md").read_text()


def test_models_on_the_same_images_are_compared_image_by_image(tmp_path):
    results = [simulated(m, d) for m in MODELS for d in ("cats", "dogs")]
    html = made(tmp_path, results)
    _, *rows = html.table(str(results[0].question), 4)
    found = compare([replace(r, model=Path(r.model).name) for r in results], "hpt_gpd")
    assert [row[0] for row in rows] == [c.model for c in found[1:]] and found[0].model == "hpt_gpd"
    for row, other in zip(rows, found[1:], strict=True):
        shown = [f"{d.value:+.1f} {d.low:+.1f} to {d.high:+.1f}" for d in other.against.values()]
        assert row[1:] == [*shown, ", ".join(k for k, d in other.against.items() if d.low > 0 or d.high < 0)]
    pair = [make_result(model=m, fingerprint=m) for m in ("a", "b")]
    alike = made(tmp_path / "alike", pair)
    assert alike.table(str(results[0].question), 4)[1] == ["b", "+0.0 -1.9 to +1.9", "+0.0 -1.9 to +1.9", "neither"]
    for number, changed in enumerate(({"ends": ""}, {"dataset": "dogs"}, {"per_class": COUNTS[0]})):
        odd = [pair[0], make_result(model="b", fingerprint="b", **changed)]
        assert "Image by image" not in made(tmp_path / str(number), odd).text, changed


def test_what_one_needs_to_doubt_a_figure_is_told(tmp_path):
    stages = {"apgd-ce": 44, "apgd-t": 41, "square": 40}
    result = make_result(attack="standard", n_after=stages, skipped=("row 3", "row 9"), target="cat")
    text, left_out = made(tmp_path, [result]).text, "2 unreadable images were left out"
    assert left_out in text and left_out in (tmp_path / "report.md").read_text()
    for said in (
        "robust after apgd-ce: 44.0%, apgd-t: 41.0%, square: 40.0%;",
        "robust = right on the clean image and never taken for 'cat' on any query;",
        f"weights {result.fingerprint}; images {result.images_digest}, opened by {result.source};",
        "1.5 s on a CPU; torch 2, hpt_hf 0.1.0.",
    ):
        assert said in text


def test_transfer_is_a_table(tmp_path):
    html = made(tmp_path, [make_result()], transfer=TRANSFER)
    assert list(html.tables)[0] == "In short" and list(html.tables)[-1] == "Transfer: pgd-20, linf 8/255"
    header, *rows = html.table("Transfer: pgd-20, linf 8/255", 7)
    assert header == ["asked", "attacked for", "clean", "on the attack", "kept", "KL, nats", "images"]
    figures = [(c["judge"], c["source"], "70.0", f"{c['adversarial']:.1f}", f"{c['kept']:.0f}%") for c in CELLS]
    assert rows == [[*row, "1.25", "40"] for row in figures]
    assert (tmp_path / "report.md").read_text().endswith("## Transfer\n\n| a |\n|---|\n")


PREFLIGHTS = {
    "Take b: it is right on 70.8% of the images attacked for s.": ("ba", ("a", 100, 50), ("b", 90, 85)),
    "Chance may have put it before a: more images tell.": ("ba", ("a", 100, 84), ("b", 90, 85)),
    "Take none: not even a is better there than s itself, beyond chance.": ("a", ("a", 100, 14)),
}


@pytest.mark.parametrize("says", PREFLIGHTS)
def test_the_page_says_which_proxy_to_take_and_how_sure_that_is(tmp_path, says):
    order, *figures = PREFLIGHTS[says]
    html = made(tmp_path, transfer=proxies(*figures, ("s", 106, 9)))
    assert says in html.text and ("Chance" in says or "Chance" not in html.text)
    assert [row[0] for row in html.table(f"Transfer: {TRANSFER['title']}", 7)] == ["asked", *order, "s"]


def test_several_radii_draw_a_curve_from_the_clean_accuracy(tmp_path):
    robust = {"1/255": 60, "2/255": 40, "4/255": 20}
    results = [make_result(eps=e, per_class={"a": (100, 80, r)}) for e, r in robust.items()]
    ((line,),) = (plot["lines"] for plot in curves(summary(results)))
    expected = [wilson(80, 100), *(wilson(r, 100) for r in robust.values())]
    assert [ends for *_, ends in line["points"]] == [pytest.approx(ends) for ends in expected]
    html = made(tmp_path, results)
    (drawn,) = (attrs["points"].split() for tag, attrs in html.tags if tag == "polyline")
    places = [(34 + 300 * eps / 4, 210 - 2 * y) for eps, y in ((0, 80), (1, 60), (2, 40), (4, 20))]
    assert [tuple(map(float, point.split(","))) for point in drawn] == places
    assert sorted(t for t in html.found["text"] if "/" in t) == list(robust)
    assert html.found["b"] == ["ours", "pgd-20 on cats"], "the legend"
    header = ["data set", "clean", "robust", "verdict", "weakest class", "images", "classes"]
    assert html.table(str(results[0].question), 7)[0] == header, "one model needs no names"


def test_a_plot_has_one_unit_and_protocol_and_a_line_one_model_and_attack_on_the_same_images():
    kinds = [{"norm": n, "protocol": p} for n, p in (("linf", "input"), ("l2", "input"), ("linf", "native"))]
    models = [{"model": m, "attack": a} for m, a in (("1", "pgd-20"), ("2", "pgd-20"), ("1", "cw-20"))]
    results = [make_result(**kind, **model, eps=e) for kind in kinds for model in models for e in ("0.5", "1")]
    plots = curves(summary(results))
    assert [(p["question"].norm, p["question"].protocol) for p in plots] == [tuple(k.values()) for k in kinds]
    assert all([[x for x, *_ in line["points"]] for line in p["lines"]] == [[0, 0.5, 1]] * 3 for p in plots)
    for other in ({"dataset": "hard"}, {"per_class": {"cat": (5, 4, 3)}}, {"seed": 1}):
        assert curves(summary([make_result(), make_result(eps="2/255", **other)])) == [], other


def test_models_have_a_colour_and_attacks_a_dash_in_lines_and_legend(tmp_path):
    radii, attacks = ("1/255", "2/255"), ("cw-20", "pgd-20")
    results = [make_result(model=m, attack=a, eps=e, fingerprint=m) for m in "ab" for a in attacks for e in radii]
    html = made(tmp_path, results)
    hues = [attrs["style"] for _, attrs in html.tags if "hue" in attrs.get("class", "")]
    assert hues == hues[:2] * 3 and hues[0] != hues[1], "four lines, and the legend's two"
    dashes = [attrs["stroke-dasharray"] for tag, attrs in html.tags if attrs.get("class") == "line"]
    assert dashes == [dashes[0]] * 2 + [dashes[2]] * 2 + dashes[1:3] and dashes[0] != dashes[2]
    assert html.found["b"] == ["a", "b", "cw-20 on cats", "pgd-20 on cats"]


def test_a_mean_of_sets_is_as_sure_as_its_sets_together():
    one, four = measured([(100, 60, 0)]), measured([(100, 60, 0)] * 4)
    for kind, right in (("clean_interval", 60), ("robust_interval", 0)):
        assert one[kind] == pytest.approx(wilson(right, 100)), "of one set it is Wilson's"
        assert np.diff(four[kind]) == pytest.approx(np.diff(one[kind]) / 2)
    assert four["robust_interval"][0] == 0 and measured([(10, 10, 0), (1000, 0, 0)])["clean"] == 50, "unweighted"


def test_one_radius_is_bars_of_the_sets_of_one_model_or_the_means_of_several():
    sets = [make_result(dataset=d, per_class=c) for d, c in zip(("cats", "dogs"), COUNTS, strict=False)]
    ((question, rows),) = bars(sets, summary(sets), []).items()
    assert question == str(sets[0].question) and [row["name"] for row in rows] == ["cats", "dogs", "mean"]
    assert rows[0]["robust_interval"] == pytest.approx(sets[0].interval)
    other = [replace(r, model="other", fingerprint="f") for r in sets]
    ((_, rows),) = bars(both := sets + other, summary(both), []).items()
    assert [row["name"] for row in rows] == ["models/ours", "other"]
    ((_, rows),) = bars(odd := sets + other[:1], summary(odd), []).items()
    assert [row["name"] for row in rows] == ["models/ours, pgd-20 on 2 sets", "other, pgd-20 on cats"]
    curve = [*sets, *(replace(r, eps="2/255") for r in sets)]
    rows = summary(curve)
    assert bars(curve, rows, curves(rows)) == {}, "which a plot shows"


def test_the_gallery_shows_each_set_under_its_widest_ball_and_its_first_image_before_any_second(tmp_path):
    results = [make_result(dataset=f"set{i}", eps="16/255") for i in range(8)]
    results += [make_result(dataset="set0", eps=e) for e in ("4/255", "0.01")]
    for i, result in enumerate(results):
        shown = [example(f"{i}-{j}", shade=(i + 9 * j) / 20) for j in range(2 * (i != 3))]
        write_json(tmp_path / "gallery" / result.file_name, shown)
    html = made(tmp_path, results)
    order = [f"{i}-0" for i in (0, 1, 2, 4, 5, 6, 7)] + [f"{i}-1" for i in (0, 1, 2, 4, 5)]
    assert [t for t in html.found["b"] if re.fullmatch(r"\d-\d", t)] == order, "at most twelve"
    images = [(attrs["alt"], attrs["src"]) for tag, attrs in html.tags if tag == "img"]
    first = [(k, f"data:image/png;base64,{example('', shade=0.0)[k]}") for k in ("clean", "perturbation", "attacked")]
    assert len(images) == 36 and images[:3] == first
    assert "attacked: dog (80%) set0 · ours · pgd-20, linf 16/255" in html.text


def test_the_page_needs_nothing_from_outside_runs_nothing_and_is_the_same_each_time(tmp_path):
    for name in ("one", "two", "two"):
        html = made(tmp_path / name, many(), examples=[example(), example("dog", "cat")], transfer=TRANSFER)
    assert {tag for tag, _ in html.tags} >= {"svg", "img", "table", "details", "style"}
    for name in ("report.md", "report.html"):
        page, again = ((tmp_path / place / name).read_bytes() for place in ("one", "two"))
        assert page == again
    foreign = rb"<(script|link|iframe|object|embed|base|form|audio|video)\b|<[^>]*\son\w+=|@import|url\(|://"
    assert not re.search(foreign, page)
    loads = set(re.findall(rb'\s(?:src|href|xlink:href|srcset|poster|data|action|background)="(.{22})', page))
    assert loads == {b"data:image/png;base64,"}


def test_names_are_text_and_never_markup(tmp_path):
    """Names of models, classes and sets come from folders and the Hub: whoever names them does not write this page."""
    evil = '<b onclick="x">&amp; $a^b$ {{ 7 * 7 }} --> '
    settings = {name: f"{evil}{name}" for name in ("attack", "hardware", "dataset")}
    settings |= {"templates": (f"{evil}template {{}}",), "per_class": {f"{evil}class": (40, 30, 20)}}
    settings["sanity_checks"] = (check(f"{evil}check", True, f"{evil}seen"),)
    models = [{"model": f"{evil}{m}", "fingerprint": m} for m in ("one", "two")]
    results = [make_result(**model, eps=e, **settings) for model in models for e in ("1/255", "2/255")]
    transfer = TRANSFER | {"title": f"{evil}title"}
    transfer["cells"] = [{**CELLS[0], "source": f"{evil}source", "judge": f"{evil}judge"}]
    html = made(tmp_path, results, examples=[example(f"{evil}truth", f"{evil}said")], transfer=transfer)
    assert not [attrs for _, attrs in html.tags if "onclick" in attrs]
    parts = ["attack", "hardware", "dataset", "class", "seen", "check", "one", "two", "template {}"]
    for part in (*parts, "truth", "said", "source", "judge", "title"):
        assert f"{evil}{part}" in html.text, part


def test_a_folder_without_results_is_an_error_and_none_is_made(tmp_path):
    with pytest.raises(ValueError, match="absent holds no results/.*nothing to report"):
        write_html_report(tmp_path / "absent")
    assert not list(tmp_path.iterdir())


@pytest.fixture(scope="module")
def pages(tmp_path_factory) -> dict[str, Path]:
    """Curves of models and attacks; models in one ball, with a pre-flight; one model on many sets."""
    folder, long = tmp_path_factory.mktemp("pages"), "a set whose name is rather longer than one would like"
    curves = [
        simulated(m, d, a, e, (RAISED, REMARK) if e == 4 and "tecoa" in m else (PASSED,))
        for m, d in itertools.product(MODELS, ("cifar10", long))
        for a, e in [("pgd-20", 1), ("pgd-20", 2), ("pgd-20", 4), ("pgd-20", 16), ("standard", 1), ("standard", 2)]
    ]
    made(folder / "curves", curves, examples=[example(long.replace(" ", "_")), example("dog", "cat")])
    transfer = ("lab:proxy", 106, 85), ("outputs/convolution-with-a-long-name", 84, 82), ("lab:student", 106, 9)
    models = [simulated(m, d, eps=2) for m in MODELS for d in ("cifar10", "dtd")]
    made(folder / "models", models, transfer=proxies(*transfer))
    made(
        folder / "sets",
        [simulated("outputs/hpt_gpd", d) for d in ("caltech101", "cars", "dtd", "unbroken" * 9 + "name!")],
    )
    return {name: folder / name / "report.html" for name in ("curves", "models", "sets")}


# Nothing is wider than what holds it, and no two names of an axis overlap.
UNFIT = """() => {
    document.querySelectorAll('details').forEach(e => (e.open = true));
    const holders = 'html, .scroll, td, th, .card, .bar:not(.soft), .bar > span, p, li, h1, h2, h3, dl, summary';
    const wide = [...document.querySelectorAll(holders)].filter(e => e.scrollWidth > e.clientWidth + 1);
    const found = wide.map(e => e.textContent);
    for (const plot of document.querySelectorAll('svg')) {
        const boxes = [...plot.querySelectorAll('text')].map(t => [t.textContent, t.getBoundingClientRect()]);
        for (const [name, a] of boxes) for (const [other, b] of boxes)
            if (name < other && a.left < b.right && b.left < a.right && a.top < b.bottom && b.top < a.bottom)
                found.push(name + ' on ' + other);
    }
    return found;
}"""
# The least contrast with the page of words and of marks whose colour says something: WCAG asks 4.5 and 3.
CONTRAST = """() => {
    const context = document.createElement('canvas').getContext('2d', {willReadFrequently: true});
    const light = colour => {
        context.fillStyle = colour;
        context.fillRect(0, 0, 1, 1);
        const [r, g, b] = [...context.getImageData(0, 0, 1, 1).data].map(v => v / 255)
            .map(v => (v <= 0.04045 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4));
        return 0.2126 * r + 0.7152 * g + 0.0722 * b + 0.05;
    };
    const probe = document.body.appendChild(document.createElement('i'));
    probe.style.background = 'Canvas';
    const page = light(getComputedStyle(probe).backgroundColor);
    const least = (query, property) => Math.min(...[...document.querySelectorAll(query)]
        .map(e => light(getComputedStyle(e)[property])).map(l => Math.max(l / page, page / l)));
    return [least('.clear, .remark, .suspicious, .unchecked, .soft, figcaption', 'color'),
        least('.hue path:not(.ends)', 'fill'), least('.track b', 'borderTopColor')];
}"""


@pytest.mark.parametrize(("width", "scheme"), [(1280, "light"), (390, "dark")])
def test_on_a_desk_and_on_a_phone_everything_can_be_read(browser, pages, width, scheme):
    tab = browser.new_page(viewport={"width": width, "height": 900}, color_scheme=scheme)
    for name, file in pages.items():
        tab.goto(file.as_uri())
        assert tab.evaluate(UNFIT) == [], name
        text, *pictures = tab.evaluate(CONTRAST)
        assert text >= 4.5 and min(pictures) >= 3, name
    tab.close()
