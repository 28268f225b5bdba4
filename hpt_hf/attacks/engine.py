"""Attacks for evaluation: one skeleton, `search`, and the strategies that say where to look next.

PGD (Madry et al. 2018, arXiv 1706.06083), APGD and the DLR losses (Croce & Hein 2020, arXiv 2003.01690), Square (Andriushchenko et al. 2020,
arXiv 1912.00049). An image is broken at the first query that reaches the goal, and then leaves the batch.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import NamedTuple, Protocol, runtime_checkable

import torch

from hpt_hf.attacks.losses import targeted_dlr
from hpt_hf.attacks.noise import Noise
from hpt_hf.attacks.threat_model import ThreatModel
from hpt_hf.types import Images, Labels, Logits, PerExample


@contextmanager
def frozen(model: torch.nn.Module) -> Iterator[None]:
    """No parameter of `model` asks for gradients inside: no weight gradients, and nothing kept in memory for them."""
    parameters = [p for p in model.parameters() if p.requires_grad]
    for p in parameters:
        p.requires_grad_(False)
    try:
        yield
    finally:
        for p in parameters:
            p.requires_grad_(True)


def checked(images: Images, noise: Noise | None) -> Images:
    """`images`, detached, if an attack may start from them (raises as `pgd` says)."""
    if images.dtype != torch.float32:
        raise TypeError(
            f"the attack runs in float32, the images are {images.dtype}: half precision weakens attacks (sign(0) = 0)"
        )
    if len(images) and not (images.min() >= 0 and images.max() <= 1):  # also catches NaN
        raise ValueError(
            f"images must lie in [0, 1], got [{images.min().item():.3g}, {images.max().item():.3g}]: give them un-normalised, divided by 255"
        )
    if noise is not None and len(noise.image_ids) != len(images):
        raise ValueError(f"{len(noise.image_ids)} image ids for {len(images)} images: every image needs its own")
    return images.detach()


# Per image still standing: `x`, where the model is asked next, and what the strategy remembers.
State = dict[str, torch.Tensor]


class Seen(NamedTuple):
    """What the model said of one query."""

    loss: PerExample
    gradient: Images | None


@runtime_checkable
class Criterion(Protocol):
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

    def advance(
        self, query: int, state: State, seen: Seen, images: Images, threat: ThreatModel, noise: Noise
    ) -> State:
        """The next state, given what was seen at `state["x"]`; all arguments hold the standing images only."""


def search(
    logits_fn: Callable[[Images], Logits],
    goal: Criterion,
    images: Images,
    threat: ThreatModel,
    strategy: Strategy,
    *,
    noise: Noise,
) -> tuple[Images, torch.Tensor]:
    """Look for images inside the ball that reach the goal.

    Always float32, gradients with respect to the pixels only; parameters must be frozen by the caller (`hpt_hf.attacks.engine.frozen`).

    Args:
        logits_fn: perturbed images -> (batch, classes).
        images: (batch, 3, height, width) in [0, 1], float32.
        noise: one key an image; all randomness of the strategy hangs on it.

    Returns:
        Perturbed images, inside the ball and [0, 1] to the last bit: where the goal was reached, otherwise where the search ended; and
        (batch,) bool: was it reached?

    Raises:
        TypeError, ValueError: images that are not float32 in [0, 1], or another number of image ids.
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
                noise = replace(noise, image_ids=noise.image_ids[standing])
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
class Misclassification:
    """Any answer but the label, by raising a loss of (logits, labels)."""

    labels: Labels
    loss_fn: Callable[[Logits, Labels], PerExample]

    def loss(self, logits: Logits, rows: torch.Tensor) -> PerExample:
        return self.loss_fn(logits, self.labels[rows])

    def reached(self, logits: Logits, rows: torch.Tensor) -> torch.Tensor:
        return logits.argmax(1) != self.labels[rows]


@dataclass(frozen=True)
class TargetedMisclassification:
    """Any answer but the label, by walking towards one wrong class."""

    labels: Labels
    targets: Labels

    def loss(self, logits: Logits, rows: torch.Tensor) -> PerExample:
        return targeted_dlr(logits, self.labels[rows], self.targets[rows])

    def reached(self, logits: Logits, rows: torch.Tensor) -> torch.Tensor:
        return logits.argmax(1) != self.labels[rows]


@dataclass(frozen=True)
class TargetReached:
    """One chosen answer for every image, by lowering a loss of (logits, target)."""

    targets: Labels
    loss_fn: Callable[[Logits, Labels], PerExample]

    def loss(self, logits: Logits, rows: torch.Tensor) -> PerExample:
        return -self.loss_fn(logits, self.targets[rows])

    def reached(self, logits: Logits, rows: torch.Tensor) -> torch.Tensor:
        return logits.argmax(1) == self.targets[rows]


def _wide(value: torch.Tensor) -> torch.Tensor:
    """(batch,) -> (batch, 1, 1, 1)."""
    return value[:, None, None, None]


# --- attacks by name -------------------------------------------------------------------------------------------------------

LogitsFn = Callable[[Images], Logits]


Outcome = tuple[Images, torch.Tensor]
