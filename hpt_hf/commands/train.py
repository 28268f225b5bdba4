"""`recipes/train.py`: from a recipe to a robust CLIP in a folder that `pipeline` opens."""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass, field
from typing import Literal

from transformers import set_seed
from transformers.utils import logging

from hpt_hf.attacks.pgd import TrainingAttack
from hpt_hf.attacks.threat_model import ThreatModel, parse_eps
from hpt_hf.commands.common import dataset_spec, load_model, open_images
from hpt_hf.commands.parser import RecipeError, exit_on_user_error, parse
from hpt_hf.data.collator import Collator
from hpt_hf.data.dataset import held_out
from hpt_hf.data.streaming import open_stream
from hpt_hf.method.objectives import OBJECTIVES, Divergence, Objective
from hpt_hf.method.schedule import Schedule
from hpt_hf.training.config import HPTConfig
from hpt_hf.training.trainer import HPTTrainer
from hpt_hf.utils import shutdown_distributed

METHODS = ("hpt", "hpt_gpd", "ga", "anchor_clean", "tecoa", "fare", "pmg_aft")


Method = Literal["hpt", "hpt_gpd", "ga", "anchor_clean", "tecoa", "fare", "pmg_aft"]


@dataclass
class DataArguments:
    """Which pictures, which classes."""

    dataset: str = field(
        metadata={"help": "Hub id, parquet file, image folder, lab:<task>, or real:<set> with --data_dir"}
    )
    dataset_split: str = "train"
    dataset_revision: str | None = None
    data_dir: str | None = field(default=None, metadata={"help": "the folder that real:<set> lies in"})
    image_column: str | None = None
    label_column: str | None = None
    classes: list[str] | None = field(default=None, metadata={"help": "class names in label order"})
    classes_file: str | None = field(default=None, metadata={"help": "class names, one a line, or a JSON list"})
    templates: list[str] | None = field(
        default=None, metadata={"help": "prompts with {} for the class name; several make an ensemble"}
    )
    on_corrupt: Literal["error", "skip"] = "error"
    streaming: bool = field(
        default=False, metadata={"help": "read a Hub id or parquet files as they come, nothing is unpacked to disk"}
    )
    pictures: int | None = field(
        default=None, metadata={"help": "streaming: how many there are, where the data set does not say"}
    )


@dataclass
class MethodArguments:
    """The method: objective, attack, schedule. `learning_rate`, `num_train_epochs` and `warmup_steps` are the Trainer's own."""

    method: Method
    model_name_or_path: str = field(metadata={"help": "the student: a folder or a Hub id"})
    proxy_name_or_path: str | None = field(
        default=None, metadata={"help": "a vanilla CLIP of another architecture (hpt, hpt_gpd, ga)"}
    )
    model_revision: str | None = None
    proxy_revision: str | None = None
    norm: Literal["linf", "l2"] = "linf"
    eps: str = field(default="1/255", metadata={"help": "radius of the ball as a fraction of the pixel range"})
    attack_steps: int = 2
    attack_step_size: str | None = field(
        default=None,
        metadata={
            "help": "a fraction of the pixel range, 2/255, or of the radius, 1.25 eps; left out: the whole radius, as in the paper"
        },
    )
    attack_random_start: bool = field(
        default=True, metadata={"help": "begin at a random point of the ball; false: at the image"}
    )
    attack_on: Literal["student", "proxy"] = "student"
    kl_direction: Literal["forward", "reverse"] = "forward"
    temperature: float = 1.0
    ga_epochs: float = field(default=1.0, metadata={"help": "hpt_gpd: epochs of the generalization-anchored warm-up"})
    ga_learning_rate: float | None = field(
        default=None, metadata={"help": "hpt_gpd: its rate; left out: learning_rate / 1000, the paper's ratio"}
    )
    ema: float = field(default=0.9, metadata={"help": "hpt_gpd: decay of the moving average that becomes the pivot"})
    pull: float = field(default=0.5, metadata={"help": "hpt_gpd: share of the student kept at each pull to the pivot"})
    interval: int | None = field(
        default=None, metadata={"help": "hpt_gpd: steps between averages and pulls; left out: one epoch"}
    )
    restart: bool = field(default=True, metadata={"help": "hpt_gpd: the second stage begins from the vanilla weights"})
    held_out: float = field(
        default=0.0, metadata={"help": "share of the training data kept aside to choose settings on"}
    )
    resume: bool = field(
        default=False, metadata={"help": "go on from the last whole checkpoint in output_dir; if there is none, begin"}
    )
    license: str | None = field(
        default=None,
        metadata={"help": "of the weights that come out, for the model card, as the Hub writes it: mit, apache-2.0 …"},
    )


