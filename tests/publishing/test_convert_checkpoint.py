"""Foreign checkpoints give here what their own code gives, nothing in a file is run, and every tensor is accounted for.

What their code computes is written out below in plain torch, under their names; with open_clip installed, it is asked itself.
"""

import collections
import copy
import functools
import itertools
import json
import os
import pickle
import shutil
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import CLASSES, save_tiny_clip, weights
from PIL import Image
from safetensors.torch import load_file, save_file
from transformers import CLIPModel, CLIPVisionModel, CLIPVisionModelWithProjection

from hpt_hf.data.collator import Collator
from hpt_hf.models.zero_shot import ZeroShotClassifier, fingerprint
from hpt_hf.publishing.convert_checkpoint import read_checkpoint, write_open_clip

MEAN, STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
IMAGENET = {"mean": [0.485, 0.456, 0.406], "std": [0.229, 0.224, 0.225]}
PROMPTS = [f"a {c}, this is a photo" for c in CLASSES]
VISUAL, TEXT = 8 + 12 * 2, 5 + 12 * 2  # tensors of the student's towers in open_clip's form, projections included

# --- OpenAI's and open_clip's architecture in plain torch, under their names


def random_clip(base, seed=0) -> dict[str, torch.Tensor]:
    """A state dict of OpenAI's CLIP class, as its own __init__ names and shapes it, with the base's sizes."""
    rng = torch.Generator().manual_seed(seed)
    v, t, dim = base.config.vision_config, base.config.text_config, base.config.projection_dim

    def normal(*shape, scale=0.3):
        return torch.randn(*shape, generator=rng) * scale

    sd = {
        "positional_embedding": normal(t.max_position_embeddings, t.hidden_size),
        "text_projection": normal(t.hidden_size, dim),
        "logit_scale": torch.tensor(3.0),
        "visual.class_embedding": normal(v.hidden_size),
        "visual.positional_embedding": normal((v.image_size // v.patch_size) ** 2 + 1, v.hidden_size),
        "visual.proj": normal(v.hidden_size, dim),
        "visual.conv1.weight": normal(v.hidden_size, 3, v.patch_size, v.patch_size) / v.patch_size,
        "token_embedding.weight": normal(t.vocab_size, t.hidden_size),
    }
    norms = {"visual.ln_pre": v.hidden_size, "visual.ln_post": v.hidden_size, "ln_final": t.hidden_size}
    for prefix, tower in (("visual.transformer", v), ("transformer", t)):
        for i in range(tower.num_hidden_layers):
            at, width, mlp = f"{prefix}.resblocks.{i}", tower.hidden_size, tower.intermediate_size
            norms |= {f"{at}.ln_1": width, f"{at}.ln_2": width}
            for name, out, inner in (
                ("attn.out_proj", width, width),
                ("mlp.c_fc", mlp, width),
                ("mlp.c_proj", width, mlp),
            ):
                sd |= {
                    f"{at}.{name}.weight": normal(out, inner, scale=0.15),
                    f"{at}.{name}.bias": normal(out, scale=0.15),
                }
            sd[f"{at}.attn.in_proj_weight"] = normal(3 * width, width, scale=0.15)
            sd[f"{at}.attn.in_proj_bias"] = normal(3 * width, scale=0.15)
    for name, width in norms.items():
        sd |= {f"{name}.weight": normal(width) + 1, f"{name}.bias": normal(width)}
    return sd


def norm(sd, name, x):
    return F.layer_norm(x, x.shape[-1:], sd[f"{name}.weight"], sd[f"{name}.bias"])


def run_blocks(sd, stem, x, heads, quick, mask=None):
    for i in itertools.count():
        at = f"{stem}.{i}"
        if f"{at}.ln_1.weight" not in sd:
            return x
        y = norm(sd, f"{at}.ln_1", x).transpose(0, 1)
        inner = (sd[f"{at}.attn.in_proj_weight"], sd[f"{at}.attn.in_proj_bias"], None, None, False, 0.0)
        outer = (sd[f"{at}.attn.out_proj.weight"], sd[f"{at}.attn.out_proj.bias"])
        settings = {"training": False, "need_weights": False, "attn_mask": mask}
        mixed, _ = F.multi_head_attention_forward(y, y, y, y.shape[-1], heads, *inner, *outer, **settings)
        x = x + mixed.transpose(0, 1)
        y = F.linear(norm(sd, f"{at}.ln_2", x), sd[f"{at}.mlp.c_fc.weight"], sd[f"{at}.mlp.c_fc.bias"])
        y = y * torch.sigmoid(1.702 * y) if quick else F.gelu(y)
        x = x + F.linear(y, sd[f"{at}.mlp.c_proj.weight"], sd[f"{at}.mlp.c_proj.bias"])


def reference_embeds(sd, model, *, quick=False, mean=MEAN, std=STD):
    """(image, text) embeddings of the test's images and prompts."""
    pixels = (images(model) - torch.tensor(mean).view(3, 1, 1)) / torch.tensor(std).view(3, 1, 1)
    weight, heads = sd["visual.conv1.weight"], model.config.vision_config.num_attention_heads
    x = F.conv2d(pixels, weight, stride=weight.shape[-1]).flatten(2).transpose(1, 2)
    x = torch.cat([sd["visual.class_embedding"].expand(len(x), 1, -1), x], 1) + sd["visual.positional_embedding"]
    x = run_blocks(sd, "visual.transformer.resblocks", norm(sd, "visual.ln_pre", x), heads, quick)[:, 0]
    image = norm(sd, "visual.ln_post", x) @ sd["visual.proj"]
    tokens, heads = ids(model), model.config.text_config.num_attention_heads
    mask = torch.full((tokens.shape[1],) * 2, float("-inf")).triu(1)
    x = sd["token_embedding.weight"][tokens] + sd["positional_embedding"]
    x = norm(sd, "ln_final", run_blocks(sd, "transformer.resblocks", x, heads, quick, mask))
    return image, x[torch.arange(len(x)), tokens.argmax(-1)] @ sd["text_projection"]


def images(model, count=4):
    return torch.rand(count, 3, model.image_size, model.image_size, generator=torch.Generator().manual_seed(5))


def ids(model):
    context = model.config.text_config.max_position_embeddings
    settings = {"padding": "max_length", "max_length": context, "return_tensors": "pt"}
    return model.processor.tokenizer(PROMPTS, **settings)["input_ids"]


@torch.no_grad()
def embeds(model):
    return model.embed_images(images(model)), model.model.get_text_features(ids(model)).pooler_output


def assert_close(ours, theirs):
    """Within 1e-4, of embeddings that differ among themselves by far more."""
    assert ours.shape == theirs.shape and (theirs[0] - theirs[1]).abs().max() > 0.05
    assert float((ours - theirs).abs().max()) < 1e-4


# --- the published forms: each writes a state dict as its code does


def without(sd, *names):
    return {n: t for n, t in sd.items() if n not in names}


def under(prefix, sd):
    return collections.OrderedDict((prefix + name, tensor) for name, tensor in sd.items())


def visual(sd):
    return {n.removeprefix("visual."): t for n, t in sd.items() if n.startswith("visual.")}


def sgd_state(sd):
    """A real optimiser's state, momentum and all."""
    parameters = [torch.nn.Parameter(t.clone()) for t in sd.values()]
    optimiser = torch.optim.SGD(parameters, 0.1, momentum=0.9)
    sum(p.sum() for p in parameters).backward()
    optimiser.step()
    return optimiser.state_dict()


def tecoa(sd, module="module."):
    """finetuning.py and PMG_AFT.py, save_checkpoint: NullPrompter, TokenPrompter(0), best_acc1 = numpy.mean(...)."""
    return {
        "epoch": 3,
        "state_dict": collections.OrderedDict(),
        "add_prompter": {f"{module}prompt": torch.randn(1, 0, 768)},
        "vision_encoder_state_dict": collections.OrderedDict(visual(sd)),
        "best_acc1": np.mean([51.5, 52.5]),
        "optimizer": sgd_state(visual(sd)),
    }


def adv_flyp(sd):
    return without(tecoa(sd), "vision_encoder_state_dict") | {"partial_state_dict": under("visual.", visual(sd))}


def openai(sd):
    numbers = {"input_resolution": 32, "context_length": 24, "vocab_size": 600}
    return {n: t.half() for n, t in sd.items()} | {n: torch.tensor(number) for n, number in numbers.items()}


def custom_text(sd):
    names = {n: n if n.startswith("visual.") or n == "logit_scale" else f"text.{n}" for n in sd}
    return {names[n]: t for n, t in sd.items()} | {"text.attn_mask": torch.zeros(24, 24)}


def open_clip_training(sd):
    scaler = {"scale": 65536.0, "growth_factor": 2.0}
    return {"epoch": 5, "state_dict": under("module.", sd), "optimizer": sgd_state(sd), "scaler": scaler}


def prompt_learner(sd):
    return under("image_encoder.", visual(sd)) | {"prompt_learner.ctx": torch.randn(4, 8)}


FORMS = {  # name: (what the code saves, suffix, both towers, entries ignored, does a note name what is left out)
    "TeCoA, PMG-AFT": (tecoa, ".pth.tar", False, 36, False),
    "TGA-ZSR": (lambda sd: tecoa(sd, ""), ".pth.tar", False, 36, False),
    "AGFT": (lambda sd: {"modules": {"clip.visual": visual(sd)}, "params": {}}, ".pth", False, 0, False),
    "AdvFLYP": (adv_flyp, ".pth.tar", False, 36, False),
    "FARE": (visual, ".pt", False, 0, False),
    "FARE's wrapper": (lambda sd: under("module.model.", visual(sd)), ".pt", False, 0, False),
    "vision tower, safetensors": (visual, ".safetensors", False, 0, False),
    "vision tower under its name": (lambda sd: under("visual.", visual(sd)), ".ckpt", False, 0, False),
    "prompt learner": (prompt_learner, ".pth", False, 1, True),
    "OpenAI, in half": (openai, ".pt", True, 3, False),
    "open_clip, safetensors": (dict, ".safetensors", True, 0, False),
    "open_clip, training": (open_clip_training, ".pt", True, 66, False),
    "open_clip, custom text": (custom_text, ".pt", True, 1, False),
    "open_clip, compiled": (lambda sd: {"state_dict": under("module._orig_mod.", sd)}, ".pt", True, 0, False),
    "wrapped": (lambda sd: {"model": under("clip.", sd), "args": None}, ".pt", True, 1, False),
    "with more": (
        lambda sd: sd | {"head.weight": torch.ones(3, 3), "logit_bias": torch.ones(2)},
        ".pt",
        True,
        2,
        True,
    ),
}


def save(content, file):
    if str(file).endswith(".safetensors"):
        save_file({n: t.contiguous() for n, t in content.items()}, file)
    else:
        torch.save(content, file)
    return file


@pytest.fixture(scope="module")
def base(student_path):
    return ZeroShotClassifier.from_pretrained(student_path)


@pytest.fixture(scope="module")
def theirs(base):
    return random_clip(base)


@pytest.mark.parametrize("form", FORMS)
def test_a_published_form_gives_what_its_own_code_gives(form, base, theirs, tmp_path):
    make, suffix, both, ignored, noted = FORMS[form]
    before = weights(base)
    model, reading = read_checkpoint(save(make(theirs), tmp_path / f"file{suffix}"), base)
    sd = {n: t.half().float() for n, t in theirs.items()} if "half" in form else theirs
    image, text = embeds(model)
    expected = reference_embeds(sd, base)
    assert_close(image, expected[0])
    assert_close(text, expected[1] if both else embeds(base)[1])
    assert torch.equal(model.model.logit_scale, sd["logit_scale"] if both else base.model.logit_scale)
    # Every tensor of the file is read or counted, every tensor of the model comes from one place.
    assert reading.read == (VISUAL + TEXT + 1 if both else VISUAL) and reading.ignored == ignored
    assert len(reading.from_base) == (0 if both else 5 + 16 * 2 + 1)
    assert {p.dtype for p in model.parameters()} == {torch.float32} and not model.training
    towers = "both towers" if both else "the vision tower"
    assert reading.form.startswith(towers) and f"{reading.read} tensors read" in str(reading)
    assert any("no part of a CLIP" in note for note in reading.notes) == noted
    assert all(torch.equal(model.model.state_dict()[n], base.model.state_dict()[n]) for n in reading.from_base)
    with torch.no_grad():
        model.model.logit_scale.add_(1), model.model.text_model.final_layer_norm.bias.add_(1)
    assert all(torch.equal(t, before[n]) for n, t in base.model.state_dict().items()), "no weights are shared"


PARTS = (
    "visual.transformer.resblocks.0.ls_1.gamma",
    "visual.attn_pool.query",
    "cls_emb",
    "visual.prompt_pos_embedding",
)


@pytest.mark.parametrize("unknown", [*PARTS, "text.transformer.embeddings.x"])
def test_an_unknown_part_of_a_tower_is_refused(base, theirs, tmp_path, unknown):
    with pytest.raises(ValueError, match=f"parts that the base has not: {unknown.removeprefix('text.')}"):
        read_checkpoint(save(theirs | {unknown: torch.ones(2)}, tmp_path / "a.pt"), base)


# --- transformers' names


@pytest.fixture(scope="module")
def stock(student_path):
    """A stock CLIPModel of the student's architecture with other weights."""
    torch.manual_seed(7)
    return CLIPModel(CLIPModel.from_pretrained(student_path).config).eval()


def some(prefix):
    return lambda m: {n: t for n, t in m.state_dict().items() if n.startswith(prefix)}


POSITIONS = {f"{tower}_model.embeddings.position_ids": torch.arange(17)[None] for tower in ("text", "vision")}
HEAD = {"lm_head.weight": torch.ones(2, 2)}
HF_FORMS = {  # name: (content, tensors read, from the base)
    "whole": (lambda m: m.state_dict(), 78, 0),
    "old, with buffers": (lambda m: m.state_dict() | POSITIONS, 78, 0),
    "under a prefix": (lambda m: {"state_dict": under("module.model.", m.state_dict())}, 78, 0),
    "with projection": (some("vis"), 40, 38),
    "without projection": (some("vision_model."), 39, 39),
    "flat": (lambda m: m.vision_model.state_dict(), 39, 39),
    "in a LLaVA": (lambda m: under("model.vision_tower.", some("vision_model.")(m)) | HEAD, 39, 39),
}


@pytest.mark.parametrize("form", HF_FORMS)
def test_transformers_names_are_read_whole_or_in_part(form, base, stock, tmp_path):
    make, read, from_base = HF_FORMS[form]
    model, reading = read_checkpoint(save(make(stock), tmp_path / "a.bin"), base)
    assert (reading.read, len(reading.from_base)) == (read, from_base) and "names of transformers" in reading.form
    mine, other, own = model.model.state_dict(), stock.state_dict(), base.model.state_dict()
    assert all(torch.equal(mine[n], own[n] if n in reading.from_base else other[n]) for n in mine) and len(mine) == 78
    assert ("visual_projection.weight" in reading.from_base) == any("projection" in note for note in reading.notes)


@pytest.mark.parametrize("kind", [CLIPVisionModel, CLIPVisionModelWithProjection])
def test_a_folder_of_transformers_vision_tower_is_read(kind, base, student_path, tmp_path):
    tower = kind.from_pretrained(student_path)
    tower.load_state_dict({n: torch.full_like(t, 0.25) for n, t in tower.state_dict().items()})
    tower.save_pretrained(tmp_path)
    model, reading = read_checkpoint(tmp_path, base)
    assert reading.read == len(tower.state_dict())
    assert bool((model.model.vision_model.pre_layrnorm.weight == 0.25).all())


@pytest.mark.parametrize("size", ["5GB", "80KB"])
def test_a_folder_without_processor_and_tokenizer_is_completed(base, stock, tmp_path, size):
    """LEAF's repositories: config.json and safetensors, the large ones in shards."""
    stock.save_pretrained(tmp_path, max_shard_size=size)
    with pytest.raises((OSError, ValueError)):
        ZeroShotClassifier.from_pretrained(tmp_path)
    model, reading = read_checkpoint(tmp_path, base)
    assert (reading.read, reading.from_base, reading.ignored) == (78, (), 0)
    assert reading.notes == ("Tokenizer and processor are the base's.",)
    assert all(torch.equal(t, stock.state_dict()[n]) for n, t in model.model.state_dict().items())
    if size == "80KB":
        sorted(tmp_path.glob("*.safetensors"))[1].unlink()
        with pytest.raises(ValueError, match="model-00002-of.*is missing"):
            read_checkpoint(tmp_path, base)


# --- what weights do not show


def edit(file, change):
    content = json.loads(Path(file).read_text())
    change(content)
    Path(file).write_text(json.dumps(content))


def towers(**changes):
    return lambda content: [content[f"{tower}_config"].update(changes) for tower in ("text", "vision")]


@pytest.mark.parametrize("quick", [False, True])
def test_the_activation_of_a_bare_file_is_the_bases(quick, base, theirs, student_path, tmp_path):
    shutil.copytree(student_path, tmp_path / "base")
    act = "quick_gelu" if quick else "gelu"
    edit(tmp_path / "base/config.json", towers(hidden_act=act))
    other = ZeroShotClassifier.from_pretrained(tmp_path / "base")
    model, reading = read_checkpoint(save(theirs, tmp_path / "a.pt"), other)
    for ours, reference in zip(embeds(model), reference_embeds(theirs, other, quick=quick), strict=True):
        assert_close(ours, reference)
    assert any(f"Activation ({act})" in note for note in reading.notes)


def test_the_activation_of_a_folder_wins_and_is_noted_and_other_heads_are_refused(base, stock, tmp_path):
    stock.save_pretrained(tmp_path)
    edit(tmp_path / "config.json", towers(hidden_act="quick_gelu"))
    model, reading = read_checkpoint(tmp_path, base)
    assert sum("hidden_act is 'quick_gelu' in the checkpoint's" in note for note in reading.notes) == 2
    quick, pixels = CLIPModel.from_pretrained(tmp_path).eval(), (images(base) - base.mean) / base.std
    with torch.no_grad():
        assert_close(embeds(model)[0], quick.get_image_features(pixel_values=pixels).pooler_output)
        assert_close(embeds(model)[1], quick.get_text_features(ids(base)).pooler_output)
    edit(tmp_path / "config.json", towers(num_attention_heads=4))
    with pytest.raises(ValueError, match="vision_config.num_attention_heads is 4 in the checkpoint.* 2 in the base"):
        read_checkpoint(tmp_path, base)
    edit(tmp_path / "config.json", lambda c: c.update(model_type="siglip"))
    with pytest.raises(ValueError, match="a model of type 'siglip': expected 'clip'"):
        read_checkpoint(tmp_path, base)


# --- open_clip's form


@pytest.fixture(scope="module")
def open_clip_folder(base, theirs, tmp_path_factory):
    """A model with foreign weights, written in open_clip's form."""
    folder = tmp_path_factory.mktemp("open_clip") / "model"
    model, _ = read_checkpoint(save(theirs, folder.parent / "a.pt"), base)
    assert write_open_clip(model, folder) == VISUAL + TEXT + 1
    return folder


def test_there_and_back_is_bit_equal(base, theirs, open_clip_folder, tmp_path):
    written = load_file(open_clip_folder / "open_clip_model.safetensors")
    assert set(written) == set(theirs) and all(torch.equal(written[n], theirs[n]) for n in theirs)
    model, reading = read_checkpoint(open_clip_folder, base)
    assert (reading.read, reading.from_base, reading.ignored) == (62, (), 0)
    assert reading.notes == ("Tokenizer and processor are the base's.",), "no difference where there is none"
    model.save_pretrained(tmp_path / "model")  # both forms live in one folder
    write_open_clip(model, tmp_path / "model")
    for file in ("open_clip_model.safetensors", "open_clip_config.json"):
        assert (open_clip_folder / file).read_bytes() == (tmp_path / "model" / file).read_bytes()
    assert fingerprint(ZeroShotClassifier.from_pretrained(tmp_path / "model")) == fingerprint(model)
    (open_clip_folder.parent / "pickle").mkdir()
    shutil.copy(open_clip_folder / "open_clip_config.json", open_clip_folder.parent / "pickle")
    torch.save(theirs, open_clip_folder.parent / "pickle" / "open_clip_pytorch_model.bin")
    assert fingerprint(read_checkpoint(open_clip_folder.parent / "pickle", base)[0]) == fingerprint(model)


def test_the_config_says_what_the_model_is(base, open_clip_folder):
    content = json.loads((open_clip_folder / "open_clip_config.json").read_text())
    tower = {"width": 32, "layers": 2, "mlp_ratio": 2.0}
    context, tokens = base.config.text_config.max_position_embeddings, len(base.processor.tokenizer)
    text = {"context_length": context, "vocab_size": tokens, "heads": 2, "hf_tokenizer_name": "model"}
    vision = {"image_size": 32, "patch_size": 8, "head_width": 16}
    model = {"embed_dim": 24, "quick_gelu": False, "vision_cfg": tower | vision, "text_cfg": tower | text}
    normalisation = {"mean": list(MEAN), "std": list(STD)}
    pixels = {"size": 32, **normalisation, "interpolation": "bicubic", "resize_mode": "shortest"}
    assert (
        content == {"model_cfg": model, "preprocess_cfg": pixels} and (open_clip_folder / "tokenizer.json").is_file()
    )


def with_config(folder, place, **changes):
    """A copy of open_clip's folder whose config says something else."""
    shutil.copytree(folder, place)

    def change(content):
        for path, value in changes.items():
            *parts, last = path.split("__")
            functools.reduce(dict.__getitem__, parts, content)[last] = value

    edit(place / "open_clip_config.json", change)
    return place


REFUSED_CONFIGS = {
    **{
        f"vision_cfg__{n}": {"a": 1}
        for n in ("no_ln_pre", "attentional_pool", "ls_init_value", "timm_model_name", "qk_norm")
    },
    **{"vision_cfg__pool_type": "avg", "text_cfg__proj_type": "none", "text_cfg__hf_model_name": "x"},
    **{"text_cfg__no_causal_mask": True, "init_logit_bias": -10},
}


@pytest.mark.parametrize("path", REFUSED_CONFIGS)
def test_a_config_of_what_no_clip_model_is_is_refused(base, open_clip_folder, tmp_path, path):
    place = with_config(open_clip_folder, tmp_path / "a", **{f"model_cfg__{path}": REFUSED_CONFIGS[path]})
    with pytest.raises(ValueError, match=f"cannot hold: {path.replace('__', '.')} = "):
        read_checkpoint(place, base)


def test_what_a_config_may_say_and_what_contradicts_the_base(base, theirs, open_clip_folder, tmp_path):
    defaults = {"timm_pool": "avg", "timm_model_name": None, "attn_pooler_heads": 8, "attentional_pool": False}
    vision = {f"model_cfg__vision_cfg__{k}": v for k, v in {**defaults, "pool_type": "tok"}.items()}
    place = with_config(open_clip_folder, tmp_path / "defaults", **vision, model_cfg__text_cfg__hf_proj_type="mlp")
    assert read_checkpoint(place, base)[1].read == 62
    model, reading = read_checkpoint(with_config(open_clip_folder, tmp_path / "q", model_cfg__quick_gelu=True), base)
    assert sum("hidden_act is 'quick_gelu' in the checkpoint's" in note for note in reading.notes) == 2
    for ours, reference in zip(embeds(model), reference_embeds(theirs, base, quick=True), strict=True):
        assert_close(ours, reference)
    # As in open_clip's XLM-V models: transformers would take 2 for the highest id.
    at_2 = {"model_cfg__text_cfg__pool_type": "eos", "model_cfg__text_cfg__eos_id": 2}
    for name, changes, message in (
        ("eos", at_2, "cannot hold: text_cfg.pool_type = 'eos' at id 2"),
        ("width", {"model_cfg__vision_cfg__head_width": 8}, "num_attention_heads is 4 in the checkpoint's"),
        ("heads", {"model_cfg__text_cfg__heads": 8}, "num_attention_heads is 8 in the checkpoint's"),
    ):
        with pytest.raises(ValueError, match=message):
            read_checkpoint(with_config(open_clip_folder, tmp_path / name, **changes), base)


# --- normalisation


@pytest.mark.parametrize(
    "how", ["config", "buffers", "buffers beside", "preprocessor_config.json", "processor_config.json"]
)
def test_the_checkpoints_own_normalisation_is_taken_and_exported(how, base, stock, theirs, open_clip_folder, tmp_path):
    other = {"interpolation": "bilinear", "resize_mode": "squash"}
    if how == "config":
        place = with_config(open_clip_folder, tmp_path / "a", preprocess_cfg=IMAGENET | other)
    elif how.endswith("json"):
        stock.save_pretrained(place := tmp_path / "a")
        image = {f"image_{k}": v for k, v in IMAGENET.items()}
        (place / how).write_text(json.dumps({"image_processor": image} if how.startswith("processor") else image))
    else:
        name, prefix = ("normalize.{}", "model.") if "beside" in how else ("{}", "")
        buffers = {name.format(k): torch.tensor(v).view(1, 3, 1, 1) for k, v in IMAGENET.items()}
        place = save(under(prefix, theirs) | buffers, tmp_path / "a.pt")
    model, reading = read_checkpoint(place, base)
    if not how.endswith("json"):
        assert_close(embeds(model)[0], reference_embeds(theirs, base, **IMAGENET)[0])
    assert sum(" the checkpoint's was taken" in note for note in reading.notes) == 2
    assert any("interpolation is 'bilinear', the processor's 'bicubic'" in n for n in reading.notes) == (
        how == "config"
    )
    assert any("resize_mode is 'squash'" in note for note in reading.notes) == (how == "config")
    model.save_pretrained(tmp_path / "out")
    saved = ZeroShotClassifier.from_pretrained(tmp_path / "out")
    assert np.allclose(saved.mean.flatten(), IMAGENET["mean"]) and np.allclose(saved.std.flatten(), IMAGENET["std"])
    assert list(base.processor.image_processor.image_mean) == list(MEAN)


def test_two_normalisations_are_refused_and_the_same_twice_is_none(base, theirs, tmp_path):
    same = {"mean": torch.tensor(MEAN), "std": torch.tensor(STD)}
    assert not any("taken" in n for n in read_checkpoint(save(theirs | same, tmp_path / "a.pt"), base)[1].notes)
    for buffers, message in (
        ({"mean": torch.tensor(MEAN), "teacher.mean": torch.tensor(IMAGENET["mean"])}, "more than one mean"),
        ({"mean": torch.tensor([122.7, 116.7, 104.0])}, r"mean is \[122.*expected three numbers in \[0, 1\]"),
    ):
        with pytest.raises(ValueError, match=message):
            read_checkpoint(save(theirs | buffers, tmp_path / "a.pt"), base)


# --- nothing is run, nothing broken is used


class Trap:
    def __init__(self, file):
        self.file = str(file)

    def __reduce__(self):
        return os.mkdir, (self.file,)


PICKLED = {
    "torch.save": lambda content, file: torch.save(content, file),
    "old torch.save": lambda content, file: torch.save(content, file, _use_new_zipfile_serialization=False),
    "pickle.dump": lambda content, file: file.write_bytes(pickle.dumps(without(content, "state_dict"), protocol=2)),
    "pickle.dump, new": lambda content, file: file.write_bytes(
        pickle.dumps(without(content, "state_dict"), protocol=5)
    ),
}


@pytest.mark.parametrize("how", PICKLED)
def test_code_in_a_pickle_is_refused_by_name_and_not_run(how, base, theirs, tmp_path):
    file, trap = tmp_path / "a.pt", tmp_path / "sprung"
    PICKLED[how]({"state_dict": theirs, "extra": Trap(trap)}, file)
    code = r"is a pickle that needs (posix|nt)\.mkdir to be called"
    with pytest.raises(ValueError, match="a.pt is damaged" if how.endswith("new") else rf"a\.pt {code}"):
        read_checkpoint(file, base)
    assert not trap.exists()
    pickle.loads(file.read_bytes()) if how.startswith("pickle") else torch.load(file, weights_only=False)
    assert trap.is_dir(), "the control: the trap does work"


def test_the_numbers_of_numpy_are_data(base, theirs, tmp_path):
    """best_acc1 of TeCoA's files, from numpy 1 and 2. Allowed while a file is read, and no longer."""
    file = tmp_path / "a.pt"
    for number in (np.float64(1.5), np.float32(1.5), np.int64(3), np.bool_(True)):
        torch.save(visual(theirs) | {"best": number}, file, _use_new_zipfile_serialization=False)
        assert read_checkpoint(file, base)[1].ignored == 1
    file.write_bytes(file.read_bytes().replace(b"numpy._core.multiarray", b"numpy.core.multiarray"))
    assert read_checkpoint(file, base)[1].ignored == 1 and np.dtype not in torch.serialization.get_safe_globals()


def test_programs_are_refused(base, tmp_path):
    with warnings.catch_warnings(action="ignore"):
        torch.jit.trace(torch.nn.Linear(2, 2), torch.ones(1, 2)).save(tmp_path / "ViT-B-32.pt")
    with pytest.raises(ValueError, match="TorchScript archive.*openai/clip-vit-base-patch32"):
        read_checkpoint(tmp_path / "ViT-B-32.pt", base)
    torch.save(torch.nn.Linear(2, 2), tmp_path / "a.pth")
    with pytest.raises(ValueError, match="needs torch.nn.modules.linear.Linear"):
        read_checkpoint(tmp_path / "a.pth", base)


@pytest.mark.parametrize("suffix", [".pt", ".safetensors"])
def test_a_truncated_file_or_one_of_something_else_is_named(base, theirs, tmp_path, suffix):
    raw = save(dict(theirs), tmp_path / f"cut{suffix}").read_bytes()
    for content in (b"", raw[: len(raw) // 50], raw[: len(raw) // 2], raw[:-50], b"<!DOCTYPE html>Log in" * 20):
        (tmp_path / f"cut{suffix}").write_bytes(content)
        with pytest.raises(ValueError, match=rf"cut\{suffix} is damaged or not what its name says"):
            read_checkpoint(tmp_path / f"cut{suffix}", base)


LAYER = "visual.transformer.resblocks.0."


def holds_itself(content: dict) -> dict:
    content["model"] = content
    return content


BROKEN = {  # what is in the file: what the message says
    "nothing": (lambda sd: {}, "holds 0 CLIP vision transformers, expected one: found 0 tensors"),
    "a list": (lambda sd: list(sd.values()), "holds a list: expected a state dict"),
    "a tensor": (lambda sd: sd["visual.proj"], "holds a Tensor: expected a state dict"),
    "numbers": (lambda sd: {"epoch": 3, "loss": [1.0]}, "found 0 tensors among .*epoch"),
    "a ResNet CLIP": (lambda sd: {"visual.attnpool.positional_embedding": torch.ones(5, 2)}, "found 1 tensors .*attnpool"),
    "two models": (lambda sd: {"a": visual(sd), "b": visual(sd)}, "holds 2 .*a.class_embedding', 'b.class_embedding"),
    "no ln_pre": (lambda sd: without(visual(sd), "ln_pre.weight", "ln_pre.bias"), "lacks 2 tensors of its towers: .*pre_layrnorm"),
    "no proj": (lambda sd: without(visual(sd), "proj"), "lacks 1 tensors of its towers: visual_projection.weight"),
    "one text tensor less": (lambda sd: without(sd, "transformer.resblocks.1.attn.in_proj_bias"), "lacks 3 .*layers.1.self_attn"),
    "a layer less": (lambda sd: {n: t for n, t in sd.items() if LAYER not in n}, "lacks 16 .*layers.0.*same architecture"),
    "a layer more": (lambda sd: sd | {LAYER.replace("0", "2") + "ln_1.bias": torch.ones(32)}, "parts that the base has not"),
    "a wrong shape": (lambda sd: sd | {"visual.ln_post.bias": torch.ones(7)}, r"ln_post.bias .* shape \(7,\), expected \(32,\)"),
    "a scalar": (lambda sd: sd | {LAYER + "attn.in_proj_weight": torch.tensor(1.0)}, r"shape \(\), expected \(96, 32\)"),
    "odd proj": (lambda sd: sd | {"visual.proj": torch.ones(2, 3, 4)}, r"shape \(2, 3, 4\)"),
    "integers": (lambda sd: sd | {"ln_final.bias": torch.ones(32, dtype=torch.int8)}, "ln_final.bias in .* holds torch.int8"),
    "a NaN": (lambda sd: sd | {"ln_final.bias": torch.full((32,), float("nan"))}, "ln_final.bias in .* expected finite torch.float32"),
    "float8": (lambda sd: sd | {"visual.proj": sd["visual.proj"].to(torch.float8_e4m3fn)}, "proj in .* holds torch.float8"),
    "complex": (lambda sd: sd | {"visual.proj": sd["visual.proj"].to(torch.complex64)}, "proj in .* holds torch.complex64"),
    "sparse": (lambda sd: sd | {"visual.proj": sd["visual.proj"].to_sparse()}, "lacks 1 tensors .*visual_projection"),
    "stride 0": (lambda sd: sd | {"visual.proj": torch.zeros(1).expand(10**9, 9)}, r"shape \(1000000000, 9\), expected"),
    "itself": (lambda sd: holds_itself(dict(sd)), "dicts in dicts without end"),
    "a sparse mean": (lambda sd: without(sd, "ln_final.bias") | {"mean": torch.ones(3).to_sparse()}, "lacks 1 tensors"),
    "more words": (lambda sd: sd | {"token_embedding.weight": torch.ones(700, 32)}, r"token_embedding.weight .*\(700, 32\)"),
}  # fmt: skip


@pytest.mark.parametrize("what", BROKEN)
def test_what_is_no_clip_is_refused_in_words(what, base, theirs, tmp_path):
    make, message = BROKEN[what]
    with pytest.raises(ValueError, match=message) as caught:
        read_checkpoint(save(make(theirs), tmp_path / "broken.pt"), base)
    assert "broken.pt" in str(caught.value)


@pytest.mark.parametrize("changes", [{"image_size": 48}, {"patch_size": 16}, {"layers": 3}, {"width": 48}])
def test_a_base_of_another_architecture_is_refused(base, tmp_path, changes):
    other = ZeroShotClassifier.from_pretrained(save_tiny_clip(tmp_path / "other", **({"patch_size": 8} | changes)))
    for content in (random_clip(other), visual(random_clip(other)), other.model.state_dict()):
        with pytest.raises(ValueError, match="Fix: a base of the same architecture"):
            read_checkpoint(save(content, tmp_path / "a.pt"), base)


def test_a_place_with_nothing_says_what_is_there(base, tmp_path):
    def refused(message, place=tmp_path):
        with pytest.raises(ValueError, match=message):
            read_checkpoint(place, base)

    refused("no checkpoint at .*nowhere.pt: found nothing", tmp_path / "nowhere.pt")
    (tmp_path / "simclip4.pt").write_bytes(b"")
    refused(r"found \['simclip4.pt'\], expected a file, or open_clip_config.json or config.json with weights")
    (tmp_path / "open_clip_config.json").write_text("{")
    save({"a": torch.ones(1)}, tmp_path / "open_clip_model.safetensors")
    refused("open_clip_config.json is damaged")
    (tmp_path / "open_clip_config.json").write_text("{}")
    refused("open_clip_config.json has no model_cfg")


# --- what open_clip cannot express, and what its config must say


def configs(model):
    return model.config.text_config, model.config.vision_config


CHANGES = {
    r"both towers alike, this model has \['gelu', 'quick_gelu'\]": lambda m: setattr(configs(m)[0], "hidden_act", "quick_gelu"),
    r"this model has \['relu'\]": lambda m: [setattr(c, "hidden_act", "relu") for c in configs(m)],
    "resizes to 32 px.*'shortest_edge': 40": lambda m: setattr(m.processor.image_processor, "size", {"shortest_edge": 40}),
    "Pillow's filter 1": lambda m: setattr(m.processor.image_processor, "resample", 1),
}  # fmt: skip


@pytest.mark.parametrize("message", CHANGES)
def test_what_open_clip_cannot_express_is_refused_before_anything_is_written(base, tmp_path, message):
    model = copy.deepcopy(base)
    CHANGES[message](model)
    with pytest.raises(ValueError, match=message):
        write_open_clip(model, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def pooled_elsewhere(base):
    """End of text is an id in the middle: transformers reads the embedding there, and OpenAI's argmax would not."""
    model = copy.deepcopy(base)
    word = model.processor.tokenizer(PROMPTS[0])["input_ids"][-2]
    model.config.text_config.eos_token_id = model.model.text_model.eos_token_id = word
    return model


def changed(base):
    """The same weights under quick_gelu, another epsilon and another normalisation."""
    config, processor = copy.deepcopy(base.config), copy.deepcopy(base.processor)
    for part in (config.vision_config, config.text_config):
        part.hidden_act, part.layer_norm_eps = "quick_gelu", 1e-3
    processor.image_processor.image_mean, processor.image_processor.image_std = IMAGENET["mean"], IMAGENET["std"]
    model = CLIPModel(config)
    model.load_state_dict(base.model.state_dict())
    return ZeroShotClassifier(model, processor).eval()


@pytest.mark.parametrize("change, notes", [(pooled_elsewhere, 1), (changed, 6)])
def test_pooling_activation_epsilon_and_normalisation_go_there_and_back(base, tmp_path, change, notes):
    model = change(base)
    assert write_open_clip(model, tmp_path) == 62
    again, reading = read_checkpoint(tmp_path, base)  # whose own config says otherwise
    assert all(torch.equal(one, two) for one, two in zip(embeds(again), embeds(model), strict=True))
    assert not torch.equal(embeds(again)[1], embeds(base)[1])
    assert sum("the checkpoint's was taken" in note for note in reading.notes) == notes


def test_openais_vocabulary_is_known_by_its_ids(base, tmp_path):
    """One of its size in which a prompt has its ids; in any other the tokenizer's files are needed."""
    words, merges, filler = {"a": 320, "photo": 1125, "of": 539, "cat": 2368}, [], iter(range(256, 320))
    vocab = {token: i for i, token in enumerate(sorted(set("aphotfc") | {f"{c}</w>" for c in "aoft"}))}
    for word, number in words.items():
        parts = [*word[:-1], f"{word[-1]}</w>"]
        merges += [("".join(parts[:i]), parts[i]) for i in range(1, len(parts))]
        vocab |= {"".join(parts[:i]): next(filler) for i in range(2, len(parts))} | {"".join(parts): number}
    vocab |= {"<|startoftext|>": 49406, "<|endoftext|>": 49407}
    vocab |= {f"filler {i}": i for i in range(49408) if i not in set(vocab.values())}
    model, kind = copy.deepcopy(base), type(base.processor.tokenizer)
    model.config.text_config.eos_token_id = 49407
    for known in (True, False):
        kept = merges if known else merges[:-1]
        model.processor.tokenizer = kind(vocab=vocab, merges=kept, model_max_length=24)
        write_open_clip(model, tmp_path / str(known))
        text = json.loads((tmp_path / str(known) / "open_clip_config.json").read_text())["model_cfg"]["text_cfg"]
        assert ("hf_tokenizer_name" in text) != known == (not (tmp_path / str(known) / "tokenizer.json").exists())


@pytest.mark.parametrize(
    "variant", [{}, {"width": 128}, {"image_size": 36}, {"layers": 1, "patch_size": 16}, changed, pooled_elsewhere]
)
def test_open_clip_itself_opens_what_was_written(variant, tmp_path):
    open_clip = pytest.importorskip("open_clip")
    sizes = {"patch_size": 8} | (variant if isinstance(variant, dict) else {})
    base = ZeroShotClassifier.from_pretrained(save_tiny_clip(tmp_path / "hf", **sizes))
    model, _ = read_checkpoint(save(random_clip(base), tmp_path / "a.pt"), base)
    model = variant(model) if callable(variant) else model
    count = write_open_clip(model, tmp_path / "out")
    opened, preprocess = open_clip.create_model_from_pretrained(f"local-dir:{tmp_path / 'out'}")
    tokenizer = open_clip.get_tokenizer(f"local-dir:{tmp_path / 'out'}")
    assert len(opened.eval().state_dict()) == count
    # 3 : 2, so that the margins of the crop are whole: an odd pixel is cut right here and left there.
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (60, 90, 3), dtype=np.uint8))
    pixels = torch.cat([Collator(model.processor)([{"image": image, "label": None}])["images"], images(model)])
    tokens = model.processor.tokenizer(PROMPTS, padding=True, return_tensors="pt")
    with torch.no_grad():
        normalised = (pixels - model.mean) / model.std
        normalised[0] = preprocess(image)
        assert_close(model.embed_images(pixels), opened.encode_image(normalised))
        assert_close(model.model.get_text_features(**tokens).pooler_output, opened.encode_text(tokenizer(PROMPTS)))
