"""Foreign checkpoints give here what their own code gives, nothing in a file is run, every tensor is accounted for.

What their code computes is written out below in plain torch; with open_clip installed, it is asked itself.
"""

import collections
import copy
import functools
import json
import os
import pickle
import shutil
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import CLASSES, save_tiny_clip, weights
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import CLIPModel, CLIPVisionModel, CLIPVisionModelWithProjection

from hpt_hf.data.collator import Collator
from hpt_hf.models.zero_shot import ZeroShotClassifier, fingerprint
from hpt_hf.publishing import convert_checkpoint
from hpt_hf.publishing.convert_checkpoint import read_checkpoint, write_open_clip

MEAN, STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
IMAGENET = {"mean": [0.485, 0.456, 0.406], "std": [0.229, 0.224, 0.225]}
PROMPTS = [f"a {c}, this is a photo" for c in CLASSES]
VISUAL, TEXT = 8 + 12 * 2, 5 + 12 * 2  # tensors of the student's towers in open_clip's form, projections included


IN_BLOCKS = {"layers.": "resblocks.", "self_attn.": "attn.", "linear1.": "mlp.c_fc.", "linear2.": "mlp.c_proj."}
IN_BLOCKS |= {"norm1.": "ln_1.", "norm2.": "ln_2."}


class TheirClip(nn.Module):
    """What OpenAI's class of the base's sizes computes, under its names but for `IN_BLOCKS`."""

    def __init__(self, base, quick=False):
        super().__init__()
        v, t, dim = base.config.vision_config, base.config.text_config, base.config.projection_dim
        self.visual, patches = nn.Module(), (v.image_size // v.patch_size) ** 2
        act = (lambda x: x * torch.sigmoid(1.702 * x)) if quick else nn.functional.gelu
        for tower, c, length in ((self.visual, v, patches + 1), (self, t, t.max_position_embeddings)):
            tower.positional_embedding = nn.Parameter(torch.empty(length, c.hidden_size))
            sizes = (c.hidden_size, c.num_attention_heads, c.intermediate_size)
            block = nn.TransformerEncoderLayer(*sizes, dropout=0, activation=act, batch_first=True, norm_first=True)
            tower.transformer = nn.TransformerEncoder(block, c.num_hidden_layers, enable_nested_tensor=False)
        self.visual.class_embedding = nn.Parameter(torch.empty(v.hidden_size))
        self.visual.conv1 = nn.Conv2d(3, v.hidden_size, v.patch_size, v.patch_size, bias=False)
        self.visual.ln_pre, self.visual.ln_post = nn.LayerNorm(v.hidden_size), nn.LayerNorm(v.hidden_size)
        self.visual.proj = nn.Parameter(torch.empty(v.hidden_size, dim))
        self.token_embedding, self.ln_final = nn.Embedding(t.vocab_size, t.hidden_size), nn.LayerNorm(t.hidden_size)
        self.text_projection = nn.Parameter(torch.empty(t.hidden_size, dim))
        self.logit_scale = nn.Parameter(torch.empty(()))

    def forward(self, pixels, tokens):
        v, x = self.visual, self.visual.conv1(pixels).flatten(2).transpose(1, 2)
        x = torch.cat([v.class_embedding.expand(len(x), 1, -1), x], 1) + v.positional_embedding
        image = v.ln_post(v.transformer(v.ln_pre(x))[:, 0]) @ v.proj
        mask = torch.full((tokens.shape[1],) * 2, float("-inf")).triu(1)
        x = self.transformer(self.token_embedding(tokens) + self.positional_embedding, mask=mask)
        return image, self.ln_final(x)[torch.arange(len(x)), tokens.argmax(-1)] @ self.text_projection


def their_name(name):
    return functools.reduce(lambda n, part: n.replace(*part), IN_BLOCKS.items(), name)


@torch.no_grad()
def random_clip(base) -> dict[str, torch.Tensor]:
    model, rng = TheirClip(base), torch.Generator().manual_seed(0)
    for name, tensor in model.named_parameters():
        tensor.normal_(std=0.2, generator=rng).add_(("ln_" in name or "norm" in name) and name.endswith("weight"))
    return {their_name(n): t for n, t in model.state_dict().items()}


@torch.no_grad()
def reference_embeds(sd, model, *, quick=False, mean=MEAN, std=STD):
    """(image, text) embeddings of the test's images and prompts."""
    theirs = TheirClip(model, quick)
    theirs.load_state_dict({n: sd[their_name(n)] for n in theirs.state_dict()})
    mean, std = (torch.tensor(numbers).view(3, 1, 1) for numbers in (mean, std))
    return theirs((images(model) - mean) / std, ids(model))


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
    """(image, text) embeddings within 1e-4, where they differ among themselves by far more."""
    for a, b in zip(ours, theirs, strict=True):
        assert a.shape == b.shape and (b[0] - b[1]).abs().max() > 0.05 and float((a - b).abs().max()) < 1e-4


# --- the published forms: each writes a state dict as its code does


def without(sd, *names):
    return {n: t for n, t in sd.items() if n not in names}


def under(prefix, sd):
    return collections.OrderedDict((prefix + name, tensor) for name, tensor in sd.items())


def visual(sd):
    return {n.removeprefix("visual."): t for n, t in sd.items() if n.startswith("visual.")}


def sgd_state(sd):
    buffers = {i: {"momentum_buffer": tensor} for i, tensor in enumerate(sd.values())}
    return {"state": buffers, "param_groups": [{"lr": 0.1, "params": list(buffers)}]}


def tecoa(sd):
    """finetuning.py and PMG_AFT.py, save_checkpoint: NullPrompter, TokenPrompter(0), best_acc1 = numpy.mean(...)."""
    prompter = {"state_dict": {}, "add_prompter": {"module.prompt": torch.randn(1, 0, 768)}}
    about = {"epoch": 3, "best_acc1": np.mean([51.5, 52.5]), "optimizer": sgd_state(visual(sd))}
    return about | prompter | {"vision_encoder_state_dict": collections.OrderedDict(visual(sd))}


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
    "TeCoA, PMG-AFT, TGA-ZSR": (tecoa, ".pth.tar", False, 36, False),
    "AGFT, AdvFLYP": (lambda sd: {"modules": {"clip.visual": visual(sd)}, "params": {}}, ".pth", False, 0, False),
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
}


