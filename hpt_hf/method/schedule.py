"""The schedule: phases as pure functions of the optimizer step.

Generalization-Pivot Decoupling (arXiv 2601.12865): a low-rate warm-up whose exponential moving average is the *pivot*;
then HPT at a high rate from the vanilla weights, pulled halfway back to the pivot at the start of every epoch.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from dataclasses import dataclass, replace

from hpt_hf.method.objectives import Objective

# Share of the peak rate once a share `p` of the phase after its linear warm-up is over.
DECAYS: dict[str, Callable[[float], float]] = {
    "cosine": lambda p: 0.5 * (1 + math.cos(math.pi * p)),
    "linear": lambda p: 1 - p,
    "constant": lambda p: 1.0,
}


@dataclass(frozen=True)
class Phase:
    """A stretch of training with one objective and one learning-rate curve. `Schedule.resolve` fills in what is None.

    Raises:
        ValueError: a length, rate, warm-up or ratio that cannot be.
    """

    objective: Objective
    steps: int | None = None  # its length, or in `epochs`; both None: the Trainer's
    learning_rate: float | None = None  # the peak; None: the Trainer's divided by `rate_divisor`
    warmup_steps: int | None = None  # of the linear warm-up
    epochs: float | None = None
    rate_divisor: float = 1.0
    decay: str | None = None  # how the rate falls after the warm-up until the phase ends: a row of `DECAYS`
    restart: bool = False  # from the vanilla weights, with empty momentum, instead of where the last phase ended
    ema: float | None = None  # g of `ema <- g ema + (1 - g) theta` at each interval's end; its last value is the pivot
    average_last: float | None = None  # the mean of the weights over this last share of steps replaces them at the end
    final_pull: bool = False  # one more pull, behind its last step
    pull: float | None = None  # b of `theta <- b theta + (1 - b) pivot` at the start of each interval but the first

    def __post_init__(self) -> None:
        ratio, positive = (lambda v: 0 <= v <= 1), (lambda v: 0 < v < math.inf)
        for name, allowed, expected in (
            ("epochs", positive, "a positive number"),
            ("steps", lambda v: v >= 1, "at least 1"),
            ("learning_rate", positive, "a positive number"),
            ("warmup_steps", lambda v: 0 <= v <= (self.steps or v), f"0 to {self.steps}, the steps of the phase"),
            ("decay", lambda v: v in DECAYS, f"one of {', '.join(DECAYS)}"),
            ("ema", ratio, "a ratio between 0 and 1"),
            ("pull", ratio, "a ratio between 0 and 1"),
            ("average_last", lambda v: 0 < v <= 1, "a share above 0, at most 1"),
        ):
            value = getattr(self, name)
            if value is not None and not allowed(value):
                raise ValueError(f"phase {self.objective.name}: {name}: got {value}, expected {expected}")

    def rate(self, step: int) -> float:
        """Learning rate of the phase's own step number `step`, counted from 0."""
        if step < self.warmup_steps:
            return self.learning_rate * (step + 1) / self.warmup_steps
        progress = (step - self.warmup_steps) / max(1, self.steps - self.warmup_steps)
        return self.learning_rate * DECAYS[self.decay](min(1.0, progress))


