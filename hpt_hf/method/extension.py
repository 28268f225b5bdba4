"""Objects of the user's own, named by import path: `my_file.py:my_objective` or `my_package.module:my_objective`."""

from __future__ import annotations

import importlib
import importlib.util
import sys
from pathlib import Path
from typing import TypeVar

T = TypeVar("T")


def load_object(path: str, kinds: type[T] | tuple[type[T], ...]) -> T:
    """The object of that name in a file or an importable module.

    Raises:
        ValueError: no such file or module, one that fails on import, no such name, or an object of another kind.
    """
    place, _, name = path.rpartition(":")
    try:
        module = _from_file(Path(place)) if place.endswith(".py") else importlib.import_module(place)
        found = getattr(module, name)
    except AttributeError:
        raise ValueError(f"{path}: got no {name!r} in {place}. Fix: the name of an object that it defines") from None
    except Exception as error:  # the file is the user's own: anything may go wrong in it
        raise ValueError(f"{path}: {place} cannot be imported ({type(error).__name__}: {error})") from error
    if not isinstance(found, kinds):
        wanted = " or ".join(kind.__name__ for kind in (kinds if isinstance(kinds, tuple) else (kinds,)))
        raise ValueError(f"{path}: got {type(found).__name__}, expected {wanted}")
    return found


def _from_file(file: Path):
    """Imported once: two names of one file share its objects."""
    key = str(file.resolve())
    if key not in sys.modules:
        if not file.is_file():
            raise FileNotFoundError(f"no file {file}")
        spec = importlib.util.spec_from_file_location(file.stem, file)
        module = importlib.util.module_from_spec(spec)
        sys.modules[key] = module
        try:
            spec.loader.exec_module(module)
        except BaseException:
            del sys.modules[key]
            raise
    return sys.modules[key]
