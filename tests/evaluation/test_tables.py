"""Proves that a table mixes nothing that may not be compared."""

from __future__ import annotations

import numpy as np
import pytest
from conftest import make_result
from PIL import Image

from hpt_hf.commands.quickstart import story
from hpt_hf.evaluation.statistics import mean
from hpt_hf.evaluation.tables import result_table


def rows_of(table: str) -> list[list[str]]:
    """Header, then one list of cells a row."""
    header, _, *rows = [[c.strip() for c in line.strip("|").split("|")] for line in table.splitlines()]
    assert all(len(row) == len(header) for row in rows)
    return [header, *rows]


CHECK = {"name": "large_ball", "raised": True, "detail": "2 of 3"}


def test_a_table_shows_each_set_with_its_verdict_and_the_unweighted_mean():
    results = [
        make_result(dataset="cats", per_class={"a": (5, 3, 2), "b": (5, 3, 2)}),
        make_result(dataset="dogs", per_class={"a": (1000, 200, 0)}, sanity_checks=(CHECK,)),
        make_result(dataset="mice", per_class={"a": (10, 10, 8)}, sanity_checks=({**CHECK, "raised": False},)),
    ]
    header, *rows = rows_of(result_table(results))
    assert header == ["data set", "n", "classes", "clean %", "95%", "robust %", "95%", "verdict"], "one model"
    assert [row[0] for row in rows] == ["cats", "dogs", "mice", "mean"]
    assert rows[1] == ["dogs", "1000", "1", "20.0", "17.6–22.6", "0.0", "0.0–0.4", "suspicious"]
    assert [row[-1] for row in rows] == ["unchecked", "suspicious", "clear", "1 suspicious"]
    means = mean(results)
    assert rows[3][:-1] == ["mean", "1020", "", f"{means['clean']:.1f}", "", f"{means['robust']:.1f}", ""]
    assert rows_of(result_table(results[:1]))[-1][-1] == "", "nothing is doubted"


def test_several_models_have_a_column_and_a_mean_each():
    results = [
        make_result(model=model, fingerprint=weights, dataset=data, per_class={"a": (100, right, right // 2)})
        for model, weights, rights in (("ours", "1", (80, 60)), ("theirs", "2", (40, 20)), ("ours", "3", (20, 0)))
        for data, right in zip(("cats", "dogs"), rights, strict=True)
    ]
    header, *rows = rows_of(result_table(results))
    assert header[:3] == ["data set", "model", "n"] and [row[:2] for row in rows[:6]] == [
        [r.dataset, r.model] for r in results
    ]
    means = [("ours", "200", "70.0", "35.0"), ("theirs", "200", "30.0", "15.0"), ("ours", "200", "10.0", "5.0")]
    assert [(row[1], row[2], row[4], row[6]) for row in rows[6:]] == means


def test_a_table_of_nothing_or_of_what_may_not_be_compared_is_refused():
    for change in ({"protocol": "native"}, {"attack": "pgd-10"}, {"norm": "l2"}, {"eps": "2/255"}):
        with pytest.raises(ValueError, match=f"one protocol, attack and threat.*{[*change.values()][0]}"):
            result_table([make_result(), make_result(**change)])
    with pytest.raises(ValueError, match="no results"):
        result_table([])


def test_the_story_is_drawn_for_any_number_of_models_and_examples(tmp_path):
    models = {n: {"clean": 80.0 - i, "robust": 5.0 * i} for i, n in enumerate(("vanilla", "hpt", "hpt_gpd", "tecoa"))}
    summary = {"models": models, "tasks": ["digits", "dice"], "threat": "linf 8/255"}
    summary["proxy_on_student_adversarial"] = {"clean": 70.0, "adversarial": 60.0}
    image, said = np.random.default_rng(0).random((32, 32, 3)), {"vanilla": "digit two", "hpt_gpd": "digit one"}
    for count in (1, 4):
        file = story(summary, [(image, 1 - image, "digit one", said)] * count, tmp_path / f"story{count}.png")
        drawn = np.asarray(Image.open(file).convert("RGB"))
        assert drawn.shape[0] > 300 and drawn.std() > 5
    assert (tmp_path / "story1.png").read_bytes() != (tmp_path / "story4.png").read_bytes()