def save(content, file):
    if str(file).endswith(".safetensors"):
        save_file({n: t.contiguous() for n, t in content.items()}, file)
    else:
        torch.save(content, file)
    return file


def refused(message, place, base):
    with pytest.raises(ValueError, match=message) as caught:
        read_checkpoint(place, base)
    return str(caught.value)


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
    image, text = reference_embeds(sd, base)
    assert_close(embeds(model), (image, text if both else embeds(base)[1]))
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


PARTS = "visual.transformer.resblocks.0.ls_1.gamma visual.attn_pool.query cls_emb visual.prompt_pos_embedding"


@pytest.mark.parametrize("unknown", [*PARTS.split(), "text.transformer.embeddings.x"])
def test_an_unknown_part_of_a_tower_is_refused(base, theirs, tmp_path, unknown):
    file = save(theirs | {unknown: torch.ones(2)}, tmp_path / "a.pt")
    refused(f"parts that the base has not: {unknown.removeprefix('text.')}", file, base)


@pytest.fixture(scope="module")
def stock(student_path):
    """A stock CLIPModel of the student's architecture with other weights."""
    torch.manual_seed(7)
    return CLIPModel(CLIPModel.from_pretrained(student_path).config).eval()


def file(content):
    return lambda stock, place: save(content(stock), place / "a.bin")


def tensors(prefix="", **more):
    return lambda stock: {n: t for n, t in stock.state_dict().items() if n.startswith(prefix)} | more


def folder(kind, size="5GB"):
    def saved(stock, place):
        stock.save_pretrained(place / "whole")
        kind.from_pretrained(place / "whole").save_pretrained(place / "part", max_shard_size=size)
        return place / "part"

    return saved


POSITIONS = {f"{tower}_model.embeddings.position_ids": torch.arange(17)[None] for tower in ("text", "vision")}
HEAD = {"lm_head.weight": torch.ones(2, 2)}
HF_FORMS = {  # name: (what is saved, tensors read, from the base); LEAF's repositories are folders
    "whole": (file(tensors()), 78, 0),
    "old, with buffers": (file(tensors(**POSITIONS)), 78, 0),
    "under a prefix": (file(lambda m: {"state_dict": under("module.model.", m.state_dict())}), 78, 0),
    "with projection": (file(tensors("vis")), 40, 38),
    "without projection": (file(tensors("vision_model.")), 39, 39),
    "flat": (file(lambda m: m.vision_model.state_dict()), 39, 39),
    "in a LLaVA": (file(lambda m: under("model.vision_tower.", tensors("vision_model.")(m)) | HEAD), 39, 39),
    "a folder": (folder(CLIPModel), 78, 0),
    "a folder of shards": (folder(CLIPModel, "80KB"), 78, 0),
    "a tower's folder": (folder(CLIPVisionModel), 39, 39),
    "a tower's folder, with projection": (folder(CLIPVisionModelWithProjection), 40, 38),
}


