"""CLIP checkpoints that other people's code wrote, read without running any of it; and open_clip's form, written.

A file is flattened to dotted names. The one that ends in `class_embedding` says where the CLIP lies and whose names it
has; one table leads from open_clip's to transformers'. What the file lacks comes from a base, and is listed.
"""

from __future__ import annotations

import copy
import itertools
import re
import warnings
import zipfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file, save_file

from hpt_hf.models.open_clip_models import CONFIG as OPEN_CLIP_CONFIG
from hpt_hf.models.open_clip_models import WEIGHTS as OPEN_CLIP_WEIGHTS
from hpt_hf.models.zero_shot import ZeroShotClassifier
from hpt_hf.publishing.export import seal_form
from hpt_hf.utils import read_json, write_json, written_whole

NAMES = {  # transformers' part of a name -> OpenAI's and open_clip's
    "vision_model.embeddings.class_embedding": "visual.class_embedding",
    "vision_model.embeddings.patch_embedding.": "visual.conv1.",
    "vision_model.embeddings.position_embedding.weight": "visual.positional_embedding",
    "vision_model.pre_layrnorm.": "visual.ln_pre.",
    "vision_model.encoder.layers.": "visual.transformer.resblocks.",
    "vision_model.post_layernorm.": "visual.ln_post.",
    "visual_projection.weight": "visual.proj",
    "text_model.embeddings.token_embedding.": "token_embedding.",
    "text_model.embeddings.position_embedding.weight": "positional_embedding",
    "text_model.encoder.layers.": "transformer.resblocks.",
    "text_model.final_layer_norm.": "ln_final.",
    "text_projection.weight": "text_projection",
    "layer_norm1.": "ln_1.",
    "self_attn.q_proj.": "attn.in_proj_",  # theirs is query, key and value, one below the other
    "self_attn.out_proj.": "attn.out_proj.",
    "layer_norm2.": "ln_2.",
    "mlp.fc1.": "mlp.c_fc.",
    "mlp.fc2.": "mlp.c_proj.",
}
SHOWN_BY_NO_WEIGHTS = ("num_attention_heads", "hidden_act", "layer_norm_eps", "eos_token_id")
TRANSPOSED = ("visual.proj", "text_projection")
# Parts that the base has no place for and that change what a tower computes.
OTHER_PARTS = re.compile(r"\b(text_model|vision_model|transformer|attn_pool\w*|cls_emb|prompt_pos_embedding)\b")
# Buffers that every CLIP computes, and the state of a training.
BUFFERS = r"position_ids|attn_mask|input_resolution|context_length|vocab_size"
NO_LOSS = re.compile(rf"(^|\.)({BUFFERS})$|^(optim|scaler|sched|lr_)")
FOLDERS = {  # a folder's config -> its weights, the first that is there
    OPEN_CLIP_CONFIG: (OPEN_CLIP_WEIGHTS, "open_clip_pytorch_model.bin"),
    "config.json": tuple(n + i for n in ("model.safetensors", "pytorch_model.bin") for i in ("", ".index.json")),
}
# What open_clip's model_cfg may say: what shapes show, what is compared with the base, what changes no logit.
MAY_SAY = re.compile(
    r"embed_dim|vision_cfg|text_cfg|layers|width|patch_size|image_size|mlp_ratio|context_length|vocab_size|heads|eos_id|"
    r"quick_gelu|head_width|norm_kwargs|custom_text|init_logit_scale|patch_dropout|output_tokens|pos_embed_type|pad_id|"
    r"tokenizer_mode|tokenizer_kwargs|(timm|hf|attn_pooler)_(?!model_name$).*"  # parts that are refused by other names
)
MAY_BE = {"pool_type": ("tok", "argmax", "eos"), "proj_type": ("linear",)}
# A prompt, its ids in OpenAI's vocabulary, and the size of that.
OPENAI_VOCABULARY = ("a photo of a cat", [49406, 320, 1125, 539, 320, 2368, 49407], 49408)
NUMBERS = (torch.float32, torch.float16, torch.bfloat16, torch.float64)  # that weights may be
HIGHEST = 2  # an eos_token_id that means whatever id is the highest in a text (transformers#24773)
# numpy's numbers, as best_acc1 in TeCoA's files: data, yet a pickle calls their maker by a name that numpy 2 changed.
NUMPY = [(np.float64(0).__reduce__()[0], f"numpy.{core}.multiarray.scalar") for core in ("core", "_core")]
NUMPY += [np.dtype, *{type(np.dtype(code)) for code in "?bhilqBHILQefd"}]


