"""Draws docs/architecture.svg: the rooms of hpt_hf by floor, and who imports whom. `python docs/architecture.py`."""

from __future__ import annotations

import ast
from collections.abc import Iterator, Mapping
from pathlib import Path

PACKAGE = Path(__file__).parent.parent / "hpt_hf"
SVG = Path(__file__).with_suffix(".svg")
# A room is a folder or a single file of the package; it imports only rooms of lower floors.
FLOORS = {"types": 1, "utils": 1, "attacks": 2, "models": 2, "method": 3, "data": 3, "evaluation": 4, "lab": 4}
FLOORS |= {"publishing": 5, "training": 6, "commands": 7, "cli": 8, "api": 8}
ACROSS = {"types": 0.0, "utils": 2.5, "attacks": -1.0, "models": 1.0, "method": -1.5, "data": 2.5, "evaluation": 0.5}
ACROSS |= {
    "lab": 2.5,
    "publishing": -0.5,
    "training": -0.5,
    "commands": 1.0,
    "cli": 2.2,
    "api": -0.2,
}  # where the picture has them
Sources = Mapping[str, tuple[int, ast.Module]]


def sources() -> Sources:
    """Module -> (lines, syntax tree), without `__init__.py` and `__main__.py`."""
    found = {}
    for file in sorted(PACKAGE.rglob("*.py")):
        text = file.read_text(encoding="utf-8")
        if not file.stem.startswith("__"):
            found[".".join(file.relative_to(PACKAGE).with_suffix("").parts)] = (text.count("\n"), ast.parse(text))
    return found


def room_of(module: str) -> str:
    return module.split(".")[0]


def imports(module: str, code: Sources, *, outside: bool = False) -> set[str]:
    """The modules of hpt_hf that a module imports, inside functions too; `outside`: the other packages' names."""
    names = set()
    for node in ast.walk(code[module][1]):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            names |= {f"{'.' * node.level}{node.module}.{alias.name}" for alias in node.names}
    if outside:
        return {name.split(".")[0] for name in names} - {"hpt_hf"}
    inside = {name.removeprefix("hpt_hf.") for name in names if name.startswith("hpt_hf.")}
    return {name if name in code else name.rpartition(".")[0] for name in inside}


def functions(code: Sources) -> Iterator[tuple[str, int]]:
    """(module.function, lines) of every function and method."""
    for module, (_, tree) in code.items():
        for node in ast.walk(tree):
            if isinstance(node, ast.FunctionDef):
                yield f"{module}.{node.name}", node.end_lineno - node.lineno + 1


def arrows(code: Sources) -> set[tuple[str, str]]:
    """(room, room that it imports)."""
    pairs = {(room_of(module), room_of(other)) for module in code for other in imports(module, code)}
    return {(room, other) for room, other in pairs if room != other}


def direct(pairs: set[tuple[str, str]]) -> set[tuple[str, str]]:
    """The arrows that do not follow from others: what a room reaches through a room that it imports is left out."""
    reached: dict[str, set[str]] = {}
    for room in sorted(FLOORS, key=FLOORS.__getitem__):
        below = {b for a, b in pairs if a == room}
        reached[room] = below.union(*(reached[b] for b in below))
    return {(a, b) for a, b in pairs if not any(b in reached[c] for d, c in pairs if d == a)}


def described(code: Sources) -> str:
    """Rooms and arrows as text: stands in the picture's metadata, so that a test can compare it with the code."""
    return "; ".join(
        f"{room} -> {', '.join(sorted(b for a, b in arrows(code) if a == room))}" for room in sorted(FLOORS)
    )


def draw(code: Sources) -> None:
    """Boxes are rooms with their number of lines, higher floors above; arrows are the `direct` imports."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    lines = {room: sum(n for module, (n, _) in code.items() if room_of(module) == room) for room in FLOORS}
    with matplotlib.rc_context({"svg.hashsalt": "hpt_hf", "svg.fonttype": "none"}):
        figure, axes = plt.subplots(figsize=(8, 7), layout="constrained")
        box = {"boxstyle": "round,pad=0.5", "facecolor": "#eef4f8", "edgecolor": "#33658a"}
        boxes = {
            room: axes.text(
                ACROSS[room], floor, f"{room}\n{lines[room]:,} lines", ha="center", va="center", bbox=box
            ).get_bbox_patch()
            for room, floor in FLOORS.items()
        }
        for room, other in sorted(direct(arrows(code))):
            ends = {"patchA": boxes[room], "patchB": boxes[other], "shrinkB": 3}
            axes.annotate(
                "",
                (ACROSS[other], FLOORS[other]),
                (ACROSS[room], FLOORS[room]),
                arrowprops={"arrowstyle": "-|>", "color": "#33658a"} | ends,
            )
        for floor in set(FLOORS.values()):
            axes.text(-2.6, floor, str(floor), color="#6b7780", ha="center", va="center")
        axes.set(xlim=(-2.8, 3.1), ylim=(0.6, max(FLOORS.values()) + 0.4))
        axes.axis("off")
        figure.savefig(SVG, metadata={"Date": None, "Description": described(code)})


if __name__ == "__main__":
    draw(sources())
