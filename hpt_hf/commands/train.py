"""`hpt-hf train`: from a recipe to a robust CLIP in a folder that `pipeline` opens."""

from __future__ import annotations

import dataclasses
import math
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from safetensors import SafetensorError
from transformers import set_seed
from transformers.utils import logging

from hpt_hf.attacks.pgd import TrainingAttack
from hpt_hf.attacks.threat_model import parse_eps
from hpt_hf.commands.common import ball, dataset_spec, load_model, open_images
from hpt_hf.commands.parser import HfArg, RecipeError, exit_on_user_error, parse
from hpt_hf.data.collator import Collator
from hpt_hf.data.dataset import LabelledImages
from hpt_hf.data.splits import held_out, leave_out_classes
from hpt_hf.data.streaming import open_stream
from hpt_hf.method.objectives import ATTACK_LOSSES, OBJECTIVES, TEACHERS, Objective, Teachers
from hpt_hf.method.schedule import Schedule
from hpt_hf.models.ensemble import Ensemble
from hpt_hf.models.fast_layers import keep_memory
from hpt_hf.models.lora import add_lora
from hpt_hf.models.zero_shot import ZeroShotClassifier
from hpt_hf.publishing.export import DTYPES, check_apart
from hpt_hf.publishing.model_card import TRAINED
from hpt_hf.training.config import HPTConfig
from hpt_hf.training.record import ARGUMENTS, held_out_report
from hpt_hf.training.trainer import HPTTrainer
from hpt_hf.utils import did_you_mean, load_object, no_space, progress, shutdown_distributed, write_json

logger = logging.get_logger(__name__)


@dataclass
class DataArguments:
    """Which images, which classes."""

    dataset: str = HfArg(
        help="Hub id, parquet file, image folder, lab:<task>, or real:<set> and photos:<set> with --data_dir"
    )
    split: str = "train"
    dataset_revision: str | None = None
    data_dir: str | None = HfArg(default=None, help="the folder that real:<set> or photos:<set> lies in")
    image_column: str | None = None
    label_column: str | None = None
    classes: list[str] | None = HfArg(default=None, help="class names in label order")
    classes_file: str | None = HfArg(default=None, help="class names, one a line, or a JSON list")
    templates: list[str] | None = HfArg(default=None, help="prompts with {} for the class name")
    leave_out_classes: float = HfArg(
        default=0.0, help="share of classes that training never sees, to choose settings on (hpt-hf sweep)"
    )
    on_corrupt: Literal["error", "skip"] = "error"
    streaming: bool = HfArg(default=False, help="read a Hub id or parquet files as they come")
    images: int | None = HfArg(default=None, help="streaming: how many there are, where the data set does not say")


@dataclass
class MethodArguments:
    """The method: objective, attack, schedule. `learning_rate`, `num_train_epochs` and `warmup_steps` are the Trainer's own."""

    method: str = HfArg(help="hpt_gpd, or one objective from start to end; or of your own, my_file.py:my_objective")
    model: str = HfArg(help="the student: a folder or a Hub id")
    proxy: list[str] | None = HfArg(
        default=None, help="vanilla models of other architectures (hpt, hpt_gpd, ga); of several, the mean probability"
    )
    model_revision: str | None = None
    proxy_revision: list[str] | None = HfArg(default=None, help="one for each proxy")
    proxy_weights: list[float] | None = HfArg(default=None, help="of several; left out: all alike")
    proxy_on: Literal["adversarial", "clean"] = HfArg(
        default="adversarial", help="the images on which hpt asks the proxy; clean: as ga does"
    )
    proxy_dtype: Literal["float32", "bfloat16"] = "float32"
    proxy_device: str | None = HfArg(default=None, help="cuda:1 …; left out: the student's")
    norm: Literal["linf", "l2"] = "linf"
    eps: str = HfArg(default="1/255", help="radius of the ball as a fraction of the pixel range")
    attack_steps: int = 2
    attack_step_size: str | None = HfArg(
        default=None, help="2/255, or of the radius, 1.25 eps; left out: the radius, as in the paper"
    )
    attack_random_start: bool = HfArg(default=True, help="false: begin at the image")
    attack_on: Literal["student", "proxy"] = "student"
    attack_loss: Literal["ce", "kl"] | None = HfArg(
        default=None, help="what the attack raises: ce, of the label, or kl, from the teachers; left out: the method's"
    )
    teachers: list[str] | None = HfArg(
        default=None,
        help="distillation: whose mean probabilities the student learns",
        metadata={"choices": list(TEACHERS)},
    )
    teacher_weights: list[float] | None = HfArg(default=None, help="of several; left out: all alike")
    teachers_agreeing: bool = HfArg(default=False, help="teach only the images that they agree on")
    kl_direction: Literal["forward", "reverse"] | None = None
    student_temperature: float | None = HfArg(default=None, help="left out: the method's, mostly 1")
    teacher_temperature: float | None = None
    ga_epochs: float = HfArg(default=1.0, help="hpt_gpd: epochs of the generalization-anchored warm-up")
    ga_learning_rate: float | None = HfArg(
        default=None, help="hpt_gpd: its rate; left out: learning_rate / 1000, the paper's ratio"
    )
    ema: float = HfArg(default=0.9, help="hpt_gpd: decay of the moving average that becomes the pivot")
    pull: float = HfArg(default=0.5, help="hpt_gpd: share of the student kept at each pull to the pivot")
    interval: int | None = HfArg(default=None, help="hpt_gpd: steps between averages and pulls; left out: one epoch")
    restart: bool = HfArg(default=True, help="hpt_gpd: the second stage begins from the vanilla weights")
    final_pull: bool = HfArg(default=False, help="hpt_gpd: pull once more behind the last step")
    average_last: float | None = HfArg(default=None, help="the result is the mean of the weights over this last share")
    lora_r: int | None = HfArg(default=None, help="train LoRA adapters of this rank; left out: all weights")
    lora_alpha: float | None = HfArg(default=None, help="their scale times the rank; left out: 2 r")
    held_out: float = HfArg(default=0.0, help="share of the training data kept aside to choose settings on")
    license: str | None = HfArg(default=None, help="of the weights that come out, as the Hub writes it")


