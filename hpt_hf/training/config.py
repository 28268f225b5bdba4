"""HPTConfig: transformers' TrainingArguments with the defaults of the method."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any

from transformers import SchedulerType, TrainingArguments
from transformers.integrations import get_available_reporting_integrations
from transformers.utils import logging

from hpt_hf.method.schedule import DECAYS, Schedule

logger = logging.get_logger(__name__)

# What transformers' Trainer offers and this one cannot carry out: the value that it must keep, and what to do instead.
KEPT = {
    "do_train": (True, "hpt-hf evaluate measures a model without training"),
    "do_predict": (False, "hpt-hf evaluate measures a model"),
    "label_smoothing_factor": (0.0, "the objectives have no label smoothing; --temperature softens a teacher"),
    "lr_scheduler_kwargs": (None, "leave it out: the decay is --lr_scheduler_type alone"),
    "optim_target_modules": (None, "leave it out: the whole vision side is trained"),
    "neftune_noise_alpha": (None, "leave it out: it is for language models"),
    "use_liger_kernel": (False, "leave it out: it is for language models"),
    "auto_find_batch_size": (False, "--per_device_train_batch_size with --gradient_accumulation_steps"),
    "include_num_input_tokens_seen": (False, "leave it out: images have no tokens"),
    "train_sampling_strategy": ("random", "leave it out: images are drawn at random"),
    "length_column_name": ("length", "leave it out: images have no length"),
    "use_cache": (False, "leave it out: it is for language models"),
    "ignore_data_skip": (False, "leave it out: a resumed run must see the images that are left"),
    "prediction_loss_only": (False, "leave it out: accuracies are measured"),
    "batch_eval_metrics": (False, "leave it out: accuracies are measured over the whole slice"),
    "eval_do_concat_batches": (True, "leave it out: accuracies are measured over the whole slice"),
    "eval_use_gather_object": (False, "leave it out: logits are tensors"),
    "bf16_full_eval": (False, "leave it out: attacks run in float32, half precision would weaken them"),
    "fp16_full_eval": (False, "leave it out: attacks run in float32, half precision would weaken them"),
    "deepspeed": (None, "FSDP2: recipes/accelerate/fsdp2.yaml"),
    "parallelism_config": (None, "FSDP2: recipes/accelerate/fsdp2.yaml"),
    "remove_unused_columns": (False, "leave it out: batches carry images that the model's signature does not name"),
    "label_names": (["labels"], "leave it out: the evaluation looks for them"),
}
# Trackers that are called as their package; of the others transformers tells itself, once the models are loaded.
TRACKERS = ("tensorboard", "trackio", "wandb", "mlflow", "swanlab", "clearml", "codecarbon", "dvclive", "neptune")
# Numbers, and the least that they may be.
LEAST = {"per_device_train_batch_size": 1, "per_device_eval_batch_size": 1, "gradient_accumulation_steps": 1}
LEAST |= {"seed": 0, "weight_decay": 0, "max_grad_norm": 0, "warmup_steps": 0, "dataloader_num_workers": 0}
ABOVE_ZERO = ["num_train_epochs", "learning_rate", "layer_rate_decay", "save_steps", "logging_steps", "eval_steps"]
ABOVE_ZERO += ["save_total_limit"]


@dataclass
class HPTConfig(TrainingArguments):
    """transformers' TrainingArguments with the authors' optimizer as default: SGD with momentum 0.9, no clipping.

    `learning_rate`, `num_train_epochs` or `max_steps`, `warmup_steps` and `lr_scheduler_type` are those of the phases
    that do not say their own (`hpt_hf.method.schedule.Schedule.resolve`).

    Raises:
        ValueError: a value with which the method cannot be carried out.
    """

    do_train: bool = True
    include_num_input_tokens_seen: bool = False
    optim: str = "sgd"
    optim_args: str | None = "momentum=0.9"
    max_grad_norm: float = 0.0  # transformers' default of 1 would change what a rate means
    learning_rate: float = 6e-5
    lr_scheduler_type: str = "cosine"
    per_device_train_batch_size: int = 64
    per_device_eval_batch_size: int = 64
    layer_rate_decay: float = field(
        default=1.0,
        metadata={"help": "below 1: each layer of the vision tower learns at so much of the rate before it"},
    )
    logging_steps: float = 20
    save_strategy: str = "no"
    dataloader_drop_last: bool = True
    tf32: bool | None = False  # torch_compile would turn it on, for the attack as well
    ddp_find_unused_parameters: bool | None = False  # all trained weights have gradients
    # Batches carry images that the model's signature does not name, and labels that the stock evaluation must find.
    remove_unused_columns: bool = False
    label_names: list[str] | None = field(default_factory=lambda: ["labels"])
    # Every process reads a stream and decodes its own share.
    accelerator_config: dict | str | None = field(default_factory=lambda: {"dispatch_batches": False})
    resume_from_checkpoint: str | None = field(
        default=None, metadata={"help": "a checkpoint, or true: the last whole one in output_dir, or the beginning"}
    )
    overwrite: bool = field(
        default=False, metadata={"help": "remove the checkpoints of another run that lie in output_dir"}
    )
    hub_strategy: str = "end"  # the finished model; every_save: each checkpoint on its way, too
    hub_overwrite: bool = field(
        default=False, metadata={"help": "with --push_to_hub: replace a model that the repository holds"}
    )

    told = dict[str, Any]()  # without an annotation: no flag, but what a trainer sets, for trackers

    def __post_init__(self):
        if self.hub_token:  # the message must not repeat it
            raise ValueError("hub_token would be stored in clear. Fix: `hf auth login`, or set HF_TOKEN")
        for name, (kept, instead) in KEPT.items():
            if (value := getattr(self, name)) != kept:
                raise ValueError(f"{name}: got {value!r}, expected {kept!r}. Fix: {instead}")
        for name in (*LEAST, *ABOVE_ZERO):
            value, least = getattr(self, name), LEAST.get(name)
            if value is not None and not (0 < value < math.inf if least is None else least <= value < math.inf):
                expected = "more than 0" if least is None else f"at least {least}"
                raise ValueError(f"{name}: got {value}, expected a number of {expected}")
        if self.max_steps == 0 or self.max_steps < -1:
            raise ValueError(
                f"max_steps: got {self.max_steps}, expected at least 1, or -1: --num_train_epochs decides"
            )
        super().__post_init__()
        if asked := set(TRACKERS).intersection(self.report_to):
            for name in asked.difference(get_available_reporting_integrations()):
                raise ValueError(f"report_to: got {name!r}, which is not installed. Fix: pip install {name}")
        if self.load_best_model_at_end and self.eval_strategy == "no":
            raise ValueError("load_best_model_at_end: got no evaluations. Fix: --eval_strategy, --held_out")
        if self.decay not in DECAYS:
            raise ValueError(f"lr_scheduler_type: got {self.decay!r}, expected one of {', '.join(DECAYS)}")
        if self.dataloader_pin_memory and self.device.type != "cpu":
            # The copy of a batch goes on while the step before is computed.
            self.accelerator_config.non_blocking = True

    def to_dict(self) -> dict:
        """What trackers keep of a run: the arguments, and what a trainer has told of method, attack and data."""
        return super().to_dict() | self.told

    @property
    def decay(self) -> str:
        return SchedulerType(self.lr_scheduler_type).value

    def steps_per_epoch(self, images: int) -> int:
        """Optimizer steps, counted as the Trainer does: the last one takes what micro-batches are left over."""
        batch = self.per_device_train_batch_size * self.world_size
        micro_batches = images // batch if self.dataloader_drop_last else math.ceil(images / batch)
        return max(1, math.ceil(micro_batches / self.gradient_accumulation_steps))

    def resolve(self, schedule: Schedule, steps_per_epoch: int) -> Schedule:
        """The schedule in optimizer steps; what its phases leave open is said here."""
        resolved = schedule.resolve(
            steps_per_epoch,
            epochs=self.num_train_epochs,
            learning_rate=self.learning_rate,
            warmup_steps=self.get_warmup_steps,
            decay=self.decay,
            max_steps=self.max_steps,
        )
        for phase in resolved.phases:
            if phase.warmup_steps == phase.steps > 1:
                logger.warning(f"the learning rate's warm-up takes all {phase.steps} steps of {phase.objective.name}")
        return resolved
