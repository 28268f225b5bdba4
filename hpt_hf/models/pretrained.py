"""Loading: a dual encoder and its processor from a folder or the Hub, whole or not at all."""

from __future__ import annotations

import pickle
from pathlib import Path

import torch
from safetensors import SafetensorError
from transformers import AutoProcessor, PretrainedConfig, PreTrainedModel, ProcessorMixin
from transformers.utils import cached_file

from hpt_hf.models.families import FAMILIES

CONVERT = "Fix: hpt-hf convert with --base takes it from the model it came from"


def load_pretrained(source: str | Path, **hub) -> tuple[PreTrainedModel, ProcessorMixin, str | None]:
    """(model in float32 and eval mode, processor, the Hub's commit or None).

    Args:
        hub: what transformers' `from_pretrained` takes for the Hub: revision, cache_dir, token.

    Raises:
        OSError, ValueError: nothing there, another family, or weights, tokenizer or processor that are not whole.
    """
    family = FAMILIES[_model_type(source, hub)]
    options = hub | {"dtype": torch.float32}  # a checkpoint's own half precision would weaken every attack
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
    return model.eval(), _load_processor(source, hub), commit


def _model_type(source: str | Path, hub: dict) -> str:
    path = Path(source)
    if path.is_dir() and not (path / "config.json").is_file():
        found = sorted(p.name for p in path.iterdir())[:8]
        raise ValueError(f"{source} holds no config.json: found {found}, expected a folder of save_pretrained")
    if not path.exists() and (path.is_absolute() or str(source).count("/") > 1 or str(source).startswith(".")):
        raise ValueError(f"no model at {source}: neither a folder nor a Hub id of the form owner/name")
    try:
        config = PretrainedConfig.get_config_dict(source, **hub)[0]
    except OSError as error:  # offline, transformers' own message does not say what it looked for
        raise OSError(f"no model could be loaded from {source}: {error}") from error
    kind = config.get("model_type") if isinstance(config, dict) else None
    if kind not in FAMILIES:  # transformers would only warn, and fill a whole CLIP with random weights
        known = " or ".join(map(repr, FAMILIES))
        raise ValueError(f"the config.json of {source} names a model of type {kind!r}: expected {known}")
    return kind


def _load_processor(source: str | Path, hub: dict) -> ProcessorMixin:
    try:
        # backend: torchvision's bicubic differs from Pillow's by up to 2/255, more than some threat models.
        processor = AutoProcessor.from_pretrained(source, backend="pil", **hub)
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
