"""Proves that foreign checkpoints give here what their own code gives, that nothing in a file is run, and that every tensor is accounted for.

What their code computes is written out below in plain torch, from random weights under their names; with open_clip installed, it is asked itself.
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
PROMPTS = [f"a {c}, this is a photo" for c in CLASSES]
VISUAL, TEXT = (
    8 + 12 * 2,
    5 + 12 * 2,
)  # tensors of the student's towers in open_clip's form, projections included, logit_scale not


# --- OpenAI's and open_clip's architecture in plain torch, under their names


def random_block(rng, stem, width, mlp):
    def normal(*shape):
        return torch.randn(*shape, generator=rng) * 0.15

    sizes = {
        "ln_1": (width,),
        "ln_2": (width,),
        "attn.out_proj": (width, width),
        "mlp.c_fc": (mlp, width),
        "mlp.c_proj": (width, mlp),
    }
    block = {f"{stem}.{n}.weight": normal(*s) + (len(s) == 1) for n, s in sizes.items()}
    block |= {f"{stem}.{n}.bias": normal(s[0]) for n, s in sizes.items()}
    return block | {
        f"{stem}.attn.in_proj_weight": normal(3 * width, width),
        f"{stem}.attn.in_proj_bias": normal(3 * width),
    }


def random_clip(base, seed=0) -> dict[str, torch.Tensor]:
    """A state dict of OpenAI's CLIP class, as its own __init__ names and shapes it, with the base's sizes."""
    rng = torch.Generator().manual_seed(seed)
    v, t, dim = base.config.vision_config, base.config.text_config, base.config.projection_dim

    def normal(*shape):
        return torch.randn(*shape, generator=rng) * 0.3

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
    for name, width in (
        ("visual.ln_pre", v.hidden_size),
        ("visual.ln_post", v.hidden_size),
        ("ln_final", t.hidden_size),
    ):
        sd |= {f"{name}.weight": normal(width) + 1, f"{name}.bias": normal(width)}
    for i in range(v.num_hidden_layers):
        sd |= random_block(rng, f"visual.transformer.resblocks.{i}", v.hidden_size, v.intermediate_size)
    for i in range(t.num_hidden_layers):
        sd |= random_block(rng, f"transformer.resblocks.{i}", t.hidden_size, t.intermediate_size)
    return sd


def run_blocks(sd, stem, x, heads, quick, mask=None):
    def norm(name, y):
        return F.layer_norm(y, y.shape[-1:], sd[f"{name}.weight"], sd[f"{name}.bias"])

    for i in itertools.count():
        at = f"{stem}.{i}"
        if f"{at}.ln_1.weight" not in sd:
            return x
        y = norm(f"{at}.ln_1", x).transpose(0, 1)
        inner = (sd[f"{at}.attn.in_proj_weight"], sd[f"{at}.attn.in_proj_bias"], None, None, False, 0.0)
        outer = (sd[f"{at}.attn.out_proj.weight"], sd[f"{at}.attn.out_proj.bias"])
        mixed, _ = F.multi_head_attention_forward(
            y, y, y, y.shape[-1], heads, *inner, *outer, training=False, need_weights=False, attn_mask=mask
        )
        x = x + mixed.transpose(0, 1)
        y = F.linear(norm(f"{at}.ln_2", x), sd[f"{at}.mlp.c_fc.weight"], sd[f"{at}.mlp.c_fc.bias"])
        y = y * torch.sigmoid(1.702 * y) if quick else F.gelu(y)
        x = x + F.linear(y, sd[f"{at}.mlp.c_proj.weight"], sd[f"{at}.mlp.c_proj.bias"])


def reference_image(sd, images, heads, quick, mean=MEAN, std=STD):
    images = (images - torch.tensor(mean).view(3, 1, 1)) / torch.tensor(std).view(3, 1, 1)
    weight = sd["visual.conv1.weight"]
    x = F.conv2d(images, weight, stride=weight.shape[-1]).flatten(2).transpose(1, 2)
    x = torch.cat([sd["visual.class_embedding"].expand(len(x), 1, -1), x], 1) + sd["visual.positional_embedding"]
    x = F.layer_norm(x, x.shape[-1:], sd["visual.ln_pre.weight"], sd["visual.ln_pre.bias"])
    x = run_blocks(sd, "visual.transformer.resblocks", x, heads, quick)[:, 0]
    return F.layer_norm(x, x.shape[-1:], sd["visual.ln_post.weight"], sd["visual.ln_post.bias"]) @ sd["visual.proj"]


def reference_text(sd, ids, heads, quick):
    length = ids.shape[1]
    mask = torch.full((length, length), float("-inf")).triu(1)
    x = sd["token_embedding.weight"][ids] + sd["positional_embedding"][:length]
    x = run_blocks(sd, "transformer.resblocks", x, heads, quick, mask)
    x = F.layer_norm(x, x.shape[-1:], sd["ln_final.weight"], sd["ln_final.bias"])
    return x[torch.arange(len(x)), ids.argmax(-1)] @ sd["text_projection"]


def images(model, count=4):
    return torch.rand(count, 3, model.image_size, model.image_size, generator=torch.Generator().manual_seed(5))


def ids(model):
    context = model.config.text_config.max_position_embeddings
    return model.processor.tokenizer(PROMPTS, padding="max_length", max_length=context, return_tensors="pt")[
        "input_ids"
    ]


@torch.no_grad()
def embeds(model):
    return model.embed_images(images(model)), model.get_text_features(ids(model)).pooler_output


def reference_embeds(sd, model, *, quick=False, **norms):
    v, t = model.config.vision_config, model.config.text_config
    image = reference_image(sd, images(model), v.num_attention_heads, quick, **norms)
    return image, reference_text(sd, ids(model), t.num_attention_heads, quick)


def assert_close(ours, theirs):
    """Within 1e-4, of embeddings that differ among themselves by far more."""
    assert ours.shape == theirs.shape and (theirs[0] - theirs[1]).abs().max() > 0.05
    difference = float((ours - theirs).abs().max())
    assert difference < 1e-4
    return difference


def logits(image, text, scale):
    return torch.exp(torch.as_tensor(scale)) * F.normalize(image, dim=-1) @ F.normalize(text, dim=-1).T


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


def openai(sd):
    half = {n: t.half() for n, t in sd.items()}
    numbers = {
        "input_resolution": torch.tensor(32),
        "context_length": torch.tensor(24),
        "vocab_size": torch.tensor(600),
    }
    return half | numbers


def custom_text(sd):
    names = {n: n if n.startswith("visual.") or n == "logit_scale" else f"text.{n}" for n in sd}
    return {names[n]: t for n, t in sd.items()} | {"text.attn_mask": torch.zeros(24, 24)}


def open_clip_training(sd):
    scaler = {"scale": 65536.0, "growth_factor": 2.0}
    return {
        "epoch": 5,
        "name": "run",
        "state_dict": under("module.", sd),
        "optimizer": sgd_state(sd),
        "scaler": scaler,
    }


FORMS = {  # name: (what the code saves, suffix, both towers, entries ignored)
    "TeCoA, PMG-AFT": (tecoa, ".pth.tar", False, 36),
    "TGA-ZSR": (lambda sd: tecoa(sd, ""), ".pth.tar", False, 36),
    "AGFT": (lambda sd: {"modules": {"clip.visual": visual(sd)}, "params": {}}, ".pth", False, 0),
    "AdvFLYP": (
        lambda sd: (
            without(tecoa(sd), "vision_encoder_state_dict") | {"partial_state_dict": under("visual.", visual(sd))}
        ),
        ".pth.tar",
        False,
        36,
    ),
    "FARE": (visual, ".pt", False, 0),
    "FARE's wrapper": (lambda sd: under("module.model.", visual(sd)), ".pt", False, 0),
    "FARE in half": (lambda sd: {n: t.half() for n, t in visual(sd).items()}, ".pt", False, 0),
    "vision tower, safetensors": (visual, ".safetensors", False, 0),
    "vision tower under its name": (
        lambda sd: {n: t for n, t in sd.items() if n.startswith("visual.")},
        ".ckpt",
        False,
        0,
    ),
    "prompt learner": (
        lambda sd: under("image_encoder.", visual(sd)) | {"prompt_learner.ctx": torch.randn(4, 8)},
        ".pth",
        False,
        1,
    ),
    "OpenAI": (openai, ".pt", True, 3),
    "open_clip, release": (dict, ".bin", True, 0),
    "open_clip, safetensors": (dict, ".safetensors", True, 0),
    "open_clip, training": (open_clip_training, ".pt", True, 67),
    "open_clip, custom text": (custom_text, ".pt", True, 1),
    "open_clip, compiled": (lambda sd: {"state_dict": under("module._orig_mod.", sd)}, ".pt", True, 0),
    "wrapped": (lambda sd: {"model": under("clip.", sd), "args": None}, ".pt", True, 1),
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
    make, suffix, both, ignored = FORMS[form]
    before = weights(base)
    content = make(theirs)
    model, reading = read_checkpoint(save(content, tmp_path / f"file{suffix}"), base)
    half = "half" in form or form == "OpenAI"
    sd = {n: t.half().float() for n, t in theirs.items()} if half else theirs
    image, text = embeds(model)
    image_reference, text_reference = reference_embeds(sd, base)
    if not both:
        text_reference = embeds(base)[1]
    worst = max(assert_close(image, image_reference), assert_close(text, text_reference))
    scale = sd["logit_scale"] if both else base.logit_scale.detach()
    difference = assert_close(
        logits(image, text, model.logit_scale.detach()), logits(image_reference, text_reference, scale)
    )
    print(f"{form}: embeddings within {worst:.1e}, logits within {difference:.1e}; {reading}")
    # Every tensor of the file is read or listed, every tensor of the model comes from one place.
    assert reading.read == (VISUAL + TEXT + 1 if both else VISUAL) and len(reading.ignored) == ignored
    assert len(reading.from_base) == (0 if both else 5 + 16 * 2 + 1)
    assert {p.dtype for p in model.parameters()} == {torch.float32} and not model.training
    assert reading.form.startswith(
        "both towers" if both else "the vision tower"
    ) and f"{reading.read} tensors read" in str(reading)
    for name in reading.from_base:
        assert torch.equal(model.state_dict()[name], before[name])
    assert all(torch.equal(t, before[n]) for n, t in base.state_dict().items())
    with torch.no_grad():
        model.logit_scale.add_(1), model.text_model.final_layer_norm.bias.add_(1)
    assert all(torch.equal(t, before[n]) for n, t in base.state_dict().items())  # no weights are shared


def test_the_reasons_for_ignoring_say_what_it_was(base, theirs, tmp_path):
    content = tecoa(theirs) | {"mystery": torch.ones(2), "head": {"weight": torch.ones(3, 3)}}
    _, reading = read_checkpoint(save(content, tmp_path / "a.pth.tar"), base)
    reasons = collections.Counter(reason for _, reason in reading.ignored)
    # epoch, best_acc1 and param_groups; a momentum for each of the tower's tensors; the prompt of length 0; the two that nobody knows.
    assert reasons == {"not a tensor": 3, "state of the training": VISUAL, "empty": 1, "no part of a CLIP": 2}
    assert "under 'vision_encoder_state_dict.'" in reading.form
    assert any("2 tensors that are no part of a CLIP, such as mystery, head.weight" in note for note in reading.notes)


def test_buffers_are_no_loss(base, theirs, tmp_path):
    for content in (openai(theirs), custom_text(theirs)):
        _, reading = read_checkpoint(save(content, tmp_path / "a.pt"), base)
        assert {reason for _, reason in reading.ignored} == {"a buffer that every CLIP computes"} and len(
            reading.notes
        ) == 2


@pytest.mark.parametrize("unknown", ["extra", "head.weight", "logit_bias"])
def test_an_unknown_tensor_beside_the_towers_is_listed(base, theirs, tmp_path, unknown):
    _, reading = read_checkpoint(save(theirs | {unknown: torch.ones(2)}, tmp_path / "a.pt"), base)
    assert (unknown, "no part of a CLIP") in reading.ignored and any(unknown in note for note in reading.notes)
    _, alone = read_checkpoint(save(visual(theirs) | {unknown: torch.ones(2)}, tmp_path / "b.pt"), base)
    assert (unknown, "no part of a CLIP") in alone.ignored


@pytest.mark.parametrize(
    "unknown",
    [
        "visual.transformer.resblocks.0.ls_1.gamma",
        "visual.attn_pool.query",
        "cls_emb",
        "visual.prompt_pos_embedding",
        "text.transformer.embeddings.x",
    ],
)
def test_an_unknown_part_of_a_tower_is_refused(base, theirs, tmp_path, unknown):
    with pytest.raises(ValueError, match=f"{unknown.removeprefix('text.')}.*another model"):
        read_checkpoint(save(theirs | {unknown: torch.ones(2)}, tmp_path / "a.pt"), base)


# --- transformers' names


@pytest.fixture(scope="module")
def stock(student_path):
    """A stock CLIPModel of the student's architecture with other weights."""
    torch.manual_seed(7)
    return CLIPModel(CLIPModel.from_pretrained(student_path).config).eval()


