"""What Generalization-Pivot Decoupling (arXiv 2601.12865) does between the steps: average, restart, pull."""

from __future__ import annotations

import json
import math
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from transformers import TrainerCallback
from transformers.utils import logging

from hpt_hf.method.schedule import Schedule
from hpt_hf.models.fsdp import full_tensor, parameters, shard_like
from hpt_hf.models.zero_shot import digest

logger = logging.get_logger(__name__)

PIVOT_FILE = "gpd_pivot.safetensors"


class GPDCallback(TrainerCallback):
    """Carries out what the schedule says happens between steps.

    It owns copies of the trained parameters: the vanilla weights, the moving average that becomes the pivot and, where
    a phase asks for it, the mean of the last weights (Izmailov et al. 2018, arXiv 1803.05407). The averages are saved
    with every checkpoint. *When* something happens is asked of the schedule and counted nowhere, so a resumed run
    cannot drift.

    Args:
        schedule: the phases, in steps.
        student: what is trained, with its vanilla weights.
    """

    def __init__(self, schedule: Schedule, student: torch.nn.Module):
        self.schedule, self.student = schedule, student
        asks = [
            (p.restart, p.ema is not None, p.pull is not None, p.average_last is not None) for p in schedule.phases
        ]
        needed = any(map(any, asks))
        trained = {n: p for n, p in parameters(student).items() if p.requires_grad and needed}
        self.vanilla = {n: p.detach().clone() for n, p in trained.items()}
        self.average = {n: p.clone() for n, p in self.vanilla.items()}
        self.tail = {n: p.clone() for n, p in self.vanilla.items()} if schedule.phases[-1].average_last else {}
        self.origin = digest(self.vanilla)

    def _trained(self) -> list[tuple[str, torch.nn.Parameter]]:
        return [(n, p) for n, p in parameters(self.student).items() if n in self.vanilla]

    def on_train_begin(self, args, state, control, **kwargs):
        """Keep the copies where the student trains, in parts if it lies in parts."""
        for name, theta in self._trained():
            self.vanilla[name] = shard_like(self.vanilla[name], theta)
            self.average[name] = shard_like(self.average[name], theta)
            if self.tail:
                self.tail[name] = shard_like(self.tail[name], theta)

    @torch.no_grad()
    def on_step_begin(self, args, state, control, optimizer=None, **kwargs):
        step = state.global_step
        if self.schedule.restarts_at(step):
            squares = [float(full_tensor((self.average[n] - v).square().sum())) for n, v in self.vanilla.items()]
            logger.info(f"step {step}: restart; the pivot is {math.sqrt(sum(squares)):.3g} from the vanilla weights")
            for name, theta in self._trained():
                theta.copy_(self.vanilla[name])
            # Momentum gathered elsewhere, at another rate, would throw the restarted student off.
            optimizer.state.clear()
        if self.schedule.pulls_at(step):
            b = self.schedule.phase(step).pull
            for name, theta in self._trained():
                theta.copy_(b * theta + (1 - b) * self.average[name])

    @torch.no_grad()
    def on_step_end(self, args, state, control, **kwargs):
        done = state.global_step - 1  # the Trainer has counted the step already
        if self.schedule.averages_after(done):
            g = self.schedule.phase(done).ema
            for name, theta in self._trained():
                self.average[name] = g * self.average[name] + (1 - g) * theta
        if count := self.schedule.tail_after(done):
            for name, theta in self._trained():
                self.tail[name] = self.tail[name] + (theta - self.tail[name]) / count

    @torch.no_grad()
    def on_train_end(self, args, state, control, **kwargs):
        """The last word on the weights, behind the last checkpoint, so that a finished run may be resumed."""
        phase = self.schedule.phase(done := state.global_step - 1)
        for name, theta in self._trained():
            if self.schedule.tail_after(done):
                theta.copy_(self.tail[name])
            if phase.final_pull:
                theta.copy_(phase.pull * theta + (1 - phase.pull) * self.average[name])

    def on_save(self, args, state, control, **kwargs):
        if self.vanilla:
            self.save(Path(args.output_dir) / f"checkpoint-{state.global_step}", first=state.is_world_process_zero)

    def save(self, folder: Path, *, first: bool = True) -> None:
        """Write the average beside a checkpoint, whole or not at all; every process gives its part, one writes."""
        copies = self.average | {f"tail.{n}": t for n, t in self.tail.items()}
        average = {n: full_tensor(t).contiguous().cpu() for n, t in copies.items()}
        if first:
            temporary = folder / f"{PIVOT_FILE}.part"
            save_file(average, temporary, metadata={"vanilla": self.origin, "schedule": json.dumps(self._describe())})
            temporary.replace(folder / PIVOT_FILE)

    def load(self, folder: str | Path) -> None:
        """Take the average from a checkpoint.

        Raises:
            FileNotFoundError: the checkpoint has none: it was cut off while being saved, or another method made it.
            ValueError: it belongs to a run with other vanilla weights or another schedule.
        """
        if not self.vanilla:
            return
        path = Path(folder) / PIVOT_FILE
        if not path.is_file():
            raise FileNotFoundError(f"{path} is missing: cut off, or of another method. Fix: an earlier checkpoint")
        with safe_open(path, framework="pt") as file:
            vanilla, schedule = file.metadata()["vanilla"], json.loads(file.metadata()["schedule"])
            if vanilla != self.origin:
                raise ValueError(f"{folder}: vanilla weights: got {self.origin}, expected {vanilla}. Fix: --model")
            if schedule != self._describe():
                raise ValueError(f"{folder}: schedule: got {self._describe()}, expected {schedule}")
            self.average = {n: file.get_tensor(n) for n in self.vanilla}
            self.tail = {n: file.get_tensor(f"tail.{n}") for n in self.tail}

    def _describe(self) -> list:
        """What decides the moments and the rates, as the metadata of the pivot holds it."""
        phases = [
            [p.objective.name, p.steps, p.learning_rate, p.warmup_steps, p.restart, p.ema, p.pull]
            + ([] if p.decay == "cosine" else [p.decay])  # the version before knew no other
            + ([] if p.average_last is None else [p.average_last])
            for p in self.schedule.phases
        ]
        return [self.schedule.interval, *phases]
