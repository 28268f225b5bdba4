"""Proves that the page says what the Scores say and nothing else, needs nothing from outside, and is the same for the same Scores."""

from __future__ import annotations

import json
import re
from html.parser import HTMLParser
from pathlib import Path

import pytest
import torch
from conftest import make_result

from hpt_hf.data.collator import to_png
from hpt_hf.evaluation import html_report as page
from hpt_hf.evaluation.html_report import write_html_report
from hpt_hf.evaluation.result import mean
from hpt_hf.evaluation.tables import result_table
from hpt_hf.utils import write_json

VOID = {"meta", "img", "br", "hr", "link", "input", "base", "col", "source"}
LOADS = {"src", "href", "xlink:href", "srcset", "poster", "data", "action", "background"}


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


def fill(folder: Path, scores=(), *, examples=None, crossed=None) -> Path:
    for score in scores:
        write_json(folder / "scores" / score.file_name, score.to_json())
        if examples:
            write_json(folder / "gallery" / score.file_name, examples)
    if crossed:
        write_json(folder / "transfer.json", crossed)
    return folder


def made(folder: Path, scores=(), **more) -> Page:
    file = write_html_report(fill(folder, scores, **more))
    assert file == folder / "report.html"
    return Page(file.read_text(encoding="utf-8"))


def example(truth: str = "cat", said: str = "dog", shade: float = 0.5) -> dict:
    png = {
        k: to_png(torch.full((3, 4, 4), v))
        for k, v in (("clean", shade), ("perturbation", 1.0), ("attacked", shade / 2))
    }
    return {"truth": truth, "said": f"{truth} (90%)", "said_attacked": f"{said} (80%)", **png}


def check(name: str, raised, seen: str) -> dict:
    return {"name": name, "raised": raised, "seen": seen}


def doubted(**changes):
    """A EvalResult with one check of each outcome."""
    raised = check("restarts", True, "5 of 9 standing pictures fall")
    checks = (check("detached", False, "0 of 9 pictures"), raised, check("baseline", None, "no undefended model"))
    return make_result(verdict="suspicious", suspicions=(raised,), checks=checks, **changes)


CELLS = [
    {"source": s, "judge": j, "clean": 70.0, "adversarial": a, "kept": 100 * a / 70, "kl": 1.25, "n": 40}
    for s, j, a in (("m/one", "m/one", 1.0), ("m/one", "two", 62.0), ("two", "m/one", 33.0), ("two", "two", 4.0))
]
CROSSED = {
    "title": "pgd-20, linf 8/255",
    "sources": ["m/one", "two"],
    "judges": ["m/one", "two"],
    "adversarial": [[1.0, 62.0], [33.0, 4.0]],
    "cells": CELLS,
    "table": "| a |\n|---|",
}
COUNTS = [{"cat": (30, 21, 13), "red car": (7, 7, 1)}, {"cat": (40, 39, 38), "dog": (10, 4, 4)}, {"dog": (60, 11, 0)}]


def many() -> list:
    """Three models (one on one set only), three radii, both protocols, one l2."""
    scores = [
        make_result(
            model=f"models/{m}",
            fingerprint=m * 4,
            dataset=d,
            eps=e,
            per_class=COUNTS[(i + j + k) % 3],
            verdict="clear",
        )
        for i, m in enumerate(("a", "b"))
        for j, d in enumerate(("cats", "dogs"))
        for k, e in enumerate(("1/255", "2/255", "4/255"))
    ]
    scores += [
        make_result(model="models/c", fingerprint="cccc", per_class=COUNTS[1]),
        doubted(protocol="native", dataset="mice"),
    ]
    return [*scores, make_result(norm="l2", eps="0.5", dataset="bees", attack="cw-20", per_class=COUNTS[0])]


# --- what the tables say


def row_of(score, *, model: bool) -> list[str]:
    name, count, robust = score.worst_class
    return [
        score.dataset,
        *([Path(score.model).name] if model else []),
        "{:.1f} {:.1f}–{:.1f}".format(score.clean, *score.clean_interval),
        "{:.1f} {:.1f}–{:.1f}".format(score.robust, *score.interval),
        score.verdict,
        f"{name} {robust} of {count}",
        str(score.n),
        str(score.classes),
    ]


