"""Recipes: a flat YAML file becomes a command line, the real command line is appended, and one parser checks it all.

Every value is read as the text that it is written as, and validated as a flag's; an unknown key is an error that names the nearest one.
The seam to yaml and argparse.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager

import yaml
from transformers.hf_argparser import HfArg as HfArg  # for all commands
from transformers.hf_argparser import HfArgumentParser

from hpt_hf.commands.recipes import find_recipe, recipe_names
from hpt_hf.utils import did_you_mean, no_space


class RecipeError(ValueError):
    """A recipe or command line that cannot be run; the message says which key, what was given and what was expected."""


@contextmanager
def exit_on_user_error(script: str) -> Iterator[None]:
    """Exit 1 with one line for a mistake in recipe, data or model; everything else is a traceback. OSError: also the Hub's client."""
    try:
        yield
    except KeyboardInterrupt:
        again = "The same command goes on (train: with --resume_from_checkpoint true)"
        print(f"\n{script}: interrupted. {again}", file=sys.stderr)
        raise SystemExit(130) from None
    except (ValueError, OSError, FloatingPointError) as error:
        sys.exit(f"{script}: {' '.join(str(error).split())}")
    except Exception as error:
        # Of a package that a flag asks for.
        if isinstance(error, (ImportError, RuntimeError)) and "install" in str(error):
            sys.exit(f"{script}: {' '.join(str(error).split())}")
        if no_space(error):
            sys.exit(f"{script}: no space left on the disk. Fix: make room, then the same command")
        raise


def parse(types: tuple[type, ...], argv: list[str] | None = None, *, positional: tuple[str, ...] = ()):
    """`--config recipe.yaml` and flags -> one instance of each type; flags win over the recipe.

    Args:
        positional: keys whose values may also stand first, without their names.

    Raises:
        RecipeError: missing file, unknown key, a value that does not fit.
    """
    argv = list(sys.argv[1:] if argv is None else argv)
    for place, name in enumerate(positional):
        if len(argv) > 2 * place and not argv[2 * place].startswith("-"):
            argv.insert(2 * place, f"--{name}")
        else:
            break
    argv = [part for flag in argv for part in (flag.split("=", 1) if flag.startswith("--config=") else [flag])]
    # Abbreviations are off: with them, a mistyped key is taken for a longer one that begins the same way.
    parser = HfArgumentParser(types, allow_abbrev=False)
    known = {name.lstrip("-") for name in parser._option_string_actions}
    recipe: list[str] = []
    while "--config" in argv:
        at = argv.index("--config")
        if at + 1 == len(argv):
            raise RecipeError("--config needs a recipe, by name or path")
        recipe += _recipe_to_argv(argv[at + 1], known)
        del argv[at : at + 2]
    for flag in argv:
        if flag.startswith("--") and (name := flag[2:].split("=")[0]) not in known:
            raise RecipeError(_unknown(f"--{name}", name, known))
    parser.error = _fail  # type: ignore[method-assign]
    parsed = parser.parse_args_into_dataclasses(recipe + argv, return_remaining_strings=True, look_for_args_file=False)
    if parsed[-1]:
        raise RecipeError(f"not understood: {' '.join(parsed[-1])}")
    return parsed[:-1]


class _AsWritten(yaml.BaseLoader):
    """All values stay text: a class called `no`, `007` or `1:30` is no boolean and no number. A key stands once."""

    def construct_mapping(self, node, deep=False):
        keys = [key.value for key, _ in node.value]
        if twice := {key for key in keys if keys.count(key) > 1}:
            raise RecipeError(f"{self.name}: {', '.join(sorted(map(repr, twice)))} stands more than once")
        return super().construct_mapping(node, deep)


def _fail(message: str):
    raise RecipeError(message)


def _unknown(shown: str, name: str, known: set[str]) -> str:
    return f"unknown key {shown}{did_you_mean(name, known, 'see --help for the keys there are')}"


def _recipe_to_argv(name: str, known: set[str]) -> list[str]:
    path = find_recipe(name)
    if path is None:
        near = did_you_mean(name, recipe_names(), "see hpt-hf train --help for those there are")
        raise RecipeError(f"no recipe at {name}{near}")
    try:
        with path.open("rb") as file:
            recipe = yaml.load(file, _AsWritten)
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise RecipeError(f"{path} is not YAML: {error}") from None
    if not isinstance(recipe, dict):
        raise RecipeError(f"{path} must be a flat list of `key: value` lines, it is a {type(recipe).__name__}")
    argv: list[str] = []
    for key, value in recipe.items():
        if key not in known:
            raise RecipeError(_unknown(f"{key!r} in {path}", str(key), known))
        if value in ("", "null", "~"):
            continue
        values = value if isinstance(value, list) else [value]
        if isinstance(value, dict):
            raise RecipeError(f"{key!r} in {path} is nested: recipes are flat")
        if odd := [v for v in values if not isinstance(v, str)]:
            raise RecipeError(f"{key!r} in {path}: got {odd[0]}, expected text. Fix: quotes around what holds a colon")
        argv += [f"--{key}", *values]
    return argv
