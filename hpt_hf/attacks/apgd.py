"""APGD (Croce & Hein 2020, arXiv 2003.01690, algorithm 1): PGD with momentum and an adaptive step size."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

from hpt_hf.attacks.engine import State
from hpt_hf.attacks.noise import Noise
from hpt_hf.attacks.threat_model import ThreatModel
from hpt_hf.types import Images


@dataclass(frozen=True)
class APGD:
    """PGD with momentum that halves its step and goes back to its best point where it no longer gains."""

    threat: ThreatModel
    steps: int = 100
    gradients = True
    momentum = 0.75  # the paper's alpha: the share of the gradient step in each move
    progress = 0.75  # its rho: the share of steps between two checkpoints that must raise the loss

    def checkpoints(self) -> dict[int, int]:
        """Step -> steps since the one before: first 22% of all steps, then each time 3% fewer, at least 6%."""
        stretch, least, shorter = (max(1, int(share * self.steps)) for share in (0.22, 0.06, 0.03))
        found, step = {}, stretch
        while step <= self.steps:
            found[step] = stretch
            stretch = max(stretch - shorter, least)
            step += stretch
        return found

    def start(self, images: Images, noise: Noise) -> State:
        x, low = self.threat.random_start(images, noise), images.new_full((len(images), 1, 1, 1), -math.inf)
        return {
            **self.threat.bounds(images),
            **dict.fromkeys(("x", "previous", "best"), x),
            **dict.fromkeys(("best_loss", "last_loss", "best_at_checkpoint"), low),
            "best_gradient": torch.zeros_like(x),
            "increases": torch.zeros_like(low),
            "step_size": torch.full_like(low, 2 * self.threat.radius),
            "halved": torch.ones_like(low, dtype=torch.bool),
        }

    def advance(self, step: int, state: State, noise: Noise) -> State:
        s, x, images, gradient = dict(state), state["x"], state["images"], state["gradient"]
        loss = state["loss"][:, None, None, None]
        better = loss > s["best_loss"]
        s["increases"] = s["increases"] + (loss > s["last_loss"])
        s["last_loss"] = loss
        s["best_loss"] = torch.where(better, loss, s["best_loss"])
        s["best"] = torch.where(better, x, s["best"])
        s["best_gradient"] = torch.where(better, gradient, s["best_gradient"])
        if step == 0:
            s["best_at_checkpoint"], s["increases"] = loss, torch.zeros_like(loss)
        elif (stretch := self.checkpoints().get(step)) is not None:
            few_increases = s["increases"] <= self.progress * stretch
            stuck = few_increases | (~s["halved"] & (s["best_at_checkpoint"] >= s["best_loss"]))
            s["step_size"] = torch.where(stuck, s["step_size"] / 2, s["step_size"])
            s["best_at_checkpoint"], s["halved"], s["increases"] = s["best_loss"], stuck, torch.zeros_like(loss)
            x = torch.where(stuck, s["best"], x)
            gradient = torch.where(stuck, s["best_gradient"], gradient)
        plain = self.threat.project(x + s["step_size"] * self.threat.ascent_direction(gradient), images, s)
        share = self.momentum if step else 1.0
        moved = self.threat.project(x + share * (plain - x) + (1 - share) * (x - s["previous"]), images, s)
        return s | {"previous": x, "x": moved}
