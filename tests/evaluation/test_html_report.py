"""Proves that the page says what the results say and nothing else, needs nothing from outside, and is the same each time."""

from __future__ import annotations

import base64
import json
import re
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path

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

VOID = {"meta", "img", "br", "hr", "link", "input", "base", "col", "source"}
LOADS = {"src", "href", "xlink:href", "srcset", "poster", "data", "action", "background"}
FOREIGN = {"script", "link", "iframe", "object", "embed", "base", "form", "audio", "video"}


class Page(HTMLParser):
    """The page taken apart: tags, attributes, all text, tables under their headings. Fails on tags that do not nest."""

    def __init__(self, html: str):
        super().__init__()
        self.open: list[str] = []
        self.tags: list[tuple[str, dict]] = []
        self.texts: list[str] = []
        self.heading, self.tables, self.found = "", {}, {}
        self.feed(html)
        self.close()
        assert not self.open, f"never closed: {self.open}"

    def handle_starttag(self, tag, attrs):
        self.handle_startendtag(tag, attrs)
        if tag in VOID:
            return
        self.open.append(tag)
        if tag in ("h2", "table", "tr"):
            self.heading = "" if tag == "h2" else self.heading
            self.tables.setdefault(self.heading, []).append([]) if tag == "tr" else None
        elif tag in ("td", "th"):
            self.tables[self.heading][-1].append("")

    def handle_startendtag(self, tag, attrs):
        assert len({k for k, _ in attrs}) == len(attrs)
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag):
        assert self.open and self.open.pop() == tag, f"</{tag}> closes nothing"

    def handle_data(self, data):
        self.texts.append(data)
        if "h2" in self.open:
            self.heading += data
        elif "td" in self.open or "th" in self.open:
            self.tables[self.heading][-1][-1] += data
        if self.open:
            self.found.setdefault(self.open[-1], []).append(data.strip())

    @property
    def text(self) -> str:
        return " ".join("".join(self.texts).split())

    def table(self, heading: str, columns: int) -> list[list[str]]:
        """The rows of that width under a heading, the header first."""
        return [[" ".join(c.split()) for c in row] for row in self.tables[heading] if len(row) == columns]


def made(folder: Path, results=(), *, examples=None, transfer=None) -> Page:
    for result in results:
        write_json(folder / "results" / result.file_name, result.to_json())
        if examples:
            write_json(folder / "gallery" / result.file_name, examples)
    if transfer:
        write_json(folder / "transfer.json", transfer)
    file = write_html_report(folder)
    assert file == folder / "report.html"
    return Page(file.read_text(encoding="utf-8"))


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
    """Three models (one on one set only), three radii, both protocols, one l2."""
    results = [
        make_result(model=f"models/{m}", fingerprint=m * 4, dataset=d, eps=e, per_class=COUNTS[(i + j) % 3])
        for i, m in enumerate(("a", "b"))
        for j, d in enumerate(("cats", "dogs"))
        for e in ("1/255", "2/255", "4/255")
    ]
    results += [make_result(model="models/c", fingerprint="cccc", per_class=COUNTS[1])]
    results += [make_result(protocol="native", dataset="mice", sanity_checks=CHECKS["suspicious"])]
    return [*results, make_result(norm="l2", eps="0.5", dataset="bees", attack="cw-20", per_class=COUNTS[0])]


MODELS = {"openai/clip-vit-base-patch32": 0.9, "outputs/tecoa-vit-base-patch32-eps2": 0.7, "outputs/hpt_gpd": 0.78}
KEPT = {"openai/clip-vit-base-patch32": 4.0, "outputs/tecoa-vit-base-patch32-eps2": 0.2, "outputs/hpt_gpd": 0.16}
REMARK = check("few_images", True, "40 images, 8 classes; expected at least 50 and 4")