HF_FORMS = {  # name: (content, vision layers' tensors read, from the base)
    "whole": (lambda m: m.state_dict(), 78, 0),
    "old, with buffers": (
        lambda m: (
            m.state_dict() | {f"{t}_model.embeddings.position_ids": torch.arange(17)[None] for t in ("text", "vision")}
        ),
        78,
        0,
    ),
    "under a prefix": (lambda m: {"state_dict": under("module.model.", m.state_dict())}, 78, 0),
    "with projection": (lambda m: {n: t for n, t in m.state_dict().items() if n.startswith("vis")}, 40, 38),
    "without projection": (
        lambda m: {n: t for n, t in m.state_dict().items() if n.startswith("vision_model.")},
        39,
        39,
    ),
    "flat": (lambda m: m.vision_model.state_dict(), 39, 39),
    "in a LLaVA": (
        lambda m: (
            under("model.vision_tower.vision_model.", m.vision_model.state_dict())
            | {"lm_head.weight": torch.ones(2, 2)}
        ),
        39,
        39,
    ),
}


@pytest.mark.parametrize("form", HF_FORMS)
def test_transformers_names_are_read_whole_or_in_part(form, base, stock, tmp_path):
    make, read, from_base = HF_FORMS[form]
    model, reading = read_checkpoint(save(make(stock), tmp_path / "a.bin"), base)
    assert (reading.read, len(reading.from_base)) == (
        read,
        from_base,
    ) and "in the names of transformers" in reading.form
    mine, other, own = model.state_dict(), stock.state_dict(), base.state_dict()
    assert all(torch.equal(mine[n], own[n] if n in reading.from_base else other[n]) for n in mine) and len(mine) == 78
    with torch.no_grad():
        pooled = stock.vision_model(pixel_values=(images(base) - base.mean) / base.std).pooler_output
        assert torch.allclose(
            model.vision_model(pixel_values=(images(base) - base.mean) / base.std).pooler_output, pooled, atol=1e-5
        )
    assert ("visual_projection.weight" in reading.from_base) == any("projection" in note for note in reading.notes)


