"""Class names: read from files, matched with the data's own."""

from __future__ import annotations

import json
import unicodedata
from collections.abc import Sequence
from pathlib import Path

from transformers.utils import logging

from hpt_hf.models.zero_shot import check_classes
from hpt_hf.utils import did_you_mean

logger = logging.get_logger(__name__)


def plain(name: str) -> str:
    """What two spellings of one name share: Unicode's composed form, without case, underscores and double blanks."""
    return " ".join(unicodedata.normalize("NFC", name).casefold().replace("_", " ").split())


def match_classes(
    own: Sequence[str] | None, given: Sequence[str] | dict[str, str] | None, path: str
) -> tuple[tuple[str, ...], list[int]]:
    """(the classes, the place among them of each label) from the data's own names and the user's.

    Matched by name, in any spelling of `plain`, so that the order of a list never shifts labels. If no name is shared, as
    with numbers or WordNet ids, they are renamed in order, with a warning; if some are, those that are not are an error.
    """
    if own is None:
        if given is None or isinstance(given, dict):
            raise ValueError(f"{path} names no classes. Fix: list them in label order, --classes … or --classes_file.")
        own = given
    _told_apart(own, path)
    if given is None:
        given = own
    if isinstance(given, dict):
        better = {plain(name): value for name, value in given.items()}
        if unknown := [n for n in own if plain(n) not in better]:
            raise ValueError(f"the class names have no entry for {len(unknown)} classes of {path}: {unknown[:5]}")
        given = [better[plain(n)] for n in own]
        check_classes(given)
        return tuple(given), list(range(len(own)))
    check_classes(given)
    _told_apart(given, "the class names")
    places = {plain(name): place for place, name in enumerate(given)}
    unknown = [n for n in own if plain(n) not in places]
    by_name = len(set(own)) == len(own)  # two of one name, as ImageNet has them, cannot be matched by it
    if by_name and not unknown:
        return tuple(given), [places[plain(n)] for n in own]
    if by_name and len(unknown) < len(own):
        near = did_you_mean(unknown[0], given)
        raise ValueError(f"{len(unknown)} of {len(own)} classes of {path} are not in the list: {unknown[:5]}{near}")
    if len(given) != len(own):
        some = ", ".join(own[:5])
        raise ValueError(f"{path}: got {len(given)} class names, expected {len(own)}, in the order of {some} …")
    renamed = [f"{a} -> {b}" for a, b in zip(own, given, strict=True)]
    logger.warning(f"{len(renamed)} classes of {path} are renamed in order: {', '.join(renamed[:5])} …")
    return tuple(given), list(range(len(given)))


def _told_apart(names: Sequence[str], where: str) -> None:
    seen: dict[str, str] = {}
    for name in names:
        if (other := seen.setdefault(plain(str(name)), name)) != name:
            raise ValueError(f"{where}: got the classes {other!r} and {name!r}, expected names that differ")


def read_classes(file: str | Path) -> tuple[str, ...] | dict[str, str]:
    """Class names from a text file, one a line, or a JSON list; or a JSON object from the data's names to those for the prompts.

    An empty line between others is kept as a name, which is refused later: dropped, it would shift every name after it.
    """
    path = Path(file)
    if not path.is_file():
        raise FileNotFoundError(f"no class names at {path}")
    try:
        text = path.read_text(encoding="utf-8-sig")
        names = json.loads(text) if path.suffix == ".json" else [line.strip() for line in text.rstrip().splitlines()]
    except ValueError as error:  # also of decoding
        raise ValueError(f"{path}: got {error}, expected UTF-8 text, one class a line, or JSON") from error
    content = names.values() if isinstance(names, dict) else names
    if not isinstance(names, (list, dict)) or not all(isinstance(name, str) for name in content):
        raise ValueError(f"{path}: got {text.strip()[:40]!r} …, expected a list of names, or a map of them")
    return names if isinstance(names, dict) else tuple(names)