RECIPE = (DataArguments, MethodArguments, HPTConfig)
# Of the Trainer's arguments those that phases and batches come from.
STEPS = ("learning_rate", "num_train_epochs", "max_steps", "warmup_steps", "lr_scheduler_type")
STEPS += ("per_device_train_batch_size", "gradient_accumulation_steps")


def settings(data: DataArguments, method: MethodArguments, training: HPTConfig) -> dict:
    """A recipe as `train.json` holds it: data, method, and what of the Trainer's arguments decides the weights."""
    own = dataclasses.asdict(data) | dataclasses.asdict(method)
    return own | {name: getattr(training, name) for name in (*STEPS, *ARGUMENTS)}


def build_schedule(args: MethodArguments) -> Schedule:
    """The method as phases; what is left open is the Trainer's."""
    given = {"direction": args.kl_direction}
    given |= {name: getattr(args, name) for name in ("student_temperature", "teacher_temperature")}
    given = {name: value for name, value in given.items() if value is not None}
    if args.method != "distillation" and (args.teachers or args.teacher_weights or args.teachers_agreeing):
        raise RecipeError(f"teachers: {args.method} has its own. Fix: --method distillation")
    if not 0 < args.ga_epochs < math.inf:
        raise RecipeError(f"ga_epochs: got {args.ga_epochs}, expected more than 0")

    own = None
    if ":" in args.method:
        own = load_object(args.method, (Objective, Schedule))
    elif args.method != "hpt_gpd" and args.method not in OBJECTIVES:
        known = ("hpt_gpd", *OBJECTIVES)
        hint = did_you_mean(args.method, known, f"there are {', '.join(known)}, and my_file.py:my_objective")
        raise RecipeError(f"method: got {args.method!r}{hint}")
    if isinstance(own, Schedule):
        return own

    def objective(name: str):
        name = "ga" if name == "hpt" and args.proxy_on == "clean" else name
        chosen = own or OBJECTIVES[name]
        changes = {"divergence": dataclasses.replace(chosen.divergence, **given), "attack_on": args.attack_on}
        if args.attack_loss:
            changes["attack"] = ATTACK_LOSSES[args.attack_loss]
        if name == "distillation":
            names, weights = args.teachers or chosen.teachers.names, args.teacher_weights or ()
            changes["teachers"] = Teachers(tuple(names), tuple(weights), args.teachers_agreeing)
        return dataclasses.replace(chosen, **changes)

    if args.method != "hpt_gpd":
        if args.final_pull:
            raise RecipeError(f"final_pull: {args.method} has no pivot. Fix: --method hpt_gpd, or leave it out")
        return Schedule.single(objective(args.method), average_last=args.average_last)
    return Schedule.gpd(
        objective("ga"),
        objective("hpt"),
        warm_up_epochs=args.ga_epochs,
        warm_up_learning_rate=args.ga_learning_rate,
        **{k: getattr(args, k) for k in ("interval", "ema", "pull", "restart", "final_pull", "average_last")},
    )


