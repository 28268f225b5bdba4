"""The schedule of phases, as pure functions of the step, and the callback that carries out GPD's steps between the steps.

Generalization-Pivot Decoupling (arXiv 2601.12865): a low-rate warm-up whose exponential moving average is the *pivot*; then HPT at a
high rate from the vanilla weights, pulled halfway back to the pivot at the start of every epoch.
"""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass, replace

from hpt_hf.method.objectives import Objective


@dataclass(frozen=True)
class Phase:
    """A stretch of training with one objective and one learning-rate curve.

    Args:
        objective: what is minimised and how it is attacked.
        steps: optimizer steps.
        learning_rate: the peak; linear warm-up over `warmup_steps`, then cosine to 0 at the end of the phase.
        restart: begin from the vanilla weights, with empty momentum, instead of where the last phase ended.
        ema: decay g of the moving average `ema <- g ema + (1 - g) theta`, taken at the end of each interval; its last value is the pivot.
        pull: ratio b of `theta <- b theta + (1 - b) pivot`, done at the start of each interval but the first.
    """

    objective: Objective
    steps: int
    learning_rate: float
    warmup_steps: int = 0
    restart: bool = False
    ema: float | None = None
    pull: float | None = None

    def __post_init__(self) -> None:
        if self.steps < 1:
            raise ValueError(f"phase {self.objective.name}: steps={self.steps}, expected at least 1")
        if not (self.learning_rate > 0 and math.isfinite(self.learning_rate)):
            raise ValueError(
                f"phase {self.objective.name}: learning_rate={self.learning_rate}, expected a positive number"
            )
        if not 0 <= self.warmup_steps <= self.steps:
            raise ValueError(
                f"phase {self.objective.name}: warmup_steps={self.warmup_steps}, expected 0 to {self.steps}, the steps of the phase"
            )
        for name in ("ema", "pull"):
            value = getattr(self, name)
            if value is not None and not 0 <= value <= 1:
                raise ValueError(f"phase {self.objective.name}: {name}={value}, expected a ratio between 0 and 1")

    def rate(self, step: int) -> float:
        """Learning rate of the phase's own step number `step`, counted from 0."""
        if step < self.warmup_steps:
            return self.learning_rate * (step + 1) / self.warmup_steps
        progress = (step - self.warmup_steps) / max(1, self.steps - self.warmup_steps)
        return self.learning_rate * 0.5 * (1 + math.cos(math.pi * min(1.0, progress)))


@dataclass(frozen=True)
class Schedule:
    """Phases in turn. `interval` is the number of steps between averages and pulls: an epoch, unless said otherwise."""

    phases: tuple[Phase, ...]
    interval: int

    def __post_init__(self) -> None:
        if not self.phases:
            raise ValueError("a schedule needs at least one phase")
        if self.interval < 1:
            raise ValueError(f"interval={self.interval}: expected at least one step between averages and pulls")
        averaged = False
        for phase in self.phases:
            if phase.pull is not None and not averaged:
                raise ValueError(
                    f"phase {phase.objective.name} is pulled to a pivot that no phase before it makes: give an earlier phase an ema"
                )
            averaged |= phase.ema is not None

    @classmethod
    def single(cls, objective: Objective, *, steps: int, learning_rate: float, warmup_steps: int = 0) -> Schedule:
        """One objective from start to end: plain HPT, and every baseline."""
        return cls((Phase(objective, steps, learning_rate, warmup_steps),), interval=steps)

    @classmethod
    def gpd(
        cls,
        warm_up: Objective,
        main: Objective,
        *,
        warm_up_steps: int,
        steps: int,
        warm_up_learning_rate: float,
        learning_rate: float,
        interval: int,
        warmup_steps: int = 0,
        ema: float = 0.9,
        pull: float = 0.5,
        restart: bool = True,
    ) -> Schedule:
        """The paper's two stages. `warmup_steps` is the linear ramp of the learning rate in the second."""
        first = Phase(warm_up, warm_up_steps, warm_up_learning_rate, ema=ema)
        return cls((first, Phase(main, steps, learning_rate, warmup_steps, restart=restart, pull=pull)), interval)

    @property
    def total_steps(self) -> int:
        return sum(p.steps for p in self.phases)

    def locate(self, step: int) -> tuple[Phase, int]:
        """The phase of a global step and the step's number within it. Steps past the end belong to the last phase."""
        number = self.number(step)
        return self.phases[number], step - sum(p.steps for p in self.phases[:number])

    def number(self, step: int) -> int:
        """Which phase a global step belongs to, counted from 0."""
        ends = itertools.accumulate(p.steps for p in self.phases[:-1])
        return sum(step >= end for end in ends)

    def shortened(self, steps: int) -> Schedule:
        """The same phases, each at most `steps` long."""
        phases = (
            replace(p, steps=min(p.steps, steps), warmup_steps=min(p.warmup_steps, p.steps, steps))
            for p in self.phases
        )
        return replace(self, phases=tuple(phases))

    def phase(self, step: int) -> Phase:
        return self.locate(step)[0]

    def learning_rate(self, step: int) -> float:
        phase, within = self.locate(step)
        return phase.rate(within)

    def restarts_at(self, step: int) -> bool:
        """Does the student return to the vanilla weights right before this step?"""
        phase, within = self.locate(step)
        return phase.restart and within == 0

    def pulls_at(self, step: int) -> bool:
        """Is the student pulled to the pivot right before this step?"""
        phase, within = self.locate(step)
        return phase.pull is not None and 0 < within < phase.steps and within % self.interval == 0

    def averages_after(self, step: int) -> bool:
        """Does the moving average take the weights in right after this step? At the end of every interval and of the phase."""
        phase, within = self.locate(step)
        return (
            phase.ema is not None
            and within < phase.steps
            and ((within + 1) % self.interval == 0 or within + 1 == phase.steps)
        )
