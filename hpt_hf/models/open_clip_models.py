"""The seam to open_clip: its models (ResNet, ConvNeXt, EVA02, MobileCLIP …) with what the package asks of one."""

from __future__ import annotations

import copy
import functools
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace

import torch
from safetensors.torch import save_file
from transformers import BatchEncoding, PreTrainedConfig

from hpt_hf.models.preprocessing import RESAMPLE, Preprocessing, check_normalisation
from hpt_hf.utils import read_json, write_json

CONFIG, WEIGHTS = "open_clip_config.json", "open_clip_model.safetensors"
HUB = "hf-hub:"
FILTERS = {name: number for number, name in RESAMPLE.items()}


class OpenClipModel(torch.nn.Module):
    """What a model of open_clip lacks of transformers' `PreTrainedModel`; mixed into its class, its names stay."""

    config: OpenClipConfig
    name_or_path: str

    @property
    def device(self) -> torch.device:
        return next(self.parameters()).device

    def activation_checkpointing_enable(self, **_) -> None:
        self.set_grad_checkpointing(True)

    def blank(self) -> OpenClipModel:
        """Another one of the same architecture; its weights are to be loaded."""
        return copy.deepcopy(self)

    def save_pretrained(self, folder: str | Path, **_) -> None:
        """In open_clip's own form: weights and open_clip_config.json."""
        Path(folder).mkdir(parents=True, exist_ok=True)
        state = {name: tensor.contiguous() for name, tensor in self.state_dict().items()}
        save_file(state, Path(folder, WEIGHTS), metadata={"format": "pt"})
        write_json(Path(folder, CONFIG), self.config.content)


class OpenClipConfig(PreTrainedConfig):
    """open_clip_config.json, and of it what the package asks of a config."""

    model_type = "open_clip"

    def __init__(self, content: dict):
        super().__init__()
        self.content, cfg = content, content["model_cfg"]
        self.vision_config = PreTrainedConfig(**cfg["vision_cfg"])
        self.text_config = PreTrainedConfig(max_position_embeddings=cfg["text_cfg"].get("context_length", 77))


class OpenClipTokenizer:
    """An open_clip tokenizer that is called as transformers' are, and does not cut off in silence."""

    def __init__(self, tokenizer):
        self.tokenizer = tokenizer
        self._inner = getattr(tokenizer, "tokenizer", None)  # of transformers

    def __call__(self, prompts: Sequence[str], **_) -> BatchEncoding:
        """Padded to the context; a prompt that does not fit into it has one token more."""
        length = self.tokenizer.context_length
        ids, more = (self.tokenizer(list(prompts), context_length=count) for count in (length, length + 1))
        cut = (ids != more[:, :length]).any(1)
        rows = [(long if is_cut else row).tolist() for row, long, is_cut in zip(ids, more, cut, strict=True)]
        return BatchEncoding({"input_ids": rows})

    def save_pretrained(self, folder: str | Path) -> None:
        if self._inner is not None:  # OpenAI's vocabulary lies in the package itself
            self._inner.save_pretrained(folder)


def load_open_clip(source: str) -> tuple[OpenClipModel, SimpleNamespace, None]:
    """(model in float32 and eval mode, processor, None) of a folder in open_clip's form, or of `hf-hub:owner/name`.

    Raises:
        ValueError: open_clip is not installed, or it cannot open the source.
    """
    try:
        import open_clip
    except ModuleNotFoundError as error:
        raise ValueError(f"{source} is an open_clip model ({error}). Fix: pip install 'hpt_hf[openclip]'") from None
    name = source if source.startswith(HUB) else f"local-dir:{source}"
    try:
        model = open_clip.create_model(name, precision="fp32", require_pretrained=True).eval()
        tokenizer, model_cfg = open_clip.get_tokenizer(name), open_clip.get_model_config(name)
    except Exception as error:  # what odd files lead to is of any type
        raise ValueError(f"open_clip cannot open {source}: {' '.join(str(error).split())[:300]}") from error
    preprocess = open_clip.get_model_preprocess_cfg(model)
    content = {"model_cfg": model_cfg, "preprocess_cfg": preprocess}
    if not source.startswith(HUB):
        content = read_json(Path(source, CONFIG))
    model.__class__ = _with_mixin(type(model))
    model.config = OpenClipConfig(content)
    model.name_or_path = source
    tokenizer = OpenClipTokenizer(tokenizer)
    processor = SimpleNamespace(image_processor=_preprocessing(preprocess, source), tokenizer=tokenizer)
    processor.save_pretrained = tokenizer.save_pretrained
    return model, processor, None


@functools.cache
def _with_mixin(kind: type) -> type:
    return type(kind.__name__, (OpenClipModel, kind), {})


def _preprocessing(preprocess: dict, source: str) -> Preprocessing:
    """open_clip's transforms. Raises ValueError for those that are no resize, centre crop and normalisation."""
    size, mode, filter_ = preprocess["size"], preprocess["resize_mode"], preprocess["interpolation"]
    height, side = (size, size) if isinstance(size, int) else size
    if height != side:
        raise ValueError(f"{source} reads images of {height} x {side} px: expected a square")
    if mode not in ("shortest", "squash") or filter_ not in FILTERS:
        expected = "shortest or squash, bilinear or bicubic"
        raise ValueError(f"the preprocess_cfg of {source}: got {mode!r}, {filter_!r}, expected {expected}")
    check_normalisation(preprocess["mean"], preprocess["std"])
    mean, std = (tuple(map(float, preprocess[name])) for name in ("mean", "std"))
    cut = mode == "shortest"
    # rounded: as torchvision's CenterCrop
    return Preprocessing(side, side if cut else (side, side), cut, FILTERS[filter_], mean, std, rounded=True)