def test_one_model_and_one_question_are_one_table_of_the_scores_own_numbers(tmp_path):
    scores = [
        make_result(dataset="cats", per_class=COUNTS[0]),
        make_result(dataset="dogs", per_class=COUNTS[1], verdict="clear"),
    ]
    html = made(tmp_path, scores)
    heading = "pgd-20, linf 1/255, protocol “input”"
    assert list(html.tables) == ["In short", heading]
    header, *rows = html.table(heading, 7)
    assert header == ["data set", "clean", "robust", "verdict", "weakest class", "pictures", "classes"]
    assert rows == [row_of(s, model=False) for s in scores]
    means = mean(scores)
    assert html.table("In short", 7)[1:] == [
        ["ours", f"{means['clean']:.1f}", f"{means['robust']:.1f}", "unchecked", heading, "2", "87"]
    ]
    assert not [tag for tag, _ in html.tags if tag in ("svg", "img")], "one point is no plot, and nothing was attacked"


def test_every_number_of_many_models_and_questions_is_a_scores_and_each_score_stands_once(tmp_path):
    scores = many()
    html = made(tmp_path, scores)
    for heading in {str(s.question) for s in scores}:
        part = sorted((s for s in scores if str(s.question) == heading), key=lambda s: s.file_name)
        header, *rows = html.table(heading, 8)
        assert header[1] == "model" and rows == [row_of(s, model=True) for s in part]
    _, *short = html.table("In short", 7)
    groups = {(s.question, s.model) for s in scores}
    assert len(short) == len(groups) == 9
    for model, clean, robust, verdict, heading, sets, n in short:
        part = [s for s in scores if (str(s.question), Path(s.model).name) == (heading, model)]
        means = mean(part)
        assert [sets, n] == [str(len(part)), str(sum(s.n for s in part))]
        assert [clean, robust] == [f"{means['clean']:.1f}", f"{means['robust']:.1f}"]
        assert verdict == ("suspicious (1 of 1 sets)" if heading.endswith("“native”") else part[0].verdict)


def test_the_verdict_over_several_sets_is_the_worst(tmp_path):
    for verdicts, worst in (
        (("clear", "clear"), "clear"),
        (("clear", "unchecked"), "unchecked"),
        (("unchecked", "suspicious", "clear"), "suspicious (1 of 3 sets)"),
        (("suspicious", "suspicious"), "suspicious (2 of 2 sets)"),
    ):
        scores = [make_result(dataset=f"set{i}", verdict=v) for i, v in enumerate(verdicts)]
        assert made(tmp_path / worst[:4] / str(len(verdicts)), scores).table("In short", 7)[1][3] == worst


def test_questions_are_never_mixed_in_one_table(tmp_path):
    changes = ({}, {"protocol": "native"}, {"attack": "cw-20"}, {"norm": "l2"}, {"eps": "2/255"})
    scores = [make_result(dataset=f"set{i}", **change) for i, change in enumerate(changes)]
    html = made(tmp_path, scores)
    for score in scores:
        assert [row[0] for row in html.table(str(score.question), 7)] == ["data set", score.dataset]
    text = (tmp_path / "report.md").read_text(encoding="utf-8")
    parts = dict(part.split("\n\n", 1) for part in text.split("\n## ")[1:])
    assert parts.keys() == {str(s.question) for s in scores}
    for score in scores:
        assert parts[str(score.question)].strip() == result_table([score])


def test_suspicions_stand_by_name_with_what_was_seen(tmp_path):
    html = made(tmp_path, [doubted(dataset="mice"), make_result(dataset="cats", verdict="clear")])
    assert "mice: restarts" in html.found["h3"] and not any(h.startswith("cats:") for h in html.found["h3"])
    assert "restarts" in html.found["b"] and html.text.count("5 of 9 standing pictures fall") == 2
    rows = html.table(str(make_result().question), 3)
    assert rows == [
        ["detached", "passed", "0 of 9 pictures"],
        ["restarts", "raised", "5 of 9 standing pictures fall"],
        ["baseline", "not run", "no undefended model"],
    ]
    assert "- mice (ours): restarts: 5 of 9 standing pictures fall" in (tmp_path / "report.md").read_text()


