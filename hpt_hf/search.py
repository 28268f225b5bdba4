"""Attacks for evaluation: one skeleton, `search`, and the strategies that say where to look next.

PGD (Madry et al. 2018, arXiv 1706.06083), APGD and the DLR losses (Croce & Hein 2020, arXiv 2003.01690), Square (Andriushchenko et al. 2020,
arXiv 1912.00049). An image is broken at the first query that reaches the goal, and then leaves the batch.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple, Protocol, runtime_checkable

import torch

from hpt_hf.attacks import checked, cross_entropy, margin, towards
from hpt_hf.shapes import Images, Labels, Logits, PerExample
from hpt_hf.threat import Noise, ThreatModel, l2_norm

# Per image still standing: `x`, where the model is asked next, and what the strategy remembers.
State = dict[str, torch.Tensor]


class Seen(NamedTuple):
    """What the model said of one query."""

    loss: PerExample
    gradient: Images | None


@runtime_checkable
class Goal(Protocol):
    """What is wanted of each image. `rows` says which images of the batch the logits belong to."""

    def loss(self, logits: Logits, rows: torch.Tensor) -> PerExample:
        """What the search maximises."""

    def reached(self, logits: Logits, rows: torch.Tensor) -> torch.Tensor:
        """(batch,) bool: is the image broken?"""


@runtime_checkable
class Strategy(Protocol):
    """Where to look. `queries` forwards are asked for, with the gradient of the loss if `gradients`."""

    queries: int
    gradients: bool

    def start(self, images: Images, threat: ThreatModel, noise: Noise) -> State: ...

    def advance(self, query: int, state: State, seen: Seen, images: Images, threat: ThreatModel, noise: Noise) -> State:
        """The next state, given what was seen at `state["x"]`; all arguments hold the standing images only."""


def search(
    logits_fn: Callable[[Images], Logits], goal: Goal, images: Images, threat: ThreatModel, strategy: Strategy, *, noise: Noise
) -> tuple[Images, torch.Tensor]:
    """Look for images inside the ball that reach the goal.

    Always float32, gradients with respect to the pixels only; parameters must be frozen by the caller (`hpt_hf.attacks.frozen`).

    Args:
        logits_fn: perturbed images -> (batch, classes).
        images: (batch, 3, height, width) in [0, 1], float32.
        noise: one key an image; all randomness of the strategy hangs on it.

    Returns:
        Perturbed images, inside the ball and [0, 1] to the last bit: where the goal was reached, otherwise where the search ended; and
        (batch,) bool: was it reached?

    Raises:
        TypeError, ValueError: images that are not float32 in [0, 1], or another number of noise keys.
    """
    images = checked(images, noise)
    rows = torch.arange(len(images), device=images.device)
    found, broken = images.clone(), torch.zeros(len(images), dtype=torch.bool, device=images.device)
    with torch.autocast(images.device.type, enabled=False), torch.set_grad_enabled(strategy.gradients):
        state = strategy.start(images, threat, noise)
        for query in range(strategy.queries):
            last = query == strategy.queries - 1
            x = state["x"].detach().requires_grad_(strategy.gradients and not last)
            logits = logits_fn(x)
            reached = goal.reached(logits, rows)
            fallen = bool(reached.any())
            if fallen or last:
                found[rows], broken[rows] = x.detach(), reached
            if last or (fallen and reached.all()):
                break
            loss = goal.loss(logits, rows)
            # The gradient is asked for before the fallen leave: each image's own, so theirs disturb nobody.
            seen = Seen(loss.detach(), pixel_gradient(loss, x) if strategy.gradients else None)
            if fallen:
                standing = ~reached
                rows, images = rows[standing], images[standing]
                noise = replace(noise, keys=noise.keys[standing])
                state = {name: value[standing] for name, value in state.items()}
                seen = Seen(*(None if v is None else v[standing] for v in seen))
            state = strategy.advance(query, state, seen, images, threat, noise)
    return found, broken


def pixel_gradient(loss: torch.Tensor, images: Images) -> Images:
    """d loss / d images, where `loss` holds one number for some of the images; zeros where the model is cut off from its pixels, so that such a model can be measured too."""
    if not loss.requires_grad:
        return torch.zeros_like(images)
    return torch.autograd.grad(loss.sum(), images, allow_unused=True, materialize_grads=True)[0].detach()


# --- goals --------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class WrongAnswer:
    """Any answer but the label, by raising a loss of (logits, labels)."""

    labels: Labels
    loss_fn: Callable[[Logits, Labels], PerExample]

    def loss(self, logits: Logits, rows: torch.Tensor) -> PerExample:
        return self.loss_fn(logits, self.labels[rows])

    def reached(self, logits: Logits, rows: torch.Tensor) -> torch.Tensor:
        return logits.argmax(1) != self.labels[rows]


@dataclass(frozen=True)
class WrongTowards:
    """Any answer but the label, by walking towards one wrong class."""

    labels: Labels
    targets: Labels

    def loss(self, logits: Logits, rows: torch.Tensor) -> PerExample:
        return towards(logits, self.labels[rows], self.targets[rows])

    def reached(self, logits: Logits, rows: torch.Tensor) -> torch.Tensor:
        return logits.argmax(1) != self.labels[rows]


@dataclass(frozen=True)
class ChosenAnswer:
    """One chosen answer for every image, by lowering a loss of (logits, target)."""

    targets: Labels
    loss_fn: Callable[[Logits, Labels], PerExample]

    def loss(self, logits: Logits, rows: torch.Tensor) -> PerExample:
        return -self.loss_fn(logits, self.targets[rows])

    def reached(self, logits: Logits, rows: torch.Tensor) -> torch.Tensor:
        return logits.argmax(1) == self.targets[rows]


# --- strategies -----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class PGD:
    """Steps of one size along the ascent direction, from a random start."""

    steps: int
    step_size: float
    gradients = True

    @property
    def queries(self) -> int:
        return self.steps + 1

    def start(self, images: Images, threat: ThreatModel, noise: Noise) -> State:
        return {"x": threat.random_start(images, noise), **threat.corners(images)}

    def advance(self, query, state, seen, images, threat, noise):
        x = state["x"] + self.step_size * threat.ascent_direction(seen.gradient)
        return state | {"x": threat.project(x, images, state)}


@dataclass(frozen=True)
class APGD:
    """PGD with momentum that halves its step and goes back to its best point where it no longer gains (arXiv 2003.01690, algorithm 1)."""

    steps: int = 100
    gradients = True

    momentum = 0.75  # the paper's alpha: the share of the gradient step in each move
    progress = 0.75  # its rho: the share of steps between two checkpoints that must raise the loss

    @property
    def queries(self) -> int:
        return self.steps + 1

    def checkpoints(self) -> dict[int, int]:
        """Step -> steps since the checkpoint before. The first stretch is 22% of all steps, each later one 3% shorter, at least 6%."""
        stretch, least, shorter = (max(1, int(share * self.steps)) for share in (0.22, 0.06, 0.03))
        found, step = {}, stretch
        while step <= self.steps:
            found[step] = stretch
            stretch = max(stretch - shorter, least)
            step += stretch
        return found

    def start(self, images: Images, threat: ThreatModel, noise: Noise) -> State:
        x, count = threat.random_start(images, noise), len(images)
        low = images.new_full((count,), -math.inf)
        return {
            "x": x,
            "previous": x,
            "best": x,
            "best_gradient": torch.zeros_like(x),
            "best_loss": low,
            "last_loss": low,
            "best_at_checkpoint": low,
            "increases": images.new_zeros(count),
            "step_size": images.new_full((count,), 2 * threat.radius),
            "halved": torch.ones(count, dtype=torch.bool, device=images.device),
            **threat.corners(images),
        }

    def advance(self, query, state, seen, images, threat, noise):
        s, (loss, gradient) = dict(state), seen
        better = loss > s["best_loss"]
        s["increases"] = s["increases"] + (loss > s["last_loss"])
        s["last_loss"] = loss
        s["best_loss"] = torch.where(better, loss, s["best_loss"])
        s["best"] = torch.where(_wide(better), s["x"], s["best"])
        s["best_gradient"] = torch.where(_wide(better), gradient, s["best_gradient"])
        x = s["x"]
        if query == 0:
            s["best_at_checkpoint"], s["increases"] = loss, torch.zeros_like(loss)
        elif (stretch := self.checkpoints().get(query)) is not None:
            stuck = (s["increases"] <= self.progress * stretch) | (~s["halved"] & (s["best_at_checkpoint"] >= s["best_loss"]))
            s["step_size"] = torch.where(stuck, s["step_size"] / 2, s["step_size"])
            s["best_at_checkpoint"], s["halved"], s["increases"] = s["best_loss"], stuck, torch.zeros_like(loss)
            x = torch.where(_wide(stuck), s["best"], x)
            gradient = torch.where(_wide(stuck), s["best_gradient"], gradient)
        plain = threat.project(x + _wide(s["step_size"]) * threat.ascent_direction(gradient), images, s)
        share = self.momentum if query else 1.0
        moved = threat.project(x + share * (plain - x) + (1 - share) * (x - s["previous"]), images, s)
        return s | {"previous": x, "x": moved}


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
        noise = replace(noise, draw=noise.draw + 1 + query)
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
        bumps = torch.where((draw[:, 4] < 0.5)[:, None, None], *(_bumps(side, side, upright=u).to(delta) for u in (True, False)))
        bumps = bumps[:, None] * _signs(draw[:, 5:, None, None])
        old = delta[one.expand_as(delta)].view(len(delta), channels, side, side)
        fresh = bumps + old / old.flatten(2).norm(dim=2)[..., None, None].clamp_min(1e-12)
        fresh = fresh / fresh.flatten(2).norm(dim=2)[..., None, None].clamp_min(1e-12)
        spare = (threat.radius**2 - l2_norm(delta) ** 2).clamp_min(0) / channels
        budget = (delta * (one | two)).flatten(2).norm(dim=2)[..., None, None] ** 2
        moved = delta.masked_fill(one | two, 0)
        moved[one.expand_as(delta)] = (fresh * (spare + budget).sqrt()).flatten()
        return moved * (threat.radius / l2_norm(moved).clamp_min(1e-12))


def _wide(value: torch.Tensor) -> torch.Tensor:
    """(batch,) -> (batch, 1, 1, 1)."""
    return value[:, None, None, None]


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


# --- attacks by name -------------------------------------------------------------------------------------------------------

LogitsFn = Callable[[Images], Logits]
Outcome = tuple[Images, torch.Tensor]


def any_answer(loss_fn: Callable[[Logits, Labels], PerExample], strategy: Callable[[int, ThreatModel], Strategy]):
    """The attack that raises `loss_fn` of the labels until the answer is wrong, by the strategy made of (steps, threat)."""

    def attack(logits_fn: LogitsFn, images: Images, labels: Labels, threat: ThreatModel, steps: int, noise: Noise) -> Outcome:
        return search(logits_fn, WrongAnswer(labels, loss_fn), images, threat, strategy(steps, threat), noise=noise)

    return attack


def one_answer(loss_fn: Callable[[Logits, Labels], PerExample], strategy: Callable[[int, ThreatModel], Strategy]):
    """The attack that lowers `loss_fn` of the targets, given in the labels' place, until they are the answer."""

    def attack(logits_fn: LogitsFn, images: Images, targets: Labels, threat: ThreatModel, steps: int, noise: Noise) -> Outcome:
        return search(logits_fn, ChosenAnswer(targets, loss_fn), images, threat, strategy(steps, threat), noise=noise)

    return attack