@dataclass(frozen=True)
class Reading:
    """The account of a checkpoint: whose names, how many tensors, which the base gave, what else to know."""

    form: str
    read: int
    from_base: tuple[str, ...]
    ignored: int
    notes: tuple[str, ...]

    def __str__(self) -> str:
        base, ignored = f"{len(self.from_base)} taken from the base", f"{self.ignored} entries ignored"
        return "\n- ".join((f"{self.form}: {self.read} tensors read, {base}, {ignored}", *self.notes))


def read_checkpoint(source: str | Path, base: ZeroShotClassifier) -> tuple[ZeroShotClassifier, Reading]:
    """A CLIP from a file or folder that others' code wrote, in float32 and eval mode, and the account of it.

    State dicts in OpenAI's, open_clip's or transformers' names, whole or the vision tower alone, under any prefix
    (TeCoA, PMG-AFT, TGA-ZSR, AGFT, FARE). `base`, of the same architecture, gives what is missing.

    Raises:
        ValueError: nothing there, broken, a pickle that needs code to run, no CLIP, not whole, another architecture.
    """
    source, own = Path(source), base.model.state_dict()
    entries, theirs, pixels = _open(source, base)
    form, prefix, names = _locate(entries, source)
    state, used = _translate({short: entries[name] for short, name in names.items()}, form, own, source)
    read = {names[name] for name in used}
    left = {n: v for n, v in entries.items() if n not in read and _is_plain(v) and v.numel()}
    for name in [n for n in left if _norm(n) in ("mean", "std") and left[n].numel() == 3]:
        pixels.setdefault(_norm(name), []).append(left.pop(name).flatten().tolist())
    config, notes = _reconcile_config(theirs, base)
    processor, more = _reconcile_processor(pixels, base)
    notes += more
    if unknown := [name for name in left if not NO_LOSS.search(name)]:
        notes.append(f"Left out are {len(unknown)} tensors that are no part of a CLIP: {', '.join(unknown[:3])}.")
    from_base = tuple(name for name in own if name not in state)
    if "visual_projection.weight" in from_base:
        notes.append("The projection into the shared space is the base's: the file has a vision tower without one.")
    model = type(base.model)(config).to(base.device)
    model.load_state_dict({name: state.get(name, tensor).reshape(tensor.shape) for name, tensor in own.items()})
    towers = "both towers" if "text_projection.weight" in state else "the vision tower"
    form = f"{towers} in the names of {form}" + (f", under '{prefix}'" if prefix else "")
    reading = Reading(form, len(used), from_base, len(entries) - len(used), tuple(notes))
    return ZeroShotClassifier(model, processor).eval(), reading


