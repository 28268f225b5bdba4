"""Sharding: weights spread over the processes by FSDP2, for towers that do not fit one device beside their proxy and anchor.

Each layer's weights are gathered right before it computes and dropped after. Accelerate would shard a `CLIPModel` by itself,
but stops at two of its peculiarities (its scale without dimensions, its two kinds of input); so the models are handed to it
sharded, by PyTorch's `fully_shard`.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from accelerate.utils import FullyShardedDataParallelPlugin, parse_flag_from_env
from torch.distributed.fsdp import FSDPModule, StateDictType, fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor
from transformers.utils import logging

from hpt_hf.models.zero_shot import ZeroShotClassifier

logger = logging.get_logger(__name__)


def check_plugin(plugin: FullyShardedDataParallelPlugin) -> None:
    """Let the numbers be those of one process.

    Raises:
        ValueError: a setting with which weights, attack or checkpoints would be wrong.
    """
    for name, found, expected in (
        ("fsdp_version", plugin.fsdp_version, 2),
        # A checkpoint must hold a model that opens.
        ("fsdp_state_dict_type", plugin.state_dict_type, StateDictType.FULL_STATE_DICT),
        # All processes but the first would embed the class prompts with empty weights.
        ("fsdp_cpu_ram_efficient_loading", bool(plugin.cpu_ram_efficient_loading), False),
        # It comes too late for models that are sharded already: use --activation_checkpointing true.
        ("fsdp_activation_checkpointing", bool(plugin.activation_checkpointing), False),
    ):
        if found != expected:
            fix = "use --activation_checkpointing true" if "activation" in name else "start from accelerate/fsdp2.yaml"
            raise ValueError(f"{name}: got {found}, expected {expected}. Fix: {fix}")
    # It would have the attack computed in half precision, too. Autocast, around the loss alone, gives the same products.
    plugin.mixed_precision_policy = None


def shard_models(models: Sequence[ZeroShotClassifier], accelerator, *, asked: str | bool | None) -> None:
    """Shard each model in place, layer by layer, where accelerate runs FSDP2; from then on weights come together in `forward` alone.

    Args:
        asked: the Trainer's flag `fsdp`, to warn where accelerate, which gives FSDP to several GPUs alone, does not follow it.
    """
    plugin = getattr(accelerator.state, "fsdp_plugin", None)
    if plugin is None:
        if asked or parse_flag_from_env("ACCELERATE_USE_FSDP"):
            logger.warning(
                "FSDP was asked for, and accelerate gives it to several GPUs alone: every process holds all weights"
            )
        return
    check_plugin(plugin)
    for classifier in models:
        model = classifier.to(accelerator.device).model
        options = {"offload_policy": plugin.cpu_offload, "ignored_params": {model.logit_scale}}
        # Nobody asks the text tower after the classes are set: it stays in parts.
        for part in (*model.vision_model.encoder.layers, model.text_model):
            fully_shard(part, reshard_after_forward=plugin.reshard_after_forward, **options)
        fully_shard(classifier, **options)


def shard_like(tensor: torch.Tensor, parameter: torch.Tensor) -> torch.Tensor:
    """The tensor where `parameter` lies, in the parts in which it lies."""
    tensor = full_tensor(tensor)
    if isinstance(parameter, DTensor):
        tensor = distribute_tensor(
            tensor.to(parameter.device_mesh.device_type), parameter.device_mesh, parameter.placements
        )
    return tensor.to(parameter.device)


def full_tensor(tensor: torch.Tensor) -> torch.Tensor:
    """The tensor of which every process holds a part; all must ask."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def parameters(module: torch.nn.Module) -> dict[str, torch.nn.Parameter]:
    """The parameters by name, of a classifier under the names of its model.

    Not the gathered copies that a forward pass without a backward one leaves behind.
    """
    for part in module.modules():
        if isinstance(part, FSDPModule):
            part.reshard()
    return {name.removeprefix("model."): parameter for name, parameter in module.named_parameters()}


@torch.no_grad()
def load_weights(classifier: ZeroShotClassifier, folder: str | Path) -> None:
    """Copy a checkpoint's weights into the classifier's model, to where they lie."""
    weights = type(classifier.model).from_pretrained(folder, dtype=torch.float32).state_dict()
    for name, parameter in parameters(classifier).items():
        parameter.copy_(shard_like(weights[name], parameter))