@pytest.mark.parametrize("lost", ["visual_projection.weight", "text_projection.weight"])
def test_a_whole_clip_without_a_projection_is_refused(base, stock, tmp_path, lost):
    with pytest.raises(ValueError, match=f"lacks 1 tensors of its towers: {lost}"):
        read_checkpoint(save(without(stock.state_dict(), lost), tmp_path / "a.pt"), base)


@pytest.mark.parametrize("kind", [CLIPVisionModel, CLIPVisionModelWithProjection])
def test_a_folder_of_transformers_vision_tower_is_read(kind, base, stock, student_path, tmp_path):
    tower = kind.from_pretrained(student_path)
    tower.load_state_dict({n: torch.full_like(t, 0.25) for n, t in tower.state_dict().items()})
    tower.save_pretrained(tmp_path)
    model, reading = read_checkpoint(tmp_path, base)
    assert reading.read == len(tower.state_dict()) and bool((model.vision_model.pre_layrnorm.weight == 0.25).all())


@pytest.mark.parametrize("shards", [1, 3])
def test_a_folder_without_processor_and_tokenizer_is_completed(base, stock, tmp_path, shards):
    """LEAF's repositories: config.json and safetensors, the large ones in shards."""
    stock.save_pretrained(tmp_path / "leaf", max_shard_size="5GB" if shards == 1 else "80KB")
    assert len(list((tmp_path / "leaf").glob("*.safetensors"))) >= shards
    with pytest.raises((OSError, ValueError)):
        ZeroShotClassifier.from_pretrained(tmp_path / "leaf")
    model, reading = read_checkpoint(tmp_path / "leaf", base)
    assert (reading.read, reading.from_base, reading.ignored) == (78, (), ())
    assert reading.notes == ("Tokenizer and processor are the base's.",)
    model.save_pretrained(tmp_path / "whole")
    again = ZeroShotClassifier.from_pretrained(tmp_path / "whole")
    assert fingerprint(again) == fingerprint(model) == fingerprint(stock)


def test_a_missing_shard_is_named(base, stock, tmp_path):
    stock.save_pretrained(tmp_path, max_shard_size="80KB")
    sorted(tmp_path.glob("*.safetensors"))[1].unlink()
    with pytest.raises(ValueError, match="model-00002-of.*is missing"):
        read_checkpoint(tmp_path, base)


# --- what weights do not show


def edit(file, change):
    content = json.loads(Path(file).read_text())
    change(content)
    Path(file).write_text(json.dumps(content))


def test_the_activation_of_the_folder_wins_and_is_noted(base, stock, tmp_path):
    stock.save_pretrained(tmp_path)
    edit(
        tmp_path / "config.json",
        lambda c: [c[f"{t}_config"].update(hidden_act="quick_gelu") for t in ("text", "vision")],
    )
    model, reading = read_checkpoint(tmp_path, base)
    assert (
        sum(
            "hidden_act is 'quick_gelu' in the checkpoint's config and 'gelu' in the base's" in n
            for n in reading.notes
        )
        == 2
    )
    quick = CLIPModel.from_pretrained(tmp_path).eval()
    with torch.no_grad():
        pixels = (images(base) - base.mean) / base.std
        assert torch.allclose(
            model.embed_images(images(base)), quick.get_image_features(pixel_values=pixels).pooler_output, atol=1e-5
        )
        assert torch.allclose(embeds(model)[1], quick.get_text_features(ids(base)).pooler_output, atol=1e-5)


@pytest.mark.parametrize("quick", [False, True])
def test_the_activation_of_a_bare_file_is_the_base_s(quick, base, theirs, student_path, tmp_path):
    shutil.copytree(student_path, tmp_path / "base")
    if quick:
        edit(
            tmp_path / "base/config.json",
            lambda c: [c[f"{t}_config"].update(hidden_act="quick_gelu") for t in ("text", "vision")],
        )
    other = ZeroShotClassifier.from_pretrained(tmp_path / "base")
    model, reading = read_checkpoint(save(theirs, tmp_path / "a.pt"), other)
    for ours, reference in zip(embeds(model), reference_embeds(theirs, other, quick=quick), strict=True):
        assert_close(ours, reference)
    assert any(f"Activation ({'quick_gelu' if quick else 'gelu'})" in note for note in reading.notes)


@pytest.mark.parametrize("tower", ["vision", "text"])
def test_another_number_of_heads_is_another_architecture(base, stock, tmp_path, tower):
    stock.save_pretrained(tmp_path)
    edit(tmp_path / "config.json", lambda c: c[f"{tower}_config"].update(num_attention_heads=4))
    with pytest.raises(ValueError, match=f"{tower}_config.num_attention_heads is 4 in the checkpoint.* 2 in the base"):
        read_checkpoint(tmp_path, base)


# --- open_clip's form


@pytest.fixture(scope="module")
def open_clip_folder(base, theirs, tmp_path_factory):
    """A model with foreign weights, written in open_clip's form."""
    folder = tmp_path_factory.mktemp("open_clip") / "model"
    torch.save(theirs, folder.parent / "a.pt")
    model, _ = read_checkpoint(folder.parent / "a.pt", base)
    assert write_open_clip(model, folder) == VISUAL + TEXT + 1 == 62
    return folder


