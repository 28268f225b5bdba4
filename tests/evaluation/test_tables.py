"""Proves that a file is whole or absent, says why it could not be written, and that a table mixes nothing."""

from __future__ import annotations

import errno
import json
import os
from pathlib import Path

import numpy as np
import pytest
from conftest import make_result
from PIL import Image

from hpt_hf.commands.quickstart import story
from hpt_hf.evaluation.statistics import mean
from hpt_hf.evaluation.tables import result_table
from hpt_hf.utils import markdown, write_json, write_text

# --- files


def test_json_is_read_back_as_it_was_in_a_folder_that_is_made(tmp_path):
    value = {"name": "tête", "eps": "8/255", "list": [1, 2.5, None, True]}
    file = write_json(tmp_path / "a" / "b" / "one.json", value)
    assert json.loads(file.read_text(encoding="utf-8")) == value and list(file.parent.iterdir()) == [file]


NO_SPACE = OSError(errno.ENOSPC, "No space left on device")


def full_at_write(monkeypatch):
    write = Path.write_text

    def half(self, text, **options):
        write(self, text[: len(text) // 2], **options)
        raise NO_SPACE

    monkeypatch.setattr(Path, "write_text", half)


def full_at_replace(monkeypatch):
    def refuse(*_):
        raise NO_SPACE

    monkeypatch.setattr(os, "replace", refuse)


@pytest.mark.parametrize("trouble", [full_at_write, full_at_replace])
@pytest.mark.parametrize("before", [None, {"old": 1}])
def test_a_failed_write_leaves_the_old_file_or_none_and_says_so(tmp_path, monkeypatch, trouble, before):
    file = tmp_path / "one.json"
    if before is not None:
        write_json(file, before)
    trouble(monkeypatch)
    for write, value in ((write_json, {"new": list(range(1000))}), (write_text, "new" * 1000)):
        with pytest.raises(OSError, match="one.json could not be written .No space left on device") as error:
            write(file, value)
        assert error.value.errno == errno.ENOSPC and error.value.__cause__ is NO_SPACE
        assert list(tmp_path.iterdir()) == ([] if before is None else [file]), "nothing half-written is left"
        assert before is None or json.loads(file.read_text()) == before
    monkeypatch.undo()
    assert json.loads(write_json(file, {"new": 2}).read_text()) == {"new": 2}, "and the next attempt succeeds"


def test_a_full_disk_stops_even_the_clean_up_without_hiding_what_happened(tmp_path, monkeypatch):
    def refuse(*_, **__):
        raise OSError(errno.EROFS, "Read-only file system")

    full_at_write(monkeypatch)
    monkeypatch.setattr(Path, "unlink", refuse)
    with pytest.raises(OSError, match="one.json could not be written .No space left"):
        write_text(tmp_path / "one.json", "text")


def test_what_cannot_be_written_is_an_error_before_any_file(tmp_path):
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(OSError, match=r"file/one.json could not be written"):
        write_text(tmp_path / "file" / "one.json", "text")
    with pytest.raises(TypeError):
        write_json(tmp_path / "one.json", {"bad": object()})
    assert [f.name for f in tmp_path.iterdir()] == ["file"]


# --- tables


def rows_of(table: str) -> list[list[str]]:
    """Header, then one list of cells a row."""
    header, _, *rows = [[c.strip() for c in line.strip("|").split("|")] for line in table.splitlines()]
    assert all(len(row) == len(header) for row in rows)
    return [header, *rows]


def test_markdown_is_a_table_of_equal_lines():
    lines = markdown(("name", "value"), [("a long name", 1.26), ("b", 10), ("c", "–")]).splitlines()
    assert len({len(line) for line in lines}) == 1 and len({line.count("|") for line in lines}) == 1
    assert rows_of("\n".join(lines))[1:] == [["a long name", "1.3"], ["b", "10"], ["c", "–"]]
    assert lines[1].strip("|").split("|")[1].endswith(":")  # numbers to the right
    with pytest.raises((ValueError, IndexError)):
        markdown(("name", "value"), [("one cell",)])


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
    """Also two of one name: other weights are another model."""
    results = [
        make_result(model=model, fingerprint=weights, dataset=data, per_class={"a": (100, right, right // 2)})
        for model, weights, rights in (("ours", "1", (80, 60)), ("theirs", "2", (40, 20)), ("ours", "3", (20, 0)))
        for data, right in zip(("cats", "dogs"), rights, strict=True)
    ]
    header, *rows = rows_of(result_table(results))
    assert header[:3] == ["data set", "model", "n"]
    means = [["mean", model] for model in ("ours", "theirs", "ours")]
    assert [row[:2] for row in rows] == [[r.dataset, r.model] for r in results] + means
    assert [(row[4], row[6]) for row in rows[6:]] == [("70.0", "35.0"), ("30.0", "15.0"), ("10.0", "5.0")]
    assert [row[2] for row in rows[6:]] == ["200", "200", "200"]


@pytest.mark.parametrize(
    ("field", "other"),
    [("protocol", "native"), ("attack", "pgd-10"), ("attack", "cw-20"), ("norm", "l2"), ("eps", "2/255")],
)
def test_a_table_of_what_may_not_be_compared_or_of_nothing_is_refused(field, other):
    assert result_table([make_result(), make_result(dataset="dogs")])
    with pytest.raises(ValueError, match=f"one protocol, attack and threat.*{other}"):
        result_table([make_result(), make_result(**{field: other})])
    with pytest.raises(ValueError, match="no results"):
        result_table([])


# --- the story


def test_the_story_is_drawn_for_any_number_of_models_and_examples(tmp_path):
    models = {
        name: {"clean": 80.0 - i, "robust": 5.0 * i} for i, name in enumerate(("vanilla", "hpt", "hpt_gpd", "tecoa"))
    }
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