def simulated(model: str, dataset: str, attack: str = "pgd-20", eps: str = "1/255", n: int = 120, **changes):
    """What an evaluation would leave: each image has its own difficulty, so models fail on much the same ones."""
    shared, own = (np.random.default_rng([seed, len(dataset)]).uniform(size=n) for seed in (1, len(model)))
    difficulty = 0.7 * shared + 0.3 * own
    radius = int(eps.split("/")[0]) * (1.15 if attack == "standard" else 1)
    right, robust = difficulty < MODELS[model], difficulty < MODELS[model] * np.exp(-KEPT[model] * radius)
    names = [f"{dataset} class {i}" for i in range(8)]
    counts = {c: (len(right[i::8]), int(right[i::8].sum()), int(robust[i::8].sum())) for i, c in enumerate(names)}
    ends = "".join("r" if b else "0" if a else "w" for a, b in zip(right, robust, strict=True))
    settings = {"model": model, "fingerprint": f"{len(model):016x}", "dataset": dataset, "attack": attack, "eps": eps}
    settings |= {"sanity_checks": (PASSED,), "per_class": counts, "ends": ends}
    return make_result(**(settings | changes))


def proxies(*figures: tuple[str, int, int]) -> dict:
    """`transfer.json` of a pre-flight, the last being the student itself: (name, right clean, right attacked) of 120."""
    *names, student = (name for name, _, _ in figures)
    share = {name: {"clean": a / 1.2, "adversarial": b / 1.2, "kl": 0.8, "n": 120} for name, a, b in figures}
    cells = [
        {"source": student, "judge": j, "kept": 100 * c["adversarial"] / c["clean"]} | c for j, c in share.items()
    ]
    sets = [{"source": student, "judge": j, "dataset": "digits", "interval": [0, 0]} | c for j, c in share.items()]
    ranking = sorted(names, key=lambda name: -share[name]["adversarial"])
    found = {"student": student, "ranking": ranking, "cells": cells, "sets": sets, "table": "| a |\n|---|"}
    return found | {"title": "pgd-20, linf 6/255, protocol “input”, 1 sets"}


# --- what the tables say


def row_of(result, *, model: bool) -> list[str]:
    name, count, robust = result.worst_class
    return [
        result.dataset,
        *([Path(result.model).name] if model else []),
        "{:.1f} {:.1f}–{:.1f}".format(result.clean, *result.clean_interval),
        "{:.1f} {:.1f}–{:.1f}".format(result.robust, *result.interval),
        result.verdict,
        f"{name} {robust} of {count}",
        str(result.n),
        str(result.classes),
    ]


def test_one_model_and_one_question_are_one_table_of_the_results_own_numbers(tmp_path):
    results = [make_result(dataset=d, per_class=c) for d, c in zip(("cats", "dogs"), COUNTS, strict=False)]
    html = made(tmp_path, results)
    heading = "pgd-20, linf 1/255, protocol “input”"
    assert list(html.tables) == ["In short", heading]
    header, *rows = html.table(heading, 7)
    assert header == ["data set", "clean", "robust", "verdict", "weakest class", "images", "classes"]
    assert rows == [row_of(r, model=False) for r in results]
    means = mean(results)
    (row,) = html.table("In short", 7)[1:]
    assert [row[0], *row[3:]] == ["ours", "unchecked", heading, "2", "87"]
    assert [text.split()[0] for text in row[1:3]] == [f"{means['clean']:.1f}", f"{means['robust']:.1f}"]
    assert not [tag for tag, _ in html.tags if tag in ("svg", "img")], "one point is no plot, and nothing was attacked"


def test_every_number_of_many_models_and_questions_is_a_results_and_each_stands_once(tmp_path):
    results = many()
    html = made(tmp_path, results)
    for heading in {str(r.question) for r in results}:
        part = sorted((r for r in results if str(r.question) == heading), key=lambda r: r.file_name)
        header, *rows = html.table(heading, 8)
        assert header[1] == "model" and rows == [row_of(r, model=True) for r in part]
    _, *short = html.table("In short", 7)
    assert len(short) == len({(r.question, r.model) for r in results}) == 9
    for model, clean, robust, verdict, heading, sets, n in short:
        part = [r for r in results if (str(r.question), Path(r.model).name) == (heading, model)]
        means = mean(part)
        assert [sets, n] == [str(len(part)), str(sum(r.n for r in part))]
        assert [clean.split()[0], robust.split()[0]] == [f"{means['clean']:.1f}", f"{means['robust']:.1f}"]
        assert verdict == ("suspicious (1 of 1 sets)" if heading.endswith("“native”") else part[0].verdict)


