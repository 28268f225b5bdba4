"""Proves that a file is whole or absent, says why it could not be written, and that a Markdown table is one."""

from __future__ import annotations

import errno
import json
import os
from pathlib import Path

import pytest

from hpt_hf.utils import markdown, write_json, write_text

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
    file = tmp_path / "made" / "one.json"
    file.parent.mkdir()
    if before is not None:
        write_json(file, before)
    trouble(monkeypatch)
    with pytest.raises(OSError, match="one.json could not be written .No space left on device") as error:
        write_json(file, {"new": list(range(1000))})
    assert error.value.errno == errno.ENOSPC
    assert list(file.parent.iterdir()) == ([] if before is None else [file]), "nothing half-written is left"
    assert before is None or json.loads(file.read_text()) == before
    monkeypatch.undo()
    value = {"name": "tête", "list": [1, 2.5, None, True]}
    written = write_json(tmp_path / "a" / "b" / "one.json", value)
    assert json.loads(written.read_text(encoding="utf-8")) == value, "and the next attempt succeeds"


def test_a_full_disk_stops_even_the_clean_up_without_hiding_what_happened(tmp_path, monkeypatch):
    def refuse(*_, **__):
        raise OSError(errno.EROFS, "Read-only file system")

    full_at_write(monkeypatch)
    monkeypatch.setattr(Path, "unlink", refuse)
    with pytest.raises(OSError, match="one.json could not be written .No space left"):
        write_text(tmp_path / "one.json", "text")


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
