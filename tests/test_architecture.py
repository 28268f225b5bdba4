"""The import contract: rooms import only rooms of lower floors, modules have no cycles, libraries stay at their seams, code stays small."""

from __future__ import annotations

import graphlib
from xml.sax.saxutils import escape

import pytest
from architecture import FLOORS, SVG, arrows, described, functions, imports, room_of, sources

CODE = sources()
# Third-party libraries that not every room may import; those left out (torch, numpy, transformers, PIL …) are free.
SEAMS = {
    "datasets": {"data", "evaluation", "lab"},
    "huggingface_hub": {"commands", "data", "publishing"},
    "accelerate": {"evaluation", "models", "utils"},  # training leaves it to the Trainer
    "matplotlib": {"commands", "lab", "training"},
    "jinja2": {"evaluation"},
    "evaluate": {"evaluation"},
    "yaml": {"commands"},
    "gradio": {"commands"},
    "open_clip": {"models"},
    "peft": {"models"},
    "jaxtyping": {"types"},
}
# What is still longer than the limits. A row that is no longer needed fails the test: delete it.
LONG_FILES: set[str] = set()
LONG_FUNCTIONS: set[str] = set()


def test_a_room_imports_only_lower_floors_and_the_check_saw_every_room():
    assert {room_of(module) for module in CODE} == set(FLOORS) and len(arrows(CODE)) > 30
    assert [(a, b) for a, b in arrows(CODE) if FLOORS[a] <= FLOORS[b]] == []
    assert {a for a, b in arrows(CODE) if b == "lab"} == {"commands"}


def test_modules_import_each_other_in_no_cycle():
    order = graphlib.TopologicalSorter({name: imports(name, CODE) for name in CODE}).static_order()
    assert set(order) == set(CODE), "an import of a module that does not exist"


@pytest.mark.parametrize("library", SEAMS)
def test_a_library_stays_at_its_seam(library):
    assert {room_of(name) for name in CODE if library in imports(name, CODE, outside=True)} == SEAMS[library]


def test_files_have_at_most_400_lines_and_functions_60():
    assert {name for name, (lines, _) in CODE.items() if lines > 400} == LONG_FILES
    assert {name for name, lines in functions(CODE) if lines > 60} == LONG_FUNCTIONS


def test_the_picture_in_the_documents_shows_these_rooms_and_arrows():
    assert escape(described(CODE)) in SVG.read_text(encoding="utf-8"), "run python docs/architecture.py"