def test_the_verdict_over_several_sets_is_the_worst():
    for verdicts, worst in (
        (("clear", "clear"), ("clear", 0)),
        (("clear", "unchecked"), ("unchecked", 0)),
        (("unchecked", "suspicious", "clear"), ("suspicious", 1)),
        (("suspicious", "suspicious"), ("suspicious", 2)),
    ):
        (row,) = summary([make_result(dataset=f"set{i}", sanity_checks=CHECKS[v]) for i, v in enumerate(verdicts)])
        assert (row["verdict"], row["doubted"]) == worst


def test_models_of_one_name_are_told_apart_by_their_paths_or_weights():
    def names(*models):
        return [*short_names([make_result(model=m, fingerprint=f * 8) for m, f in models]).values()]

    assert names(("x/a", "1"), ("x/b", "2"), ("x/a", "1")) == ["a", "b"]
    assert names(("x/a", "1"), ("y/a", "2")) == ["x/a", "y/a"]
    assert names(("x/a", "1"), ("x/a", "2")) == ["x/a (111111)", "x/a (222222)"]


def test_questions_are_never_mixed_in_one_table(tmp_path):
    changes = ({}, {"protocol": "native"}, {"attack": "cw-20"}, {"norm": "l2"}, {"eps": "2/255"})
    results = [make_result(dataset=f"set{i}", **change) for i, change in enumerate(changes)]
    html = made(tmp_path, results)
    text = (tmp_path / "report.md").read_text(encoding="utf-8")
    parts = dict(part.split("\n\n", 1) for part in text.split("\n## ")[1:])
    assert parts.keys() == {str(r.question) for r in results}
    for result in results:
        assert [row[0] for row in html.table(str(result.question), 7)] == ["data set", result.dataset]
        assert parts[str(result.question)].strip() == result_table([result])


def test_doubts_stand_by_name_with_what_was_seen(tmp_path):
    clear = make_result(dataset="cats", sanity_checks=CHECKS["clear"])
    html = made(tmp_path, [make_result(dataset="mice", sanity_checks=CHECKS["suspicious"]), clear])
    assert "mice: more_steps" in html.found["h3"] and not any(h.startswith("cats:") for h in html.found["h3"])
    assert "more_steps" in html.found["b"] and html.text.count(RAISED["detail"]) == 2
    passed = ["detached", "passed", "0 of 9 images"]
    rows = [passed, passed, ["more_steps", "raised", RAISED["detail"]], ["baseline", "not run", "none given"]]
    assert [row for row in html.table(str(clear.question), 3) if row[0] != "check"] == rows
    assert f"- mice (ours): more_steps: {RAISED['detail']}" in (tmp_path / "report.md").read_text()


def test_a_check_that_was_raised_is_told_in_its_own_words_and_at_its_level(tmp_path):
    odd = check("few_images", True, "9 images"), check("of_old", True, "seen")
    html = made(tmp_path, [make_result(sanity_checks=(*CHECKS["suspicious"], *odd))])
    _, *rows = html.table("What was raised", 3)
    assert [row[:2] for row in rows] == [
        ["more_steps", "suspicious"],
        ["few_images", "remark"],
        ["of_old", "suspicious"],
    ]
    assert rows[0][2] == sanity_checks.more_steps.__doc__ and rows[2][2] == "A check of another version."
    assert all(check.__doc__ and "\n" not in check.__doc__ for check in sanity_checks.CHECKS), "one sentence or two"
    assert "What was raised" not in made(tmp_path / "clear", [make_result(sanity_checks=CHECKS["clear"])]).tables


def test_models_on_the_same_images_are_compared_image_by_image(tmp_path):
    results = [simulated(m, d) for m in MODELS for d in ("cats", "dogs")]
    html = made(tmp_path, results)
    _, *rows = html.table(str(results[0].question), 4)
    found = compare([replace(r, model=Path(r.model).name) for r in results], "hpt_gpd")
    assert [row[0] for row in rows] == [c.model for c in found[1:]] and found[0].model == "hpt_gpd"
    for row, other in zip(rows, found[1:], strict=True):
        shown = [f"{d.value:+.1f} {d.low:+.1f} to {d.high:+.1f}" for d in other.against.values()]
        assert row[1:] == [*shown, ", ".join(k for k, d in other.against.items() if d.low > 0 or d.high < 0)]
    alike = made(tmp_path / "alike", [make_result(model=m, fingerprint=m) for m in ("a", "b")])
    assert alike.table(str(results[0].question), 4)[1] == ["b", "+0.0 -1.9 to +1.9", "+0.0 -1.9 to +1.9", "neither"]