def test_what_one_needs_to_doubt_a_figure_is_told(tmp_path):
    score = make_result(
        attack="standard",
        parts={"apgd-ce": 44.0, "apgd-t": 41.0, "square": 40.0},
        notes=("apgd-t: few classes",),
        skipped=("row 3", "row 9"),
        robust_is="right when clean and so on",
    )
    text = made(tmp_path, [score]).text
    for said in (
        "standing after apgd-ce: 44.0%, apgd-t: 41.0%, square: 40.0%;",
        "robust = right when clean and so on;",
        f"weights {score.fingerprint}; pictures {score.rows}, opened by {score.source};",
        "prompts a photo of a {};",
        "1.5 s on a CPU; torch 2, hpt_hf 0.1.0. apgd-t: few classes.",
        "2 unreadable pictures were left out",
    ):
        assert said in text
    report = (tmp_path / "report.md").read_text()
    assert "- apgd-t: few classes" in report and "2 unreadable pictures were skipped" in report


# --- plots


@pytest.fixture
def drawn(monkeypatch):
    """The axes that are drawn on, instead of their SVG."""
    import matplotlib.pyplot as plt

    axes = []

    def keep(draw):
        axes.append(plt.figure().add_subplot())
        draw(axes[-1])
        return "<svg></svg>"

    monkeypatch.setattr(page, "_svg", keep)
    yield axes
    plt.close("all")


def test_several_radii_draw_a_curve_from_the_clean_accuracy(drawn):
    scores = [
        make_result(eps=e, per_class={"a": (100, 80, r)}) for e, r in (("4/255", 20), ("1/255", 60), ("2/255", 40))
    ]
    ((caption, _),) = page.plots(scores, None)
    assert caption.startswith("Robust accuracy over eps") and "linf, protocol “input”" in caption
    (line,) = drawn[0].lines
    assert line.get_xydata().tolist() == [pytest.approx(p) for p in ([0, 80], [1, 60], [2, 40], [4, 20])]
    assert drawn[0].get_xlabel() == "eps, in 255ths" and line.get_label() == "ours, pgd-20"


def test_one_plot_has_one_unit_one_protocol_and_one_line_for_each_model_and_attack(drawn):
    """0.5 in l2 and 1/255 in linf have no common axis; models of one name and other weights are two."""
    kinds = [{"norm": n, "protocol": p} for n, p in (("linf", "input"), ("l2", "input"), ("linf", "native"))]
    models = [
        {"model": "x/m", "fingerprint": f, "attack": a} for f, a in (("1", "pgd-20"), ("2", "pgd-20"), ("1", "cw-20"))
    ]
    scores = [make_result(**kind, **model, eps=e) for kind in kinds for model in models for e in ("0.5", "1")]
    curves = [caption for caption, _ in page.plots(scores, None) if caption.startswith("Robust accuracy over eps")]
    assert len(curves) == 3
    for axis, scale in zip(drawn[:3], (255, 1, 255), strict=True):
        assert [line.get_xdata().tolist() for line in axis.lines] == [[0, 0.5 * scale, scale]] * 3


def test_several_models_are_set_side_by_side_and_the_line_joins_those_that_none_beats(drawn):
    points = {"a": (90, 10), "b": (70, 50), "worse": (60, 40), "same": (90, 10), "c": (50, 50), "d": (40, 60)}
    scores = [make_result(model=m, fingerprint=m, per_class={"x": (100, *p)}) for m, p in points.items()]
    ((caption, _),) = page.plots(scores, None)
    assert caption.startswith("Clean against robust accuracy: pgd-20, linf 1/255")
    (line,) = drawn[0].lines
    assert [tuple(p) for p in line.get_xydata()] == [(40, 60), (70, 50), (90, 10), (90, 10)]
    assert [t.get_text() for t in drawn[0].texts] == list(points)
    assert [tuple(c.get_offsets()[0]) for c in drawn[0].collections] == list(points.values())