def _open(source: Path, base: ZeroShotClassifier) -> tuple[dict[str, object], object, dict[str, list]]:
    """(entries, the config of a folder or None, its preprocessing {word: values})."""
    if source.is_file():
        return _load(source), None, {}
    for name, candidates in FOLDERS.items():
        weights = next((source / file for file in candidates if (source / file).is_file()), None)
        if weights is None or not (source / name).is_file():
            continue
        shards = read_json(weights).get("weight_map", {}).values() if weights.suffix == ".json" else [weights.name]
        entries = {k: v for shard in sorted(set(shards)) for k, v in _load(source / Path(shard).name).items()}
        content = read_json(source / name)
        if name == OPEN_CLIP_CONFIG:
            config, pixels = _open_clips_config(content, base, source / name), content.get("preprocess_cfg") or {}
        else:
            config, pixels = _transformers_config(content, base, source / name), {}
            for file in [source / f"{kind}_config.json" for kind in ("preprocessor", "processor")]:
                image = read_json(file) if file.is_file() else {}
                pixels |= {_norm(k): v for k, v in image.get("image_processor", image).items() if "image_" in k}
        return entries, config, {word: [value] for word, value in pixels.items() if value}
    found = sorted(p.name for p in source.iterdir())[:8] if source.is_dir() else "nothing"
    expected = f"a file, or weights beside {' or '.join(FOLDERS)}"
    raise ValueError(f"no checkpoint at {source}: found {found}, expected {expected}")


def _load(file: Path) -> dict[str, object]:
    """A file's entries, nested dicts flattened. Pickles: by torch's weights-only reader, which runs nothing."""
    if not file.is_file():
        raise ValueError(f"{file} is missing: the index beside it counts it among the weights")
    try:
        if file.suffix == ".safetensors":
            content = load_file(file)
        else:
            with warnings.catch_warnings(action="ignore"), torch.serialization.safe_globals(NUMPY):
                content = torch.load(file, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(file))
    except (PermissionError, MemoryError):
        raise
    except Exception as error:  # a damaged file raises whatever its bytes happen to mean
        why = f"is damaged or not what its name says ({type(error).__name__}). Fix: fetch it again"
        if "TorchScript" in str(error):
            why = "is a TorchScript archive, a program. Fix: take weights, as those of openai/clip-vit-base-patch32"
        elif needed := re.search(r"GLOBAL ([\w.]+)", str(error)):
            why = f"is a pickle that needs {needed[1]} to be called; nothing in it was run. Fix: take a state dict"
        raise ValueError(f"{file} {why}") from error
    if not isinstance(content, Mapping):
        raise ValueError(f"{file} holds a {type(content).__name__}: expected a state dict, names to tensors")
    return dict(_flat(content, file))


def _flat(content: Mapping, file: Path, prefix: str = "", depth: int = 0) -> Iterator[tuple[str, object]]:
    if depth > 20:
        raise ValueError(f"{file} holds dicts in dicts without end: expected a state dict, names to tensors")
    for key, value in content.items():
        if isinstance(value, Mapping):
            yield from _flat(value, file, f"{prefix}{key}.", depth + 1)
        else:
            yield f"{prefix}{key}", value


def _is_plain(value: object) -> bool:
    """Is it a tensor, and not a sparse one?"""
    return isinstance(value, torch.Tensor) and value.layout == torch.strided


def _locate(entries: dict[str, object], source: Path) -> tuple[str, str, dict[str, str]]:
    """(whose names, their prefix, {name without it: name in the file}) of the tensors around the one vision tower."""
    tensors = [name for name, value in entries.items() if _is_plain(value)]
    towers = [name for name in tensors if name.split(".")[-1] == "class_embedding"]
    if len(towers) != 1:
        found = towers[:3] or f"{len(tensors)} tensors among {list(entries)[:3]}"
        raise ValueError(f"{source} holds {len(towers)} CLIP vision transformers, expected one: found {found}")
    place = towers[0].removesuffix("class_embedding")
    form, tower = ("transformers", "vision_model.") if place.endswith("embeddings.") else ("open_clip", "visual.")
    place = place.removesuffix("embeddings.")
    prefix, unnamed = place.removesuffix(tower), "" if place.endswith(tower) else tower  # alone, it may go unnamed
    inside = {unnamed + name.removeprefix(prefix): name for name in tensors if name.startswith(prefix)}
    return form, prefix, {short.removeprefix("text."): name for short, name in inside.items()}