@pytest.mark.parametrize("changed", [{"ends": ""}, {"dataset": "dogs"}, {"per_class": COUNTS[0]}])
def test_models_that_may_not_be_compared_are_not(tmp_path, changed):
    results = [make_result(model="a", fingerprint="a"), make_result(model="b", fingerprint="b", **changed)]
    assert "Image by image" not in made(tmp_path, results).text


def test_what_one_needs_to_doubt_a_figure_is_told(tmp_path):
    stages = {"apgd-ce": 44, "apgd-t": 41, "square": 40}
    more = {"skipped": ("row 3", "row 9"), "target": "cat"}
    result = make_result(attack="standard", n_after=stages, **more)
    text = made(tmp_path, [result]).text
    for said in (
        "robust after apgd-ce: 44.0%, apgd-t: 41.0%, square: 40.0%;",
        "robust = right on the clean image and never taken for 'cat' on any query;",
        f"weights {result.fingerprint}; images {result.images_digest}, opened by {result.source};",
        "prompts a photo of a {};",
        "1.5 s on a CPU; torch 2, hpt_hf 0.1.0.",
        "2 unreadable images were left out",
    ):
        assert said in text
    report = (tmp_path / "report.md").read_text()
    assert "2 unreadable images were left out" in report


def test_transfer_is_a_table(tmp_path):
    html = made(tmp_path, transfer=TRANSFER)
    header, *rows = html.table("Transfer: pgd-20, linf 8/255", 7)
    assert header == ["asked", "attacked for", "clean", "on the attack", "kept", "KL, nats", "images"]
    assert [row[:4] for row in rows] == [[c["judge"], c["source"], "70.0", f"{c['adversarial']:.1f}"] for c in CELLS]
    assert [row[4:] for row in rows] == [[f"{c['kept']:.0f}%", "1.25", "40"] for c in CELLS]
    assert (tmp_path / "report.md").read_text().endswith("## Transfer\n\n| a |\n|---|\n")
    both = made(tmp_path, [make_result()], transfer=TRANSFER)
    assert list(both.tables)[0] == "In short" and list(both.tables)[-1] == "Transfer: pgd-20, linf 8/255"


@pytest.mark.parametrize(
    ("figures", "order", "says"),
    [
        (
            (("a", 100, 50), ("b", 90, 85)),
            ["b", "a", "s"],
            "Take b: it is right on 70.8% of the images attacked for s.",
        ),
        ((("a", 100, 84), ("b", 90, 85)), ["b", "a", "s"], "Chance may have put it before a: more images tell."),
        ((("a", 100, 14),), ["a", "s"], "Take none: not even a is better there than s itself, beyond chance."),
    ],
)
def test_the_page_says_which_proxy_to_take_and_how_sure_that_is(tmp_path, figures, order, says):
    html = made(tmp_path, transfer=(transfer := proxies(*figures, ("s", 106, 9))))
    assert says in html.text and ("Chance" in says or "Chance" not in html.text)
    assert [row[0] for row in html.table(f"Transfer: {transfer['title']}", 7)] == ["asked", *order]


# --- plots


def test_several_radii_draw_a_curve_from_the_clean_accuracy(tmp_path):
    robust = {"1/255": 60, "2/255": 40, "4/255": 20}
    results = [make_result(eps=e, per_class={"a": (100, 80, r)}) for e, r in robust.items()]
    ((line,),) = (plot["lines"] for plot in curves(summary(results)))
    assert (line["model"], line["asked"]) == ("models/ours", "pgd-20 on cats")
    expected = [(0.0, 80.0, wilson(80, 100))]
    expected += [(pytest.approx(int(e[0]) / 255), r, pytest.approx(wilson(r, 100))) for e, r in robust.items()]
    assert line["points"] == [(x, y, pytest.approx(ends)) for x, y, ends in expected]
    html = made(tmp_path, results)
    (drawn,) = (attrs["points"].split() for tag, attrs in html.tags if tag == "polyline")
    places = [tuple(float(v) for v in point.split(",")) for point in drawn]
    assert [x for x, _ in places] == [pytest.approx(34 + 300 * e / 4) for e in (0, 1, 2, 4)]
    assert [y for _, y in places] == [pytest.approx(210 - 2 * y) for y in (80, 60, 40, 20)]
    assert sorted(t for t in html.found["text"] if "/" in t) == list(robust)
    assert html.found["b"] == ["ours", "pgd-20 on cats"], "the legend"