def even_steps(steps: int, threat: ThreatModel) -> PGD:
    """PGD-N with steps of 2.5 eps / N (Madry et al. 2018)."""
    return PGD(steps, 2.5 * threat.radius / steps)


def apgd_t(logits_fn: LogitsFn, images: Images, labels: Labels, threat: ThreatModel, steps: int, noise: Noise) -> Outcome:
    """APGD towards each of the nine likeliest wrong classes, as AutoAttack does; an image is done with the first of them that breaks it.

    The pairs (image, target) wait in a queue and are taken `len(images)` at a time, so the batch stays full when few images stand.
    """
    images = checked(images, noise)
    with torch.no_grad(), torch.autocast(images.device.type, enabled=False):
        wrong_first = logits_fn(images).scatter(1, labels[:, None], -torch.inf).argsort(1, descending=True)
    found, broken = images.clone(), torch.zeros(len(images), dtype=torch.bool, device=images.device)
    ranks = min(9, wrong_first.shape[1] - 1)
    waiting = torch.cartesian_prod(torch.arange(ranks), torch.arange(len(images))).to(images.device)  # the likeliest class first
    while len(waiting):
        rank, rows = waiting[: len(images)].T
        goal = WrongTowards(labels[rows], wrong_first[rows, rank])
        own = replace(noise, keys=noise.keys[rows] + 1_000_003 * rank)
        x, reached = search(logits_fn, goal, images[rows], threat, APGD(steps), noise=own)
        # One image may stand in the front with several targets: one of its outcomes is kept, a success if there is one.
        kept = {int(rows[i]): i for i in reached.int().argsort(stable=True).tolist()}
        chosen = torch.tensor([*kept.values()], device=images.device)
        found[rows[chosen]], broken[rows[chosen]] = x[chosen], reached[chosen]
        waiting = waiting[len(images) :]
        waiting = waiting[~broken[waiting[:, 1]]]
    return found, broken


