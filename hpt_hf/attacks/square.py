"""Square Attack (Andriushchenko et al. 2020, arXiv 1912.00049, algorithms 1 to 3): random search, no gradients."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import torch

from hpt_hf.attacks.engine import State
from hpt_hf.attacks.noise import Noise
from hpt_hf.attacks.threat_model import ThreatModel, l2_norm
from hpt_hf.types import Images


@dataclass(frozen=True)
class Square:
    """Random search over squares: what masks gradients does not stop it."""

    threat: ThreatModel
    queries: int = 5000
    gradients = False
    share = 0.8  # of the pixels that the first squares cover

    @property
    def steps(self) -> int:
        return self.queries - 1

    def side(self, query: int, height: int, width: int) -> int:
        """Side of a query's square: the share covered halves along a schedule stretched to the number of queries."""
        position = query * 10_000 // self.queries
        halvings = sum(position > mark for mark in (10, 50, 200, 500, 1000, 2000, 4000, 6000, 8000))
        return max(1, round(math.sqrt(self.share / 2**halvings * height * width)))

    def start(self, images: Images, noise: Noise) -> State:
        channels, height, width = images.shape[1:]
        bounds = self.threat.bounds(images)
        if self.threat.norm == "linf":  # vertical stripes at the ends of each pixel's range
            x = torch.where(noise.uniform((channels, 1, width)) < 0.5, bounds["low"], bounds["high"])
        else:  # a grid of bumps
            tile = max(1, min(height, width) // 5)
            down, across = height // tile, width // tile
            signs = _signs(noise.uniform((channels, down, across)))
            signs = signs.repeat_interleave(tile, 2).repeat_interleave(tile, 3)
            top, left, delta = (height - down * tile) // 2, (width - across * tile) // 2, torch.zeros_like(images)
            grid = delta[..., top : top + down * tile, left : left + across * tile]
            grid.copy_(signs * _bumps(tile, upright=True).to(images).repeat(down, across))
            x = self.threat.project(images + delta * (self.threat.radius / l2_norm(delta)), images)
        return {"x": x, "best": x, "best_loss": images.new_full((len(images), 1, 1, 1), -math.inf), **bounds}

    def advance(self, step: int, state: State, noise: Noise) -> State:
        images, loss = state["images"], state["loss"][:, None, None, None]
        best = torch.where(loss > state["best_loss"], state["x"], state["best"])
        channels, height, width = images.shape[1:]
        noise, side = replace(noise, round=noise.round + 1 + step), self.side(step + 1, height, width)
        if self.threat.norm == "linf":
            draw = noise.uniform((2 + channels,))
            ends = torch.where(draw[:, 2:, None, None] < 0.5, state["low"], state["high"])
            x = torch.where(_window(draw[:, :2], min(side, height, width), height, width), ends, best)
        else:
            odd = min(max(3, side) // 2 * 2 + 1, (min(height, width) - 1) // 2 * 2 + 1)
            x = self.threat.project(images + self._moved(best - images, odd, noise.uniform((5 + channels,))), images)
        return state | {"x": x, "best": best, "best_loss": torch.maximum(loss, state["best_loss"])}

    def _moved(self, delta: torch.Tensor, side: int, draw: torch.Tensor) -> torch.Tensor:
        """l-2: the norm of two windows goes into a bump in the first, on top of what stood there (algorithm 3)."""
        channels, height, width = delta.shape[1:]
        one, two = (_window(d, side, height, width) for d in (draw[:, :2], draw[:, 2:4]))
        upright, flat = (_bumps(side, upright=u).to(delta) for u in (True, False))
        bumps = torch.where(draw[:, 4, None, None, None] < 0.5, upright, flat) * _signs(draw[:, 5:, None, None])
        old = delta[one.expand_as(delta)].view(len(delta), channels, side, side)
        fresh = bumps + old / _channel_norm(old).clamp_min(1e-12)
        fresh = fresh / _channel_norm(fresh).clamp_min(1e-12)
        spare = (self.threat.radius**2 - l2_norm(delta) ** 2).clamp_min(0) / channels
        budget = _channel_norm(delta * (one | two)) ** 2
        moved = delta.masked_fill(one | two, 0)
        moved[one.expand_as(delta)] = (fresh * (spare + budget).sqrt()).flatten()
        return moved * (self.threat.radius / l2_norm(moved).clamp_min(1e-12))


def _signs(uniform: torch.Tensor) -> torch.Tensor:
    return torch.where(uniform < 0.5, -1.0, 1.0)


def _channel_norm(delta: torch.Tensor) -> torch.Tensor:
    return delta.flatten(2).norm(dim=2)[..., None, None]


def _window(corner: torch.Tensor, side: int, height: int, width: int) -> torch.Tensor:
    """(batch, 1, height, width) bool: a square of that side, its corner where the uniform (batch, 2) numbers say."""
    top, left = (corner * torch.tensor([height - side + 1, width - side + 1], device=corner.device)).long().unbind(1)
    rows, columns = (torch.arange(length, device=corner.device) for length in (height, width))
    inside_rows = (rows >= top[:, None]) & (rows < top[:, None] + side)
    inside_columns = (columns >= left[:, None]) & (columns < left[:, None] + side)
    return (inside_rows[:, :, None] & inside_columns[:, None, :])[:, None]


def _bumps(side: int, *, upright: bool) -> torch.Tensor:
    """The paper's eta: two pyramids of opposite sign side by side, of unit norm."""
    pair = torch.cat([_pyramid(side, side // 2), -_pyramid(side, side - side // 2)], dim=1)
    return (pair.T if upright else pair) / pair.norm()


def _pyramid(height: int, width: int) -> torch.Tensor:
    """At Chebyshev distance d from the centre: the sum of 1 / (1 + k)^2 for k from d to the edge."""
    rows, columns = ((torch.arange(length) - length // 2).abs() for length in (height, width))
    tail = (1 / (1.0 + torch.arange(max(height, width) // 2 + 1)) ** 2).flip(0).cumsum(0).flip(0)
    return tail[torch.maximum(rows[:, None], columns[None, :])]
