"""HPTConfig: transformers' TrainingArguments with the defaults of the method."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

from transformers import SchedulerType, TrainingArguments

from hpt_hf.method.schedule import DECAYS, Schedule


@dataclass
class HPTConfig(TrainingArguments):
    """transformers' TrainingArguments with the authors' optimizer as default: SGD with momentum 0.9, no clipping.

    `learning_rate`, `num_train_epochs` or `max_steps`, `warmup_steps` and `lr_scheduler_type` are those of the phases
    that do not say their own (`hpt_hf.method.schedule.Schedule.resolve`).

    Raises:
        ValueError: a value with which the method cannot be carried out.
    """

    optim: str = "sgd"
    optim_args: str | None = "momentum=0.9"
    max_grad_norm: float = 0.0  # transformers' default of 1 would change what a rate means
    learning_rate: float = 6e-5
    lr_scheduler_type: str = "cosine"
    per_device_train_batch_size: int = 64
    per_device_eval_batch_size: int = 64
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

    def __post_init__(self):
        if self.hub_token:  # the message must not repeat it
            raise ValueError("hub_token would be stored in clear. Fix: `hf auth login`, or set HF_TOKEN")
        if self.remove_unused_columns or self.label_names != ["labels"]:
            raise ValueError("remove_unused_columns must be false and label_names ['labels']")
        super().__post_init__()
        if self.decay not in DECAYS:
            raise ValueError(f"lr_scheduler_type: got {self.decay!r}, expected one of {', '.join(DECAYS)}")
        if self.dataloader_pin_memory and self.device.type != "cpu":
            # The copy of a batch goes on while the step before is computed.
            self.accelerator_config.non_blocking = True

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
        return schedule.resolve(
            steps_per_epoch,
            epochs=self.num_train_epochs,
            learning_rate=self.learning_rate,
            warmup_steps=self.get_warmup_steps,
            decay=self.decay,
            max_steps=self.max_steps,
        )