def _table(own: Mapping[str, torch.Tensor]) -> dict[str, tuple[str, ...]]:
    """open_clip's name -> ours, for all tensors of a model; three for one that holds query, key and value."""
    table = {}
    for name in own:
        theirs = name
        for ours, other in NAMES.items():
            theirs = theirs.replace(ours, other)
        if "in_proj" in theirs:
            table[theirs] = tuple(name.replace("q_proj", f"{letter}_proj") for letter in "qkv")
        elif "self_attn." not in theirs:
            table[theirs] = (name,)
    return table


def _translate(found: dict, form: str, own: Mapping[str, torch.Tensor], source: Path) -> tuple[dict, list[str]]:
    """({our name: tensor}, the names of `found` that it was made of). A tower is there as a whole or not at all."""
    table = _table(own) if form == "open_clip" else {name: (name,) for name in own}
    fix = "Fix: a base of the same architecture, or the whole checkpoint"
    used, state = [name for name in table if name in found], {}
    if odd := [n for n in found if n not in table and not NO_LOSS.search(n) and OTHER_PARTS.search(n)]:
        raise ValueError(f"{source} holds parts that the base has not: {', '.join(odd[:4])}. {fix}")
    for name in used:
        tensor, ours = found[name], table[name]
        shape = list(own[ours[0]].shape)
        if len(ours) == 3:
            shape[0] *= 3
        if turned := form == "open_clip" and name in TRANSPOSED:
            shape.reverse()
        if list(tensor.shape) != shape and not (name == "logit_scale" and tensor.numel() == 1):
            raise ValueError(f"{name} in {source} has the shape {tuple(tensor.shape)}, expected {tuple(shape)}. {fix}")
        if tensor.dtype not in NUMBERS or not tensor.isfinite().all():
            raise ValueError(f"{name} in {source} holds {tensor.dtype}, expected finite floats of 16, 32 or 64 bits")
        tensor = tensor.T if turned else tensor
        state.update(zip(ours, tensor.chunk(3) if len(ours) == 3 else (tensor,), strict=True))
    begun = tuple({name[:3] for name in state} - {"log"})
    alone = form == "transformers" and "tex" not in begun  # a CLIPVisionModel has no projection
    missing = [n for n in own if n.startswith(begun) and n not in state and not (alone and n.startswith("visual_"))]
    if missing:
        raise ValueError(f"{source} lacks {len(missing)} tensors of its towers: {', '.join(missing[:6])}. {fix}")
    return state, used


def _norm(name: str) -> str:
    return name.split(".")[-1].removeprefix("image_")


def _open_clips_config(content: dict, base: ZeroShotClassifier, file: Path):
    """The base's config with what open_clip's says. Raises ValueError where that is no CLIPModel's."""
    cfg = content.get("model_cfg", {})
    parts = {"": cfg, "vision_cfg.": cfg.get("vision_cfg"), "text_cfg.": cfg.get("text_cfg")}
    if not all(isinstance(part, dict) for part in parts.values()):
        raise ValueError(f"{file} has no model_cfg with vision_cfg and text_cfg: not open_clip's")
    entries = [(place + k, k, v) for place, part in parts.items() for k, v in part.items()]
    odd = [f"{n} = {v!r}" for n, k, v in entries if v and not MAY_SAY.fullmatch(k) and v not in MAY_BE.get(k, ())]
    vision, text, config = cfg["vision_cfg"], cfg["text_cfg"], copy.deepcopy(base.config)
    eos = text.get("eos_id", HIGHEST) if text.get("pool_type") == "eos" else None
    if eos == HIGHEST:  # transformers would read it as the highest id
        odd.append("text_cfg.pool_type = 'eos' at id 2")
    if odd:
        raise ValueError(f"{file} describes a model that CLIPModel cannot hold: {', '.join(odd)}")
    config.vision_config.num_attention_heads = vision.get("width", 768) // vision.get("head_width", 64)
    config.text_config.num_attention_heads, config.text_config.eos_token_id = text.get("heads", 8), eos or HIGHEST
    for tower, part in ((config.vision_config, vision), (config.text_config, text)):
        tower.hidden_act = "quick_gelu" if cfg.get("quick_gelu") else "gelu"
        tower.layer_norm_eps = (part.get("norm_kwargs") or {}).get("eps", 1e-5)
    return config