# What a recipe is parsed into.
RECIPE = (DataArguments, MethodArguments, HPTConfig)


logger = logging.get_logger(__name__)


def build_objective(name: str, args: MethodArguments) -> Objective:
    """A row of OBJECTIVES with the recipe's KL and target of attack."""
    changes: dict = {"divergence": Divergence(args.kl_direction, args.temperature)}
    if args.attack_on != "student":
        changes["attack_on"] = args.attack_on
    return dataclasses.replace(OBJECTIVES[name], **changes)


def count_steps(pictures: int, training: HPTConfig) -> int:
    """Optimizer steps in an epoch, counted as the Trainer does: its last step takes what micro-batches are left over."""
    batch = training.per_device_train_batch_size * training.world_size
    micro_batches = pictures // batch if training.dataloader_drop_last else math.ceil(pictures / batch)
    return max(1, math.ceil(micro_batches / training.gradient_accumulation_steps))


def build_schedule(args: MethodArguments, training: HPTConfig, steps_per_epoch: int) -> Schedule:
    """Epochs of the recipe -> steps. With `max_steps`, both stages shrink in proportion: a short run still goes through the switch."""
    main = max(1, round(training.num_train_epochs * steps_per_epoch))
    first = max(1, round(args.ga_epochs * steps_per_epoch)) if args.method == "hpt_gpd" else 0
    if training.max_steps > 0:
        total = training.max_steps
        first = min(max(1, round(total * first / (first + main))), total - 1) if first else 0
        if args.method == "hpt_gpd" and total < 2:
            raise RecipeError("hpt_gpd has two stages: max_steps must be at least 2")
        main = total - first
    warmup = min(training.get_warmup_steps(main), main)
    if args.method != "hpt_gpd":
        return Schedule.single(
            build_objective(args.method, args), steps=main, learning_rate=training.learning_rate, warmup_steps=warmup
        )
    return Schedule.gpd(
        build_objective("ga", args),
        build_objective("hpt", args),
        warm_up_steps=first,
        steps=main,
        warm_up_learning_rate=training.learning_rate / 1000
        if args.ga_learning_rate is None
        else args.ga_learning_rate,
        learning_rate=training.learning_rate,
        interval=steps_per_epoch if args.interval is None else args.interval,
        warmup_steps=warmup,
        ema=args.ema,
        pull=args.pull,
        restart=args.restart,
    )


def build_attack(args: MethodArguments) -> TrainingAttack:
    """The recipe's attack on training images.

    Raises:
        RecipeError, ValueError: an attack that would not move, or a number that is none.
    """
    threat, size = ThreatModel(args.norm, args.eps), None
    if args.attack_steps < 1:
        raise RecipeError(
            f"attack_steps={args.attack_steps}: expected at least 1; without a step the images would only be noisy"
        )
    if args.attack_step_size is not None:
        given = args.attack_step_size.strip()
        try:
            size = parse_eps(given.removesuffix("eps")) * (threat.radius if given.endswith("eps") else 1)
        except ValueError:
            raise RecipeError(
                f"attack_step_size={given!r}: expected a fraction such as '2/255', or a multiple of the radius such as '1.25 eps'"
            ) from None
        if size == 0 and threat.radius > 0:
            raise RecipeError(
                f"attack_step_size={given!r}: expected more than 0; without moving the images would only be noisy"
            )
        if threat.norm == "linf" and size > 1:
            raise RecipeError(f"attack_step_size={given!r}: images live in [0, 1]; did you mean '{given}/255'?")
    return TrainingAttack(threat, args.attack_steps, size, args.attack_random_start)