@pytest.mark.parametrize("form", HF_FORMS)
def test_transformers_names_are_read_whole_or_in_part(form, base, stock, tmp_path):
    make, read, from_base = HF_FORMS[form]
    model, reading = read_checkpoint(make(stock, tmp_path), base)
    assert (reading.read, len(reading.from_base)) == (read, from_base) and "names of transformers" in reading.form
    mine, other, own = model.model.state_dict(), stock.state_dict(), base.model.state_dict()
    assert all(torch.equal(mine[n], own[n] if n in reading.from_base else other[n]) for n in mine) and len(mine) == 78
    assert ("visual_projection.weight" in reading.from_base) == any("projection" in note for note in reading.notes)
    assert any("Tokenizer and processor are the base's." in note for note in reading.notes)


def edit(file, change):
    content = json.loads(Path(file).read_text())
    change(content)
    Path(file).write_text(json.dumps(content))


def configs(model):
    return model.config.text_config, model.config.vision_config


def test_the_activation_of_a_bare_file_is_the_bases(base, theirs, tmp_path):
    other = copy.deepcopy(base)
    for config in configs(other):
        config.hidden_act = "quick_gelu"
    model, reading = read_checkpoint(save(theirs, tmp_path / "a.pt"), other)
    assert_close(embeds(model), reference_embeds(theirs, other, quick=True))
    assert any("Activation (quick_gelu)" in note for note in reading.notes)


def towers(**changes):
    def change(content):
        for tower in ("text_config", "vision_config"):
            content[tower].update(changes)

    return lambda folder: edit(folder / "config.json", change)


def test_the_activation_of_a_folder_wins_and_is_noted(base, folder_of):
    place = folder_of(towers(hidden_act="quick_gelu"), form="transformers")
    model, reading = read_checkpoint(place, base)
    assert sum("hidden_act is 'quick_gelu' in the checkpoint's" in note for note in reading.notes) == 2
    assert_close(embeds(model), embeds(ZeroShotClassifier(CLIPModel.from_pretrained(place), base.processor).eval()))


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
    shutil.copy(open_clip_folder / "open_clip_config.json", tmp_path)
    torch.save(theirs, tmp_path / "open_clip_pytorch_model.bin")
    assert fingerprint(read_checkpoint(tmp_path, base)[0]) == fingerprint(model)


def test_the_config_says_what_the_model_is(base, open_clip_folder):
    context, tokens = base.config.text_config.max_position_embeddings, len(base.processor.tokenizer)
    tower = {"width": 32, "layers": 2, "mlp_ratio": 2.0}
    text = {"context_length": context, "vocab_size": tokens, "heads": 2, "hf_tokenizer_name": "model"}
    vision = {"image_size": 32, "patch_size": 8, "head_width": 16}
    model = {"embed_dim": 24, "quick_gelu": False, "vision_cfg": tower | vision, "text_cfg": tower | text}
    pixels = {"size": 32, "mean": [*MEAN], "std": [*STD], "interpolation": "bicubic", "resize_mode": "shortest"}
    content = json.loads((open_clip_folder / "open_clip_config.json").read_text())
    assert content == {"model_cfg": model, "preprocess_cfg": pixels}
    assert (open_clip_folder / "tokenizer.json").is_file()


def says(part="", **values):
    def change(content):
        (content["model_cfg"][part] if part else content["model_cfg"]).update(values)

    return lambda folder: edit(folder / "open_clip_config.json", change)


@pytest.fixture
def folder_of(open_clip_folder, stock, tmp_path):
    """open_clip's folder, or that of a stock CLIPModel, where something else stands."""

    def changed(*changes, form="open_clip"):
        place = tmp_path / form
        if form == "open_clip":
            shutil.copytree(open_clip_folder, place, dirs_exist_ok=True)
        else:
            stock.save_pretrained(place, max_shard_size="80KB")
        for change in changes:
            change(place)
        return place

    return changed