def test_one_plot_has_one_unit_one_protocol_and_one_line_for_each_model_and_attack():
    """0.5 in l2 and 1/255 in linf have no common axis."""
    kinds = [{"norm": n, "protocol": p} for n, p in (("linf", "input"), ("l2", "input"), ("linf", "native"))]
    models = [{"model": m, "attack": a} for m, a in (("1", "pgd-20"), ("2", "pgd-20"), ("1", "cw-20"))]
    results = [make_result(**kind, **model, eps=e) for kind in kinds for model in models for e in ("0.5", "1")]
    plots = curves(summary(results))
    assert [(p["question"].norm, p["question"].protocol) for p in plots] == [tuple(k.values()) for k in kinds]
    assert all([[x for x, *_ in line["points"]] for line in p["lines"]] == [[0, 0.5, 1]] * 3 for p in plots)


def test_means_over_different_sets_or_samples_are_no_curve():
    """A model that was asked about the easy set only would look better than one asked about all."""
    for other in ({"dataset": "hard"}, {"per_class": {"cat": (5, 4, 3)}}, {"seed": 1}):
        assert curves(summary([make_result(), make_result(eps="2/255", **other)])) == []


def test_models_have_a_colour_and_a_mark_each_and_attacks_a_dash_in_lines_and_legend(tmp_path):
    radii, models = ("1/255", "2/255"), ("a", "b")
    results = [make_result(model=m, attack=a, eps=e) for m in models for a in ("cw-20", "pgd-20") for e in radii]
    html = made(tmp_path, [replace(r, fingerprint=r.model * 8) for r in results])
    hues = [attrs["style"] for _, attrs in html.tags if "hue" in attrs.get("class", "")]
    assert hues == hues[:2] * 3 and hues[0] != hues[1], "four lines, and the legend's two"
    dashes = [attrs["stroke-dasharray"] for tag, attrs in html.tags if attrs.get("class") == "line"]
    assert dashes == [dashes[0]] * 2 + [dashes[2]] * 2 + dashes[1:3] and dashes[0] != dashes[2]
    assert html.found["b"] == ["a", "b", "cw-20 on cats", "pgd-20 on cats"]
    assert sum(attrs.get("class") == "ends" for _, attrs in html.tags) == 12, "an interval at each point"


def test_a_mean_of_sets_is_as_sure_as_its_sets_together():
    """Of one set it is Wilson's; of four alike it is half as wide; and it never leaves 0 to 100."""
    one, four = measured([(100, 60, 0)]), measured([(100, 60, 0)] * 4)
    assert one["clean_interval"] == pytest.approx(wilson(60, 100))
    assert one["robust_interval"] == pytest.approx(wilson(0, 100))
    for kind in ("clean_interval", "robust_interval"):
        width = one[kind][1] - one[kind][0]
        assert four[kind][1] - four[kind][0] == pytest.approx(width / 2)
    assert four["robust_interval"][0] == 0 and four["robust"] == 0
    assert measured([(10, 10, 0), (1000, 0, 0)])["clean"] == 50, "unweighted"


def test_one_radius_is_bars_of_the_sets_of_one_model_or_the_means_of_several(tmp_path):
    sets = [make_result(dataset=d, per_class=c) for d, c in zip(("cats", "dogs"), COUNTS, strict=False)]
    ((question, rows),) = bars(sets, summary(sets)).items()
    assert question == str(sets[0].question) and [row["name"] for row in rows] == ["cats", "dogs", "mean"]
    assert rows[0]["robust_interval"] == pytest.approx(sets[0].interval)
    other = [replace(r, model="other", fingerprint="f") for r in sets]
    ((_, rows),) = bars(both := sets + other, summary(both)).items()
    assert [row["name"] for row in rows] == ["models/ours", "other"]
    ((_, rows),) = bars(odd := sets + other[:1], summary(odd)).items()
    assert [row["name"] for row in rows] == ["models/ours, pgd-20 on 2 sets", "other, pgd-20 on cats"]
    curve = [*sets, *(replace(r, eps="2/255") for r in sets)]
    assert bars(curve, summary(curve)) == {}, "which a plot shows"
    html = made(tmp_path, sets)
    assert sum(attrs.get("class") == "track" for _, attrs in html.tags) == 3


