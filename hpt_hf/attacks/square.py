"""Square Attack (Andriushchenko et al. 2020, arXiv 1912.00049): random search, no gradients."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import torch

from hpt_hf.attacks.engine import _wide
from hpt_hf.attacks.threat_model import ThreatModel, l2_norm


@dataclass(frozen=True)
class Square:
    """Random search over squares, with no gradient: what masks gradients does not stop it (arXiv 1912.00049, algorithms 1 to 3)."""

    queries: int = 5000
    share: float = 0.8  # of the pixels that the first squares cover
    gradients = False

    def side(self, query: int, height: int, width: int) -> int:
        """Side of the square of a query: the covered share halves along a schedule stretched to the number of queries."""
        position = query * 10_000 // self.queries
        halvings = sum(position > mark for mark in (10, 50, 200, 500, 1000, 2000, 4000, 6000, 8000))
        return max(1, round(math.sqrt(self.share / 2**halvings * height * width)))

    def start(self, images, threat, noise):
        channels, height, width = images.shape[1:]
        if threat.norm == "linf":
            stripes = _signs(noise.uniform((channels, 1, width)))
            # Every query lies on the ball's corners, so they are worked out once.
            corners = threat.corners(images)
            x = torch.where(stripes < 0, corners["low"], corners["high"])
        else:
            corners = {}
            tile = max(1, min(height, width) // 5)
            down, across = height // tile, width // tile
            signs = _signs(noise.uniform((channels, down, across)))
            bump = _bumps(tile, tile, upright=True).to(images)
            delta = torch.zeros_like(images)
            top, left = (height - down * tile) // 2, (width - across * tile) // 2
            tiles = signs.repeat_interleave(tile, 2).repeat_interleave(tile, 3) * bump.repeat(down, across)
            delta[..., top : top + down * tile, left : left + across * tile] = tiles
            x = threat.project(images + delta * (threat.radius / l2_norm(delta)), images)
        return {"x": x, "best": x, "best_loss": images.new_full((len(images),), -math.inf), **corners}

    def advance(self, query, state, seen, images, threat, noise):
        better = seen.loss > state["best_loss"]
        best = torch.where(_wide(better), state["x"], state["best"])
        channels, height, width = images.shape[1:]
        noise = replace(noise, round=noise.round + 1 + query)
        if threat.norm == "linf":
            side = min(self.side(query + 1, height, width), height, width)
            draw = noise.uniform((2 + channels,))
            window = _window(draw[:, :2], side, height, width)
            corners = torch.where(_signs(draw[:, 2:, None, None]) < 0, state["low"], state["high"])
            x = torch.where(window, corners, best)
        else:
            side = max(3, self.side(query + 1, height, width)) // 2 * 2 + 1
            side = min(side, (min(height, width) - 1) // 2 * 2 + 1)
            draw = noise.uniform((5 + channels,))
            x = threat.project(images + self._moved(best - images, side, draw, threat), images)
        return state | {"x": x, "best": best, "best_loss": torch.maximum(seen.loss, state["best_loss"])}

    def _moved(self, delta: torch.Tensor, side: int, draw: torch.Tensor, threat: ThreatModel) -> torch.Tensor:
        """l-2: the norm of two windows goes into a bump in the first, on top of what stood there (algorithm 3)."""
        channels, height, width = delta.shape[1:]
        one, two = (_window(d, side, height, width) for d in (draw[:, :2], draw[:, 2:4]))
        bumps = torch.where(
            (draw[:, 4] < 0.5)[:, None, None], *(_bumps(side, side, upright=u).to(delta) for u in (True, False))
        )
        bumps = bumps[:, None] * _signs(draw[:, 5:, None, None])
        old = delta[one.expand_as(delta)].view(len(delta), channels, side, side)
        fresh = bumps + old / old.flatten(2).norm(dim=2)[..., None, None].clamp_min(1e-12)
        fresh = fresh / fresh.flatten(2).norm(dim=2)[..., None, None].clamp_min(1e-12)
        spare = (threat.radius**2 - l2_norm(delta) ** 2).clamp_min(0) / channels
        budget = (delta * (one | two)).flatten(2).norm(dim=2)[..., None, None] ** 2
        moved = delta.masked_fill(one | two, 0)
        moved[one.expand_as(delta)] = (fresh * (spare + budget).sqrt()).flatten()
        return moved * (threat.radius / l2_norm(moved).clamp_min(1e-12))


def _signs(uniform: torch.Tensor) -> torch.Tensor:
    return torch.where(uniform < 0.5, -1.0, 1.0)


def _window(corner: torch.Tensor, side: int, height: int, width: int) -> torch.Tensor:
    """(batch, 1, height, width) bool: a square of that side, its corner where the uniform (batch, 2) numbers say."""
    top, left = (corner * torch.tensor([height - side + 1, width - side + 1], device=corner.device)).long().unbind(1)
    inside = []
    for start, length in ((top, height), (left, width)):
        place = torch.arange(length, device=corner.device)
        inside.append((place >= start[:, None]) & (place < start[:, None] + side))
    return (inside[0][:, :, None] & inside[1][:, None, :])[:, None]


def _bumps(height: int, width: int, *, upright: bool) -> torch.Tensor:
    """Two pyramids of opposite sign side by side, of unit norm: the paper's eta."""
    half = width // 2
    pair = torch.cat([_pyramid(height, half), -_pyramid(height, width - half)], dim=1)
    pair = pair / pair.norm()
    return pair.T if upright else pair


def _pyramid(height: int, width: int) -> torch.Tensor:
    """At Chebyshev distance d from the centre: the sum of 1 / (1 + k)^2 for k from d to the edge."""
    rows, columns = ((torch.arange(length) - length // 2).abs() for length in (height, width))
    distance = torch.maximum(rows[:, None], columns[None, :])
    tail = (1 / (1.0 + torch.arange(max(height, width) // 2 + 1)) ** 2).flip(0).cumsum(0).flip(0)
    return tail[distance]
