"""`recipes/train.py`: from a recipe to a robust CLIP in a folder that `pipeline` opens."""

from __future__ import annotations

import dataclasses
import math

from transformers import set_seed
from transformers.utils import logging

from hpt_hf.arguments import (
    RECIPE,
    DataArguments,
    MethodArguments,
    RecipeError,
    RecipeTrainingArguments,
    mistakes_in_a_line,
    parse,
)
from hpt_hf.data import Collate, DatasetSpec, held_out, read_classes
from hpt_hf.evaluation import finish
from hpt_hf.lab.suite import WEIGHTS, open_pictures
from hpt_hf.objectives import OBJECTIVES, Divergence, Objective
from hpt_hf.schedule import Schedule
from hpt_hf.stream import open_stream
from hpt_hf.threat import ThreatModel, parse_eps
from hpt_hf.trainer import HPTTrainer, TrainingAttack
from hpt_hf.zero_shot import ZeroShotCLIP

logger = logging.get_logger("hpt_hf.train")


def load_clip(source: str, revision: str | None = None) -> ZeroShotCLIP:
    """`lab:student` and `lab:proxy` are the pair that ships with the package; all else is a folder or a Hub id."""
    return ZeroShotCLIP.load(WEIGHTS / source[4:] if source.startswith("lab:") else source, revision=revision)


def dataset_spec(args, path: str, split: str, *, revision: str | None = None) -> DatasetSpec:
    """What the data flags say of one path."""
    if args.classes and args.classes_file:
        raise RecipeError("both --classes and --classes_file name the classes: give one of them")
    classes = read_classes(args.classes_file) if args.classes_file else tuple(args.classes) if args.classes else None
    templates = tuple(args.templates) if args.templates else None
    return DatasetSpec(
        path,
        split=split,
        revision=revision,
        image=args.image_column,
        label=args.label_column,
        classes=classes,
        templates=templates,
    )


def build_objective(name: str, args: MethodArguments) -> Objective:
    """A row of OBJECTIVES with the recipe's KL and target of attack."""
    changes: dict = {"divergence": Divergence(args.kl_direction, args.temperature)}
    if args.attack_on != "student":
        changes["attack_on"] = args.attack_on
    return dataclasses.replace(OBJECTIVES[name], **changes)


def count_steps(pictures: int, training: RecipeTrainingArguments) -> int:
    """Optimizer steps in an epoch, counted as the Trainer does: its last step takes what micro-batches are left over."""
    batch = training.per_device_train_batch_size * training.world_size
    micro_batches = pictures // batch if training.dataloader_drop_last else math.ceil(pictures / batch)
    return max(1, math.ceil(micro_batches / training.gradient_accumulation_steps))


def build_schedule(args: MethodArguments, training: RecipeTrainingArguments, steps_per_epoch: int) -> Schedule:
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
        warm_up_learning_rate=training.learning_rate / 1000 if args.ga_learning_rate is None else args.ga_learning_rate,
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
        raise RecipeError(f"attack_steps={args.attack_steps}: expected at least 1; without a step the images would only be noisy")
    if args.attack_step_size is not None:
        given = args.attack_step_size.strip()
        try:
            size = parse_eps(given.removesuffix("eps")) * (threat.radius if given.endswith("eps") else 1)
        except ValueError:
            raise RecipeError(
                f"attack_step_size={given!r}: expected a fraction such as '2/255', or a multiple of the radius such as '1.25 eps'"
            ) from None
        if size == 0 and threat.radius > 0:
            raise RecipeError(f"attack_step_size={given!r}: expected more than 0; without moving the images would only be noisy")
        if threat.norm == "linf" and size > 1:
            raise RecipeError(f"attack_step_size={given!r}: images live in [0, 1]; did you mean '{given}/255'?")
    return TrainingAttack(threat, args.attack_steps, size, args.attack_random_start)


def build(
    data: DataArguments,
    method: MethodArguments,
    training: RecipeTrainingArguments,
) -> HPTTrainer:
    """Everything a recipe says, as a trainer ready to train. Nothing is written before this has succeeded."""
    set_seed(training.seed)
    attack = build_attack(method)
    spec = dataset_spec(data, data.dataset, data.dataset_split, revision=data.dataset_revision)
    if data.pictures is not None and not data.streaming:
        raise RecipeError("--pictures says how long a stream is: without --streaming true all pictures of the data set are taken")
    if data.streaming:
        if method.held_out or data.on_corrupt == "skip":
            raise RecipeError(
                "a stream is not looked at before training: held_out and on_corrupt skip cannot be had with --streaming"
            )
        pictures = train_part = open_stream(spec, pictures=data.pictures)
        eval_part = None
    else:
        pictures = open_pictures(spec, training=True, data_dir=data.data_dir, on_corrupt=data.on_corrupt)
        train_part, eval_part = held_out(pictures, method.held_out, seed=0)
    global_batch = training.per_device_train_batch_size * training.gradient_accumulation_steps * training.world_size
    if len(train_part) < global_batch:
        raise RecipeError(
            f"{len(train_part)} training pictures do not fill one batch of {global_batch} ({training.per_device_train_batch_size} × {training.gradient_accumulation_steps} "
            f"accumulated × {training.world_size} processes): lower per_device_train_batch_size"
        )
    schedule = build_schedule(method, training, count_steps(len(train_part), training))
    student = load_clip(method.model_name_or_path, method.model_revision).set_classes(pictures.classes, pictures.templates)
    proxy = None
    if any("proxy" in p.objective.references for p in schedule.phases):
        if method.proxy_name_or_path is None:
            raise RecipeError(
                f"{method.method} learns from a proxy: name a vanilla CLIP of another architecture with --proxy_name_or_path"
            )
        proxy = load_clip(method.proxy_name_or_path, method.proxy_revision).set_classes(pictures.classes, pictures.templates)
    return HPTTrainer(
        student,
        training,
        schedule=schedule,
        attack=attack,
        proxy=proxy,
        train_dataset=train_part,
        eval_dataset=eval_part,
        data_collator=Collate(student.processor),
        hub_overwrite=training.hub_overwrite,
    )


def run(data: DataArguments, method: MethodArguments, training: RecipeTrainingArguments) -> dict:
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
    with mistakes_in_a_line("recipes/train.py"):
        data, method, training = parse(RECIPE, argv)
        record = run(data, method, training)
    if training.process_index == 0:
        slice_ = "".join(f", {k.removeprefix('eval_').replace('_', ' ')} {v:.1f}%" for k, v in record["held_out"].items())
        print(f"{method.method}: {record['steps']} steps in {record['seconds']:.0f} s{slice_} -> {training.output_dir}")
    finish()