# --- the gallery


def test_the_gallery_shows_a_set_under_its_widest_ball_only(tmp_path):
    results = [make_result(dataset=d, eps=e) for d in ("cats", "dogs") for e in ("4/255", "16/255", "0.01")]
    for result in results:
        write_json(tmp_path / "gallery" / result.file_name, [example(f"{result.dataset} {result.eps}")])
    html = made(tmp_path, results)
    assert [t for t in html.found["b"] if "/" in t or "." in t] == ["cats 16/255", "dogs 16/255"]


def test_the_gallery_shows_each_sets_first_image_before_any_second(tmp_path):
    results = [make_result(dataset=f"set{i}") for i in range(8)]
    for i, result in enumerate(results):
        shown = [example(f"{i}-{j}", shade=(i + 9 * j) / 20) for j in range(2 * (i != 3))]
        write_json(tmp_path / "gallery" / result.file_name, shown)
    html = made(tmp_path, results)
    order = [f"{i}-0" for i in (0, 1, 2, 4, 5, 6, 7)] + [f"{i}-1" for i in (0, 1, 2, 4, 5)]
    assert [t for t in html.found["b"] if re.fullmatch(r"\d-\d", t)] == order, "at most twelve"
    images = [attrs["src"].removeprefix("data:image/png;base64,") for tag, attrs in html.tags if tag == "img"]
    first = example("0-0", shade=0.0)
    assert len(images) == 36 and images[:3] == [first[k] for k in ("clean", "perturbation", "attacked")]
    assert all(attrs["alt"] for tag, attrs in html.tags if tag == "img")
    assert "attacked: dog (80%) set0 · ours · pgd-20, linf 1/255" in html.text


# --- the page as a file


def everything(folder: Path) -> Page:
    return made(folder, many(), examples=[example(), example("dog", "cat")], transfer=TRANSFER)


def test_the_page_needs_nothing_from_outside_and_runs_nothing(tmp_path):
    html = everything(tmp_path)
    tags = {tag for tag, _ in html.tags}
    assert tags >= {"svg", "img", "table", "details", "style"} and not tags & FOREIGN
    for tag, attrs in html.tags:
        for name, value in attrs.items():
            if name in LOADS:
                assert value.startswith(("data:image/png;base64,", "#")), (tag, name, value[:80])
            assert not name.startswith("on")
            assert all(u.startswith("#") for u in re.findall(r"url\((.*?)\)", value or ""))
            assert "://" not in value or name.startswith("xmlns") or name == "rdf:resource", (tag, name, value)
    styles = " ".join(html.found["style"])
    assert "@import" not in styles and "url(" not in styles and "://" not in styles
    assert [attrs for tag, attrs in html.tags if tag == "meta"][0] == {"charset": "utf-8"}


def test_the_same_results_give_the_same_bytes(tmp_path):
    for folder in (tmp_path / "one", tmp_path / "two"):
        everything(folder)
    for name in ("report.html", "report.md"):
        first = (tmp_path / "one" / name).read_bytes()
        assert first == (tmp_path / "two" / name).read_bytes()
        write_html_report(tmp_path / "one")
        assert first == (tmp_path / "one" / name).read_bytes()


