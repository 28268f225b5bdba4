"""Proves that a report is whole or absent, mixes nothing that may not be compared, and states intervals that are right."""

import json
import math
import os
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from hpt_hf.evaluation import Score, mean, wilson
from hpt_hf.report import markdown, score_table, story, write_json


def score(**changes):
    settings = {
        "model": "m",
        "fingerprint": "f",
        "dataset": "cats",
        "classes": 5,
        "templates": ("{}",),
        "n": 100,
        "rows": "r",
        "attack": "pgd-20",
        "norm": "linf",
        "eps": "1/255",
        "protocol": "input",
        "seed": 0,
        "clean": 60.0,
        "robust": 40.0,
        "clean_interval": (50.2, 69.1),
        "interval": (30.9, 49.8),
    }
    return Score(**(settings | changes))


# --- files


def test_json_is_read_back_as_it_was_in_a_folder_that_is_made(tmp_path):
    value = {"name": "tête", "eps": "8/255", "list": [1, 2.5, None, True]}
    file = write_json(tmp_path / "a" / "b" / "score.json", value)
    assert json.loads(file.read_text(encoding="utf-8")) == value and [f.name for f in file.parent.iterdir()] == ["score.json"]


def full_disk(monkeypatch):
    write = Path.write_text

    def half(self, text, **options):
        write(self, text[: len(text) // 2], **options)
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "write_text", half)


def no_rename(monkeypatch):
    def refuse(*_):
        raise PermissionError

    monkeypatch.setattr(os, "replace", refuse)


@pytest.mark.parametrize("trouble", [full_disk, no_rename])
@pytest.mark.parametrize("before", [None, {"old": 1}])
def test_a_failed_write_leaves_the_old_file_or_none(tmp_path, monkeypatch, trouble, before):
    file = tmp_path / "score.json"
    if before is not None:
        write_json(file, before)
    trouble(monkeypatch)
    with pytest.raises(OSError):
        write_json(file, {"new": list(range(1000))})
    assert (json.loads(file.read_text()) if file.exists() else None) == before
    monkeypatch.undo()
    assert json.loads(write_json(file, {"new": 2}).read_text()) == {"new": 2}  # and the next attempt succeeds


def test_what_json_cannot_say_is_an_error_before_any_file(tmp_path):
    with pytest.raises(TypeError):
        write_json(tmp_path / "score.json", {"bad": object()})
    assert not list(tmp_path.iterdir())


def test_a_score_survives_its_file(tmp_path):
    one = score()
    again = json.loads(write_json(tmp_path / "s.json", one.to_json()).read_text())
    assert score_table([again]) == score_table([one.to_json()])
    assert again["clean"] == one.clean and tuple(again["interval"]) == one.interval


# --- tables


def cells(table):
    return [[c.strip() for c in line.strip("|").split("|")] for line in table.splitlines()]


def test_markdown_is_a_table_of_equal_lines():
    lines = markdown(("name", "value"), [("a long name", 1.26), ("b", 10), ("c", "–")]).splitlines()
    assert len({len(line) for line in lines}) == 1 and len({line.count("|") for line in lines}) == 1
    assert cells("\n".join(lines))[2:] == [["a long name", "1.3"], ["b", "10"], ["c", "–"]]
    assert lines[1].strip("|").split("|")[1].endswith(":")  # numbers to the right
    with pytest.raises((ValueError, IndexError)):
        markdown(("name", "value"), [("one cell",)])


def test_a_score_table_shows_each_set_and_the_unweighted_mean():
    scores = [
        score(dataset="cats", n=10, clean=60.0, robust=40.0),
        score(dataset="dogs", n=1000, clean=20.0, robust=0.0, clean_interval=(17.6, 22.6), interval=(0.0, 0.38)),
    ]
    header, _, *rows = cells(score_table([s.to_json() for s in scores]))
    table = [dict(zip(header, row, strict=True)) for row in rows]
    assert [row["data set"] for row in table] == ["cats", "dogs", "mean"]
    assert rows[1] == ["dogs", "1000", "5", "20.0", "17.6–22.6", "0.0", "0.0–0.4"]
    assert (table[2]["clean %"], table[2]["robust %"], table[2]["n"]) == ("40.0", "20.0", "1010")
    assert mean(scores) == {"clean": 40.0, "robust": 20.0}


@pytest.mark.parametrize(
    ("field", "other"),
    [("protocol", "native"), ("attack", "pgd-10"), ("attack", "cw-20"), ("norm", "l2"), ("eps", "2/255")],
)
def test_a_table_of_what_may_not_be_compared_is_refused(field, other):
    assert score_table([score().to_json(), score(dataset="dogs").to_json()])
    with pytest.raises(ValueError, match=f"one protocol, attack and threat.*{other}"):
        score_table([score().to_json(), score(**{field: other}).to_json()])


# --- intervals


@pytest.mark.parametrize(
    ("right", "n", "low", "high"),
    [  # R: binom::binom.wilson
        (0, 10, 0.0, 27.75),
        (10, 10, 72.25, 100.0),
        (5, 10, 23.66, 76.34),
        (1, 100, 0.18, 5.45),
        (400, 1000, 37.01, 43.07),
    ],
)
def test_wilson_gives_the_published_numbers(right, n, low, high):
    assert wilson(right, n) == pytest.approx((low, high), abs=0.006)


@pytest.mark.parametrize("n", [1, 7, 100, 1000, 50_000])
def test_wilson_bounds_are_the_proportions_just_rejected(n):
    """By definition: at a bound p, the observed share lies z standard errors of p away."""
    for right in {0, 1, n // 3, n // 2, n - 1, n}:
        bounds = wilson(right, n)
        assert 0 <= bounds[0] <= 100 * right / n <= bounds[1] <= 100
        for p in (b / 100 for b in bounds):
            if 0 < p < 1:
                # Rounded to 0.01 points: as far as a bound may have moved by that, so may the distance.
                reach = 1.959964 * math.sqrt(p * (1 - p) / n)
                slack = 6e-5 * (1 + 1.959964 * abs(1 - 2 * p) / (2 * math.sqrt(p * (1 - p) * n)))
                assert abs(abs(right / n - p) - reach) <= slack


def test_wilson_is_symmetric_narrows_with_n_and_knows_nothing_of_nothing():
    assert wilson(0, 0) == (0.0, 100.0)
    for right, n in ((3, 10), (1, 50)):
        low, high = wilson(right, n)
        assert wilson(n - right, n) == pytest.approx((100 - high, 100 - low), abs=0.011)
    widths = [np.diff(wilson(4 * 10**k, 10 * 10**k))[0] for k in range(4)]
    assert widths == sorted(widths, reverse=True) and widths[0] > 10 * widths[3]


# --- the picture


def test_the_story_is_drawn_for_any_number_of_models_and_examples(tmp_path):
    models = {name: {"clean": 80.0 - i, "robust": 5.0 * i} for i, name in enumerate(("vanilla", "hpt", "hpt_gpd", "tecoa"))}
    summary = {
        "models": models,
        "tasks": ["digits", "dice"],
        "threat": "linf 8/255",
        "proxy_on_student_adversarial": {"clean": 70.0, "adversarial": 60.0},
    }
    image = np.random.default_rng(0).random((32, 32, 3))
    said = {"vanilla": "digit two", "hpt_gpd": "digit one"}
    for count in (1, 4):
        file = story(summary, [(image, 1 - image, "digit one", said)] * count, tmp_path / f"story{count}.png")
        drawn = np.asarray(Image.open(file).convert("RGB"))
        assert drawn.shape[0] > 300 and drawn.std() > 5
    assert (tmp_path / "story1.png").read_bytes() != (tmp_path / "story4.png").read_bytes()