def test_what_is_written_is_what_was_read_bit_for_bit(theirs, open_clip_folder):
    written = load_file(open_clip_folder / "open_clip_model.safetensors")
    assert set(written) == set(theirs) and all(torch.equal(written[n], theirs[n]) for n in theirs)


def test_there_and_back_is_bit_equal(base, open_clip_folder):
    model, reading = read_checkpoint(open_clip_folder, base)
    assert (reading.read, reading.from_base, reading.ignored) == (62, (), ())
    assert reading.notes == (
        "Tokenizer and processor are the base's.",
    )  # no difference is claimed where there is none
    write_open_clip(model, open_clip_folder.parent / "again")
    for file in ("open_clip_model.safetensors", "open_clip_config.json"):
        one, two = ((folder / file).read_bytes() for folder in (open_clip_folder, open_clip_folder.parent / "again"))
        assert one == two.replace(b'"again"', b'"model"')
    again, _ = read_checkpoint(open_clip_folder.parent / "again", base)
    assert fingerprint(again) == fingerprint(model)


def test_the_config_says_what_the_model_is(base, open_clip_folder):
    content = json.loads((open_clip_folder / "open_clip_config.json").read_text())
    vision = {"width": 32, "layers": 2, "mlp_ratio": 2.0, "image_size": 32, "patch_size": 8, "head_width": 16}
    tokens = len(base.processor.tokenizer)
    text = {
        "width": 32,
        "layers": 2,
        "mlp_ratio": 2.0,
        "context_length": base.config.text_config.max_position_embeddings,
        "vocab_size": tokens,
        "heads": 2,
    }
    assert content["model_cfg"] == {
        "embed_dim": 24,
        "quick_gelu": False,
        "vision_cfg": vision,
        "text_cfg": text | {"hf_tokenizer_name": "model"},
    }
    assert content["preprocess_cfg"] == {
        "size": 32,
        "mean": list(MEAN),
        "std": list(STD),
        "interpolation": "bicubic",
        "resize_mode": "shortest",
    }
    assert (open_clip_folder / "tokenizer.json").is_file()


def test_both_forms_live_in_one_folder(base, tmp_path):
    base.save_pretrained(tmp_path)
    write_open_clip(base, tmp_path)
    assert (
        fingerprint(ZeroShotClassifier.from_pretrained(tmp_path))
        == fingerprint(read_checkpoint(tmp_path, base)[0])
        == fingerprint(base)
    )


def test_a_folder_with_a_pickle_is_read_alike(base, theirs, open_clip_folder, tmp_path):
    shutil.copy(open_clip_folder / "open_clip_config.json", tmp_path)
    torch.save(theirs, tmp_path / "open_clip_pytorch_model.bin")
    assert fingerprint(read_checkpoint(tmp_path, base)[0]) == fingerprint(read_checkpoint(open_clip_folder, base)[0])


def with_config(folder, place, **changes):
    """A copy of open_clip's folder whose config says something else."""
    shutil.copytree(folder, place)

    def change(content):
        for path, value in changes.items():
            *parts, last = path.split("__")
            functools.reduce(dict.__getitem__, parts, content)[last] = value

    edit(place / "open_clip_config.json", change)
    return place


def test_quick_gelu_of_the_config_is_taken_and_noted(base, theirs, open_clip_folder, tmp_path):
    model, reading = read_checkpoint(with_config(open_clip_folder, tmp_path / "a", model_cfg__quick_gelu=True), base)
    assert sum("hidden_act is 'quick_gelu' in the checkpoint's" in note for note in reading.notes) == 2
    for ours, reference in zip(embeds(model), reference_embeds(theirs, base, quick=True), strict=True):
        assert_close(ours, reference)


@pytest.mark.parametrize(
    "name", ["no_ln_pre", "attentional_pool", "ls_init_value", "timm_model_name", "act_kwargs", "qk_norm"]
)
def test_a_config_of_what_no_clip_model_is_is_refused(base, open_clip_folder, tmp_path, name):
    with pytest.raises(ValueError, match=f"cannot hold: vision_cfg.{name} = "):
        read_checkpoint(
            with_config(open_clip_folder, tmp_path / "a", **{f"model_cfg__vision_cfg__{name}": {"a": 1}}), base
        )


@pytest.mark.parametrize(
    ("path", "value"),
    [
        ("vision_cfg__pool_type", "avg"),
        ("text_cfg__proj_type", "none"),
        ("text_cfg__hf_model_name", "x"),
        ("text_cfg__no_causal_mask", True),
        ("init_logit_bias", -10),
    ],
)
def test_so_is_one_with_another_pooling_projection_or_loss(base, open_clip_folder, tmp_path, path, value):
    with pytest.raises(ValueError, match=f"cannot hold: {path.replace('__', '.')} = {value!r}"):
        read_checkpoint(with_config(open_clip_folder, tmp_path / "a", **{f"model_cfg__{path}": value}), base)


def test_a_config_with_every_default_spelled_out_is_read(base, open_clip_folder, tmp_path):
    defaults = {
        "timm_pool": "avg",
        "timm_model_name": None,
        "attn_pooler_heads": 8,
        "attentional_pool": False,
        "pool_type": "tok",
        "patch_dropout": 0.0,
    }
    changes = {f"model_cfg__vision_cfg__{k}": v for k, v in defaults.items()} | {
        "model_cfg__text_cfg__hf_proj_type": "mlp"
    }
    assert read_checkpoint(with_config(open_clip_folder, tmp_path / "a", **changes), base)[1].read == 62


def test_pooling_at_id_2_is_refused_for_transformers_would_take_the_highest(base, open_clip_folder, tmp_path):
    """As in open_clip's XLM-V models."""
    changes = {"model_cfg__text_cfg__pool_type": "eos", "model_cfg__text_cfg__eos_id": 2}
    with pytest.raises(ValueError, match="cannot hold: text_cfg.pool_type = 'eos' at id 2"):
        read_checkpoint(with_config(open_clip_folder, tmp_path / "a", **changes), base)


@pytest.mark.parametrize("which", ["vision_cfg__head_width", "text_cfg__heads"])
def test_heads_that_contradict_the_base_are_refused(base, open_clip_folder, tmp_path, which):
    with pytest.raises(ValueError, match="num_attention_heads is . in the checkpoint's config and 2 in the base's"):
        read_checkpoint(with_config(open_clip_folder, tmp_path / "a", **{f"model_cfg__{which}": 8}), base)


# --- normalisation


IMAGENET = {"mean": [0.485, 0.456, 0.406], "std": [0.229, 0.224, 0.225]}