@dataclass(frozen=True)
class Schedule:
    """Phases in turn. `interval` is the number of steps between averages and pulls; None: an epoch.

    Raises:
        ValueError: no phase, an interval below 1, or a pull to a pivot that no earlier phase makes.
    """

    phases: tuple[Phase, ...]
    interval: int | None = None

    def __post_init__(self) -> None:
        if not self.phases:
            raise ValueError("a schedule needs at least one phase")
        if self.interval is not None and self.interval < 1:
            raise ValueError(f"interval: got {self.interval}, expected at least 1 step between averages and pulls")
        for number, phase in enumerate(self.phases):
            pulled = phase.pull is not None or phase.final_pull
            if pulled and all(before.ema is None for before in self.phases[:number]):
                raise ValueError(f"phase {phase.objective.name} is pulled to a pivot: no phase before it has an ema")
            if (phase.average_last or phase.final_pull) and number + 1 < len(self.phases):
                raise ValueError(f"phase {phase.objective.name}: average_last and final_pull are of the last phase")

    @classmethod
    def single(cls, objective: Objective, **phase) -> Schedule:
        """One objective from start to end: plain HPT, and every baseline. `phase`: fields of `Phase`."""
        return cls((Phase(objective, **phase),))

    @classmethod
    def gpd(
        cls,
        warm_up: Objective,
        main: Objective,
        *,
        warm_up_epochs: float | None = None,
        warm_up_steps: int | None = None,
        warm_up_learning_rate: float | None = None,
        interval: int | None = None,
        ema: float = 0.9,
        pull: float = 0.5,
        restart: bool = True,
        **phase,
    ) -> Schedule:
        """The paper's two stages, the first by default at a thousandth of the rate. `phase`: fields of the second."""
        first = Phase(
            warm_up,
            warm_up_steps,
            warm_up_learning_rate,
            0,
            warm_up_epochs,
            rate_divisor=1000,
            decay="cosine",
            ema=ema,
        )
        return cls((first, Phase(main, restart=restart, pull=pull, **phase)), interval)

    def resolve(
        self,
        steps_per_epoch: int,
        *,
        epochs: float,
        learning_rate: float,
        warmup_steps: Callable[[int], int] = lambda steps: 0,
        decay: str = "cosine",
        max_steps: int = -1,
    ) -> Schedule:
        """The same schedule in optimizer steps, what its phases leave open taken from the arguments.

        Args:
            warmup_steps: steps of a phase -> of its warm-up, cut off at the phase's end.
            max_steps: total length, if positive: all phases shrink or grow in proportion, each to a step at least.
        """
        lengths = [p.steps or max(1, round((p.epochs or epochs) * steps_per_epoch)) for p in self.phases]
        if max_steps > 0:
            if max_steps < len(lengths):
                raise ValueError(f"max_steps: got {max_steps}, expected at least {len(lengths)}, one for each phase")
            first = [min(max(1, round(max_steps * n / sum(lengths))), max_steps - 1) for n in lengths[:-1]]
            lengths = [*first, max_steps - sum(first)]
        phases = tuple(
            replace(
                p,
                epochs=None,
                steps=steps,
                learning_rate=learning_rate / p.rate_divisor if p.learning_rate is None else p.learning_rate,
                warmup_steps=min(warmup_steps(steps) if p.warmup_steps is None else p.warmup_steps, steps),
                decay=p.decay or decay,
            )
            for p, steps in zip(self.phases, lengths, strict=True)
        )
        return Schedule(phases, self.interval or steps_per_epoch)

    def shortened(self, steps: int) -> Schedule:
        """The same phases, each at most `steps` long."""
        phases = (replace(p, steps=min(p.steps, steps), warmup_steps=min(p.warmup_steps, steps)) for p in self.phases)
        return replace(self, phases=tuple(phases))

    @property
    def total_steps(self) -> int:
        return sum(p.steps for p in self.phases)

    def number(self, step: int) -> int:
        """Which phase a global step belongs to, counted from 0; steps past the end belong to the last."""
        ends = itertools.accumulate(p.steps for p in self.phases[:-1])
        return sum(step >= end for end in ends)

    def locate(self, step: int) -> tuple[Phase, int]:
        """The phase of a global step and the step's number within it."""
        number = self.number(step)
        return self.phases[number], step - sum(p.steps for p in self.phases[:number])

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

    def tail_after(self, step: int) -> int:
        """How many weights the mean of the last share holds with those right after this step; 0: it has not begun."""
        phase, within = self.locate(step)
        if phase.average_last is None:
            return 0
        return max(0, within + 1 - phase.steps + max(1, round(phase.average_last * phase.steps)))

    def averages_after(self, step: int) -> bool:
        """Does the average take in the weights right after this step, the end of an interval or of the phase?"""
        phase, within = self.locate(step)
        done = within + 1
        return phase.ema is not None and (done == phase.steps or done < phase.steps and done % self.interval == 0)