def test_names_are_text_and_never_markup(tmp_path):
    """Names of models, classes and sets come from folders and the Hub: whoever names them does not write this page."""
    evil = '<b onclick="x">&amp; $a^b$ {{ 7 * 7 }} --> '
    settings = {name: f"{evil}{name}" for name in ("attack", "hardware", "dataset")}
    settings |= {"templates": (f"{evil}template {{}}",)}
    settings |= {"sanity_checks": (check(f"{evil}check", True, f"{evil}seen"),)}
    settings |= {"per_class": {f"{evil}class": (40, 30, 20)}}
    models = [{"model": f"{evil}{m}", "fingerprint": m} for m in ("one", "two")]
    results = [make_result(**model, eps=e, **settings) for model in models for e in ("1/255", "2/255")]
    transfer = TRANSFER | {"title": f"{evil}title"}
    transfer["cells"] = [{**CELLS[0], "source": f"{evil}source", "judge": f"{evil}judge"}]
    html = made(tmp_path, results, examples=[example(f"{evil}truth", f"{evil}said")], transfer=transfer)
    assert not [attrs for _, attrs in html.tags if "onclick" in attrs]
    parts = ["attack", "hardware", "dataset", "class", "seen", "check", "one", "two", "template {}"]
    for part in (*parts, "truth", "said", "source", "judge", "title"):
        assert f"{evil}{part}" in html.text, part


@pytest.mark.parametrize("name", ["<b>x</b>", "$\\frac{$^$", "_hidden", "a & b"])
def test_an_odd_name_spoils_no_page(tmp_path, name):
    results = [make_result(model=name, dataset=name, eps=e, per_class={name: (3, 2, 1)}) for e in ("0", "1/255")]
    html = made(tmp_path, results)
    assert name in [" ".join(row[0].split()) for rows in html.tables.values() for row in rows]
    assert sum(tag == "figure" for tag, _ in html.tags) == 1


# --- old folders, and nothing to report


def test_a_folder_of_the_version_before_is_reported(tmp_path):
    old = {"model": "m", "fingerprint": "f", "revision": None, "dataset": "old", "source": {}, "classes": 1, "n": 4}
    old |= {"templates": ["{}"], "rows": "r", "attack": "pgd-20", "steps": None, "norm": "linf", "eps": "1/255"}
    old |= {"protocol": "input", "seed": 0, "target": None, "clean": 75.0, "robust": 25.0, "parts": {"pgd": 25.0}}
    old |= {"per_class": {"a": [4, 3, 1]}, "format": 2}
    old |= {"checks": [{"name": "restarts", "raised": True, "seen": "2 of 9"}]}
    write_json(tmp_path / "scores" / "old.json", old)
    html = made(tmp_path, [make_result(dataset="new")])
    assert {row[0] for row in html.table("pgd-20, linf 1/255, protocol “input”", 8)} >= {"old", "new"}
    assert "2 of 9" in html.text


@pytest.mark.parametrize("folder", ["absent", "bare"])
def test_an_empty_folder_is_an_error_and_stays_as_it_is(tmp_path, folder):
    (tmp_path / "bare" / "results").mkdir(parents=True)
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(ValueError, match=f"{folder} holds no results/.*json and no transfer.json: nothing to report"):
        write_html_report(tmp_path / folder)
    assert sorted(tmp_path.rglob("*")) == before


def test_a_folder_with_a_file_that_is_no_result_is_an_error_that_names_it(tmp_path):
    write_json(tmp_path / "results" / make_result().file_name, make_result().to_json())
    (tmp_path / "results" / "other.json").write_text(json.dumps({"robust": 1}))
    with pytest.raises(ValueError, match="other.json is no result"):
        write_html_report(tmp_path)
    assert [f.name for f in tmp_path.iterdir()] == ["results"]


# --- the page as it is seen


def realistic(folder: Path) -> dict[str, Path]:
    """Three folders: curves of models and attacks; models in one ball, with a pre-flight; one model on many sets."""
    doubted = {"sanity_checks": (PASSED, RAISED, REMARK)}
    made(
        folder / "curves",
        [
            simulated(m, d, a, e, **(doubted if (a, e) == ("pgd-20", "4/255") and "tecoa" in m else {}))
            for m in MODELS
            for d in ("cifar10", "a set whose name is rather longer than one would like")
            for a, radii in (("pgd-20", ("1/255", "2/255", "4/255", "16/255")), ("standard", ("1/255", "2/255")))
            for e in radii
        ],
        examples=[example("a photograph of a Siamese cat"), example("dog", "cat")],
    )
    ranking = proxies(
        ("lab:proxy", 106, 85), ("outputs/convolution-with-a-long-name", 84, 82), ("lab:student", 106, 9)
    )
    made(
        folder / "models", [simulated(m, d, eps="2/255") for m in MODELS for d in ("cifar10", "dtd")], transfer=ranking
    )
    sets = ["caltech101", "cars", "cifar10", "dtd", "eurosat", "food101"]
    made(
        folder / "sets",
        [simulated("outputs/hpt_gpd", d, n=40 + 9 * i, sanity_checks=(REMARK,) * (not i)) for i, d in enumerate(sets)],
    )
    return {name: folder / name / "report.html" for name in ("curves", "models", "sets")}