def build_attack(args: MethodArguments) -> TrainingAttack:
    """The recipe's attack on training images.

    Raises:
        RecipeError, ValueError: an attack that would not move, or a number that is none.
    """
    threat, size = ball(args.norm, args.eps), None
    if args.attack_steps < 1:
        raise RecipeError(f"attack_steps: got {args.attack_steps}, expected at least 1")
    if args.attack_step_size is not None:
        given = args.attack_step_size.strip()
        try:
            size = parse_eps(given.removesuffix("eps")) * (threat.radius if given.endswith("eps") else 1)
        except ValueError:
            raise RecipeError(
                f"attack_step_size: got {given!r}, expected a fraction as '2/255' or '1.25 eps'"
            ) from None
        if size == 0:
            raise RecipeError(f"attack_step_size: got {given!r}, expected more than 0")
        if threat.norm == "linf" and size > 1:
            raise RecipeError(f"attack_step_size: got {given!r}, expected at most 1; did you mean '{given}/255'?")
    return TrainingAttack(threat, args.attack_steps, size, args.attack_random_start)


def load_proxy(args: MethodArguments, images: LabelledImages) -> ZeroShotClassifier | Ensemble:
    """The proxy, or several as one, with the classes set.

    Raises:
        RecipeError: none, or other settings than proxies.
    """
    if not args.proxy:
        raise RecipeError(f"{args.method} learns from a proxy: got none. Fix: --proxy, a CLIP of another architecture")
    revisions = args.proxy_revision or [None] * len(args.proxy)
    if len(revisions) != len(args.proxy):
        raise RecipeError(f"proxy_revision: got {len(revisions)}, expected one for each of {len(args.proxy)} proxies")
    proxies = [
        load_model(name, revision).set_classes(images.classes, images.templates).in_precision(DTYPES[args.proxy_dtype])
        for name, revision in zip(args.proxy, revisions, strict=True)
    ]
    if args.proxy_device:
        proxies = [proxy.to(args.proxy_device) for proxy in proxies]
    single = len(proxies) == 1 and not args.proxy_device and not args.proxy_weights
    return proxies[0] if single else Ensemble(proxies, args.proxy_weights)


def open_training_images(data: DataArguments) -> tuple[LabelledImages, LabelledImages | None]:
    """What a recipe trains on, and the images of the classes that it leaves out."""
    spec = dataset_spec(data, data.dataset, data.split, revision=data.dataset_revision)
    images = open_images(spec, training=True, data_dir=data.data_dir, on_corrupt=data.on_corrupt)
    return leave_out_classes(images, data.leave_out_classes)


def training_images(data: DataArguments, training: HPTConfig, share: float, images: LabelledImages | None):
    """(what tells the classes, what is trained on, the held-out slice or None). Raises RecipeError: less than a batch."""
    batch = training.per_device_train_batch_size * training.world_size
    if data.images is not None and not data.streaming:
        raise RecipeError("--images says how long a stream is. Fix: --streaming true, or leave it out")
    if data.streaming:
        if share or data.leave_out_classes or data.on_corrupt == "skip":
            fix = "Fix: no held_out or leave_out_classes, on_corrupt error"
            raise RecipeError(f"--streaming: a stream is not looked at before. {fix}")
        spec = dataset_spec(data, data.dataset, data.split, revision=data.dataset_revision)
        images = train_part = open_stream(spec, length=data.images, batch=batch, seed=training.seed)
        eval_part = None
    else:
        if images is None:
            images, _ = open_training_images(data)
        train_part, eval_part = held_out(images, share, seed=0)
        if eval_part is not None and not eval_part.labelled:
            raise RecipeError(f"held_out: {images.name} has no labels to measure with. Fix: --held_out 0")
        for index in range(len(eval_part or ())):  # a damaged image would fail behind the last step
            eval_part[index]
    if len(train_part) < (total := batch * training.gradient_accumulation_steps):
        raise RecipeError(
            f"{len(train_part)} training images do not fill one batch of {total} ({training.per_device_train_batch_size} × "
            f"{training.gradient_accumulation_steps} accumulated × {training.world_size} processes): "
            "lower per_device_train_batch_size"
        )
    return images, train_part, eval_part