@pytest.mark.parametrize("how", ["config", "buffers", "buffers beside"])
def test_the_checkpoint_s_own_normalisation_is_taken_and_exported(how, base, theirs, open_clip_folder, tmp_path):
    if how == "config":
        place = with_config(
            open_clip_folder,
            tmp_path / "a",
            preprocess_cfg=IMAGENET | {"interpolation": "bilinear", "resize_mode": "squash"},
        )
    else:
        names = {"buffers": "{}", "buffers beside": "normalize.{}"}[how]
        buffers = {names.format(k): torch.tensor(v).view(1, 3, 1, 1) for k, v in IMAGENET.items()}
        place = save(under("model.", theirs) | buffers if "beside" in how else theirs | buffers, tmp_path / "a.pt")
    model, reading = read_checkpoint(place, base)
    image, _ = embeds(model)
    assert_close(image, reference_embeds(theirs, base, **IMAGENET)[0])
    assert (image - reference_embeds(theirs, base)[0]).abs().max() > 0.01  # the control: it does matter
    assert sum("The checkpoint normalises with" in note for note in reading.notes) == 2
    if how == "config":
        assert any("interpolation is 'bilinear', the processor's 'bicubic'" in note for note in reading.notes)
        assert any("resize_mode is 'squash'" in note for note in reading.notes)
    else:
        assert [reason for _, reason in reading.ignored] == ["normalisation, which the processor now holds"] * 2
    model.save_pretrained(tmp_path / "out")
    saved = ZeroShotClassifier.from_pretrained(tmp_path / "out").processor.image_processor
    assert np.allclose(saved.image_mean, IMAGENET["mean"]) and np.allclose(saved.image_std, IMAGENET["std"])
    assert base.processor.image_processor.image_mean == MEAN or list(
        base.processor.image_processor.image_mean
    ) == list(MEAN)


@pytest.mark.parametrize("name", ["preprocessor_config.json", "processor_config.json"])
def test_so_is_that_of_a_processor_in_transformers_folder(base, stock, tmp_path, name):
    stock.save_pretrained(tmp_path)
    image = {f"image_{k}": v for k, v in IMAGENET.items()}
    (tmp_path / name).write_text(json.dumps({"image_processor": image} if name.startswith("processor") else image))
    model, reading = read_checkpoint(tmp_path, base)
    assert list(model.processor.image_processor.image_mean) == IMAGENET["mean"] and torch.allclose(
        model.std.flatten(), torch.tensor(IMAGENET["std"])
    )
    assert sum("The checkpoint normalises with" in note for note in reading.notes) == 2


def test_buffers_that_agree_with_the_config_are_one_normalisation(base, theirs, open_clip_folder, tmp_path):
    place = with_config(open_clip_folder, tmp_path / "a", preprocess_cfg=IMAGENET)
    save(
        theirs | {f"visual.image_{k}": torch.tensor(v) for k, v in IMAGENET.items()},
        place / "open_clip_model.safetensors",
    )
    model, reading = read_checkpoint(place, base)
    assert list(model.processor.image_processor.image_mean) == IMAGENET["mean"] and len(reading.ignored) == 2


def test_two_normalisations_are_refused(base, theirs, tmp_path):
    content = under("model.", theirs) | {
        "model.mean": torch.tensor(MEAN),
        "teacher.mean": torch.tensor(IMAGENET["mean"]),
    }
    with pytest.raises(ValueError, match="more than one mean"):
        read_checkpoint(save(content, tmp_path / "a.pt"), base)


def test_the_same_normalisation_in_float32_is_no_difference(base, theirs, tmp_path):
    _, reading = read_checkpoint(
        save(theirs | {"mean": torch.tensor(MEAN), "std": torch.tensor(STD)}, tmp_path / "a.pt"), base
    )
    assert not any("normalises" in note for note in reading.notes) and len(reading.ignored) == 2


def test_means_of_pixels_up_to_255_are_refused(base, theirs, tmp_path):
    with pytest.raises(ValueError, match=r"mean is \[122.*expected three numbers in \[0, 1\]"):
        read_checkpoint(save(theirs | {"mean": torch.tensor([122.7, 116.7, 104.0])}, tmp_path / "a.pt"), base)


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
    code = r"is a pickle that needs (posix|nt)\.mkdir to be called.*nothing in a checkpoint is run.*state dict"
    with pytest.raises(ValueError, match="a.pt is not, or not wholly" if how.endswith("new") else rf"a\.pt {code}"):
        read_checkpoint(file, base)
    assert not trap.exists()
    pickle.loads(file.read_bytes()) if how.startswith("pickle") else torch.load(file, weights_only=False)
    assert trap.is_dir()  # the control: the trap does work


def test_a_whole_pickled_module_is_refused_by_its_class(base, student, tmp_path):
    torch.save(torch.nn.Linear(2, 2), tmp_path / "a.pth")
    with pytest.raises(ValueError, match="needs torch.nn.modules.linear.Linear"):
        read_checkpoint(tmp_path / "a.pth", base)


def test_the_numbers_of_numpy_are_data(base, theirs, tmp_path):
    """best_acc1 of TeCoA's files, from numpy 1 and 2. Allowed while a file is read, and no longer."""
    file = tmp_path / "a.pt"
    for number in (np.float64(1.5), np.float32(1.5), np.int64(3), np.bool_(True)):
        torch.save(visual(theirs) | {"best": number}, file, _use_new_zipfile_serialization=False)
        assert ("best", "not a tensor") in read_checkpoint(file, base)[1].ignored
    renamed = file.read_bytes().replace(b"numpy._core.multiarray", b"numpy.core.multiarray")
    assert renamed != file.read_bytes()
    file.write_bytes(renamed)
    assert ("best", "not a tensor") in read_checkpoint(file, base)[1].ignored
    assert np.dtype not in torch.serialization.get_safe_globals()


def test_torchscript_is_refused_and_says_where_the_weights_are(base, tmp_path):
    with warnings.catch_warnings(action="ignore"):
        torch.jit.trace(torch.nn.Linear(2, 2), torch.ones(1, 2)).save(tmp_path / "ViT-B-32.pt")
    with pytest.raises(ValueError, match="TorchScript archive.*openai/clip-vit-base-patch32"):
        read_checkpoint(tmp_path / "ViT-B-32.pt", base)


@pytest.mark.parametrize(("suffix", "share"), [*itertools.product([".pt", ".safetensors"], [0, 0.02, 0.5, 0.999])])
def test_a_truncated_file_is_named(base, theirs, tmp_path, suffix, share):
    file = save(dict(theirs), tmp_path / f"cut{suffix}")
    raw = file.read_bytes()
    file.write_bytes(raw[: int(len(raw) * share)])
    with pytest.raises(ValueError, match=rf"cut\{suffix} is not, or not wholly, what its name says"):
        read_checkpoint(file, base)


@pytest.mark.parametrize("suffix", [".pt", ".safetensors", ".pth.tar", ".bin"])
def test_a_file_of_something_else_is_named(base, tmp_path, suffix):
    (tmp_path / f"page{suffix}").write_text("<!DOCTYPE html><html>You need to log in</html>" * 20)
    with pytest.raises(ValueError, match=rf"page\{suffix} is not, or not wholly"):
        read_checkpoint(tmp_path / f"page{suffix}", base)