# Every text lies inside the cell, card or picture that holds it and inside the window, and no two names of an axis overlap.
UNFIT = """() => {
    const found = [], walk = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT);
    const range = document.createRange(), within = (a, b) => a.left >= b.left - 1 && a.right <= b.right + 1;
    for (let node; (node = walk.nextNode()); ) {
        range.selectNodeContents(node);
        const holder = node.parentElement.closest('td, th, .card, .bar, figure, p, li, h1, h2, h3, dl, summary');
        const boxes = [...range.getClientRects()].filter(box => node.data.trim() && box.width);
        const tick = node.parentElement.closest('.ends') !== null; // it is wider than its place, on one line
        if (boxes.some(box => !within(box, {left: 0, right: innerWidth})) || (tick ? boxes.length > 1
            : boxes.some(box => !within(box, holder.getBoundingClientRect()))))
            found.push(node.data.trim());
    }
    for (const plot of document.querySelectorAll('svg')) {
        const boxes = [...plot.querySelectorAll('text')].map(t => [t.textContent, t.getBoundingClientRect()]);
        for (const [name, a] of boxes) for (const [other, b] of boxes)
            if (name < other && a.left < b.right && b.left < a.right && a.top < b.bottom && b.top < a.bottom)
                found.push(name + ' on ' + other);
    }
    return found;
}"""
# (colour, contrast with the page) of all that is marked by a colour: WCAG asks 4.5 of text and 3 of pictures.
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
    const against = colour => Math.max(light(colour) / page, page / light(colour));
    const text = [...document.querySelectorAll('.clear, .remark, .suspicious, .unchecked, .soft, figcaption')];
    const pictures = [...document.querySelectorAll('.hue path, .track b')];
    return [text.map(e => against(getComputedStyle(e).color)),
        pictures.map(e => against(getComputedStyle(e)[e.tagName == 'B' ? 'borderTopColor' : 'fill']))]
        .map((list, i) => Math.min(...list.filter(c => i == 0 || c > 1.01)));
}"""


@pytest.fixture(scope="module")
def pages(tmp_path_factory):
    return realistic(tmp_path_factory.mktemp("pages"))


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [1280, 390])
def test_on_a_desk_and_on_a_phone_everything_can_be_read(browser, pages, tmp_path, width, scheme):
    for name, file in pages.items():
        tab = browser.new_page(viewport={"width": width, "height": 900}, color_scheme=scheme)
        tab.goto(file.as_uri())
        picture = tmp_path / f"{name}.png"
        tab.screenshot(path=picture, full_page=True)
        assert picture.stat().st_size > 10_000
        tab.evaluate("document.querySelectorAll('details').forEach(e => (e.open = true))")
        assert tab.evaluate("document.documentElement.scrollWidth <= innerWidth"), (name, "wider than the window")
        assert tab.evaluate("[...document.querySelectorAll('.scroll')].every(e => e.scrollWidth <= e.clientWidth)"), (
            name
        )
        assert tab.evaluate(UNFIT) == [], name
        text, pictures = tab.evaluate(CONTRAST)
        assert text >= 4.5 and pictures >= 3, name
        assert tab.locator("dt").all_inner_texts() == ["clear", "remark", "suspicious", "unchecked"]
        tab.close()


def test_the_legends_say_model_attack_and_what_was_raised(browser, pages):
    tab = browser.new_page()
    tab.goto(pages["curves"].as_uri())
    keys = tab.locator(".key").all_inner_texts()
    assert [key.strip() for key in keys] == [
        *sorted(Path(m).name for m in MODELS),
        "pgd-20 on 2 sets",
        "standard on 2 sets",
    ]
    assert tab.get_by_text("had not arrived").is_visible(), "what more_steps means"
    tab.goto(pages["models"].as_uri())
    assert (
        tab.get_by_text("Take lab:proxy").is_visible()
        and tab.get_by_text("Image by image, against hpt_gpd").is_visible()
    )
    tab.close()
