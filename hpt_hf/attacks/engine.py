"""The one attack loop, of training and evaluation: always float32, gradients of the pixels only."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import NamedTuple

import torch

from hpt_hf.attacks.noise import Noise
from hpt_hf.types import Images, Labels, Logits, PerExample

LogitsFn = Callable[[Images], Logits]
Outcome = tuple[Images, torch.Tensor]  # perturbed images, and (batch,) bool: was the criterion reached?

# Of each image still attacked: `x`, where the model is asked next; `loss` and `gradient` there; the clean `images`;
# `rows`, its place in the batch; and what the strategy remembers. A strategy is an object with `start(images, noise)`
# -> State, `advance(step, state, noise)` -> State, the number of these `steps`, and `gradients`: does it want them?
State = dict[str, torch.Tensor]


class Criterion(NamedTuple):
    """What is wanted of each image: two functions of the logits and the `rows` that they belong to."""

    loss: Callable[[Logits, torch.Tensor], PerExample]  # what the attack raises
    reached: Callable[[Logits, torch.Tensor], torch.Tensor]  # (batch,) bool: is the image broken?


def misclassification(loss_fn: Callable[..., PerExample], labels: Labels, *targets: Labels) -> Criterion:
    """Any answer but the label, by raising a loss of (logits, labels), or of (logits, labels, targets)."""
    loss = lambda z, rows: loss_fn(z, labels[rows], *(t[rows] for t in targets))  # noqa: E731
    return Criterion(loss, lambda z, rows: z.argmax(1) != labels[rows])


def target_reached(loss_fn: Callable[..., PerExample], targets: Labels) -> Criterion:
    """The target as the answer, by lowering a loss of (logits, targets)."""
    return Criterion(lambda z, rows: -loss_fn(z, targets[rows]), lambda z, rows: z.argmax(1) == targets[rows])


def run_attack(
    forward: Callable[..., torch.Tensor], images: Images, strategy, *, noise, criterion: Criterion | None = None
) -> Outcome:
    """Raise a loss inside the ball around each image. The caller freezes the parameters (`frozen`).

    Args:
        forward: perturbed images -> (batch, classes) logits, which `criterion` judges; without one -> (batch,) losses.
        images: (batch, 3, height, width) in [0, 1], float32; TypeError or ValueError for others.
        noise: a `Noise`, all randomness of the strategy; None: PGD starts at the images.
        criterion: an image leaves the batch at the first iterate that reaches it. None (training): every image takes
            all steps, each of one forward and one backward pass, and nothing is asked of the last iterate.

    Returns:
        Perturbed images, in the ball and in [0, 1] to the last bit: the first that reached the criterion, or the last.
    """
    images = checked(images, noise)
    found, broken = torch.empty_like(images), torch.zeros(len(images), dtype=torch.bool, device=images.device)
    with torch.autocast(images.device.type, enabled=False), torch.set_grad_enabled(strategy.gradients):
        rows = torch.arange(len(images), device=images.device)
        state = {"images": images, "rows": rows, **strategy.start(images, noise)}
        for step in range(strategy.steps):
            x, rows = state["x"].detach().requires_grad_(strategy.gradients), state["rows"]
            output, reached = forward(x), None
            if criterion is not None and (now := criterion.reached(output, rows)).any():
                reached, found[rows], broken[rows] = now, x.detach(), now
                if reached.all():
                    return found, broken
            loss = output if criterion is None else criterion.loss(output, rows)
            state["loss"] = loss.detach()
            if strategy.gradients:
                state["gradient"] = pixel_gradient(loss, x, strict=criterion is None)
            if reached is not None:  # after the gradient, whose graph holds the whole batch
                state = {name: value[~reached] for name, value in state.items()}
                noise = noise and replace(noise, image_ids=noise.image_ids[~reached])
            state = strategy.advance(step, state, noise)
        found[state["rows"]] = state["x"]
        if criterion is not None:
            broken[state["rows"]] = criterion.reached(forward(state["x"]), state["rows"])
    return found, broken


def checked(images: Images, noise: Noise | None) -> Images:
    """`images`, detached, if an attack may start from them."""
    if images.dtype != torch.float32:
        raise TypeError(f"images are {images.dtype}, expected float32: half precision weakens attacks (sign(0) = 0)")
    if len(images) and not (images.min() >= 0 and images.max() <= 1):  # also catches NaN
        low, high = images.min().item(), images.max().item()
        raise ValueError(f"images in [{low:.3g}, {high:.3g}], expected [0, 1]: un-normalised, divided by 255")
    if noise is not None and len(noise.image_ids) != len(images):
        raise ValueError(f"{len(noise.image_ids)} image ids for {len(images)} images, expected one each")
    return images.detach()


def pixel_gradient(loss: torch.Tensor, images: Images, *, strict: bool = False) -> Images:
    """d loss / d images; unless `strict`, 0 for a model cut off from its pixels, so that it can be measured."""
    if not (strict or loss.requires_grad):
        return torch.zeros_like(images)
    return torch.autograd.grad(loss.sum(), images, materialize_grads=not strict)[0]


@contextmanager
def frozen(model: torch.nn.Module) -> Iterator[None]:
    """No parameter of `model` asks for gradients inside."""
    asking = [p for p in model.parameters() if p.requires_grad]
    model.requires_grad_(False)
    try:
        yield
    finally:
        for p in asking:
            p.requires_grad_()