def _transformers_config(content: dict, base: ZeroShotClassifier, file: Path):
    """The config of a whole CLIP, or the base's with that of a vision tower."""
    if (kind := content.get("model_type")) not in ("clip", "clip_vision_model"):
        raise ValueError(f"{file} describes a model of type {kind!r}: expected 'clip' or 'clip_vision_model'")
    whole = content if kind == "clip" else base.config.to_dict() | {"vision_config": content}
    return type(base.config).from_dict(whole)


def _pooling(eos: int, classifier: ZeroShotClassifier) -> dict[str, object]:
    """Where the text tower's embedding is read, in open_clip's words; {}: at the highest id, which it does unasked."""
    highest = max(classifier.processor.tokenizer.get_vocab().values())
    return {} if eos in (HIGHEST, highest) else {"pool_type": "eos", "eos_id": eos}


def _reconcile_config(theirs, base: ZeroShotClassifier) -> tuple[object, list[str]]:
    """The base's config with what the checkpoint's own says, and a sentence on each difference."""
    config, notes = copy.deepcopy(base.config), ["Tokenizer and processor are the base's."]
    if theirs is None:
        act = config.vision_config.hidden_act
        return config, [*notes, f"Activation ({act}) and number of heads are the base's: no weights show them."]
    for tower, field in itertools.product(("vision_config", "text_config"), SHOWN_BY_NO_WEIGHTS):
        ours, value = (getattr(getattr(c, tower), field, None) for c in (config, theirs))
        if value == ours or (field == "eos_token_id" and _pooling(value, base) == _pooling(ours, base)):
            continue
        difference = f"{tower}.{field} is {value!r} in the checkpoint's config and {ours!r} in the base's"
        if field == "num_attention_heads":
            raise ValueError(f"{difference}: expected a base of the same architecture")
        setattr(getattr(config, tower), field, value)
        notes.append(f"{difference}: the checkpoint's was taken.")
    return config, notes


def _resizing(classifier: ZeroShotClassifier) -> dict[str, str | None]:
    """How the processor makes images of the tower's size, in open_clip's words; None where it has none."""
    size, image = classifier.image_size, classifier.processor.image_processor
    squash = image.size.get("height") == image.size.get("width") == size
    mode = "shortest" if image.size.get("shortest_edge") == size else "squash" if squash else None
    return {"interpolation": {2: "bilinear", 3: "bicubic"}.get(int(image.resample)), "resize_mode": mode}


def _reconcile_processor(pixels: dict[str, list], base: ZeroShotClassifier) -> tuple[object, list[str]]:
    """The base's processor with the checkpoint's own mean and std, and a sentence on each difference."""
    processor, notes = copy.deepcopy(base.processor), []
    image = processor.image_processor
    for key, ours in (("mean", image.image_mean), ("std", image.image_std)):
        theirs, *others = pixels.get(key, [ours])
        if not all(np.allclose(other, theirs, atol=1e-6) for other in others):
            raise ValueError(f"the checkpoint holds more than one {key}: {theirs} and {others}")
        if np.size(theirs) != 3 or not all(0 <= v <= 1 for v in theirs):
            raise ValueError(f"the checkpoint's {key} is {theirs}: expected three numbers in [0, 1]")
        if not np.allclose(ours, theirs, atol=1e-6):
            setattr(image, f"image_{key}", list(theirs))
            shown = np.round(theirs, 6).tolist()
            notes.append(f"The checkpoint's {key} is {shown}, the base's {list(ours)}: the checkpoint's was taken.")
    for key, ours in _resizing(base).items():
        if (theirs := pixels.get(key, [ours])[0]) != ours:
            notes.append(f"The checkpoint's {key} is {theirs!r}, the processor's {ours!r}: accuracies can differ.")
    return processor, notes