def test_means_over_different_sets_are_not_set_side_by_side(drawn):
    """A model that was asked about the easy set only would look better than one asked about all."""
    other = make_result(model="other", fingerprint="2")
    assert page.plots([make_result(), make_result(dataset="hard"), other], None) == []
    assert page.plots([make_result(), make_result(dataset="hard", eps="2/255")], None) == []
    few = make_result(model="other", fingerprint="2", per_class={"cat": (5, 4, 3)})
    assert page.plots([make_result(), few], None) == [], "nor is a sample of the set the set"
    assert len(page.plots([make_result(), other], None)) == 1


def test_transfer_is_a_heat_map_and_a_table(tmp_path):
    html = made(tmp_path, crossed=CROSSED)
    header, *rows = html.table("Transfer: pgd-20, linf 8/255", 7)
    assert header == ["attacked for", "asked", "clean", "on the attack", "kept", "KL, nats", "pictures"]
    assert rows == [
        [Path(c["source"]).name, c["judge"][-3:], "70.0", f"{c['adversarial']:.1f}", f"{c['kept']:.0f}%", "1.25", "40"]
        for c in CELLS
    ]
    assert [t for t in html.found["text"] if t.isdigit()] == ["1", "62", "33", "4"] and html.found["text"].count(
        "one"
    ) == 2
    assert (tmp_path / "report.md").read_text().endswith("## Transfer\n\n| a |\n|---|\n")
    both = made(tmp_path, [make_result()], crossed=CROSSED)
    assert list(both.tables)[0] == "In short" and list(both.tables)[-1] == "Transfer: pgd-20, linf 8/255"


# --- the gallery


def test_the_gallery_shows_a_set_under_its_widest_ball_only(tmp_path):
    scores = [make_result(dataset=d, eps=e) for d in ("cats", "dogs") for e in ("4/255", "16/255", "0.01")]
    for score in scores:
        write_json(tmp_path / "gallery" / score.file_name, [example(f"{score.dataset} {score.eps}")])
    html = made(tmp_path, scores)
    assert [t for t in html.found["b"] if "/" in t or "." in t] == ["cats 16/255", "dogs 16/255"]


def test_the_gallery_shows_each_sets_first_picture_before_any_second(tmp_path):
    scores = [make_result(dataset=f"set{i}") for i in range(8)]
    for i, score in enumerate(scores):
        write_json(
            tmp_path / "gallery" / score.file_name,
            [example(f"{i}-{j}", shade=(i + 9 * j) / 20) for j in range(2 * (i != 3))],
        )
    html = made(tmp_path, scores)
    order = [f"{i}-0" for i in (0, 1, 2, 4, 5, 6, 7)] + [f"{i}-1" for i in (0, 1, 2, 4, 5)]
    assert [t for t in html.found["b"] if re.fullmatch(r"\d-\d", t)] == order, "at most twelve"
    images = [attrs["src"].removeprefix("data:image/png;base64,") for tag, attrs in html.tags if tag == "img"]
    first = example("0-0", shade=0.0)
    assert len(images) == 36 and images[:3] == [first[k] for k in ("clean", "perturbation", "attacked")]
    assert all(attrs["alt"] for tag, attrs in html.tags if tag == "img")
    assert "clean: 0-0 (90%) attacked: dog (80%) set0 · ours · pgd-20, linf 1/255" in html.text


# --- the page as a file


def everything(folder: Path) -> Page:
    return made(folder, many(), examples=[example(), example("dog", "cat")], crossed=CROSSED)


def test_the_page_needs_nothing_from_outside_and_runs_nothing(tmp_path):
    html = everything(tmp_path)
    assert {tag for tag, _ in html.tags} >= {"svg", "img", "table", "details", "style"}
    assert not {tag for tag, _ in html.tags} & {
        "script",
        "link",
        "iframe",
        "object",
        "embed",
        "base",
        "form",
        "audio",
        "video",
    }
    for tag, attrs in html.tags:
        for name, value in attrs.items():
            if name in LOADS:
                assert value.startswith(("data:image/png;base64,", "#")), (tag, name, value[:80])
            assert not name.startswith("on") and all(
                u.startswith("#") for u in re.findall(r"url\((.*?)\)", value or "")
            )
            assert "://" not in value or name.startswith("xmlns") or name == "rdf:resource", (tag, name, value)
    styles = " ".join(html.found["style"])
    assert "@import" not in styles and "url(" not in styles and "://" not in styles
    assert [attrs for tag, attrs in html.tags if tag == "meta"][0] == {"charset": "utf-8"}


