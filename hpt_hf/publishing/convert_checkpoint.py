"""CLIP checkpoints that other people's code wrote, read without running any of it; and open_clip's form, written.

A file is flattened to dotted names. The one that ends in `class_embedding` says where the CLIP lies and in whose names; one table then leads
from OpenAI's and open_clip's names to transformers' and back. What the file lacks comes from a base, and is listed.
"""

from __future__ import annotations

import copy
import json
import re
import warnings
import zipfile
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file, save_file

from hpt_hf.models.zero_shot import ZeroShotClassifier

# open_clip's name, ours. A name that ends in `#.` goes on with each line of _LAYER, for each layer; `*` is weight and bias.
_NAMES = (
    ("visual.class_embedding", "vision_model.embeddings.class_embedding"),
    ("visual.conv1.weight", "vision_model.embeddings.patch_embedding.weight"),
    ("visual.positional_embedding", "vision_model.embeddings.position_embedding.weight"),
    ("visual.ln_pre.*", "vision_model.pre_layrnorm.*"),
    ("visual.transformer.resblocks.#.", "vision_model.encoder.layers.#."),
    ("visual.ln_post.*", "vision_model.post_layernorm.*"),
    ("visual.proj", "visual_projection.weight"),
    ("token_embedding.weight", "text_model.embeddings.token_embedding.weight"),
    ("positional_embedding", "text_model.embeddings.position_embedding.weight"),
    ("transformer.resblocks.#.", "text_model.encoder.layers.#."),
    ("ln_final.*", "text_model.final_layer_norm.*"),
    ("text_projection", "text_projection.weight"),
    ("logit_scale", "logit_scale"),
)


_LAYER = (
    ("ln_1.*", "layer_norm1.*"),
    (
        "attn.in_proj_*",
        "self_attn.q_proj.*",
        "self_attn.k_proj.*",
        "self_attn.v_proj.*",
    ),  # theirs is ours, one below the other
    ("attn.out_proj.*", "self_attn.out_proj.*"),
    ("ln_2.*", "layer_norm2.*"),
    ("mlp.c_fc.*", "mlp.fc1.*"),
    ("mlp.c_proj.*", "mlp.fc2.*"),
)


_TRANSPOSED = ("visual.proj", "text_projection")


# Parts that no CLIP has and that change what a tower computes: what is left without them is another model.
_OTHER_PARTS = re.compile(
    r"(^|\.)(text_model|vision_model|transformer|resblocks|attn_pool\w*|cls_emb|prompt_pos_embedding)\b"
)


_BUFFERS = ("position_ids", "attn_mask", "input_resolution", "context_length", "vocab_size")


_NORMALISATION, _NO_PART = "normalisation, which the processor now holds", "no part of a CLIP"


_FOUND_INSTEAD = {
    "attnpool.": "a ResNet CLIP, and CLIPModel has vision transformers only",
    "visual.trunk.": "a timm vision tower, as open_clip's SigLIP and EVA have",
    "vision_model.head.": "a SigLIP",
}


_FOLDERS = {  # a folder's config -> its weights, the first that is there
    "open_clip_config.json": ("open_clip_model.safetensors", "open_clip_pytorch_model.bin"),
    "config.json": (
        "model.safetensors",
        "model.safetensors.index.json",
        "pytorch_model.bin",
        "pytorch_model.bin.index.json",
    ),
}


# What open_clip's model_cfg may say: what the weights' shapes show, what is compared with the base, what changes no logit.
_MAY_SAY = re.compile(
    r"embed_dim|vision_cfg|text_cfg|layers|width|patch_size|image_size|mlp_ratio|context_length|vocab_size|"
    r"quick_gelu|head_width|heads|norm_kwargs|eos_id|"
    r"custom_text|init_logit_scale|patch_dropout|output_tokens|pos_embed_type|pad_id|tokenizer_mode|tokenizer_kwargs|"
    r"(timm|hf|attn_pooler)_(?!model_name$).*"  # details of parts that are refused by their own names
)


_MAY_BE = {"pool_type": ("tok", "argmax", "eos"), "proj_type": ("linear",)}


