"""Class names: read from files, matched with the data's own."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

from transformers.utils import logging

from hpt_hf.models.zero_shot import check_classes

logger = logging.get_logger(__name__)


def match_classes(
    own: Sequence[str] | None, given: Sequence[str] | dict[str, str] | None, path: str
) -> tuple[tuple[str, ...], list[int]]:
    """(the classes, the place among them of each label) from the data's own names and the user's.

    Matched by name where possible, so that the order of a list never shifts labels; otherwise renamed in order, with a warning.
    """
    if own is None:
        if given is None or isinstance(given, dict):
            raise ValueError(f"{path} names no classes. Fix: list them in label order, --classes … or --classes_file.")
        own = given
    if isinstance(given, dict):
        if unknown := [n for n in own if n not in given]:
            raise ValueError(f"the class names have no entry for {len(unknown)} classes of {path}: {unknown[:5]}")
        given = [given[n] for n in own]
    elif given is None:
        given = own
    elif set(own) <= set(given) and len(set(own)) == len(own):
        check_classes(given)
        return tuple(given), [list(given).index(n) for n in own]
    elif len(given) != len(own):
        raise ValueError(
            f"{len(given)} class names were given and {path} has {len(own)} classes ({', '.join(own[:5])} …). "
            "Fix: give as many, in that order, or a list with all its names."
        )
    else:
        renamed = [f"{a} -> {b}" for a, b in zip(own, given, strict=True) if a != b]
        logger.warning(f"{len(renamed)} of {len(own)} classes of {path} are renamed: {', '.join(renamed[:5])} …")
    check_classes(given)
    return tuple(given), list(range(len(given)))


def read_classes(file: str | Path) -> tuple[str, ...] | dict[str, str]:
    """Class names from a text file, one a line, or a JSON list; or a JSON object from the data's names to those for the prompts.

    An empty line between others is kept as a name, which is refused later: dropped, it would shift every name after it.
    """
    path = Path(file)
    if not path.is_file():
        raise FileNotFoundError(f"no class names at {path}")
    text = path.read_text(encoding="utf-8-sig")
    if path.suffix != ".json":
        return tuple(line.strip() for line in text.rstrip().splitlines())
    names = json.loads(text)
    return names if isinstance(names, dict) else tuple(names)