def resnet(sd):
    return {f"visual.layer1.0.conv{i}.weight": torch.ones(2, 2) for i in (1, 2)} | {
        "visual.attnpool.positional_embedding": torch.ones(5, 2)
    }


BROKEN = {  # what is in the file: what the message says
    "nothing": (lambda sd: {}, "no name ends in 'class_embedding': found 0 tensors among 0 entries"),
    "a list": (lambda sd: list(sd.values()), "holds a list: expected a state dict"),
    "a tensor": (lambda sd: sd["visual.proj"], "holds a Tensor: expected a state dict"),
    "numbers": (lambda sd: {"epoch": 3, "loss": [1.0]}, "found 0 tensors among 2 entries, such as .*epoch"),
    "a ResNet CLIP": (resnet, "found a ResNet CLIP"),
    "a SigLIP": (lambda sd: {"vision_model.head.probe": torch.ones(1)}, "found a SigLIP"),
    "a timm tower": (lambda sd: {"visual.trunk.cls_token": torch.ones(1)}, "found a timm vision tower"),
    "something else": (
        lambda sd: {"fc.weight": torch.ones(2, 2)},
        "found 1 tensors among 1 entries, such as .*fc.weight",
    ),
    "two models": (
        lambda sd: {"student": visual(sd), "teacher": visual(sd)},
        "2 vision towers, student.class_embedding, teacher.class_embedding",
    ),
    "no ln_pre": (
        lambda sd: without(visual(sd), "ln_pre.weight", "ln_pre.bias"),
        "lacks 2 tensors of its towers: visual.ln_pre.weight, visual.ln_pre.bias",
    ),
    "no proj": (lambda sd: without(visual(sd), "proj"), "lacks 1 tensors of its towers: visual.proj"),
    "one text tensor less": (
        lambda sd: without(sd, "transformer.resblocks.1.attn.in_proj_bias"),
        "lacks 1 .*: transformer.resblocks.1.attn.in_proj_bias",
    ),
    "a layer less in the middle": (
        lambda sd: {n: t for n, t in sd.items() if "visual.transformer.resblocks.0." not in n},
        "lacks 12 .*: visual.transformer.resblocks.0.ln_1.weight",
    ),
    "no layers": (
        lambda sd: {n: t for n, t in visual(sd).items() if "resblocks" not in n},
        "a ViT of width 32, 0 layers",
    ),
    "a wrong shape": (
        lambda sd: sd | {"visual.ln_post.bias": torch.ones(7)},
        r"vision_model.post_layernorm.bias of .* has the shape \(7,\), the base's \(32,\)",
    ),
    "a scalar for a matrix": (
        lambda sd: sd | {"visual.transformer.resblocks.0.attn.in_proj_weight": torch.tensor(1.0)},
        "self_attn.q_proj.weight of .* has the shape",
    ),
    "odd proj": (lambda sd: sd | {"visual.proj": torch.ones(2, 3, 4)}, "holds a ViT"),
    "integers": (
        lambda sd: sd | {"ln_final.bias": torch.ones(32, dtype=torch.int8)},
        "ln_final.bias in .* holds torch.int8",
    ),
    "a NaN": (
        lambda sd: sd | {"ln_final.bias": torch.full((32,), float("nan"))},
        "ln_final.bias in .* not all finite",
    ),
    "an overflow": (
        lambda sd: sd | {"visual.proj": (sd["visual.proj"] * 1e6).half()},
        "visual.proj in .* not all finite",
    ),
}


@pytest.mark.parametrize("what", BROKEN)
def test_what_is_no_clip_is_refused_in_words(what, base, theirs, tmp_path):
    make, message = BROKEN[what]
    with pytest.raises(ValueError, match=message) as caught:
        read_checkpoint(save(make(theirs), tmp_path / "broken.pt"), base)
    assert "broken.pt" in str(caught.value)


@pytest.mark.parametrize("both", [True, False])
def test_another_architecture_is_named_in_words(base, proxy, tmp_path, both):
    sd = random_clip(proxy)
    file = save(sd if both else visual(sd), tmp_path / "a.pt")
    theirs, ours = (
        "a ViT of width 24, 1 layers, MLP 48, patch 16, 32 px",
        "a ViT of width 32, 2 layers, MLP 64, patch 8, 32 px",
    )
    with pytest.raises(
        ValueError, match=f"holds {theirs}, embeddings of 24; the base is {ours}.*base of the same architecture"
    ):
        read_checkpoint(file, base)
    assert read_checkpoint(file, proxy)[1].read == (12 + 8 + 12 + 6 if both else 20)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"image_size": 48}, "patch 8, 48 px.*patch 8, 32 px"),
        ({"patch_size": 16}, "patch 16, 32 px.*patch 8, 32 px"),
        ({"layers": 3}, "3 layers.*2 layers"),
    ],
)
def test_a_base_that_differs_in_one_thing_is_told_apart_by_it(base, tmp_path, changes, words):
    other = ZeroShotClassifier.from_pretrained(save_tiny_clip(tmp_path / "other", **({"patch_size": 8} | changes)))
    with pytest.raises(ValueError, match=words):
        read_checkpoint(save(visual(random_clip(other)), tmp_path / "a.pt"), base)


def test_another_vocabulary_is_another_text_tower(base, theirs, tmp_path):
    longer = theirs | {"token_embedding.weight": torch.ones(700, 32)}
    with pytest.raises(
        ValueError, match="a text tower of width 32, 2 layers, MLP 64, .* of 700 tokens; the base is a text tower"
    ):
        read_checkpoint(save(longer, tmp_path / "a.pt"), base)


def test_a_place_with_nothing_says_what_is_there(base, tmp_path):
    with pytest.raises(ValueError, match="no checkpoint at .*nowhere.pt.*there is nothing"):
        read_checkpoint(tmp_path / "nowhere.pt", base)
    (tmp_path / "simclip4.pt").write_bytes(b"")
    with pytest.raises(
        ValueError,
        match=r"expected a file, or open_clip_config.json or config.json with weights beside it; found \['simclip4.pt'\]",
    ):
        read_checkpoint(tmp_path, base)
    (tmp_path / "open_clip_config.json").write_text("{")
    with pytest.raises(ValueError, match="found.*simclip4"):
        read_checkpoint(tmp_path, base)
    save({"a": torch.ones(1)}, tmp_path / "open_clip_model.safetensors")
    with pytest.raises(ValueError, match="open_clip_config.json holds no JSON"):
        read_checkpoint(tmp_path, base)
    (tmp_path / "open_clip_config.json").write_text("{}")
    with pytest.raises(ValueError, match="open_clip_config.json has no model_cfg"):
        read_checkpoint(tmp_path, base)


