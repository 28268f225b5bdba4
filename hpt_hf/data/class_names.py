"""Class names: read from files, matched with the data's own."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

from transformers.utils import logging

logger = logging.get_logger(__name__)


def match_classes(
    names: Sequence[str] | None, given: Sequence[str] | dict[str, str] | None, path: str
) -> tuple[Sequence[str] | None, list[int] | None]:
    """(class list, place in it of each of the data's own names), from these names and the user's; None: labels stay as they are.

    Matches by name where it can, so that an order can never shift labels silently.
    """
    if given is None or names is None:
        if isinstance(given, dict):
            raise ValueError(
                f"{path} names no classes, so a map from its names to others cannot be applied: give a list of names in label order"
            )
        return (names if given is None else given), None
    if isinstance(given, dict):
        unknown = [n for n in names if n not in given]
        if unknown:
            raise ValueError(
                f"the map of class names has no entry for {unknown[:5]}, {len(unknown)} of the {len(names)} classes of {path}"
            )
        return tuple(given[n] for n in names), None
    if set(names) <= set(given) and len(set(names)) == len(names):
        return given, [list(given).index(n) for n in names]
    if len(given) != len(names):
        raise ValueError(
            f"{len(given)} class names were given and {path} has {len(names)} classes ({', '.join(names[:5])} …): give as many, in that order, or a list with all its names"
        )
    renamed = [f"{a} -> {b}" for a, b in zip(names, given, strict=True) if a != b]
    logger.warning(
        f"{len(renamed)} of {len(names)} classes of {path} are renamed, in their order: {', '.join(renamed[:5])} …"
    )
    return given, None


def read_classes(file: str | Path) -> tuple[str, ...] | dict[str, str]:
    """Class names from a text file, one a line, or a JSON list; or a JSON object from the data's names to those for the prompts.

    An empty line between others is the (refused) name of a class: left out it would give every name after it to another class.
    """
    path = Path(file)
    if not path.is_file():
        raise FileNotFoundError(f"no class names at {path}")
    text = path.read_text(encoding="utf-8-sig")
    if path.suffix != ".json":
        return tuple(line.strip() for line in text.rstrip().splitlines())
    names = json.loads(text)
    return names if isinstance(names, dict) else tuple(names)