PARTS_OF_OTHERS = ["no_ln_pre", "attentional_pool", "ls_init_value", "timm_model_name", "qk_norm"]
OF_OPEN_CLIP = [
    *((says("vision_cfg", **{name: {"a": 1}}), f"cannot hold: vision_cfg.{name} = ") for name in PARTS_OF_OTHERS),
    (says("vision_cfg", pool_type="avg"), "cannot hold: vision_cfg.pool_type = "),
    (says("text_cfg", proj_type="none"), "cannot hold: text_cfg.proj_type = "),
    (says("text_cfg", hf_model_name="x"), "cannot hold: text_cfg.hf_model_name = "),
    (says("text_cfg", no_causal_mask=True), "cannot hold: text_cfg.no_causal_mask = "),
    (says(init_logit_bias=-10), "cannot hold: init_logit_bias = "),
    # As in open_clip's XLM-V models: transformers would take 2 for the highest id.
    (says("text_cfg", pool_type="eos", eos_id=2), "cannot hold: text_cfg.pool_type = 'eos' at id 2"),
    (says("vision_cfg", head_width=8), "vision_config.num_attention_heads is 4 in the checkpoint's.* 2 in the base"),
    (says("text_cfg", heads=8), "text_config.num_attention_heads is 8 in the checkpoint's"),
]
OF_TRANSFORMERS = [
    (towers(num_attention_heads=4), "num_attention_heads is 4 in the checkpoint's"),
    (lambda f: edit(f / "config.json", lambda c: c.update(model_type="siglip")), "type 'siglip': expected 'clip'"),
    (lambda f: sorted(f.glob("*.safetensors"))[1].unlink(), "model-00002-of.*is missing"),
]
FOLDERS = [("open_clip", *row) for row in OF_OPEN_CLIP] + [("transformers", *row) for row in OF_TRANSFORMERS]


@pytest.mark.parametrize("form, change, message", FOLDERS)
def test_a_folder_of_another_model_or_not_whole_is_refused(base, folder_of, form, change, message):
    refused(message, folder_of(change, form=form), base)


def test_what_a_config_may_say(base, folder_of):
    defaults = {"timm_pool": "avg", "timm_model_name": None, "attn_pooler_heads": 8, "attentional_pool": False}
    place = folder_of(says("vision_cfg", **defaults, pool_type="tok"), says("text_cfg", hf_proj_type="mlp"))
    assert read_checkpoint(place, base)[1].read == 62


@pytest.mark.parametrize("how", ["config", "buffers", "buffers beside", "preprocessor", "processor"])
def test_the_checkpoints_own_normalisation_is_taken_and_exported(how, base, stock, theirs, folder_of, tmp_path):
    other = {"interpolation": "bilinear", "resize_mode": "squash"}
    if how == "config":
        place = folder_of()
        edit(place / "open_clip_config.json", lambda c: c.update(preprocess_cfg=IMAGENET | other))
    elif how.endswith("processor"):
        stock.save_pretrained(place := tmp_path / "a")
        image = {f"image_{k}": v for k, v in IMAGENET.items()}
        content = {"image_processor": image} if how == "processor" else image
        (place / f"{how}_config.json").write_text(json.dumps(content))
    else:
        name, prefix = ("normalize.{}", "model.") if "beside" in how else ("{}", "")
        buffers = {name.format(k): torch.tensor(v).view(1, 3, 1, 1) for k, v in IMAGENET.items()}
        place = save(under(prefix, theirs) | buffers, tmp_path / "a.pt")
    model, reading = read_checkpoint(place, base)
    if not how.endswith("processor"):
        assert_close(embeds(model), reference_embeds(theirs, base, **IMAGENET))
    assert sum(" the checkpoint's was taken" in note for note in reading.notes) == 2
    for resized in ("interpolation is 'bilinear', the processor's 'bicubic'", "resize_mode is 'squash'"):
        assert any(resized in note for note in reading.notes) == (how == "config")
    model.save_pretrained(tmp_path / "out")
    saved = ZeroShotClassifier.from_pretrained(tmp_path / "out")
    assert np.allclose(saved.mean.flatten(), IMAGENET["mean"]) and np.allclose(saved.std.flatten(), IMAGENET["std"])
    assert list(base.processor.image_processor.image_mean) == list(MEAN)