def test_a_folder_of_another_kind_of_model_is_refused_by_its_kind(base, stock, tmp_path):
    stock.save_pretrained(tmp_path)
    edit(tmp_path / "config.json", lambda c: c.update(model_type="siglip"))
    with pytest.raises(ValueError, match="a model of type 'siglip': expected 'clip'"):
        read_checkpoint(tmp_path, base)


def test_a_base_without_processor_cannot_serve(student_path, tmp_path):
    bare = ZeroShotClassifier.from_pretrained(student_path)
    for call in (read_checkpoint, lambda a, b: write_open_clip(b, a)):
        with pytest.raises(RuntimeError, match="no processor"):
            call(tmp_path / "a", bare)
    assert not list(tmp_path.iterdir())


# --- what open_clip cannot express


def activation(model):
    model.config.text_config.hidden_act = "quick_gelu"


def other_activation(model):
    for part in (model.config.text_config, model.config.vision_config):
        part.hidden_act = "relu"


def larger_resize(model):
    model.processor.image_processor.size = {"shortest_edge": 40}


def lanczos(model):
    model.processor.image_processor.resample = 1


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (activation, r"both towers alike; this model has \['gelu', 'quick_gelu'\]"),
        (other_activation, r"this model has \['relu'\]"),
        (larger_resize, "open_clip resizes to 32 px.*'shortest_edge': 40"),
        (lanczos, "Pillow's filter 1"),
    ],
)
def test_what_open_clip_cannot_express_is_refused_before_anything_is_written(base, tmp_path, change, message):
    model = copy.deepcopy(base)
    change(model)
    with pytest.raises(ValueError, match=message):
        write_open_clip(model, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def pooled_elsewhere(model):
    """End of text is an id in the middle: transformers reads the embedding there, and OpenAI's argmax would not."""
    word = model.processor.tokenizer(PROMPTS[0])["input_ids"][-2]
    model.config.text_config.eos_token_id = model.text_model.eos_token_id = word
    return model


def test_a_pooling_that_is_no_argmax_is_said_in_the_config(base, tmp_path):
    model = pooled_elsewhere(copy.deepcopy(base))
    assert write_open_clip(model, tmp_path) == 62
    text = json.loads((tmp_path / "open_clip_config.json").read_text())["model_cfg"]["text_cfg"]
    assert text["pool_type"] == "eos" and text["eos_id"] == model.config.text_config.eos_token_id
    again, reading = read_checkpoint(tmp_path, base)  # whose own config reads the end of text
    assert any("eos_token_id is" in note for note in reading.notes)
    assert torch.equal(embeds(again)[1], embeds(model)[1]) and not torch.equal(embeds(again)[1], embeds(base)[1])
    legacy = copy.deepcopy(base)
    legacy.config.text_config.eos_token_id = legacy.text_model.eos_token_id = 2
    write_open_clip(legacy, tmp_path / "legacy")
    assert (
        "pool_type" not in json.loads((tmp_path / "legacy/open_clip_config.json").read_text())["model_cfg"]["text_cfg"]
    )


def changed(model):
    """The same weights under quick_gelu, another epsilon and another normalisation."""
    config, processor = copy.deepcopy(model.config), copy.deepcopy(model.processor)
    for part in (config.vision_config, config.text_config):
        part.hidden_act, part.layer_norm_eps = "quick_gelu", 1e-3
    processor.image_processor.image_mean, processor.image_processor.image_std = IMAGENET["mean"], IMAGENET["std"]
    other = ZeroShotClassifier(config)
    other.load_state_dict(model.state_dict())
    return other.set_processor(processor).eval()


def test_activation_epsilon_and_normalisation_go_there_and_back(base, tmp_path):
    model = changed(base)
    write_open_clip(model, tmp_path)
    again, reading = read_checkpoint(tmp_path, base)  # which has none of the three
    for one, two, plain in zip(embeds(again), embeds(model), embeds(base), strict=True):
        assert torch.equal(one, two) and (one - plain).abs().max() > 1e-3
    assert sum("the checkpoint's was taken" in note for note in reading.notes) == 6


def test_openai_s_vocabulary_is_known_by_its_ids(base, tmp_path):
    """One of its size in which a prompt has its ids; in any other the tokenizer's files are needed."""
    words, merges, filler = {"a": 320, "photo": 1125, "of": 539, "cat": 2368}, [], iter(range(256, 320))
    vocab = {token: i for i, token in enumerate(sorted(set("aphotfc") | {f"{c}</w>" for c in "aoft"}))}
    for word, number in words.items():
        parts = [*word[:-1], f"{word[-1]}</w>"]
        merges += [("".join(parts[:i]), parts[i]) for i in range(1, len(parts))]
        vocab |= {"".join(parts[:i]): next(filler) for i in range(2, len(parts))} | {"".join(parts): number}
    vocab |= {"<|startoftext|>": 49406, "<|endoftext|>": 49407}
    vocab |= {f"filler {i}": i for i in range(49408) if i not in set(vocab.values())}
    model = copy.deepcopy(base)
    model.config.text_config.eos_token_id = 49407
    for known in (True, False):
        model.processor.tokenizer = type(base.processor.tokenizer)(
            vocab=vocab, merges=merges if known else merges[:-1], model_max_length=24
        )
        write_open_clip(model, tmp_path / str(known))
        text = json.loads((tmp_path / str(known) / "open_clip_config.json").read_text())["model_cfg"]["text_cfg"]
        assert ("hf_tokenizer_name" in text) != known == (not (tmp_path / str(known) / "tokenizer.json").exists())


# --- open_clip itself, where it is installed


VARIANTS = {  # of the tiny CLIP
    "as it is": {},
    "wide heads": {"width": 128},  # two heads of 64, which the config then leaves unsaid
    "odd size": {"image_size": 36},
    "one layer": {"layers": 1, "patch_size": 16},
}


@pytest.fixture(scope="session")
def open_clip():
    return pytest.importorskip("open_clip")


@pytest.mark.parametrize(
    "variant", [*VARIANTS, "quick_gelu, epsilon, normalisation", "pooled at an id", "after save_pretrained"]
)
def test_open_clip_opens_what_was_written(variant, open_clip, tmp_path):
    model = ZeroShotClassifier.from_pretrained(
        save_tiny_clip(tmp_path / "hf", **({"patch_size": 8} | VARIANTS.get(variant, {})))
    )
    model.load_state_dict(read_checkpoint(save(random_clip(model), tmp_path / "a.pt"), model)[0].state_dict())
    model = (
        changed(model) if variant.startswith("quick") else pooled_elsewhere(model) if "pooled" in variant else model
    )
    if variant.startswith("after"):
        model.save_pretrained(tmp_path / "out")
    count = write_open_clip(model, tmp_path / "out")
    opened, preprocess = open_clip.create_model_from_pretrained(f"local-dir:{tmp_path / 'out'}")
    tokenizer = open_clip.get_tokenizer(f"local-dir:{tmp_path / 'out'}")
    opened.eval()
    assert len(opened.state_dict()) == count
    # 3 : 2, so that the margins of the crop are whole: an odd pixel is cut right here and left there.
    picture = Image.fromarray(np.random.default_rng(0).integers(0, 256, (60, 90, 3), dtype=np.uint8))
    pixels = Collator(model.processor)([{"image": picture, "label": None}])["images"]
    pixels = torch.cat([pixels, images(model)])
    with torch.no_grad():
        tokens = model.processor.tokenizer(PROMPTS, padding=True, return_tensors="pt")
        ours = (model.embed_images(pixels), model.get_text_features(**tokens).pooler_output)
        normalised = (pixels - model.mean) / model.std
        normalised[0] = preprocess(picture)
        theirs = (opened.encode_image(normalised), opened.encode_text(tokenizer(PROMPTS)))
        ours += (logits(*ours, model.logit_scale),)
        theirs += (logits(*theirs, opened.logit_scale),)
    for kind, a, b in zip(("image", "text", "logits"), ours, theirs, strict=True):
        print(f"{variant}, {kind}: largest difference {assert_close(a, b):.1e} over {a.numel()} numbers")


def test_openai_s_vocabulary_is_known_and_needs_no_files(open_clip, base, tmp_path):
    """With the vocabulary that open_clip ships: its own tokenizer is meant, and gives the same embeddings."""
    simple = open_clip.tokenizer.SimpleTokenizer()
    # open_clip calls start and end otherwise; the ids are the same.
    vocab = {
        {"<start_of_text>": "<|startoftext|>", "<end_of_text>": "<|endoftext|>"}.get(t, t): i
        for t, i in simple.encoder.items()
    }
    tokenizer = type(base.processor.tokenizer)(vocab=vocab, merges=list(simple.bpe_ranks), model_max_length=24)
    config, processor = copy.deepcopy(base.config), copy.deepcopy(base.processor)
    config.text_config.vocab_size, config.text_config.eos_token_id, processor.tokenizer = 49408, 49407, tokenizer
    torch.manual_seed(0)
    model = ZeroShotClassifier(config).set_processor(processor).eval()
    write_open_clip(model, tmp_path)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["open_clip_config.json", "open_clip_model.safetensors"]
    opened, _, _ = open_clip.create_model_and_transforms(f"local-dir:{tmp_path}")
    theirs = open_clip.get_tokenizer(f"local-dir:{tmp_path}")
    assert type(theirs) is open_clip.tokenizer.SimpleTokenizer
    with torch.no_grad():
        ours = model.get_text_features(**tokenizer(PROMPTS, padding=True, return_tensors="pt")).pooler_output
        print(f"OpenAI's vocabulary: text within {assert_close(ours, opened.eval().encode_text(theirs(PROMPTS))):.1e}")


def tiny_cfg(cfg):
    """One of open_clip's own configs at two layers of two heads, all else as it is."""
    cfg = copy.deepcopy(cfg)
    vision, text = cfg["vision_cfg"], cfg["text_cfg"]
    if isinstance(vision.get("layers"), int):
        vision |= {"layers": 2, "width": 2 * vision.get("head_width", 64), "image_size": 3 * vision["patch_size"]}
    text |= {"layers": 2, "heads": 2, "width": 64, "vocab_size": 534, "context_length": 24}
    return cfg | {"embed_dim": 24}


def test_every_config_of_open_clip_is_read_right_or_refused(open_clip, base, tmp_path):
    """Each kind of model that its list holds, small, with its own random weights, saved in its own form."""
    read, refused, seen, worst = [], [], set(), 0.0
    for name in open_clip.list_models():
        cfg = tiny_cfg(open_clip.get_model_config(name))
        if (key := json.dumps(cfg, sort_keys=True)) in seen:
            continue
        seen.add(key)
        place = tmp_path / name
        place.mkdir()
        (place / "open_clip_config.json").write_text(json.dumps({"model_cfg": cfg}))
        weights_file = save({"visual.class_embedding": torch.ones(1)}, place / "open_clip_model.safetensors")
        with pytest.raises(ValueError) as caught:  # for its config already, or for the weights that are not there
            read_checkpoint(place, base)
        if "cannot hold" in str(caught.value) or isinstance(cfg["vision_cfg"]["layers"], list):
            refused.append(name)
            continue
        kind = open_clip.CustomTextCLIP if cfg.pop("custom_text", False) else open_clip.CLIP
        torch.manual_seed(0)
        model = kind(**copy.deepcopy(cfg)).eval()
        for parameter in model.parameters():
            parameter.data.add_(torch.randn_like(parameter) * 0.1)
        save({n: t.clone() for n, t in model.state_dict().items()}, weights_file)
        ours, reading = read_checkpoint(place, small_base(cfg, base))
        assert reading.read == len(model.state_dict()) and not reading.from_base
        pixels, tokens = images(ours), ids(base)
        tokens[:, -4] = cfg["text_cfg"].get("eos_id", 533)  # where some read the text
        with torch.no_grad():
            ours_theirs = (
                (ours.embed_images(pixels), model.encode_image((pixels - ours.mean) / ours.std)),
                (ours.get_text_features(tokens).pooler_output, model.encode_text(tokens)),
            )
        for a, b in ours_theirs:
            worst = max(worst, assert_close(a, b))
        read.append(name)
    print(f"{len(read)} kinds read, largest difference {worst:.1e}: {', '.join(read)}; {len(refused)} refused")
    assert {"ViT-B-32", "ViT-B-32-quickgelu", "ViT-H-14", "ViT-g-14", "ViT-bigG-14"} <= set(read) and len(refused) > 30
    assert {"RN50", "coca_ViT-B-32", "ViT-B-16-SigLIP", "ViT-H-14-CLIPA", "ViT-H-14-worldwide"} <= set(refused)


def small_base(cfg, base):
    vision, text = cfg["vision_cfg"], cfg["text_cfg"]
    config = copy.deepcopy(base.config)
    v, t = config.vision_config, config.text_config
    v.hidden_size, v.num_hidden_layers, v.num_attention_heads = vision["width"], 2, 2
    v.intermediate_size = int(vision["width"] * vision.get("mlp_ratio", 4.0))
    v.patch_size, v.image_size = vision["patch_size"], vision["image_size"]
    t.hidden_size, t.num_hidden_layers, t.num_attention_heads, t.max_position_embeddings = (
        64,
        2,
        2,
        text["context_length"],
    )
    t.intermediate_size = int(64 * text.get("mlp_ratio", 4.0))
    config.projection_dim = v.projection_dim = t.projection_dim = cfg["embed_dim"]
    return ZeroShotClassifier(config).set_processor(copy.deepcopy(base.processor)).eval()
