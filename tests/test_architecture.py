"""Proves the house rules on imports: a module imports only lower rows, and each third-party library is touched by its seam alone."""

from __future__ import annotations

import ast
import graphlib
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parent.parent / "hpt_hf"

# A module imports strictly lower rows only.
ROWS = {
    "shapes": 0,
    "words": 0,
    "kernels": 0,
    "threat": 1,
    "zero_shot": 1,
    "journal": 1,
    "scores": 1,
    "attacks": 2,
    "sharding": 2,
    "data": 2,
    "report": 2,
    "metric": 2,
    "foreign": 2,
    "objectives": 3,
    "search": 3,
    "sets": 3,
    "page": 3,
    "card": 3,
    "schedule": 4,
    "suspicions": 4,
    "export": 4,
    "lab.glyphs": 4,
    "lab.pretrain": 4,
    "lab.suite": 4,
    "evaluation": 5,
    "hub": 5,
    "arguments": 5,
    "trainer": 6,
    "stopwatch": 5,
    "stream": 3,
    "train": 7,
    "cost": 8,
    "evaluate": 8,
    "tower": 5,
    "push": 6,
    "convert": 8,
    "dial": 9,
    "demo": 9,
    "transfer": 9,
    "verify": 9,
    "lab.quickstart": 10,
}
SEAMS = {
    "datasets": {"data", "lab.suite", "metric", "stream"},
    "huggingface_hub": {"card", "convert", "hub", "sets", "verify"},
    "yaml": {"arguments"},
    "argparse": {
        "lab.pretrain",
        "lab.quickstart",
    },  # apart from arguments.py, which reaches it through HfArgumentParser
    "matplotlib": {"report", "page", "lab.glyphs"},
    "jinja2": {"card", "page"},
    "evaluate": {"metric"},
    "jaxtyping": {"shapes"},
    "accelerate": {"evaluation", "sharding"},  # training leaves it to the Trainer
}
# What of transformers a room may name, beside its logging and utilities.
TRANSFORMERS = {
    "CLIPModel": {"zero_shot", "lab.pretrain"},
    "CLIPConfig": {"zero_shot", "lab.pretrain"},
    "Trainer": {"trainer"},
    "TrainerCallback": {"schedule", "stopwatch"},
    "TrainingArguments": {"arguments"},
    "HfArgumentParser": {"arguments"},
}


def modules() -> dict[str, ast.Module]:
    files = [p for p in PACKAGE.rglob("*.py") if p.name != "__init__.py"]
    return {
        ".".join(p.relative_to(PACKAGE).with_suffix("").parts): ast.parse(p.read_text(encoding="utf-8")) for p in files
    }


def imported(tree: ast.AST) -> list[tuple[str, str | None]]:
    """(module, name) of every import, also of those inside functions."""
    found: list[tuple[str, str | None]] = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found += [(alias.name, None) for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "relative import: write the full name, which can be searched for"
            found += [(node.module, alias.name) for alias in node.names]
    return found


def rooms(tree: ast.AST, known: set[str]) -> set[str]:
    """The package's own modules that a module imports, `from hpt_hf import x` and `from hpt_hf.lab import x` included."""
    names = set()
    for module, name in imported(tree):
        if module.split(".")[0] == "hpt_hf":
            inner = module.removeprefix("hpt_hf").removeprefix(".")
            joined = f"{inner}.{name}".strip(".")
            names.add(joined if joined in known else inner)
    assert names <= known, f"not a module of this package: {names - known}"
    return names


MODULES = modules()
GRAPH = {name: rooms(tree, set(MODULES)) for name, tree in MODULES.items()}


def test_every_module_has_its_row_and_the_walk_saw_them_all():
    assert set(MODULES) == set(ROWS), "a new module: give it a row here, and a place in the README's map"
    assert len(MODULES) == 41 and sum(len(r) for r in GRAPH.values()) >= 50


@pytest.mark.parametrize("name", sorted(MODULES))
def test_a_module_imports_only_lower_rows(name):
    within_lab = {r for r in GRAPH[name] if name.startswith("lab.") and r.startswith("lab.")}
    wrong = {r: ROWS[r] for r in GRAPH[name] - within_lab if ROWS[r] >= ROWS[name]}
    assert not wrong, f"{name} (row {ROWS[name]}) imports {wrong}"


def test_no_cycles_not_even_inside_the_lab():
    order = list(graphlib.TopologicalSorter(GRAPH).static_order())
    assert len(order) == len(MODULES) and order.index("shapes") < order.index("trainer") < order.index("train")


def test_the_core_does_not_know_the_lab():
    """The lab is an example world; only the mains may offer it by name."""
    assert {n for n, r in GRAPH.items() if any(x.startswith("lab.") for x in r) and not n.startswith("lab.")} == {
        "train",
        "evaluate",
        "dial",
        "demo",
    }


@pytest.mark.parametrize("library", sorted(SEAMS))
def test_a_library_is_touched_by_its_seam_alone(library):
    touching = {n for n, tree in MODULES.items() if any(m.split(".")[0] == library for m, _ in imported(tree))}
    assert touching == SEAMS[library]


@pytest.mark.parametrize("thing", sorted(TRANSFORMERS))
def test_a_class_of_transformers_is_used_by_its_seam_alone(thing):
    using = {n for n, tree in MODULES.items() if ("transformers", thing) in imported(tree)}
    assert using == TRANSFORMERS[thing]


def test_pixel_values_occur_in_the_model_and_at_the_processors_only():
    """Images are called images, in [0, 1]; the normalised tensor of transformers has no business elsewhere."""

    def words(tree):
        strings = {n.value for n in ast.walk(tree) if isinstance(n, ast.Constant) and isinstance(n.value, str)}
        return (
            strings
            | {n.arg for n in ast.walk(tree) if isinstance(n, ast.keyword)}
            | {n.id for n in ast.walk(tree) if isinstance(n, ast.Name)}
        )

    assert {n for n, tree in MODULES.items() if "pixel_values" in words(tree)} == {"zero_shot", "data"}


def test_every_module_says_what_it_is():
    assert [n for n, tree in MODULES.items() if len(ast.get_docstring(tree) or "") < 40] == []
