"""Proves that a file is whole or absent, says why it could not be written, and that a Markdown table is one."""

from __future__ import annotations

import errno
import json
import os
from pathlib import Path

import pytest

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


def test_markdown_is_a_table_of_equal_lines():
    lines = markdown(("name", "value"), [("a long name", 1.26), ("b", 10), ("c", "–")]).splitlines()
    assert len({len(line) for line in lines}) == 1 and len({line.count("|") for line in lines}) == 1
    assert [[c.strip() for c in line.strip("|").split("|")] for line in lines[2:]] == [
        ["a long name", "1.3"],
        ["b", "10"],
        ["c", "–"],
    ]
    assert lines[1].strip("|").split("|")[1].endswith(":")  # numbers to the right
    with pytest.raises((ValueError, IndexError)):
        markdown(("name", "value"), [("one cell",)])
