"""The stopwatch: how long the steps of each phase take, and, once that is known, how long the run will."""

from __future__ import annotations

import statistics
import time

import torch
from transformers import TrainerCallback

from hpt_hf.method.schedule import Schedule
from hpt_hf.utils import duration, peak_memory, progress

FIRST = 3  # steps of a process, or of a phase, that are not representative: memory is asked for, kernels are chosen
KNOWN = 13  # steps after which the run is announced


class Stopwatch(TrainerCallback):
    """Times every optimizer step with its data, without checkpoints and evaluations; says once what is left."""

    def __init__(self, schedule: Schedule, device: torch.device):
        self.schedule, self.device, self.quiet = schedule, device, False
        self.steps: list[list[float]] = []
        self.saving = 0.0  # seconds of the last checkpoint
        self._began, self._mark = time.perf_counter(), 0.0

    def seconds(self, phase: int) -> float:
        """Of a step of phase number `phase`; of one that is not reached yet, what the steps of the latest took."""
        taken = next((s for s in self.steps[phase::-1] if s), None)
        if taken is None:
            raise ValueError(f"no step of phase {phase} was timed yet")
        return statistics.mean(taken[FIRST:] or taken[-1:])

    def remaining(self, step: int) -> float:
        """Seconds from the global step `step` to the end of the schedule."""
        total, begins = 0.0, 0
        for number, phase in enumerate(self.schedule.phases):
            left = min(phase.steps, begins + phase.steps - step)
            if left > 0:
                total += self.seconds(number) * left
            begins += phase.steps
        return total

    @property
    def elapsed(self) -> float:
        """Seconds since training began."""
        return time.perf_counter() - self._began

    def on_train_begin(self, args, state, control, **kwargs):
        self.steps, self._began = [[] for _ in self.schedule.phases], time.perf_counter()
        self._lap()

    def on_step_end(self, args, state, control, **kwargs):
        phase = self.schedule.number(state.global_step - 1)
        self.steps[phase].append(self._lap())
        if sum(map(len, self.steps)) == KNOWN and not self.quiet and state.is_world_process_zero:
            rest = self.remaining(state.global_step)
            until = time.strftime("%H:%M on %d %B", time.localtime(time.time() + rest))
            unit = "GPU" if self.device.type == "cuda" else "process"
            progress(
                f"{duration(rest)} to go, until {until}, checkpoints and evaluations apart: "
                f"{self.schedule.total_steps - state.global_step} steps of {self.seconds(phase):.3g} s; "
                f"{rest / 3600 * args.world_size:.3g} {unit}-hours, "
                f"{peak_memory(self.device) / 2**30:.1f} GiB of memory a process so far"
            )

    def on_save(self, args, state, control, **kwargs):
        self.saving = self._lap()

    def on_evaluate(self, args, state, control, **kwargs):
        self._lap()

    def _lap(self) -> float:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        before, self._mark = self._mark, time.perf_counter()
        return self._mark - before