def in_turn(parts: Sequence[Callable[[Images, torch.Tensor, Noise], Outcome]], images: Images, noise: Noise) -> Outcome:
    """Attacks one after another, each on what those before it left standing: the worst case of all, image by image.

    Returns:
        Perturbed images, and (batch,) the number of the part that broke each; -1: it stands.
    """
    images = checked(images, noise)
    found, by = images.clone(), torch.full((len(images),), -1, device=images.device)
    for number, part in enumerate(parts):
        rows = (by < 0).nonzero()[:, 0]
        if not len(rows):
            break
        own = replace(noise, keys=noise.keys[rows], draw=noise.draw + number * 1_000_003)
        found[rows], broken = part(images[rows], rows, own)
        by[rows[broken]] = number
    return found, by


# name -> (loss, strategy, its steps unless said otherwise).
_PLAIN: dict[str, tuple[Callable[[Logits, Labels], PerExample], Callable[[int, ThreatModel], Strategy], int]] = {
    "pgd": (cross_entropy, even_steps, 20),
    "cw": (margin, even_steps, 20),  # Carlini & Wagner's loss (2017)
    "apgd-ce": (cross_entropy, lambda steps, _: APGD(steps), 100),
    "square": (margin, lambda steps, _: Square(steps), 5000),
}
# name -> (attack, its steps). `standard` is the worst case over the three, as AutoAttack without FAB.
ATTACKS: dict[str, tuple[Callable[..., Outcome], int]] = {
    **{name: (any_answer(loss_fn, strategy), steps) for name, (loss_fn, strategy, steps) in _PLAIN.items()},
    "apgd-t": (apgd_t, 100),
}
TARGETED: dict[str, tuple[Callable[..., Outcome], int]] = {
    name: (one_answer(loss_fn, strategy), steps) for name, (loss_fn, strategy, steps) in _PLAIN.items()
}
# 500 queries and not 5,000: two thirds of all time would go into pictures that the white-box attacks had left, and find nothing (docs/evaluation.md).
STANDARD = {"apgd-ce": 100, "apgd-t": 100, "square": 500}
