"""Sharding: weights spread over the processes by FSDP2, for towers that do not fit one device beside proxy and anchor.

Each layer's weights are gathered right before it computes and dropped after. Accelerate would shard a `CLIPModel` by
itself, but stops at its scale without dimensions and its two kinds of input; so the models are handed to it sharded,
by PyTorch's `fully_shard`.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from accelerate.utils import FullyShardedDataParallelPlugin, parse_flag_from_env
from torch.distributed.fsdp import FSDPModule, StateDictType, fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor
from transformers.utils import logging

from hpt_hf.models.fast_layers import vision_layers
from hpt_hf.models.pretrained import load_pretrained
from hpt_hf.models.zero_shot import ZeroShotClassifier

logger = logging.get_logger(__name__)


def check_plugin(plugin: FullyShardedDataParallelPlugin) -> None:
    """Let the numbers be those of one process.

    Raises:
        ValueError: a setting with which weights, attack or checkpoints would be wrong.
    """
    expected = {
        "fsdp_version": 2,
        "state_dict_type": StateDictType.FULL_STATE_DICT,  # a checkpoint must hold a model that opens
        "cpu_ram_efficient_loading": False,  # all processes but the first would embed prompts with empty weights
        "activation_checkpointing": False,  # comes too late for models that are sharded already
    }
    for name, value in expected.items():
        if (found := getattr(plugin, name) or False) != value:
            raise ValueError(f"FSDP: {name}: got {found}, expected {value}. Fix: take accelerate/fsdp2.yaml")
    # It would have the attack computed in half precision, too. Autocast around the loss alone gives the same products.
    plugin.mixed_precision_policy = None


def shard_models(models: Sequence[ZeroShotClassifier], accelerator, *, asked: str | bool | None) -> None:
    """Shard each model in place where accelerate runs FSDP2; weights then come together in `forward` alone.

    Args:
        asked: the Trainer's flag `fsdp`, to warn where accelerate, which gives FSDP to several GPUs alone, ignores it.
    """
    plugin = getattr(accelerator.state, "fsdp_plugin", None)
    if plugin is None:
        if asked or parse_flag_from_env("ACCELERATE_USE_FSDP"):
            logger.warning("accelerate gives FSDP to several GPUs alone: every process holds all weights")
        return
    check_plugin(plugin)
    for classifier in models:
        model = classifier.to(accelerator.device).model
        if classifier.lora:
            raise ValueError("FSDP: got a student with LoRA, whose adapters are small. Fix: DDP")
        if not hasattr(model, "vision_model"):
            raise ValueError(f"FSDP: {model.name_or_path} is an open_clip model, which is not sharded. Fix: DDP")
        scalars = {p for p in model.parameters() if p.numel() == 1}
        options = {"offload_policy": plugin.cpu_offload, "ignored_params": scalars}
        # Nobody asks the text tower after the classes are set: it stays in parts.
        for part in (*vision_layers(model), model.text_model):
            fully_shard(part, reshard_after_forward=plugin.reshard_after_forward, **options)
        fully_shard(classifier, **options)


def shard_like(tensor: torch.Tensor, parameter: torch.Tensor) -> torch.Tensor:
    """The tensor where `parameter` lies, in the parts in which it lies."""
    tensor = full_tensor(tensor)
    if isinstance(parameter, DTensor):
        mesh = parameter.device_mesh
        tensor = distribute_tensor(tensor.to(mesh.device_type), mesh, parameter.placements)
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
    weights = load_pretrained(folder)[0].state_dict()
    for name, parameter in parameters(classifier).items():
        parameter.copy_(shard_like(weights[name], parameter))
