"""Loading: a dual encoder and its processor from a folder or the Hub, whole or not at all."""

from __future__ import annotations

import pickle
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from transformers import AutoProcessor, PretrainedConfig, PreTrainedModel, ProcessorMixin
from transformers.utils import cached_file

from hpt_hf.models.families import FAMILIES, Encoder
from hpt_hf.models.open_clip_models import CONFIG, HUB, load_open_clip
from hpt_hf.models.preprocessing import Preprocessing

CONVERT = "Fix: hpt-hf convert with --base takes it from the model it came from"


def load_pretrained(source: str | Path, **hub) -> tuple[Encoder, Any, str | None]:
    """(model in float32 and eval mode, processor, the Hub's commit or None).

    Args:
        hub: what transformers' `from_pretrained` takes for the Hub: revision, cache_dir, token.

    Raises:
        OSError, ValueError: nothing there, another family, or weights, tokenizer or processor that are not whole.
    """
    config = Path(source, "config.json")
    if str(source).startswith(HUB) or Path(source, CONFIG).is_file() and not config.is_file():
        return load_open_clip(str(source))
    try:
        model, processor, commit = _load(source, hub)
        _check(model, processor, source)
    except (OSError, ValueError):
        raise
    except Exception as error:  # what odd values in its files lead to is of any type
        reason = " ".join(str(error).split())[:300]
        raise ValueError(f"{source} cannot be used: its config or processor is odd ({reason})") from error
    return model, processor, commit


@torch.no_grad()
def _check(model: PreTrainedModel, processor: ProcessorMixin, source: str | Path) -> None:
    """Raise ValueError unless processor and tokenizer make what the model reads."""
    family, config = FAMILIES[model.config.model_type], model.config
    for part in (config.vision_config, config.text_config):
        if getattr(part, "num_attention_heads", 1) < 1:
            raise ValueError(f"num_attention_heads of {source}: got {part.num_attention_heads}, expected at least 1")
    try:
        read = Preprocessing.of(processor.image_processor)
    except ValueError as error:
        raise ValueError(f"the processor of {source}: {error}") from None
    side = getattr(config.vision_config, "image_size", read.side) if family.student else read.side
    if not read.patch_size and read.side != side:
        raise ValueError(f"the processor of {source}: got images of {read.side} px, expected the model's {side}")
    tokens, text = processor.tokenizer(["a"], padding=True, return_tensors="pt"), config.text_config
    largest = max(int(tokens["input_ids"].max()), processor.tokenizer.pad_token_id or 0)
    if largest >= text.vocab_size:
        raise ValueError(f"the tokenizer of {source}: got token {largest}, expected one of {text.vocab_size}")
    tokens = {name: tokens[name].to(model.device) for name in family.prompts if name in tokens}
    if not family.text_features(model, tokens).isfinite().all():
        raise ValueError(f"{source}: the text tower's answers are not finite")


def _load(source: str | Path, hub: dict) -> tuple[PreTrainedModel, ProcessorMixin, str | None]:
    family = FAMILIES[_model_type(source, hub)]
    # A checkpoint's own half precision would weaken every attack, and its own attention may name code to download.
    options = hub | {"dtype": torch.float32, "attn_implementation": family.attention, "trust_remote_code": False}
    try:
        model, report = family.model_class.from_pretrained(source, output_loading_info=True, **options)
    except (SafetensorError, pickle.UnpicklingError, RuntimeError, EOFError, TypeError, OSError) as error:
        if isinstance(error, OSError) and error.errno is None:  # transformers' own: it says which file is missing
            raise
        raise ValueError(f"the weights of {source} cannot be used: {_why_not(error)}") from error
    # transformers only warns of these, fills in random numbers for the first and leaves out the second.
    if missing := sorted(report["missing_keys"]):
        raise ValueError(f"the weights of {source} lack {len(missing)} tensors, such as {missing[:3]}. {CONVERT}")
    if surplus := sorted(k for k in report["unexpected_keys"] if not k.endswith("position_ids")):
        raise ValueError(f"the weights of {source} hold tensors that config.json has no place for: {surplus[:3]} …")
    file = Path(cached_file(source, "config.json", **hub))
    commit = file.parent.name if file.parent.parent.name == "snapshots" else None  # so the Hub's cache is laid out
    processor = _load_processor(source, hub)
    # What the tokenizer gives by default is what `pipeline` hands on, and of some families a mask changes the answer.
    names = [name for name in processor.tokenizer.model_input_names if name in family.prompts]
    processor.tokenizer.model_input_names = processor.tokenizer.init_kwargs["model_input_names"] = names
    return model.eval(), processor, commit


def _model_type(source: str | Path, hub: dict) -> str:
    path = Path(source)
    if path.is_dir() and not (path / "config.json").is_file():
        found = sorted(p.name for p in path.iterdir())[:8]
        raise ValueError(f"{source} holds no config.json: found {found}, expected a folder of save_pretrained")
    if path.is_file():
        raise ValueError(f"{source} is a file, expected a folder or Hub id. Fix: hpt-hf convert {source} OUT --base …")
    if not path.exists() and (path.is_absolute() or str(source).count("/") > 1 or str(source).startswith((".", "~"))):
        raise ValueError(f"no model at {source}: neither a folder nor a Hub id of the form owner/name")
    try:
        config = PretrainedConfig.get_config_dict(source, **hub)[0]
    except OSError as error:  # offline, transformers' own message does not say what it looked for
        raise OSError(f"no model could be loaded from {source}: {error}") from error
    if "auto_map" in config:
        raise ValueError(f"the config.json of {source} asks to run code of its own (auto_map): that is never done")
    kind = config.get("model_type") if isinstance(config, dict) else None
    known = [name for name in FAMILIES if name != "open_clip"]  # which has no config.json
    if kind not in known:  # transformers would only warn, and fill a whole CLIP with random weights
        listed = ", ".join(map(repr, known))
        raise ValueError(f"the config.json of {source} names a model of type {kind!r}: expected one of {listed}")
    return kind


def _load_processor(source: str | Path, hub: dict) -> ProcessorMixin:
    try:
        # backend: torchvision's bicubic differs from Pillow's by up to 2/255, more than some threat models.
        processor = AutoProcessor.from_pretrained(source, backend="pil", trust_remote_code=False, **hub)
    except OSError as error:
        raise OSError(f"{source} has weights but no processor that can be read ({error}). {CONVERT}") from error
    except (ValueError, KeyError) as error:
        raise ValueError(f"the tokenizer or processor of {source} is damaged ({error!r})") from error
    tokenizer = processor.tokenizer
    if len(tokenizer) <= len(tokenizer.all_special_ids):  # what transformers makes where there is no file
        raise ValueError(f"{source} has weights but no tokenizer. {CONVERT}")
    return processor


def _why_not(error: Exception) -> str:
    if isinstance(error, SafetensorError):
        return f"the safetensors file is damaged or not one ({error}). Fix: download or export it again"
    if isinstance(error, pickle.UnpicklingError):
        return "a pickle that is damaged or holds more than tensors; nothing in it was run. Fix: ask for safetensors"
    if "ignore_mismatched_sizes" in str(error):
        return "they do not have the shapes that config.json says (the report above names the tensors)"
    return str(error)
