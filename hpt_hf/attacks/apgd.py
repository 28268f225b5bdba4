"""APGD (Croce & Hein 2020, arXiv 2003.01690): PGD with momentum and an adaptive step size."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

from hpt_hf.attacks.engine import State, _wide
from hpt_hf.attacks.noise import Noise
from hpt_hf.attacks.threat_model import ThreatModel
from hpt_hf.types import Images


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
            stuck = (s["increases"] <= self.progress * stretch) | (
                ~s["halved"] & (s["best_at_checkpoint"] >= s["best_loss"])
            )
            s["step_size"] = torch.where(stuck, s["step_size"] / 2, s["step_size"])
            s["best_at_checkpoint"], s["halved"], s["increases"] = s["best_loss"], stuck, torch.zeros_like(loss)
            x = torch.where(_wide(stuck), s["best"], x)
            gradient = torch.where(_wide(stuck), s["best_gradient"], gradient)
        plain = threat.project(x + _wide(s["step_size"]) * threat.ascent_direction(gradient), images, s)
        share = self.momentum if query else 1.0
        moved = threat.project(x + share * (plain - x) + (1 - share) * (x - s["previous"]), images, s)
        return s | {"previous": x, "x": moved}