_OPENAI = (
    "a photo of a cat",
    [49406, 320, 1125, 539, 320, 2368, 49407],
    49408,
)  # a prompt, its ids, the size of the vocabulary


_HIGHEST = 2  # an eos_token_id that means whatever id is the highest in a text (transformers#24773)


# numpy's numbers, as best_acc1 in TeCoA's and PMG-AFT's files: data, yet a pickle calls their maker by its name, which numpy 2 changed.
_NUMBERS = [(np.float64(0).__reduce__()[0], f"numpy.{core}.multiarray.scalar") for core in ("core", "_core")]


_NUMBERS += [np.dtype, *{type(np.dtype(code)) for code in "?bhilqBHILQefd"}]


@dataclass(frozen=True)
class Reading:
    """What was read from a foreign checkpoint, what was not, and what to know about it.

    Args:
        form: which towers, in whose names, and where in the file they lay.
        read: how many of the file's tensors the model holds.
        from_base: names (transformers') of the tensors that the file lacks.
        ignored: (name, reason) of everything else that the file holds.
        notes: sentences: where config, tokenizer and normalisation come from, and what contradicts the base.
    """

    form: str
    read: int
    from_base: tuple[str, ...]
    ignored: tuple[tuple[str, str], ...]
    notes: tuple[str, ...]

    def __str__(self) -> str:
        reasons = "; ".join(
            f"{count} {reason}" for reason, count in Counter(reason for _, reason in self.ignored).items()
        )
        facts = (
            f"{self.read} tensors read, {len(self.from_base)} taken from the base, {len(self.ignored)} entries ignored"
        )
        return "\n- ".join((f"{self.form}: {facts}" + f" ({reasons})" * bool(reasons), *self.notes))


def read_checkpoint(source: str | Path, base: ZeroShotClassifier) -> tuple[ZeroShotClassifier, Reading]:
    """A CLIP from a checkpoint that others' code wrote, in float32 and eval mode, and the account of it. `base` is not changed.

    Read are state dicts in OpenAI's and open_clip's names or in transformers', whole or the vision tower alone, in any nesting and under any
    prefix (TeCoA, PMG-AFT, TGA-ZSR, AGFT, FARE, open_clip's training); open_clip's folders; folders of transformers without a processor (LEAF).

    Args:
        source: a file (.pt, .pth, .pth.tar, .bin, .ckpt, .safetensors) or a folder.
        base: a CLIP of the same architecture: gives config, tokenizer, processor and every tensor that `source` lacks.

    Raises:
        ValueError: nothing there, broken, a pickle that needs code to run, no CLIP, a part of it missing, or another architecture.
    """
    if base.processor is None:
        raise RuntimeError(
            "the base has no processor: make it with ZeroShotClassifier.load, or call attach(processor) first"
        )
    source, own = Path(source), base.model.state_dict()
    entries, said, pixels = _open(source, base)
    form, prefix, names = _locate(entries, source)
    where = f", under '{prefix}'" * bool(prefix)
    state, used = _translate({name: entries[full] for name, full in names.items()}, form, f"{source}{where}")
    _check(state, own, source)
    read = {names[name] for name in used}
    ignored = tuple((name, _why_ignored(name, value)) for name, value in entries.items() if name not in read)
    from_base = tuple(name for name in own if name not in state)
    config, notes = _reconciled(said, base)
    for name, reason in ignored:
        if reason == _NORMALISATION:
            pixels.setdefault(_norm(name), []).append(entries[name].flatten().tolist())
    processor, more = _with_pixels(pixels, base)
    if left := [name for name, reason in ignored if reason == _NO_PART]:
        more.append(f"Left out are {len(left)} tensors that are {_NO_PART}, such as {', '.join(left[:3])}.")
    if "visual_projection.weight" in from_base:
        more.append("The projection into the shared space is the base's: the file has a vision tower without one.")
    model = type(base.model)(config).to(base.device)
    model.load_state_dict({name: state.get(name, tensor).reshape(tensor.shape) for name, tensor in own.items()})
    towers = "both towers" if any(name.startswith("text_model.") for name in state) else "the vision tower"
    reading = Reading(f"{towers} in the names of {form}{where}", len(used), from_base, ignored, (*notes, *more))
    return ZeroShotClassifier(model, processor).eval(), reading


