"""LoRA (Hu et al. 2021, arXiv 2106.09685) by peft: low-rank adapters of a vision side's linear layers are trained."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
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
    # Those inside torch's own attention are never called.
    inside = [n for n, m in classifier.model.named_modules() if isinstance(m, torch.nn.MultiheadAttention)]
    names = [
        name
        for name, module in classifier.model.named_modules()
        if name.startswith(classifier.family.vision_side)
        and isinstance(module, torch.nn.Linear)
        and not name.startswith(tuple(inside))
    ]
    base = str(classifier.model.name_or_path)
    config = LoraConfig(r=r, lora_alpha=alpha, target_modules=names, base_model_name_or_path=base)
    with kept_random_state():
        torch.manual_seed(seed)
        inject_adapter_in_model(config, classifier.model, adapter_name=NAME)
    classifier.lora = config
    return classifier.freeze_text()


@contextmanager
def without_adapters(classifier: ZeroShotClassifier) -> Iterator[None]:
    layers = dict(adapted_layers(classifier.model))
    scales = {name: layer.scaling[NAME] for name, layer in layers.items()}
    for layer in layers.values():
        layer.scaling[NAME] = 0.0
    try:
        yield
    finally:
        for name, layer in layers.items():
            layer.scaling[NAME] = scales[name]


def anchor_of(classifier: ZeroShotClassifier) -> Callable[[Images], ZeroShotOutput]:
    """The model as it was: the same weights without their adapters, and no second copy."""

    def anchor(images: Images) -> ZeroShotOutput:
        with without_adapters(classifier):
            return classifier.classify(images)

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
