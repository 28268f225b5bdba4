"""PGD (Madry et al. 2018, arXiv 1706.06083): a strategy of evaluation, and the attack of training."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from hpt_hf.attacks.engine import State, run_attack
from hpt_hf.attacks.noise import Noise
from hpt_hf.attacks.threat_model import ThreatModel
from hpt_hf.types import ImageIds, Images, PerExample


@dataclass(frozen=True)
class PGD:
    """Steps of `step_size` along the ascent direction; None: 2.5 eps / steps, as in the paper."""

    threat: ThreatModel
    steps: int = 20
    step_size: float | None = None
    gradients = True

    def start(self, images: Images, noise: Noise | None) -> State:
        x = images if noise is None else self.threat.random_start(images, noise)
        return {"x": x, **self.threat.bounds(images)}

    def advance(self, step: int, state: State, noise: Noise | None) -> State:
        size = 2.5 * self.threat.radius / self.steps if self.step_size is None else self.step_size
        x = state["x"] + size * self.threat.ascent_direction(state["gradient"])
        return state | {"x": self.threat.project(x, state["images"], state)}


@dataclass(frozen=True)
class TrainingAttack:
    """PGD for training: steps of `step_size` (None: the radius, as in HPT) from a random start or from the image."""

    threat: ThreatModel
    steps: int = 2
    step_size: float | None = None
    random_start: bool = True

    def __call__(
        self, loss_fn: Callable[[Images], PerExample], images: Images, image_ids: ImageIds, *, seed: int, round: int
    ) -> Images:
        """(batch, 3, height, width) images in the ball, where `loss_fn` is high. See `run_attack`."""
        strategy = PGD(self.threat, self.steps, self.threat.radius if self.step_size is None else self.step_size)
        noise = Noise(image_ids, seed, round) if self.random_start else None
        return run_attack(loss_fn, images, strategy, noise=noise)[0]