def test_two_normalisations_are_refused_and_the_same_twice_is_none(base, theirs, tmp_path):
    same = {"mean": torch.tensor(MEAN), "std": torch.tensor(STD)}
    assert not any("taken" in n for n in read_checkpoint(save(theirs | same, tmp_path / "a.pt"), base)[1].notes)
    two = {"mean": torch.tensor(MEAN), "teacher.mean": torch.tensor(IMAGENET["mean"])}
    refused("more than one mean", save(theirs | two, tmp_path / "a.pt"), base)
    odd = save(theirs | {"mean": torch.tensor([122.7, 116.7, 104.0])}, tmp_path / "a.pt")
    refused(r"mean is \[122.*expected three numbers in \[0, 1\]", odd, base)


# --- nothing is run, nothing broken is used


class Trap:
    def __init__(self, file):
        self.file = str(file)

    def __reduce__(self):
        return os.mkdir, (self.file,)


def dumped(content, file, protocol=2):
    file.write_bytes(pickle.dumps(without(content, "state_dict"), protocol=protocol))


PICKLED = {
    "torch.save": torch.save,
    "old torch.save": lambda content, file: torch.save(content, file, _use_new_zipfile_serialization=False),
    "pickle.dump": dumped,
    "pickle.dump, new": lambda content, file: dumped(content, file, protocol=5),
}


@pytest.mark.parametrize("how", PICKLED)
def test_code_in_a_pickle_is_refused_by_name_and_not_run(how, base, theirs, tmp_path):
    file, trap = tmp_path / "a.pt", tmp_path / "sprung"
    PICKLED[how]({"state_dict": theirs, "extra": Trap(trap)}, file)
    code = r"is a pickle that needs (posix|nt)\.mkdir to be called"
    refused("a.pt is damaged" if how.endswith("new") else rf"a\.pt {code}", file, base)
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


def test_a_program_is_refused(base, tmp_path):
    with warnings.catch_warnings(action="ignore"):
        torch.jit.trace(nn.Linear(2, 2), torch.ones(1, 2)).save(tmp_path / "ViT-B-32.pt")
    refused("TorchScript archive.*openai/clip-vit-base-patch32", tmp_path / "ViT-B-32.pt", base)


