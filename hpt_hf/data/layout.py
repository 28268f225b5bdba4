"""What a local path means: which files and which split. Decided here alone, for stored and for streamed data.

Hidden names (`.cache`, `.git`, `__MACOSX`) are passed over, links are followed.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Sequence
from pathlib import Path

ALIASES = {"train": ("train", "training"), "test": ("test", "testing")}
ALIASES |= {"validation": ("val", "valid", "validation", "dev")}
SPLIT_OF = {alias: split for split, aliases in ALIASES.items() for alias in aliases}
SHARD = re.compile(r"(?P<split>.+)-(?P<number>\d+)-of-(?P<count>\d+)(-[0-9a-f]+)?")


def split_of(name: str) -> str | None:
    """The split that a folder's or file's name stands for, as `Train`, `val` or `test_01` do; None: none."""
    return SPLIT_OF.get(re.sub(r"[-_.]?\d+$", "", name.lower()))


def visible(folder: Path) -> list[Path]:
    return sorted(f for f in folder.iterdir() if not f.name.startswith(".") and f.name != "__MACOSX")


def files_below(folder: Path, suffixes: Iterable[str], left_out: list[Path] | None = None) -> list[Path]:
    """Visible regular files with one of these suffixes, in order. Links are followed, but not in circles.

    What else lies there, hidden files and folders too, is added to `left_out`.
    """
    found, seen, suffixes, rest = [], set(), set(suffixes), [] if left_out is None else left_out
    for place, folders, names in os.walk(folder, followlinks=True):
        if (real := os.path.realpath(place)) in seen:
            folders.clear()
            continue
        seen.add(real)
        hidden = {f for f in folders if f.startswith(".") or f == "__MACOSX"}
        folders[:] = [f for f in folders if f not in hidden]
        rest += [Path(place, name) for name in hidden]
        for file in (Path(place, name) for name in names):
            image = not file.name.startswith(".") and file.suffix.lower() in suffixes and file.is_file()
            (found if image else rest).append(file)
    return sorted(found)


def split_folder(path: Path, split: str) -> Path:
    """The folder of the split if `path` holds folders of splits, else `path` itself, whose folders are classes.

    Raises:
        ValueError: the split is not there, or folders of splits and others stand side by side.
    """
    folders = [f for f in visible(path) if f.is_dir()]
    splits = [f for f in folders if f.name.lower() in SPLIT_OF]
    if not splits:
        _check_known(path, split)
        return path
    if others := [f.name for f in folders if f not in splits]:
        if len(splits) == 1 and not any(f.is_dir() for f in visible(splits[0])):
            return path  # a class that is called "train"
        raise ValueError(f"{path}: got folders of splits beside others, {others[:4]}. Fix: give {splits[0]}")
    wanted = [f for f in splits if f.name == split] or [f for f in splits if SPLIT_OF[f.name.lower()] == canon(split)]
    if len(wanted) != 1:
        raise _no_split(path, split, [f.name for f in splits])
    return wanted[0]


def canon(split: str) -> str:
    return SPLIT_OF.get(split.lower(), split)


def _check_known(path: Path, split: str) -> None:
    """What has no splits may be asked for as the one it is; a name that no split has is a slip."""
    if canon(split) not in ALIASES:
        raise ValueError(f"{path} has no split {split!r}: it has none at all. Fix: leave --split out")


def _no_split(path: Path, split: str, there: Sequence[str]) -> ValueError:
    return ValueError(f"{path} has no split {split!r}, it has {', '.join(sorted(set(there)))}. Fix: --split")


def parquet_files(folder: Path, split: str) -> list[Path]:
    """The parquet files of a split, or of a union `a+b`: by their names, else by those of their folders, else all.

    Raises:
        ValueError: the split is not there, some files name none, or a shard is missing.
    """
    named: dict[Path, str | None] = {}
    for file in files_below(folder, [".parquet"]):
        shard = SHARD.fullmatch(file.stem)
        parts = file.relative_to(folder).parts[:-1]
        found = [shard["split"]] if shard else [s for s in map(split_of, (file.stem, *parts[::-1])) if s]
        named[file] = found[0] if found else None
    if not any(named.values()):
        _check_known(folder, split)
        return list(named)
    if unnamed := [f.name for f, s in named.items() if s is None]:
        raise ValueError(f"{folder}: which split is {unnamed[0]} of? Fix: give files by name, or move it away")
    files = []
    for wanted in split.split("+"):
        part = [f for f, s in named.items() if s == wanted]
        part = part or [f for f, s in named.items() if canon(s) == canon(wanted)]
        if not part:
            raise _no_split(folder, wanted, [s for s in named.values() if s])
        if len(places := {(f.parent, named[f]) for f in part}) > 1:
            there = ", ".join(sorted(str(place.relative_to(folder) / name) for place, name in places))
            raise ValueError(f"{folder}: {wanted!r} could be {there}, expected one. Fix: give its own folder or file")
        check_shards(part)
        files += part
    return files


def check_shards(files: Sequence[Path]) -> None:
    """Raise ValueError unless `name-00000-of-00003` comes with its two companions."""
    shards = [found for f in files if (found := SHARD.fullmatch(f.stem))]
    for found in shards:
        numbers = {int(s["number"]) for s in shards if s["count"] == found["count"]}
        if missing := set(range(int(found["count"]))) - numbers:
            part = f"{min(missing)} of {int(found['count'])} of {found['split']!r}"
            raise ValueError(f"{files[0].parent}: the shard {part} is missing. Fix: download the rest")