def _open(source: Path, base: ZeroShotClassifier) -> tuple[dict[str, object], dict, dict]:
    """(entries, what the config says and weights do not show {(tower, field): value}, the preprocessing {word: values}) of a file or folder."""
    if source.is_file():
        return _load(source), {}, {}
    for name, candidates in _FOLDERS.items():
        weights = next((source / file for file in candidates if (source / file).is_file()), None)
        if weights is not None and (source / name).is_file():
            shards = _json(weights).get("weight_map", {}).values() if weights.suffix == ".json" else [weights.name]
            entries = {k: v for shard in sorted(set(shards)) for k, v in _load(source / Path(shard).name).items()}
            config = _json(source / name)
            if name == "open_clip_config.json":
                said, pixels = (
                    _said_by_open_clip(config.get("model_cfg", {}), source / name),
                    config.get("preprocess_cfg") or {},
                )
            else:
                said, pixels = _said_by_transformers(config, base, source / name), {}
                for file in (source / "preprocessor_config.json", source / "processor_config.json"):
                    image = _json(file) if file.is_file() else {}
                    pixels |= {
                        _norm(k): v
                        for k, v in image.get("image_processor", image).items()
                        if k in ("image_mean", "image_std")
                    }
            return entries, said, {word: [value] for word, value in pixels.items() if value}
    found = f"found {sorted(p.name for p in source.iterdir())[:8]}" if source.is_dir() else "there is nothing"
    raise ValueError(
        f"no checkpoint at {source}: expected a file, or {' or '.join(_FOLDERS)} with weights beside it; {found}"
    )


def _load(file: Path) -> dict[str, object]:
    """A file's entries, nested dicts flattened. A pickle is read by torch's weights-only reader, which calls nothing that it names."""
    if not file.is_file():
        raise ValueError(f"{file} is missing: the index beside it counts it among the weights")
    try:
        if file.suffix == ".safetensors":
            content = load_file(file)
        else:
            with warnings.catch_warnings(action="ignore"), torch.serialization.safe_globals(_NUMBERS):
                content = torch.load(file, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(file))
    except (PermissionError, MemoryError):
        raise
    except Exception as error:  # a damaged file raises whatever its bytes happen to mean
        if "TorchScript" in str(error):
            raise ValueError(
                f"{file} is a TorchScript archive, a program, and nothing in a checkpoint is run here. OpenAI's are on the Hub as weights: "
                "openai/clip-vit-base-patch32, -base-patch16, -large-patch14, -large-patch14-336. Where you trust it, "
                "torch.save(torch.jit.load(file).state_dict(), 'weights.pt') makes a file that can be read"
            ) from None
        if needed := re.search(r"GLOBAL ([\w.]+)", str(error)):
            raise ValueError(
                f"{file} is a pickle that needs {needed[1]} to be called, and nothing in a checkpoint is run here: ask its author for the "
                "state dict alone (safetensors, or torch.save(model.state_dict(), …)), or make it where you trust the file"
            ) from None
        raise ValueError(
            f"{file} is not, or not wholly, what its name says ({type(error).__name__}): fetch it again"
        ) from error
    if not isinstance(content, Mapping):
        raise ValueError(f"{file} holds a {type(content).__name__}: expected a state dict, names to tensors")
    return dict(_flat(content))