@pytest.mark.parametrize("suffix", [".pt", ".safetensors"])
def test_a_truncated_file_or_one_of_something_else_is_named(base, theirs, tmp_path, suffix):
    raw = save(dict(theirs), tmp_path / f"cut{suffix}").read_bytes()
    for content in (b"", raw[: len(raw) // 50], raw[: len(raw) // 2], raw[:-50], b"<!DOCTYPE html>Log in" * 20):
        (tmp_path / f"cut{suffix}").write_bytes(content)
        refused(rf"cut\{suffix} is damaged or not what its name says", tmp_path / f"cut{suffix}", base)


LAYER = "visual.transformer.resblocks.0."
IN_PROJ = "transformer.resblocks.1.attn.in_proj_bias"


def put(name, change):
    return lambda sd: sd | {name: change(sd.get(name))}


def holds_itself(sd):
    content = dict(sd)
    content["model"] = content
    return content


BROKEN = {  # what is in the file: what the message says
    "nothing": (lambda sd: {}, "holds 0 CLIP vision transformers, expected one: found 0 tensors"),
    "a list": (lambda sd: list(sd.values()), "holds a list: expected a state dict"),
    "a tensor": (lambda sd: sd["visual.proj"], "holds a Tensor: expected a state dict"),
    "numbers": (lambda sd: {"epoch": 3, "loss": [1.0]}, "found 0 tensors among .*epoch"),
    "a ResNet CLIP": (lambda sd: {"visual.attnpool.x": torch.ones(5)}, "found 1 tensors .*attnpool"),
    "two models": (lambda sd: {"a": visual(sd), "b": visual(sd)}, "holds 2 .*a.class_emb.*', 'b.class_emb"),
    "no ln_pre": (lambda sd: without(visual(sd), "ln_pre.weight", "ln_pre.bias"), "lacks 2 .*towers: .*pre_layrnorm"),
    "no proj": (lambda sd: without(visual(sd), "proj"), "lacks 1 tensors of its towers: visual_projection.weight"),
    "one text tensor less": (lambda sd: without(sd, IN_PROJ), "lacks 3 .*layers.1.self_attn"),
    "a layer less": (lambda sd: without(sd, *(n for n in sd if LAYER in n)), "lacks 16 .*layers.0.*same architecture"),
    "a layer more": (put("visual.transformer.resblocks.2.ln_1.bias", lambda _: torch.ones(32)), "base has not"),
    "a wrong shape": (put("visual.ln_post.bias", lambda t: t[:7]), r"post.bias .* shape \(7,\), expected \(32,\)"),
    "a scalar": (put(LAYER + "attn.in_proj_weight", lambda t: t[0, 0]), r"shape \(\), expected \(96, 32\)"),
    "odd proj": (put("visual.proj", lambda t: torch.ones(2, 3, 4)), r"shape \(2, 3, 4\)"),
    "integers": (put("ln_final.bias", lambda t: t.char()), "ln_final.bias in .* holds torch.int8"),
    "a NaN": (put("ln_final.bias", lambda t: t * np.nan), "ln_final.bias in .* expected finite torch.float32"),
    "float8": (put("visual.proj", lambda t: t.to(torch.float8_e4m3fn)), "proj in .* holds torch.float8"),
    "complex": (put("visual.proj", lambda t: t.cfloat()), "proj in .* holds torch.complex64"),
    "sparse": (put("visual.proj", lambda t: t.to_sparse()), "lacks 1 tensors .*visual_projection"),
    "stride 0": (put("visual.proj", lambda t: torch.zeros(1).expand(10**9, 9)), r"\(1000000000, 9\), expected"),
    "itself": (holds_itself, "dicts in dicts without end"),
    "a sparse mean": (lambda sd: without(sd, "ln_final.bias") | {"mean": torch.ones(3).to_sparse()}, "lacks 1 tensor"),
    "more words": (put("token_embedding.weight", lambda t: torch.ones(700, 32)), r"token_emb.* \(700, 32\)"),
}  # fmt: skip


@pytest.mark.parametrize("what", BROKEN)
def test_what_is_no_clip_is_refused_in_words(what, base, theirs, tmp_path):
    make, message = BROKEN[what]
    assert "broken.pt" in refused(message, save(make(theirs), tmp_path / "broken.pt"), base)


def test_a_place_with_nothing_says_what_is_there(base, tmp_path):
    refused("no checkpoint at .*nowhere.pt: found nothing", tmp_path / "nowhere.pt", base)
    (tmp_path / "simclip4.pt").write_bytes(b"")
    refused(r"found \['simclip4.pt'\], expected a file, or .*_config.json or config.json with weights", tmp_path, base)
    save({"a": torch.ones(1)}, tmp_path / "open_clip_model.safetensors")
    for content, message in (("{", "is damaged"), ("{}", "has no model_cfg")):
        (tmp_path / "open_clip_config.json").write_text(content)
        refused(f"open_clip_config.json {message}", tmp_path, base)


def resized(**changes):
    return lambda m: [setattr(m.processor.image_processor, name, value) for name, value in changes.items()]


CHANGES = {
    r"both .* alike, .* \['gelu', 'quick_gelu'\]": lambda m: setattr(configs(m)[0], "hidden_act", "quick_gelu"),
    r"this model has \['relu'\]": lambda m: [setattr(c, "hidden_act", "relu") for c in configs(m)],
    "resizes to 32 px.*'shortest_edge': 40": resized(size={"shortest_edge": 40}),
    "Pillow's filter 1": resized(resample=1),
}


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


@pytest.mark.parametrize("ids, size, known", [(0, 0, True), (1, 0, False), (0, 1, False)])
def test_openais_vocabulary_is_known_by_its_ids_and_another_goes_along(base, tmp_path, monkeypatch, ids, size, known):
    tokenizer, prompt = base.processor.tokenizer, "a photo of a cat"
    known_as = (prompt, [i + ids for i in tokenizer(prompt)["input_ids"]], len(tokenizer) + size)
    monkeypatch.setattr(convert_checkpoint, "OPENAI_VOCABULARY", known_as)
    write_open_clip(base, tmp_path)
    text = json.loads((tmp_path / "open_clip_config.json").read_text())["model_cfg"]["text_cfg"]
    assert ("hf_tokenizer_name" not in text) == (not (tmp_path / "tokenizer.json").exists()) == known


@pytest.mark.parametrize(
    "variant", [{}, {"width": 128}, {"image_size": 36}, {"layers": 1, "patch_size": 16}, changed, pooled_elsewhere]
)
def test_open_clip_itself_opens_what_was_written(variant, tmp_path):
    open_clip = pytest.importorskip("open_clip")
    sizes = {} if callable(variant) else variant
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
        ours = model.embed_images(pixels), model.model.get_text_features(**tokens).pooler_output
        assert_close(ours, (opened.encode_image(normalised), opened.encode_text(tokenizer(PROMPTS))))
