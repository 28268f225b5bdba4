"""What a long evaluation has found so far, line by line in a file, so that it goes on after a kill."""

from __future__ import annotations

import hashlib
import json
import os
from contextlib import suppress
from pathlib import Path


class Findings:
    """Findings of one question by name. Without a folder they are only remembered.

    Each is one JSON line, on disk before `note` returns; a line that a kill tore in two does not count. A file is named
    by a digest of `question`, all that the findings hang on; each process appends to its own and reads all.
    """

    def __init__(self, folder: str | Path | None, question: dict, rank: int = 0):
        self.findings: dict[str, dict] = {}
        self.get = self.findings.get
        self.file: Path | None = None
        if folder is None:
            return
        Path(folder).mkdir(parents=True, exist_ok=True)
        self.digest = hashlib.sha256(json.dumps(question, sort_keys=True).encode()).hexdigest()[:16]
        for file in sorted(Path(folder).glob(f"{self.digest}-*.jsonl")):
            self.findings.update(_whole_lines(file))
        self.file = Path(folder, f"{self.digest}-{rank}.jsonl")
        if self.file.exists():  # a torn last line must not be continued
            os.truncate(self.file, self.file.read_bytes().rfind(b"\n") + 1)

    def note(self, name: str, finding: dict) -> dict:
        """Keep a finding under its name. Returns it."""
        self.findings[name] = finding
        if self.file is not None:
            with self.file.open("a", encoding="utf-8") as file:
                file.write(json.dumps({"name": name, "finding": finding}) + "\n")
                file.flush()
                os.fsync(file.fileno())
        return finding


def _whole_lines(file: Path) -> dict[str, dict]:
    found = {}
    for line in file.read_bytes().split(b"\n")[:-1]:
        with suppress(ValueError, KeyError, TypeError):  # torn by a kill or a full disk: it is found again
            entry = json.loads(line)
            found[entry["name"]] = entry["finding"]
    return found
