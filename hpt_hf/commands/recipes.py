"""Recipes by name: they lie in the package, or beside it in a checkout."""

from __future__ import annotations

from pathlib import Path


def recipes_folder() -> Path:
    inside = Path(__file__).parent.parent / "recipes"
    return inside if inside.is_dir() else inside.parent.parent / "recipes"


def recipe_names() -> list[str]:
    """`quickstart`, `lab/hpt_gpd`, `accelerate/ddp` …"""
    folder = recipes_folder()
    return sorted(str(file.relative_to(folder).with_suffix("")) for file in folder.rglob("*.yaml"))


def find_recipe(name: str) -> Path | None:
    """A path as it is, or a recipe of the package by its name, with or without .yaml; None if there is neither."""
    places = (Path(name), recipes_folder() / name, recipes_folder() / f"{name}.yaml")
    return next((place for place in places if place.is_file()), None)
