"""Cost: what a run will take in hours, memory and disk, predicted from a few of its own steps; `recipes/estimate.py`."""

from __future__ import annotations

import copy
import math
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path

from transformers.utils import logging

from hpt_hf.commands.parser import RecipeError, exit_on_user_error, parse
from hpt_hf.commands.train import RECIPE, DataArguments, MethodArguments, build
from hpt_hf.method.schedule import Schedule
from hpt_hf.training.config import HPTConfig
from hpt_hf.utils import duration, markdown, peak_memory, shutdown_distributed


@dataclass
class EstimateArguments:
    """What `recipes/estimate.py` asks beside a recipe."""

    probe_steps: int = field(default=40, metadata={"help": "steps of each phase that are run and timed"})


@dataclass(frozen=True)
class Cost:
    """What a run is predicted to take.

    Args:
        parts: (what, how often, seconds each).
        processes: that run beside each other, each on a device of its own.
        device: "cuda", "cpu" …
        memory: peak of one process in bytes: of its device's memory, or on a CPU of the process.
        disk: bytes that are left in output_dir.
    """

    parts: tuple[tuple[str, float, float], ...]
    processes: int
    device: str
    memory: int
    disk: int

    @property
    def seconds(self) -> float:
        return sum(count * each for _, count, each in self.parts)

    def __str__(self) -> str:
        rows = [(what, f"{count:,.4g}", f"{each:.3f}", duration(count * each)) for what, count, each in self.parts]
        hours = self.seconds / 3600
        unit = "GPU-hours" if self.device == "cuda" else f"process-hours on {self.device}"
        return (
            f"{markdown(('part', 'times', 'seconds each', 'in all'), rows)}\n\n{duration(self.seconds)} = {hours:.3g} hours on {self.processes} "
            f"process{'es' * (self.processes > 1)}, {hours * self.processes:.3g} {unit}; {self.memory / 2**30:.1f} GiB of memory each, {self.disk / 2**30:.2f} GiB on disk"
        )


def predict(data: DataArguments, method: MethodArguments, training: HPTConfig, *, steps: int = 40) -> Cost:
    """The cost of `train.run` with these arguments, from `steps` steps of every phase, one checkpoint, some of the held-out slice and one export.

    The probe works in a temporary folder: `output_dir` is not touched, and nothing is pushed.
    """
    start = time.perf_counter()
    with tempfile.TemporaryDirectory() as place:
        probe = copy.copy(training)
        probe.output_dir, probe.push_to_hub, probe.load_best_model_at_end = place, False, False
        trainer = build(data, method, probe, shortened=steps)
        preparing = time.perf_counter() - start
        schedule, pictures = trainer.full_schedule, trainer.eval_dataset
        saves, evaluations = (
            _times(
                strategy, every, schedule, len(trainer.get_train_dataloader()) / training.gradient_accumulation_steps
            )
            for strategy, every in (
                (training.save_strategy, training.save_steps),
                (training.eval_strategy, training.eval_steps),
            )
        )
        trainer.args.save_strategy = type(probe.save_strategy)("steps" if saves else "no")
        trainer.args.save_steps = trainer.schedule.total_steps
        trainer.args.eval_strategy = type(probe.eval_strategy)("no")
        trainer.stopwatch.quiet = True
        trainer.train()
        watch = trainer.stopwatch
        parts = [("preparing", 1, preparing)]
        parts += [
            (f"a step of {phase.objective.name}", phase.steps, watch.seconds(number))
            for number, phase in enumerate(schedule.phases)
        ]
        left = 0
        if saves:
            parts.append(("a checkpoint", saves, watch.saving))
            kept = saves if training.save_total_limit is None else min(saves, training.save_total_limit)
            left += kept * _size(Path(place) / f"checkpoint-{trainer.schedule.total_steps}")
        if pictures is not None:
            some = min(len(pictures), 4 * probe.per_device_eval_batch_size * probe.world_size)
            began = time.perf_counter()
            trainer.evaluate(pictures.select(range(some)))
            share = len(pictures) / some
            parts.append(("the held-out slice", evaluations + 1, share * (time.perf_counter() - began)))
        began = time.perf_counter()
        trainer.save_model()
        parts.append(("the export", 1, time.perf_counter() - began))
        left += sum(f.stat().st_size for f in Path(place).iterdir() if f.is_file())
    return Cost(tuple(parts), training.world_size, training.device.type, peak_memory(training.device), left)


def _times(strategy: str, every: float | None, schedule: Schedule, steps_per_epoch: float) -> int:
    """How often the Trainer does what it does by `strategy`."""
    if strategy == "epoch":
        return math.ceil(schedule.total_steps / steps_per_epoch)
    if strategy == "steps":
        return schedule.total_steps // max(1, math.ceil(every if every >= 1 else every * schedule.total_steps))
    return 0


def _size(folder: Path) -> int:
    return sum(f.stat().st_size for f in folder.rglob("*") if f.is_file())


def main(argv: list[str] | None = None) -> None:
    with exit_on_user_error("hpt-hf estimate"):
        *recipe, args = parse((*RECIPE, EstimateArguments), argv)
        if args.probe_steps < 1:
            raise RecipeError(f"--probe_steps {args.probe_steps}: expected at least 1")
        recipe[2].disable_tqdm = True
        logging.disable_progress_bar()
        cost = predict(*recipe, steps=args.probe_steps)
    if recipe[2].process_index == 0:
        print(cost)
    shutdown_distributed()
