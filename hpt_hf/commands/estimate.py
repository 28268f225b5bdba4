"""`hpt-hf estimate`: what a run will take in hours, memory and disk, predicted from a few of its own steps."""

from __future__ import annotations

import copy
import math
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

from transformers.utils import logging

from hpt_hf.commands.parser import HfArg, RecipeError, exit_on_user_error, parse
from hpt_hf.commands.train import RECIPE, DataArguments, MethodArguments, build
from hpt_hf.training.config import HPTConfig
from hpt_hf.utils import duration, markdown, peak_memory, shutdown_distributed


@dataclass
class EstimateArguments:
    """What is asked beside a recipe."""

    probe_steps: int = HfArg(default=40, help="steps of each phase that are run and timed")


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
            f"{markdown(('part', 'times', 'seconds each', 'in all'), rows)}\n\n{duration(self.seconds)} = {hours:.3g} hours "
            f"on {self.processes} process{'es' * (self.processes > 1)}, {hours * self.processes:.3g} {unit}; "
            f"{self.memory / 2**30:.1f} GiB of memory each, {self.disk / 2**30:.2f} GiB on disk"
        )


def predict(data: DataArguments, method: MethodArguments, training: HPTConfig, *, steps: int = 40) -> Cost:
    """The cost of `train.run` with these arguments, from `steps` steps of every phase, one checkpoint, some of the held-out slice and one save.

    The probe works in a temporary folder: `output_dir` is not touched, and nothing is pushed.
    """
    parts, left = [], 0

    def timed(what: str, times: float, action, share: float = 1):
        began = time.perf_counter()
        result = action()
        parts.append((what, times, share * (time.perf_counter() - began)))
        return result

    with tempfile.TemporaryDirectory() as place:
        probe = copy.copy(training)
        probe.output_dir, probe.push_to_hub, probe.load_best_model_at_end = place, False, False
        trainer = timed("preparing", 1, lambda: build(data, method, probe, shortened=steps))
        schedule, images, args = trainer.full_schedule, trainer.eval_dataset, trainer.args
        per_epoch = len(trainer.get_train_dataloader()) / training.gradient_accumulation_steps
        saves = _times(training.save_strategy, training.save_steps, schedule.total_steps, per_epoch)
        evaluations = _times(training.eval_strategy, training.eval_steps, schedule.total_steps, per_epoch)
        args.save_strategy = type(args.save_strategy)("steps" if saves else "no")
        args.save_steps, args.eval_strategy = trainer.schedule.total_steps, type(args.eval_strategy)("no")
        watch = trainer.stopwatch
        watch.quiet = True
        trainer.train()
        parts += [(f"a step of {p.objective.name}", p.steps, watch.seconds(n)) for n, p in enumerate(schedule.phases)]
        if saves:
            parts.append(("a checkpoint", saves, watch.saving))
            kept = min(saves, training.save_total_limit or saves)
            left += kept * _size((Path(place) / f"checkpoint-{trainer.schedule.total_steps}").rglob("*"))
        if images is not None:
            some = images.select(range(min(len(images), 4 * args.per_device_eval_batch_size * args.world_size)))
            share = len(images) / len(some)
            timed("the held-out slice", evaluations + 2, lambda: trainer.evaluate(some), share)
        timed("the export", 1, trainer.save_model)
        left += _size(Path(place).iterdir())
    return Cost(tuple(parts), training.world_size, training.device.type, peak_memory(training.device), left)


def _times(strategy: str, every: float | None, steps: int, steps_per_epoch: float) -> int:
    """How often the Trainer does what it does by `strategy`."""
    if strategy == "epoch":
        return math.ceil(steps / steps_per_epoch)
    return steps // max(1, math.ceil(every if every >= 1 else every * steps)) if strategy == "steps" else 0


def _size(files) -> int:
    return sum(f.stat().st_size for f in files if f.is_file())


def main(argv: list[str] | None = None) -> None:
    with exit_on_user_error("hpt-hf estimate"):
        *recipe, args = parse((*RECIPE, EstimateArguments), argv)
        if args.probe_steps < 1:
            raise RecipeError(f"--probe_steps: got {args.probe_steps}, expected at least 1")
        recipe[2].disable_tqdm = True
        logging.disable_progress_bar()
        cost = predict(*recipe, steps=args.probe_steps)
    if recipe[2].process_index == 0:
        print(cost)
    shutdown_distributed()