def _flat(content: Mapping, prefix: str = "") -> Iterator[tuple[str, object]]:
    for key, value in content.items():
        if isinstance(value, Mapping):
            yield from _flat(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def _json(file: Path) -> dict:
    try:
        return dict(json.loads(file.read_text(encoding="utf-8")))
    except (ValueError, TypeError) as error:
        raise ValueError(f"{file} holds no JSON of names and values ({error})") from None


def _locate(entries: dict[str, object], source: Path) -> tuple[str, str, dict[str, str]]:
    """(whose names, their prefix, {name without it: name in the file}) of the tensors around the one vision tower."""
    tensors = [name for name, value in entries.items() if isinstance(value, torch.Tensor)]
    towers = [name for name in tensors if name.split(".")[-1] == "class_embedding"]
    if not towers:
        other = next((what for part, what in _FOUND_INSTEAD.items() if any(part in name for name in tensors)), None)
        found = other or f"{len(tensors)} tensors among {len(entries)} entries, such as {list(entries)[:3]}"
        raise ValueError(
            f"{source} holds no CLIP with a vision transformer, no name ends in 'class_embedding': found {found}"
        )
    if len(towers) > 1:
        raise ValueError(
            f"{source} holds {len(towers)} vision towers, {', '.join(towers[:3])}: save the one that is meant"
        )
    place = towers[0].removesuffix("class_embedding")
    form, tower = ("transformers", "vision_model.") if place.endswith("embeddings.") else ("open_clip", "visual.")
    place = place.removesuffix("embeddings.")
    prefix, unnamed = (
        place.removesuffix(tower),
        "" if place.endswith(tower) else tower,
    )  # alone, a tower may go without its name
    inside = {name: unnamed + name.removeprefix(prefix) for name in tensors if name.startswith(prefix)}
    return form, prefix, {short.removeprefix("text."): name for name, short in inside.items()}


def _rows(vision_layers: int, text_layers: int) -> dict[str, tuple[str, ...]]:
    """The table for so many layers: open_clip's name -> ours, three for one that holds query, key and value."""
    lines = []
    for theirs, ours in _NAMES:
        layers = range(vision_layers if theirs.startswith("visual.") else text_layers)
        inner = [(theirs + a, *(ours + b for b in bs)) for a, *bs in _LAYER]
        lines += (
            [[n.replace("#", str(i)) for n in line] for i in layers for line in inner]
            if "#" in theirs
            else [[theirs, ours]]
        )
    ends = [(line, end) for line in lines for end in (("weight", "bias") if "*" in line[0] else ("",))]
    return {line[0].replace("*", end): tuple(name.replace("*", end) for name in line[1:]) for line, end in ends}


def _layers(names: Mapping[str, object], stem: str) -> int:
    return len({name.removeprefix(stem).split(".")[0] for name in names if name.startswith(stem)})


def _translate(found: dict[str, torch.Tensor], form: str, where: str) -> tuple[dict[str, torch.Tensor], list[str]]:
    """({our name: tensor}, the names of `found` that it was made of). A tower is there as a whole or not at all."""
    stems = [names[form == "transformers"].removesuffix("#.") for names in _NAMES if "#" in names[0]]
    rows = _rows(*(_layers(found, stem) for stem in stems))
    if form == "transformers":
        rows = {name: (name,) for ours in rows.values() for name in ours}
    parts = {name: name if name == "logit_scale" else "vision" if name.startswith("vis") else "text" for name in rows}
    if form == "transformers" and not any(name.startswith("text_") for name in found):
        parts["visual_projection.weight"] = "projection"  # which a CLIPVisionModel has not
    used = [name for name in rows if name in found]
    begun = {parts[name] for name in used}
    if missing := [name for name in rows if name not in found and parts[name] in begun]:
        raise ValueError(f"{where} lacks {len(missing)} tensors of its towers: {', '.join(missing[:6])}")
    others = [name for name in found if name not in rows and name.split(".")[-1] not in _BUFFERS]
    if odd := [name for name in others if _OTHER_PARTS.search(name)]:
        raise ValueError(
            f"{where} holds what no CLIPModel has, {', '.join(odd[:4])}: what is left without them is another model"
        )
    state = {}
    for name in used:
        tensor = found[name].detach()
        if not tensor.is_floating_point() or not tensor.isfinite().all():
            raise ValueError(
                f"{name} in {where} holds {tensor.dtype} that are not all finite numbers: no weights to use"
            )
        tensor = tensor.transpose(0, -1) if form == "open_clip" and name in _TRANSPOSED else tensor
        state.update(zip(rows[name], tensor.tensor_split(len(rows[name])) if tensor.ndim else (tensor,), strict=False))
    return state, used


def _check(state: dict[str, torch.Tensor], own: Mapping[str, torch.Tensor], source: Path) -> None:
    """Raise ValueError unless `state` has the base's architecture; the message says both in words."""

    def words(tensors: Mapping[str, torch.Tensor], tower: str) -> str:
        def size(name: str, dim: int = 0) -> int:
            return (*(tensors[name].shape if name in tensors else ()), 0, 0, 0)[dim]

        stem = f"{tower}_model.encoder.layers."
        middle = f"{_layers(tensors, stem)} layers, MLP {size(stem + '0.mlp.fc1.weight')}"
        places = size(f"{tower}_model.embeddings.position_embedding.weight")
        if tower == "text":
            tokens = size("text_model.embeddings.token_embedding.weight")
            return f"a text tower of width {size('text_model.final_layer_norm.weight')}, {middle}, {places} of {tokens} tokens"
        patch = size("vision_model.embeddings.patch_embedding.weight", 2)
        space = f", embeddings of {size('visual_projection.weight')}" if "visual_projection.weight" in state else ""
        pixels = round(max(places - 1, 0) ** 0.5) * patch
        return (
            f"a ViT of width {size('vision_model.pre_layrnorm.weight')}, {middle}, patch {patch}, {pixels} px{space}"
        )

    for tower in ("vision", "text")[: 1 + ("text_model.final_layer_norm.weight" in state)]:
        file, ours = words(state, tower), words(own, tower)
        if file != ours:
            raise ValueError(f"{source} holds {file}; the base is {ours}: expected a base of the same architecture")
    for name, tensor in state.items():
        if tensor.shape != own[name].shape and not (name == "logit_scale" and tensor.numel() == 1):
            shapes = f"shape {tuple(tensor.shape)}, the base's {tuple(own[name].shape)}"
            raise ValueError(f"{name} of {source} has the {shapes}: no CLIP of the base's architecture")


def _norm(name: str) -> str:
    """'mean' or 'std' for a buffer's name that says so."""
    return name.split(".")[-1].removeprefix("image_")


def _why_ignored(name: str, value: object) -> str:
    if not isinstance(value, torch.Tensor):
        return "not a tensor"
    if _norm(name) in ("mean", "std") and value.numel() == 3:
        return _NORMALISATION
    if name.split(".")[-1] in _BUFFERS:
        return "a buffer that every CLIP computes"
    if re.match(r"optim|scaler|sched|lr_", name):
        return "state of the training"
    return _NO_PART if value.numel() else "empty"


def _said_by_open_clip(cfg: dict, file: Path) -> dict[tuple[str, str], object]:
    """What model_cfg says and weights do not show. Raises ValueError where it describes what CLIPModel is not."""
    parts = {"": cfg, "vision_cfg.": cfg.get("vision_cfg"), "text_cfg.": cfg.get("text_cfg")}
    if not all(isinstance(part, dict) for part in parts.values()):
        raise ValueError(f"{file} has no model_cfg with vision_cfg and text_cfg: not open_clip's")
    entries = [(place + k, k, v) for place, part in parts.items() for k, v in part.items() if v]
    odd = [f"{name} = {v!r}" for name, k, v in entries if not _MAY_SAY.fullmatch(k) and v not in _MAY_BE.get(k, ())]
    vision, text = cfg["vision_cfg"], cfg["text_cfg"]
    at_id = text.get("pool_type") == "eos"
    if at_id and text.get("eos_id", 2) == _HIGHEST:  # transformers would read it as the highest id
        odd.append("text_cfg.pool_type = 'eos' at id 2")
    if odd:
        raise ValueError(f"{file} describes a model that CLIPModel cannot hold: {', '.join(odd)}")
    said: dict[tuple[str, str], object] = {
        ("vision_config", "num_attention_heads"): vision.get("width", 768) // vision.get("head_width", 64),
        ("text_config", "num_attention_heads"): text.get("heads", 8),
        ("text_config", "eos_token_id"): text["eos_id"] if at_id else _HIGHEST,
    }
    for tower, part in (("vision_config", vision), ("text_config", text)):
        said[tower, "hidden_act"] = "quick_gelu" if cfg.get("quick_gelu") else "gelu"
        said[tower, "layer_norm_eps"] = (part.get("norm_kwargs") or {}).get("eps", 1e-5)
    return said


def _said_by_transformers(content: dict, base: ZeroShotClassifier, file: Path) -> dict[tuple[str, str], object]:
    """The same of a config.json, of a whole CLIP or of its vision tower."""
    kind = content.get("model_type")
    if kind not in ("clip", "clip_vision_model"):
        raise ValueError(f"{file} describes a model of type {kind!r}: expected 'clip' or 'clip_vision_model'")
    config = type(base.config).from_dict(content if kind == "clip" else {"vision_config": content})
    fields = ("num_attention_heads", "hidden_act", "layer_norm_eps")
    asked = [("vision_config", f) for f in fields] + [
        ("text_config", f) for f in (*fields, "eos_token_id") if kind == "clip"
    ]
    return {(tower, field): getattr(getattr(config, tower), field) for tower, field in asked}


def _pooling(eos: int, model: ZeroShotClassifier) -> dict[str, object]:
    """Where the text tower's embedding is read, in open_clip's words: the end of text may well be the highest id."""
    highest = max(model.processor.tokenizer.get_vocab().values())
    return {"pool_type": "argmax"} if eos in (_HIGHEST, highest) else {"pool_type": "eos", "eos_id": eos}


def _reconciled(said: dict[tuple[str, str], object], base: ZeroShotClassifier) -> tuple[object, list[str]]:
    """The base's config with what the checkpoint's own says, and a sentence on each difference."""
    config = copy.deepcopy(base.config)
    unseen = f"Activation ({config.vision_config.hidden_act}) and number of heads do not show in weights: they are the base's."
    notes = ["Tokenizer and processor are the base's.", *([] if said else [unseen])]
    for (tower, field), value in said.items():
        ours = getattr(getattr(config, tower), field)
        if value == ours or (field == "eos_token_id" and _pooling(value, base) == _pooling(ours, base)):
            continue
        difference = f"{tower}.{field} is {value!r} in the checkpoint's config and {ours!r} in the base's"
        if field == "num_attention_heads":
            raise ValueError(f"{difference}: expected a base of the same architecture")
        setattr(getattr(config, tower), field, value)
        notes.append(f"{difference}: the checkpoint's was taken.")
    return config, notes


def _resizing(model: ZeroShotClassifier) -> dict[str, str | None]:
    """How the processor makes pictures of the tower's size, in open_clip's words; None where it has none."""
    size, image = model.image_size, model.processor.image_processor
    squash = image.size.get("height") == image.size.get("width") == size
    mode = "shortest" if image.size.get("shortest_edge") == size else "squash" if squash else None
    return {"interpolation": {2: "bilinear", 3: "bicubic"}.get(int(image.resample)), "resize_mode": mode}


def _with_pixels(pixels: dict[str, list], base: ZeroShotClassifier) -> tuple[object, list[str]]:
    """The base's processor with the checkpoint's own mean and standard deviation, and a sentence on each difference."""
    processor, notes = copy.deepcopy(base.processor), []
    image = processor.image_processor
    for key, ours in (("mean", image.image_mean), ("std", image.image_std)):
        theirs, *others = pixels.get(key, [ours])
        if not all(np.allclose(other, theirs, atol=1e-6) for other in others):
            raise ValueError(
                f"the checkpoint holds more than one {key}, {theirs} and {others}: save the one that is meant"
            )
        if np.size(theirs) != 3 or not all(0 <= v <= 1 for v in theirs):
            raise ValueError(
                f"the checkpoint's {key} is {theirs}: expected three numbers in [0, 1], as images are here"
            )
        if not np.allclose(ours, theirs, atol=1e-6):
            setattr(image, f"image_{key}", list(theirs))
            shown = np.round(theirs, 6).tolist()
            notes.append(
                f"The checkpoint normalises with {key} {shown}, the base with {list(ours)}: the checkpoint's was taken."
            )
    for key, ours in _resizing(base).items():
        if (theirs := pixels.get(key, [ours])[0]) != ours:
            notes.append(f"The checkpoint's {key} is {theirs!r}, the processor's {ours!r}: accuracies can differ.")
    return processor, notes


def write_open_clip(model: ZeroShotClassifier, folder: str | Path) -> int:
    """Write `model` for `open_clip.create_model_and_transforms("local-dir:FOLDER")` and `get_tokenizer`, and read it back.

    The folder gets open_clip_config.json, open_clip_model.safetensors and, where the vocabulary is not OpenAI's, the tokenizer's files. It may
    be a folder of `save_pretrained`. On the Hub, such a vocabulary's `hf_tokenizer_name` must become the repository's id.

    Returns:
        How many tensors were written and came back bit for bit.

    Raises:
        ValueError: the model is something that open_clip cannot express, and nothing was written.
    """
    if model.processor is None:
        raise RuntimeError(
            "this model has no processor: make it with ZeroShotClassifier.load, or call attach(processor) first"
        )
    folder, tokenizer, image = Path(folder), model.processor.tokenizer, model.processor.image_processor
    vision, text, resizing = model.config.vision_config, model.config.text_config, _resizing(model)
    activations = {vision.hidden_act, text.hidden_act}
    if activations not in ({"gelu"}, {"quick_gelu"}):
        raise ValueError(
            f"open_clip has gelu or quick_gelu in both towers alike; this model has {sorted(activations)}"
        )
    if None in resizing.values():
        processing = f"{dict(image.size)} with Pillow's filter {int(image.resample)}"
        raise ValueError(
            f"open_clip resizes to {model.image_size} px, bicubic or bilinear; this model's processor: {processing}"
        )

    def tower(part, **more: object) -> dict[str, object]:
        width, mlp = part.hidden_size, part.intermediate_size
        ratio = (
            mlp / width if int(width * (mlp / width)) == mlp else (mlp + 0.5) / width
        )  # open_clip cuts off the fraction
        more |= {"mlp_ratio": ratio} if ratio != 4 else {}
        more |= {"norm_kwargs": {"eps": part.layer_norm_eps}} if part.layer_norm_eps != 1e-5 else {}
        return {"width": width, "layers": part.num_hidden_layers, **more}

    vision_cfg = tower(vision, image_size=vision.image_size, patch_size=vision.patch_size)
    text_cfg = tower(text, context_length=text.max_position_embeddings, vocab_size=text.vocab_size)
    text_cfg["heads"] = text.num_attention_heads
    if (head_width := vision.hidden_size // vision.num_attention_heads) != 64:
        vision_cfg["head_width"] = head_width
    if (pooling := _pooling(text.eos_token_id, model)) != {
        "pool_type": "argmax"
    }:  # what every version of open_clip does unasked
        text_cfg |= pooling
    prompt, ids, count = _OPENAI
    if own_words := len(tokenizer) != count or tokenizer(prompt)["input_ids"] != ids:
        text_cfg["hf_tokenizer_name"] = folder.resolve().name
    preprocess_cfg = {
        "size": model.image_size,
        "mean": list(image.image_mean),
        "std": list(image.image_std),
        **resizing,
    }
    model_cfg = {"embed_dim": model.config.projection_dim, "quick_gelu": activations == {"quick_gelu"}}
    content = {
        "model_cfg": model_cfg | {"vision_cfg": vision_cfg, "text_cfg": text_cfg},
        "preprocess_cfg": preprocess_cfg,
    }
    state, tensors = model.model.state_dict(), {}
    for theirs, ours in _rows(vision.num_hidden_layers, text.num_hidden_layers).items():
        tensor = torch.cat([state[name] for name in ours]) if len(ours) > 1 else state[ours[0]]
        tensors[theirs] = (tensor.T if theirs in _TRANSPOSED else tensor).contiguous()
    folder.mkdir(parents=True, exist_ok=True)
    if own_words:
        tokenizer.save_pretrained(folder)
    save_file(tensors, folder / "open_clip_model.safetensors", metadata={"format": "pt"})
    (folder / "open_clip_config.json").write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
    again, reading = read_checkpoint(folder, model)
    if reading.from_base or not all(
        torch.equal(tensor, state[name]) for name, tensor in again.model.state_dict().items()
    ):
        raise RuntimeError(
            f"{folder} was written, but its weights come back changed: do not use it, and please report this"
        )
    return reading.read