def test_the_same_scores_give_the_same_bytes(tmp_path):
    for folder in (tmp_path / "one", tmp_path / "two"):
        everything(folder)
    for name in ("report.html", "report.md"):
        first = (tmp_path / "one" / name).read_bytes()
        assert first == (tmp_path / "two" / name).read_bytes()
        write_html_report(tmp_path / "one")
        assert first == (tmp_path / "one" / name).read_bytes()
    assert sorted(f.name for f in (tmp_path / "one").iterdir()) == [
        "gallery",
        "report.html",
        "report.md",
        "scores",
        "transfer.json",
    ]


def test_names_are_text_and_never_markup(tmp_path):
    """Names of models, classes and sets come from folders and the Hub: whoever names them does not write this page."""
    evil = '<b onclick="x">&amp; $a^b$ {{ 7 * 7 }} --> '
    raised = check(f"{evil}check", True, f"{evil}seen")
    settings = {
        "attack": f"{evil}attack",
        "robust_is": f"{evil}robust_is",
        "templates": (f"{evil}template {{}}",),
        "notes": (f"{evil}note",),
        "hardware": f"{evil}hardware",
        "per_class": {f"{evil}class": (40, 30, 20)},
        "suspicions": (raised,),
        "checks": (raised,),
        "verdict": "suspicious",
    }
    scores = [
        make_result(model=f"{evil}{m}", fingerprint=m, dataset=f"{evil}set", eps=e, **settings)
        for m in ("one", "two")
        for e in ("1/255", "2/255")
    ]
    shown = example(f"{evil}truth", f"{evil}said")
    cells = [{**CELLS[0], "source": f"{evil}source", "judge": f"{evil}judge"}]
    crossed = CROSSED | {"title": f"{evil}title", "sources": [f"{evil}source"], "judges": [f"{evil}judge"]}
    html = made(tmp_path, scores, examples=[shown], crossed=crossed | {"adversarial": [[1.0]], "cells": cells})
    assert not [attrs for _, attrs in html.tags if "onclick" in attrs]
    for part in (
        "attack",
        "robust_is",
        "note",
        "hardware",
        "class",
        "seen",
        "check",
        "set",
        "one",
        "two",
        "template {}",
    ):
        assert f"{evil}{part}" in html.text, part
    for part in ("truth", "said", "source", "judge", "title"):
        assert f"{evil}{part}" in html.text, part
    labels = " ".join(html.found["text"])
    assert all(f"{evil}{part}" in labels for part in ("one", "two", "source", "judge")), (
        "in the plots too, and read as no formula"
    )


@pytest.mark.parametrize("name", ["<b>x</b>", "$\\frac{$^$", "_hidden", "a & b"])
def test_an_odd_name_spoils_no_page(tmp_path, name):
    scores = [make_result(model=name, dataset=name, eps=e, per_class={name: (3, 2, 1)}) for e in ("0", "1/255")]
    html = made(tmp_path, scores)
    assert name in [" ".join(row[0].split()) for rows in html.tables.values() for row in rows]
    assert sum(tag == "svg" for tag, _ in html.tags) == 1


# --- nothing to report


@pytest.mark.parametrize("folder", ["absent", "empty", "bare"])
def test_an_empty_folder_is_an_error_and_stays_as_it_is(tmp_path, folder):
    (tmp_path / "empty").mkdir()
    (tmp_path / "bare" / "scores").mkdir(parents=True)
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(ValueError, match=f"{folder} holds no scores/.*json and no transfer.json: nothing to report"):
        write_html_report(tmp_path / folder)
    assert sorted(tmp_path.rglob("*")) == before


def test_a_folder_with_a_file_that_is_no_score_is_an_error_that_names_it(tmp_path):
    fill(tmp_path, [make_result()])
    (tmp_path / "scores" / "other.json").write_text(json.dumps({"robust": 1}))
    with pytest.raises(ValueError, match="other.json was written by hpt_hf an unknown version"):
        write_html_report(tmp_path)
    assert not (tmp_path / "report.md").exists() and not (tmp_path / "report.html").exists()