def build(data: DataArguments, method: MethodArguments, training: HPTConfig) -> HPTTrainer:
    """Everything a recipe says, as a trainer ready to train. Nothing is written before this has succeeded."""
    set_seed(training.seed)
    attack = build_attack(method)
    spec = dataset_spec(data, data.dataset, data.dataset_split, revision=data.dataset_revision)
    if data.pictures is not None and not data.streaming:
        raise RecipeError(
            "--pictures says how long a stream is: without --streaming true all pictures of the data set are taken"
        )
    if data.streaming:
        if method.held_out or data.on_corrupt == "skip":
            raise RecipeError(
                "a stream is not looked at before training: held_out and on_corrupt skip cannot be had with --streaming"
            )
        pictures = train_part = open_stream(spec, pictures=data.pictures)
        eval_part = None
    else:
        pictures = open_images(spec, training=True, data_dir=data.data_dir, on_corrupt=data.on_corrupt)
        train_part, eval_part = held_out(pictures, method.held_out, seed=0)
    global_batch = training.per_device_train_batch_size * training.gradient_accumulation_steps * training.world_size
    if len(train_part) < global_batch:
        raise RecipeError(
            f"{len(train_part)} training pictures do not fill one batch of {global_batch} ({training.per_device_train_batch_size} × {training.gradient_accumulation_steps} "
            f"accumulated × {training.world_size} processes): lower per_device_train_batch_size"
        )
    schedule = build_schedule(method, training, count_steps(len(train_part), training))
    student = load_model(method.model_name_or_path, method.model_revision).set_classes(
        pictures.classes, pictures.templates
    )
    proxy = None
    if any("proxy" in p.objective.references for p in schedule.phases):
        if method.proxy_name_or_path is None:
            raise RecipeError(
                f"{method.method} learns from a proxy: name a vanilla CLIP of another architecture with --proxy_name_or_path"
            )
        proxy = load_model(method.proxy_name_or_path, method.proxy_revision).set_classes(
            pictures.classes, pictures.templates
        )
    return HPTTrainer(
        student,
        training,
        schedule=schedule,
        attack=attack,
        proxy=proxy,
        train_dataset=train_part,
        eval_dataset=eval_part,
        data_collator=Collator(student.processor),
        hub_overwrite=training.hub_overwrite,
    )


def run(data: DataArguments, method: MethodArguments, training: HPTConfig) -> dict:
    """Train, measure on the held-out slice, export to `output_dir`; returns what `train.json` records."""
    trainer = build(data, method, training)
    last = None
    if method.resume:
        try:
            last = trainer.last_checkpoint()
        except FileNotFoundError as error:
            # Killed before its first checkpoint stood: whoever restarts it in a loop should not have to look.
            logger.warning(f"{error}: it begins at the beginning")
    trainer.train(resume_from_checkpoint=last)
    metrics = trainer.evaluate() if trainer.eval_dataset is not None else {}
    record = trainer.record() | {
        "method": method.method,
        "recipe": {k: v for part in (data, method) for k, v in dataclasses.asdict(part).items()},
        "held_out": {k: v for k, v in metrics.items() if k.endswith("accuracy")},
    }
    trainer.export(**record)
    if training.push_to_hub:
        trainer.push_to_hub()
    return record | {"trainer": trainer}


def main(argv: list[str] | None = None) -> None:
    """Exit 1 with one line for a mistake in recipe, data or model; everything else is a traceback."""
    with exit_on_user_error("recipes/train.py"):
        data, method, training = parse(RECIPE, argv)
        record = run(data, method, training)
    if training.process_index == 0:
        slice_ = "".join(
            f", {k.removeprefix('eval_').replace('_', ' ')} {v:.1f}%" for k, v in record["held_out"].items()
        )
        print(
            f"{method.method}: {record['steps']} steps in {record['seconds']:.0f} s{slice_} -> {training.output_dir}"
        )
    shutdown_distributed()