def parts(
    data: DataArguments,
    method: MethodArguments,
    training: HPTConfig,
    *,
    images: LabelledImages | None = None,
    shortened: int | None = None,
) -> dict:
    """Everything a recipe says, as arguments of `HPTTrainer`. Nothing is written before this has succeeded.

    Args:
        images: instead of those that the recipe names.
        shortened: at most so many steps of each phase: enough to see what the run would cost.
    """
    check_apart(training.output_dir, model=method.model, dataset=data.dataset)
    for proxy in method.proxy or ():
        check_apart(training.output_dir, proxy=proxy)
    set_seed(training.seed)
    keep_memory()
    attack, schedule = build_attack(method), build_schedule(method)
    images, train_part, eval_part = training_images(data, training, method.held_out, images)
    student = load_model(method.model, method.model_revision).set_classes(images.classes, images.templates)
    if method.lora_r is not None:
        add_lora(student, method.lora_r, method.lora_alpha, seed=training.seed)
    elif method.lora_alpha is not None:
        raise RecipeError("lora_alpha: got one without adapters. Fix: --lora_r")
    needed = any("proxy" in p.objective.references for p in schedule.phases)
    proxy = load_proxy(method, images) if needed else None
    return {
        "model": student,
        "args": training,
        "schedule": schedule,
        "attack": attack,
        "proxy": proxy,
        "recipe": {"method": method.method, "recipe": settings(data, method, training)},
        "shortened": shortened,
        "train_dataset": train_part,
        "eval_dataset": eval_part,
        "data_collator": Collator(student.processor),
    }


def build(
    data: DataArguments, method: MethodArguments, training: HPTConfig, *, shortened: int | None = None
) -> HPTTrainer:
    """A trainer ready to train. See `parts`."""
    return HPTTrainer(**parts(data, method, training, shortened=shortened))


def run(data: DataArguments, method: MethodArguments, training: HPTConfig) -> dict:
    """Train, save to `output_dir`, measure on the held-out slice; returns what `train.json` records, and the `trainer`."""
    trainer = build(data, method, training)
    resume = training.resume_from_checkpoint
    with trainer.sole_run():
        if str(resume).lower() == "true":
            try:
                resume = trainer.last_checkpoint()
            except FileNotFoundError as error:
                # Killed before its first checkpoint stood: whoever restarts it in a loop should not have to look.
                logger.warning(f"{error}: it begins at the beginning")
                resume = False
        if trainer.eval_dataset is not None and not trainer.is_fsdp_enabled:  # which cannot be asked before it trains
            with torch.random.fork_rng(devices=[]):
                found = trainer.evaluate(metric_key_prefix="vanilla")
            trainer.vanilla = {k: v for k, v in found.items() if k.endswith("accuracy")}
        trainer.train(resume_from_checkpoint=resume)
        save(trainer)  # before anything that could fail
        try:
            if trainer.eval_dataset is not None:
                trainer.evaluate()
                trainer.save_state()
        except (ValueError, OSError, RuntimeError) as error:
            progress(f"the held-out slice could not be measured ({error}); the model stands in {training.output_dir}")
        if training.push_to_hub:
            trainer.push_to_hub()
        elif trainer.args.should_save:
            write_json(Path(training.output_dir, TRAINED), trainer.record())
            trainer.create_model_card()
    return trainer.record() | {"trainer": trainer}


def save(trainer: HPTTrainer) -> None:
    """Export to `output_dir`, and the log; with a full disk there, to the system's temporary folder, so that no training is lost."""
    try:
        trainer.save_model(_internal_call=True)
    except (OSError, RuntimeError, SafetensorError) as error:
        if not no_space(error):
            raise
        output, rescue = trainer.args.output_dir, tempfile.mkdtemp(prefix="hpt-hf-")
        trainer.save_model(rescue, _internal_call=True)
        raise OSError(f"no space left for {output}: the model lies in {rescue}. Fix: make room and move it") from error
    trainer.save_state()


def main(argv: list[str] | None = None) -> None:
    """Exit 1 with one line for a mistake in recipe, data or model; everything else is a traceback."""
    with exit_on_user_error("hpt-hf train"):
        data, method, training = parse(RECIPE, argv)
        record = run(data, method, training)
    if training.process_index == 0:
        held, doubts = held_out_report(record)
        print(f"{method.method}: {record['steps']} steps in {record['seconds']:.0f} s{held} -> {training.output_dir}")
        for doubt in doubts:
            progress(f"warning: {doubt}. Fix: a lower --learning_rate, or more images")
    shutdown_distributed()