def write_open_clip(classifier: ZeroShotClassifier, folder: str | Path, records: dict | None = None) -> int:
    """Write for `open_clip.create_model_and_transforms("local-dir:FOLDER")`; how many tensors came back bit for bit.

    Beside the same model in transformers' form, that one's seal, records and card stand for both.

    Raises:
        ValueError: it is something that open_clip cannot express, and nothing was written.
    """
    folder, tokenizer = Path(folder), classifier.processor.tokenizer
    content = _open_clip_config(classifier)
    prompt, ids, size = OPENAI_VOCABULARY
    own_vocabulary = len(tokenizer) != size or tokenizer(prompt)["input_ids"] != ids
    if own_vocabulary:
        content["model_cfg"]["text_cfg"]["hf_tokenizer_name"] = folder.resolve().name
    state, tensors = classifier.model.state_dict(), {}
    for theirs, ours in _table(state).items():
        tensor = torch.cat([state[name] for name in ours]) if len(ours) == 3 else state[ours[0]]
        tensors[theirs] = (tensor.T if theirs in TRANSPOSED else tensor).contiguous()
    with written_whole(folder, last=OPEN_CLIP_CONFIG) as stage:
        if own_vocabulary:
            tokenizer.save_pretrained(stage)
        save_file(tensors, stage / OPEN_CLIP_WEIGHTS, metadata={"format": "pt"})
        write_json(stage / OPEN_CLIP_CONFIG, content)
        again, reading = read_checkpoint(stage, classifier)
        assert not reading.from_base and all(torch.equal(t, state[n]) for n, t in again.model.state_dict().items())
        if not (folder / "config.json").is_file():
            seal_form(stage, folder, "open_clip", classifier, records or {})
    return reading.read


def _open_clip_config(classifier: ZeroShotClassifier) -> dict[str, dict]:
    config, image, resizing = classifier.config, classifier.processor.image_processor, _resizing(classifier)
    vision, text = config.vision_config, config.text_config
    activations = sorted({vision.hidden_act, text.hidden_act})
    if activations not in (["gelu"], ["quick_gelu"]):
        raise ValueError(f"open_clip has gelu or quick_gelu in both towers alike, this model has {activations}")
    if None in resizing.values():
        ours = f"{dict(image.size)} with Pillow's filter {int(image.resample)}"
        raise ValueError(f"open_clip resizes to {classifier.image_size} px, bicubic or bilinear, and not: {ours}")

    def tower(part, **more: object) -> dict[str, object]:
        width, mlp = part.hidden_size, part.intermediate_size
        ratio = mlp / width if int(width * (mlp / width)) == mlp else (mlp + 0.5) / width  # it cuts off the fraction
        norm = {"norm_kwargs": {"eps": part.layer_norm_eps}} if part.layer_norm_eps != 1e-5 else {}
        return {"width": width, "layers": part.num_hidden_layers, "mlp_ratio": ratio, **more, **norm}

    head_width = vision.hidden_size // vision.num_attention_heads
    vision_cfg = tower(vision, image_size=vision.image_size, patch_size=vision.patch_size, head_width=head_width)
    text_cfg = tower(text, context_length=text.max_position_embeddings, vocab_size=text.vocab_size)
    text_cfg |= {"heads": text.num_attention_heads, **_pooling(text.eos_token_id, classifier)}
    model_cfg = {"embed_dim": config.projection_dim, "quick_gelu": activations == ["quick_gelu"]}
    normalisation = {"mean": list(image.image_mean), "std": list(image.image_std)}
    return {
        "model_cfg": model_cfg | {"vision_cfg": vision_cfg, "text_cfg": text_cfg},
        "preprocess_cfg": {"size": classifier.image_size, **normalisation, **resizing},
    }
