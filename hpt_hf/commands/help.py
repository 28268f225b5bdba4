"""`--help`: the flags of a command read from its source, so that nothing heavy is imported to print them."""

from __future__ import annotations

import ast
import importlib.util
import signal
import textwrap
from pathlib import Path

from hpt_hf.commands.recipes import recipe_names, recipes_folder

HERE = Path(__file__).parent


def class_names(file: Path) -> list[str]:
    """The dataclasses of flags of a file, in its order."""
    tree = ast.parse(file.read_text(encoding="utf-8"))
    return [n.name for n in tree.body if isinstance(n, ast.ClassDef) and n.name.endswith("Arguments")]


def flags(file: Path, name: str) -> dict[str, tuple[str, str]]:
    """Flag -> (type, help with the default), of every field of a dataclass; those of a base in `common.py` first."""
    (node,) = (n for n in ast.walk(ast.parse(file.read_text(encoding="utf-8"))) if getattr(n, "name", None) == name)
    inherits = "ImageArguments" in map(ast.unparse, node.bases)
    found = flags(HERE / "common.py", "ImageArguments") if inherits else {}
    for field in node.body:
        if not isinstance(field, ast.AnnAssign) or field.target.id.startswith("_"):
            continue
        default, text = field.value, None
        if isinstance(default, ast.Call):  # HfArg(default=…, help=…), or field(default=…, metadata={"help": …})
            given = {k.arg: k.value for k in default.keywords}
            default = given.get("default", given.get("default_factory"))
            entries = given.get("metadata", ast.Dict([], []))
            given |= {k.value: v for k, v in zip(entries.keys, entries.values, strict=True)}
            text = given.get("help")
        said = " ".join(ast.literal_eval(text).split()) if isinstance(text, ast.Constant) else ""
        shown = ast.unparse(default).removeprefix("lambda: ").strip("'") if default else "None"
        kind = ast.unparse(field.annotation).replace(" | None", "").removeprefix("Literal").strip("'").replace("'", "")
        found[field.target.id] = kind, said + f" ({shown})" * (shown != "None")
    return found


def show(title: str, rows: dict[str, tuple[str, str]]) -> None:
    print(f"\n{title}:")
    for name, (kind, said) in rows.items():
        print(textwrap.fill(f"{f'  --{name} {kind}':<38} {said}".rstrip(), 118, subsequent_indent=" " * 39))


def print_help(command: str, what: str) -> None:
    """The command's own flags first, then, where it trains, transformers' own."""
    if hasattr(signal, "SIGPIPE"):
        signal.signal(signal.SIGPIPE, signal.SIG_DFL)  # `| head` is no error
    print(f"usage: hpt-hf {command} [--config RECIPE] [--flag value …]\n\n{command}: {what}")
    files = [HERE / f"{command}.py", *([HERE / "train.py"] if command == "estimate" else [])]
    for file in files:
        for name in class_names(file):
            show(name.removesuffix("Arguments").lower(), flags(file, name))
    if command in ("train", "estimate"):
        own = flags(HERE.parent / "training" / "config.py", "HPTConfig")
        show("the Trainer's, with the method's defaults", own)
        transformers = Path(importlib.util.find_spec("transformers").origin).parent
        theirs = flags(transformers / "training_args.py", "TrainingArguments")
        show("the Trainer's, all others", {name: row for name, row in theirs.items() if name not in own})
        print(f"\nrecipes and accelerate configs, in {recipes_folder()}:")
        print(textwrap.fill(", ".join(recipe_names()), 118, initial_indent="  ", subsequent_indent="  "))
