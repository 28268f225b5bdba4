"""Sharding: weights spread over the processes by FSDP2, for towers that do not fit one device beside their proxy and anchor.

Each layer's weights are gathered right before it computes and dropped after. Accelerate would shard a `CLIPModel` by itself, but stops at two of its
peculiarities (its scale without dimensions, its two kinds of input); so the models are handed to it sharded, by PyTorch's `fully_shard`.
"""

from __future__ import annotations

from pathlib import Path

import torch
from accelerate.utils import FullyShardedDataParallelPlugin, parse_flag_from_env
from torch.distributed.fsdp import FSDPModule, StateDictType, fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor
from transformers import PreTrainedModel

from hpt_hf.models.zero_shot import ZeroShotClassifier


def asked_for(flag: str | bool | None) -> bool:
    """By the Trainer's flag `fsdp`, or by accelerate's config."""
    return bool(flag) or parse_flag_from_env("ACCELERATE_USE_FSDP")


def check(plugin: FullyShardedDataParallelPlugin) -> None:
    """Let the numbers be those of one process.

    Raises:
        ValueError: a setting with which weights, attack or checkpoints would be wrong.
    """
    advice = "start from recipes/accelerate/fsdp2.yaml"
    if plugin.fsdp_version != 2:
        raise ValueError(f"fsdp_version {plugin.fsdp_version}: the training attack needs version 2; {advice}")
    if plugin.state_dict_type != StateDictType.FULL_STATE_DICT:
        raise ValueError(
            f"fsdp_state_dict_type must be FULL_STATE_DICT, so that a checkpoint holds a model that opens; {advice}"
        )
    if plugin.cpu_ram_efficient_loading:
        raise ValueError(
            f"fsdp_cpu_ram_efficient_loading must be false: all processes but the first would embed the class prompts with empty weights; {advice}"
        )
    if plugin.activation_checkpointing:
        raise ValueError(
            "fsdp_activation_checkpointing comes too late for models that are sharded already: use --activation_checkpointing true"
        )
    # It would have the attack computed in half precision, too. Autocast, around the loss alone, gives the same products.
    plugin.mixed_precision_policy = None


def shard(
    model: ZeroShotClassifier, device: torch.device, plugin: FullyShardedDataParallelPlugin
) -> ZeroShotClassifier:
    """Shard `model` in place, layer by layer. From then on its weights come together in `forward` alone. Returns it."""
    options = {"offload_policy": plugin.cpu_offload, "ignored_params": {model.model.logit_scale}}
    layers = model.to(device).model.vision_model.encoder.layers
    for part in (
        *layers,
        model.model.text_model,
    ):  # nobody asks the text tower after the classes are set: it stays in parts
        fully_shard(part, reshard_after_forward=plugin.reshard_after_forward, **options)
    return fully_shard(model, **options)


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


def parameters(model: torch.nn.Module) -> dict[str, torch.nn.Parameter]:
    """The model's own parameters by name; not the gathered copies that a forward pass without a backward one leaves behind."""
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.reshard()
    return dict(model.named_parameters())


@torch.no_grad()
def load_weights(model: PreTrainedModel, folder: str | Path) -> None:
    """Copy a checkpoint's weights into `model`, to where they lie."""
    weights = type(model).from_pretrained(folder, dtype=torch.float32).state_dict()
    for name, parameter in parameters(model).items():
        parameter.copy_(shard_like(weights[name], parameter))
