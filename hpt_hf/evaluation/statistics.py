"""Statistics: groups, percentages, Wilson's interval, means over data sets."""

from __future__ import annotations

import math
from collections.abc import Callable, Hashable, Iterable, Sequence
from typing import TypeVar

T = TypeVar("T")


def grouped(items: Iterable[T], key: Callable[[T], Hashable]) -> dict[Hashable, list[T]]:
    """Items by their key, in the order in which each key is first met."""
    groups: dict[Hashable, list[T]] = {}
    for item in items:
        groups.setdefault(key(item), []).append(item)
    return groups


def wilson(right: int, n: int, z: float = 1.959964) -> tuple[float, float]:
    """The 95% interval of a proportion, in percent (Wilson 1927): honest near 0 and 100, where n p (1 - p) is not."""
    if n == 0:
        return (0.0, 100.0)
    p = right / n
    centre = (p + z * z / (2 * n)) / (1 + z * z / n)
    half = z / (1 + z * z / n) * math.sqrt(p * (1 - p) / n + z * z / (4 * n * n))
    return (round(100 * max(0.0, centre - half), 2), round(100 * min(1.0, centre + half), 2))


def percent(count: int, n: int) -> float:
    return round(100 * count / n, 2)


def mean(results: Sequence) -> dict[str, float]:
    """Unweighted means of clean and robust accuracy over data sets, in percent."""
    return {key: sum(getattr(r, key) for r in results) / len(results) for key in ("clean", "robust")}
