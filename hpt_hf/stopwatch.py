"""The stopwatch: how long the steps of each phase take, and, once that is known, how long the run will."""

from __future__ import annotations

import statistics
import sys
import time

import torch
from transformers import TrainerCallback

from hpt_hf.report import progress
from hpt_hf.schedule import Schedule

FIRST = 3  # steps of a process, or of a phase, that are not representative: memory is asked for, kernels are chosen
KNOWN = 13  # steps after which the run is announced


class Stopwatch(TrainerCallback):
    """Takes the time of every optimizer step, its data included; checkpoints and evaluations apart. Says once when the run will be over."""

    def __init__(self, schedule: Schedule, device: torch.device):
        self.schedule, self.device, self.quiet = schedule, device, False
        self.steps: list[list[float]] = []
        self.saving = 0.0  # seconds of the last checkpoint
        self._mark = 0.0

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

    def on_train_begin(self, args, state, control, **kwargs):
        self.steps = [[] for _ in self.schedule.phases]
        self._lap()

    def on_step_end(self, args, state, control, **kwargs):
        done = state.global_step - 1
        self.steps[self.schedule.number(done)].append(self._lap())
        if sum(map(len, self.steps)) == KNOWN and not self.quiet and state.is_world_process_zero:
            rest = self.remaining(state.global_step)
            progress(
                f"{duration(rest)} to go, until {time.strftime('%H:%M on %d %B', time.localtime(time.time() + rest))}: "
                f"{self.schedule.total_steps - state.global_step} steps of {self.seconds(self.schedule.number(done)):.3g} s; {rest / 3600 * args.world_size:.3g} "
                f"{'GPU' if self.device.type == 'cuda' else 'process'}-hours, {peak_memory(self.device) / 2**30:.1f} GiB of memory a process so far. "
                "Checkpoints and evaluations come on top."
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


def peak_memory(device: torch.device) -> int:
    """Bytes that this process has held at most: of the GPU's memory, or, on a CPU, of the machine's; 0 where that is not known."""
    if device.type == "cuda":
        return torch.cuda.max_memory_reserved(device)
    if sys.platform == "win32":
        return 0
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def duration(seconds: float) -> str:
    """`95` -> "1 min 35 s"; the two largest units."""
    rest, said = round(seconds), []
    for name, size in (("d", 86_400), ("h", 3_600), ("min", 60), ("s", 1)):
        if rest >= size or (name == "s" and not said):
            said.append(f"{rest // size} {name}")
        rest %= size
    return " ".join(said[:2])
