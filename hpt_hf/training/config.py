"""HPTConfig: transformers' TrainingArguments with the defaults of the method."""

from __future__ import annotations

from dataclasses import dataclass, field

from transformers import TrainingArguments


@dataclass
class HPTConfig(TrainingArguments):
    """transformers' TrainingArguments with the authors' optimizer as default: SGD with momentum 0.9, no clipping."""

    optim: str = "sgd"
    optim_args: str | None = "momentum=0.9"
    max_grad_norm: float = (
        0.0  # the authors do not clip, and transformers' default of 1 would change what a rate means
    )
    learning_rate: float = 6e-5
    per_device_train_batch_size: int = 64
    per_device_eval_batch_size: int = 64
    logging_steps: float = 20
    save_strategy: str = "no"
    dataloader_drop_last: bool = True
    tf32: bool | None = False  # torch_compile would turn it on, for the attack as well
    ddp_find_unused_parameters: bool | None = (
        False  # all trained weights have gradients; a search costs a walk through the graph
    )
    hub_strategy: str = "end"  # the finished model; every_save: each checkpoint on its way, too
    hub_overwrite: bool = field(
        default=False, metadata={"help": "with --push_to_hub: replace a model that the repository holds"}
    )
