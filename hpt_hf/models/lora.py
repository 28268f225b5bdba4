"""LoRA (Hu et al. 2021, arXiv 2106.09685) by peft: low-rank adapters of a vision side's linear layers are trained."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from hpt_hf.models.zero_shot import ZeroShotClassifier, adapted_layers
from hpt_hf.types import Images, ZeroShotOutput
from hpt_hf.utils import kept_random_state

ADAPTER = "adapter"  # a folder of its own: beside merged weights, transformers would load it on top of them
NAME, WEIGHTS, PREFIX = "default", "adapter_model.safetensors", "base_model.model."


def add_lora(
    classifier: ZeroShotClassifier, r: int, alpha: float | None = None, *, seed: int = 0
) -> ZeroShotClassifier:
    """Adapters of rank `r`, scaled by alpha / r, on the vision side, in place. They begin at no change. Returns self.

    Args:
        alpha: left out: twice the rank.
        seed: of the first of each pair of matrices; the second begins at 0.

    Raises:
        ValueError: peft is not installed, a rank below 1, or a model without linear layers of its own.
    """
    try:
        from peft import LoraConfig, inject_adapter_in_model
    except ModuleNotFoundError as error:
        raise ValueError(f"lora_r: {error}. Fix: pip install 'hpt_hf[lora]'") from None
    alpha = 2 * r if alpha is None else alpha
    if r < 1 or not alpha > 0:
        raise ValueError(f"lora_r, lora_alpha: got {r}, {alpha}, expected a rank of at least 1 and more than 0")
    if classifier.config.model_type == "open_clip":
        raise ValueError("lora_r: got an open_clip model, expected one of transformers'. Fix: leave it out")
    modules = dict(classifier.model.named_modules())
    linear = [
        n for n, m in modules.items() if isinstance(m, torch.nn.Linear) and n.startswith(classifier.family.vision_side)
    ]
    # Those inside torch's own attention are never called.
    inside = tuple(n for n, m in modules.items() if isinstance(m, torch.nn.MultiheadAttention))
    names = [n for n in linear if not n.startswith(inside)]
    base = str(classifier.model.name_or_path)
    config = LoraConfig(r=r, lora_alpha=alpha, target_modules=names, base_model_name_or_path=base)
    with kept_random_state():
        torch.manual_seed(seed)
        inject_adapter_in_model(config, classifier.model, adapter_name=NAME)
    classifier.lora = config
    return classifier.freeze_text()


def anchor_of(classifier: ZeroShotClassifier) -> Callable[[Images], ZeroShotOutput]:
    """The model as it was: the same weights without their adapters, and no second copy."""
    layers = [layer for _, layer in adapted_layers(classifier.model)]

    def scale(factor: float) -> None:
        for layer in layers:
            layer.set_scale(NAME, factor)

    def anchor(images: Images) -> ZeroShotOutput:
        scale(0.0)
        try:
            return classifier.classify(images)
        finally:
            scale(1.0)

    return anchor


def save_adapter(classifier: ZeroShotClassifier, folder: str | Path) -> None:
    """The adapters alone, as peft opens them on top of the base model."""
    state = {PREFIX + n.replace(f".{NAME}", ""): t.contiguous() for n, t in _adapters(classifier).items()}
    save_file(state, Path(folder, WEIGHTS), metadata={"format": "pt"})
    classifier.lora.save_pretrained(str(folder))


@torch.no_grad()
def load_adapter(classifier: ZeroShotClassifier, folder: str | Path) -> None:
    """Copy a checkpoint's adapters into the classifier's."""
    state = load_file(Path(folder, ADAPTER, WEIGHTS))
    for name, parameter in _adapters(classifier).items():
        parameter.copy_(state[PREFIX + name.replace(f".{NAME}", "")])


def _adapters(classifier: ZeroShotClassifier) -> dict[str, torch.nn.Parameter]:
    return {name: p for name, p in classifier.model.named_parameters() if ".lora_" in name}
