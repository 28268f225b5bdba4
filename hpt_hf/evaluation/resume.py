"""The journal: what a long evaluation has found so far, line by line in a file, so that it goes on after a kill as if nothing had happened."""

from __future__ import annotations

import hashlib
import json
import os
from pathlib import Path


class Journal:
    """Findings of one question by name. Without a folder it only remembers.

    Each finding is one JSON line, on disk before `note` returns. A line that a kill tore in two does not count. The question's digest is in
    the file's name: another model, attack, set or version is another journal. Each process appends to a file of its own and reads all.

    Args:
        folder: for the files; None: nothing is kept.
        question: all that the findings hang on, as JSON.
        rank: of this process.
    """

    def __init__(self, folder: str | Path | None, question: dict, rank: int = 0):
        self.findings: dict[str, dict] = {}
        self.file: Path | None = None
        if folder is None:
            return
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        text = json.dumps(question, sort_keys=True)
        digest = hashlib.sha256(text.encode()).hexdigest()[:16]
        for file in sorted(folder.glob(f"{digest}-*.jsonl")):
            self.findings |= _whole_lines(file)
        self.file = folder / f"{digest}-{rank}.jsonl"
        if self.file.exists():  # a torn last line must not be continued
            os.truncate(self.file, self.file.read_bytes().rfind(b"\n") + 1)

    def get(self, name: str) -> dict | None:
        return self.findings.get(name)

    def note(self, name: str, finding: dict) -> dict:
        """Keep a finding under its name. Returns it."""
        self.findings[name] = finding
        if self.file is not None:
            try:
                with self.file.open("a", encoding="utf-8") as file:
                    file.write(json.dumps({"name": name, "finding": finding}) + "\n")
                    file.flush()
                    os.fsync(file.fileno())
            except OSError as error:
                raise OSError(
                    error.errno,
                    f"{self.file} could not be written ({error.strerror}); make room, and the same command goes on from here",
                ) from error
        return finding


def _whole_lines(file: Path) -> dict[str, dict]:
    found = {}
    for line in file.read_bytes().splitlines(keepends=True):
        if line.endswith(b"\n"):
            try:
                entry = json.loads(line)
                found[entry["name"]] = entry["finding"]
            except (ValueError, KeyError, TypeError):
                continue  # a disk that was full in the middle of a line: it is found again
    return found
