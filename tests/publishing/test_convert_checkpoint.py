"""Foreign checkpoints give here what their own code gives, nothing in a file is run, every tensor is accounted for.

What their code computes is written out below in plain torch; with open_clip installed, it is asked itself.
"""

import copy
import json
import os
import shutil
import warnings

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import CLASSES, save_tiny_clip
from PIL import Image
from safetensors.torch import load_file, save_file
from transformers import CLIPModel, CLIPVisionModelWithProjection

from hpt_hf.data.collator import Collator
from hpt_hf.models.zero_shot import ZeroShotClassifier, fingerprint
from hpt_hf.publishing import convert_checkpoint
from hpt_hf.publishing.convert_checkpoint import read_checkpoint, write_open_clip
from hpt_hf.utils import read_json, write_json

MEAN, STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
IMAGENET = {"mean": [0.485, 0.456, 0.406], "std": [0.229, 0.224, 0.225]}
PROMPTS = [f"a {c}, this is a photo" for c in CLASSES]
VISUAL, TEXT = 8 + 12 * 2, 5 + 12 * 2  # tensors of the student's towers in open_clip's form, projections included


def images(model):
    return torch.rand(4, 3, model.image_size, model.image_size, generator=torch.Generator().manual_seed(5))


def ids(model):
    settings = {"padding": "max_length", "max_length": model.config.text_config.max_position_embeddings}
    return model.processor.tokenizer(PROMPTS, return_tensors="pt", **settings)["input_ids"]


@torch.no_grad()
def embeds(model):
    return model.embed_images(images(model)), model.model.get_text_features(ids(model)).pooler_output


@torch.no_grad()
def reference_embeds(sd, model, *, quick=False, mean=MEAN, std=STD):
    """What OpenAI's code computes of the same images and prompts, from the tensors of its own names."""

    def linear(x, name):
        return F.linear(x, sd[f"{name}weight"], sd[f"{name}bias"])

    def norm(x, name):
        return F.layer_norm(x, x.shape[-1:], sd[f"{name}.weight"], sd[f"{name}.bias"])

    def transformer(x, tower, causal):
        for layer in range(2):
            at = f"{tower}transformer.resblocks.{layer}."
            qkv = linear(norm(x, f"{at}ln_1"), f"{at}attn.in_proj_").unflatten(-1, (3, 2, -1))  # of two heads
            attended = F.scaled_dot_product_attention(*qkv.permute(2, 0, 3, 1, 4), is_causal=causal)
            x = x + linear(attended.transpose(1, 2).flatten(2), f"{at}attn.out_proj.")
            y = linear(norm(x, f"{at}ln_2"), f"{at}mlp.c_fc.")
            x = x + linear(y * torch.sigmoid(1.702 * y) if quick else F.gelu(y), f"{at}mlp.c_proj.")
        return x

    mean, std = (torch.tensor(numbers).view(3, 1, 1) for numbers in (mean, std))
    x = F.conv2d((images(model) - mean) / std, sd["visual.conv1.weight"], stride=8).flatten(2).transpose(1, 2)
    x = torch.cat([sd["visual.class_embedding"].expand(len(x), 1, -1), x], 1) + sd["visual.positional_embedding"]
    x = transformer(norm(x, "visual.ln_pre"), "visual.", causal=False)
    image, tokens = norm(x[:, 0], "visual.ln_post") @ sd["visual.proj"], ids(model)
    x = transformer(sd["token_embedding.weight"][tokens] + sd["positional_embedding"], "", causal=True)
    return image, norm(x, "ln_final")[torch.arange(len(x)), tokens.argmax(-1)] @ sd["text_projection"]


def assert_close(ours, theirs):
    """(image, text) embeddings within 1e-4, where they differ among themselves by far more."""
    for a, b in zip(ours, theirs, strict=True):
        assert a.shape == b.shape and (b[0] - b[1]).abs().max() > 0.05 and float((a - b).abs().max()) < 1e-4


def refused(message, place, base):
    with pytest.raises(ValueError, match=message):
        read_checkpoint(place, base)


def save(content, file):
    if str(file).endswith(".safetensors"):
        save_file({n: t.contiguous() for n, t in content.items()}, file)
    else:
        torch.save(content, file)
    return file


@torch.no_grad()
def random_clip(path):
    """A stock CLIPModel with no weight at 0 or 1, which could stand for another."""
    model, rng = CLIPModel.from_pretrained(path).eval(), torch.Generator().manual_seed(0)
    for name, tensor in model.named_parameters():
        tensor.normal_(std=0.2, generator=rng).add_("norm" in name and name.endswith("weight"))
    return model


@pytest.fixture(scope="module")
def base(student_path):
    return ZeroShotClassifier.from_pretrained(student_path)


@pytest.fixture(scope="module")
def stock(student_path):
    return random_clip(student_path)


@pytest.fixture(scope="module")
def open_clip_folder(base, stock, tmp_path_factory):
    """Other weights than the base's, written in open_clip's form."""
    folder = tmp_path_factory.mktemp("open_clip") / "model"
    assert write_open_clip(ZeroShotClassifier(copy.deepcopy(stock), base.processor), folder) == VISUAL + TEXT + 1
    return folder


@pytest.fixture(scope="module")
def theirs(open_clip_folder):
    return load_file(open_clip_folder / "open_clip_model.safetensors")


# --- the published forms: each writes a state dict as its code does


def without(sd, *names):
    return {n: t for n, t in sd.items() if n not in names}


def under(prefix, sd):
    return {prefix + name: tensor for name, tensor in sd.items()}


def visual(sd):
    return {n.removeprefix("visual."): t for n, t in sd.items() if n.startswith("visual.")}


def tecoa(sd):
    """finetuning.py and PMG_AFT.py, save_checkpoint: NullPrompter, TokenPrompter(0), best_acc1 = numpy.mean(...)."""
    prompter = {"state_dict": {}, "add_prompter": {"module.prompt": torch.randn(1, 0, 768)}}
    optimizer = {"state": {0: {"momentum_buffer": sd["visual.proj"]}}, "param_groups": [{"lr": 0.1, "params": [0]}]}
    about = {"epoch": 3, "best_acc1": np.mean([51.5, 52.5]), "optimizer": optimizer}
    return about | prompter | {"vision_encoder_state_dict": visual(sd)}


def custom_text(sd):
    names = {n: n if n.startswith("visual.") or n == "logit_scale" else f"text.{n}" for n in sd}
    return {names[n]: t for n, t in sd.items()} | {"text.attn_mask": torch.zeros(24, 24)}


FORMS = {  # name: (what the code saves, suffix, both towers, entries ignored)
    "TeCoA, PMG-AFT, TGA-ZSR": (tecoa, ".pth.tar", False, 5),
    "AGFT, AdvFLYP": (lambda sd: {"modules": {"clip.visual": visual(sd)}, "params": {}}, ".pth", False, 0),
    "FARE": (visual, ".pt", False, 0),
    "FARE's wrapper": (lambda sd: under("module.model.", visual(sd)), ".pt", False, 0),
    "prompt learner": (lambda sd: under("clip.", sd) | {"learner.ctx": torch.randn(4, 8)}, ".pth", True, 1),
    "OpenAI, in half": (lambda sd: under("", sd) | {"vocab_size": torch.tensor(600)}, ".pt", True, 1),
    "open_clip, safetensors": (dict, ".safetensors", True, 0),
    "open_clip, training": (lambda sd: {"epoch": 5, "state_dict": under("module._orig_mod.", sd)}, ".pt", True, 1),
    "open_clip, custom text": (custom_text, ".pt", True, 1),
}


@pytest.mark.parametrize("form", FORMS)
def test_a_published_form_gives_what_its_own_code_gives(form, base, theirs, tmp_path):
    make, suffix, both, ignored = FORMS[form]
    half = {n: t.half() for n, t in theirs.items()} if "half" in form else theirs
    model, reading = read_checkpoint(save(make(half), tmp_path / f"file{suffix}"), base)
    sd = {n: t.float() for n, t in half.items()}
    image, text = reference_embeds(sd, base)
    assert_close(embeds(model), (image, text if both else embeds(base)[1]))
    assert torch.equal(model.model.logit_scale, sd["logit_scale"] if both else base.model.logit_scale)
    # Every tensor of the file is read or counted, every tensor of the model comes from one place.
    assert reading.read == (VISUAL + TEXT + 1 if both else VISUAL) and reading.ignored == ignored
    assert len(reading.from_base) == (0 if both else 5 + 16 * 2 + 1)
    assert {p.dtype for p in model.parameters()} == {torch.float32} and not model.training
    assert reading.form.startswith("both towers" if both else "the vision tower")
    assert ("no part of a CLIP" in str(reading)) == (form == "prompt learner")


PARTS = "visual.transformer.resblocks.0.ls_1.gamma visual.attn_pool.query cls_emb visual.prompt_pos_embedding"


@pytest.mark.parametrize("unknown", [*PARTS.split(), "text.transformer.embeddings.x"])
def test_an_unknown_part_of_a_tower_is_refused(base, theirs, tmp_path, unknown):
    file = save(theirs | {unknown: torch.ones(2)}, tmp_path / "a.pt")
    refused(f"parts that the base has not: {unknown.removeprefix('text.')}", file, base)


def part(stock, prefix):
    return {n: t for n, t in stock.state_dict().items() if n.startswith(prefix)}


POSITIONS = {f"{tower}_model.embeddings.position_ids": torch.arange(17)[None] for tower in ("text", "vision")}
HEAD = {"lm_head.weight": torch.ones(2, 2)}
HF_FORMS = {  # name: (what is in the file, or whose folder it is, tensors read); LEAF's repositories are folders
    "whole, with buffers": (lambda m: m.state_dict() | POSITIONS, 78),
    "with projection": (lambda m: part(m, "vis"), 40),
    "without projection": (lambda m: part(m, "vision_model."), 39),
    "flat": (lambda m: m.vision_model.state_dict(), 39),
    "in a LLaVA": (lambda m: under("model.vision_tower.", part(m, "vision_model.")) | HEAD, 39),
    "a folder of shards": (CLIPModel, 78),
    "a tower's folder": (CLIPVisionModelWithProjection, 40),
}


@pytest.mark.parametrize("form", HF_FORMS)
def test_transformers_names_are_read_whole_or_in_part(form, base, stock, tmp_path):
    make, read = HF_FORMS[form]
    if isinstance(make, type):
        stock.save_pretrained(tmp_path / "whole")
        make.from_pretrained(tmp_path / "whole").save_pretrained(tmp_path / "a", max_shard_size="80KB")
    else:
        torch.save(make(stock), tmp_path / "a")
    model, reading = read_checkpoint(tmp_path / "a", base)
    assert (reading.read, len(reading.from_base)) == (read, 78 - read) and "names of transformers" in reading.form
    mine, other, own = model.model.state_dict(), stock.state_dict(), base.model.state_dict()
    assert all(torch.equal(mine[n], own[n] if n in reading.from_base else other[n]) for n in mine) and len(mine) == 78
    assert ("visual_projection.weight" in reading.from_base) == any("projection" in note for note in reading.notes)


# --- what a folder's config says


def edited(name, change):
    def edit(folder):
        content = read_json(folder / name)
        change(content)
        write_json(folder / name, content)

    return edit


def says(part="", **values):
    return edited("open_clip_config.json", lambda c: (c["model_cfg"][part] if part else c["model_cfg"]).update(values))


def towers(**values):
    return edited("config.json", lambda c: [c[f"{tower}_config"].update(values) for tower in ("text", "vision")])


@pytest.fixture
def folder_of(open_clip_folder, stock, tmp_path):
    """open_clip's folder, or that of a stock CLIPModel, where something else stands."""

    def changed(*changes, form="open_clip"):
        place = tmp_path / form
        if form == "open_clip":
            shutil.copytree(open_clip_folder, place)
        else:
            stock.save_pretrained(place, max_shard_size="80KB")
        for change in changes:
            change(place)
        return place

    return changed


def test_the_activation_is_the_folders_own_and_of_a_bare_file_the_bases(base, theirs, folder_of, tmp_path):
    place = folder_of(towers(hidden_act="quick_gelu"), form="transformers")
    model, reading = read_checkpoint(place, base)
    assert str(reading).count("hidden_act is 'quick_gelu' in the checkpoint's") == 2
    quick = ZeroShotClassifier(CLIPModel.from_pretrained(place), base.processor).eval()
    assert_close(embeds(model), embeds(quick))
    model, reading = read_checkpoint(save(theirs, tmp_path / "a.pt"), quick)
    assert_close(embeds(model), reference_embeds(theirs, quick, quick=True))
    assert "Activation (quick_gelu)" in str(reading)


def test_there_and_back_is_bit_equal_and_the_config_says_what_the_model_is(base, stock, folder_of, theirs):
    model, reading = read_checkpoint(place := folder_of(), base)
    assert all(torch.equal(t, stock.state_dict()[n]) for n, t in model.model.state_dict().items())
    assert (reading.read, reading.from_base, reading.ignored) == (62, (), 0)
    assert reading.notes == ("Tokenizer and processor are the base's.",), "no difference where there is none"
    (place / "open_clip_model.safetensors").unlink()
    torch.save(theirs, place / "open_clip_pytorch_model.bin")
    assert fingerprint(read_checkpoint(place, base)[0]) == fingerprint(model)
    tower = {"width": 32, "layers": 2, "mlp_ratio": 2.0}
    context = {"context_length": base.config.text_config.max_position_embeddings}
    text = context | {"vocab_size": len(base.processor.tokenizer), "heads": 2, "hf_tokenizer_name": "model"}
    vision = {"image_size": 32, "patch_size": 8, "head_width": 16}
    cfg = {"embed_dim": 24, "quick_gelu": False, "vision_cfg": tower | vision, "text_cfg": tower | text}
    pixels = {"size": 32, "mean": [*MEAN], "std": [*STD], "interpolation": "bicubic", "resize_mode": "shortest"}
    assert read_json(place / "open_clip_config.json") == {"model_cfg": cfg, "preprocess_cfg": pixels}
    assert (place / "tokenizer.json").is_file()


ANOTHER = [
    ("open_clip", says("vision_cfg", qk_norm={"a": 1}), "cannot hold: vision_cfg.qk_norm = "),
    ("open_clip", says("vision_cfg", pool_type="avg"), "cannot hold: vision_cfg.pool_type = "),
    ("open_clip", says("text_cfg", hf_model_name="x"), "cannot hold: text_cfg.hf_model_name = "),
    ("open_clip", says(init_logit_bias=-10), "cannot hold: init_logit_bias = "),
    # As in open_clip's XLM-V models: transformers would take 2 for the highest id.
    ("open_clip", says("text_cfg", pool_type="eos", eos_id=2), "cannot hold: text_cfg.pool_type = 'eos' at id 2"),
    ("open_clip", says("vision_cfg", head_width=8), "vision_config.num_attention_heads is 4 in the checkpoint's"),
    ("open_clip", says("text_cfg", heads=8), "text_config.num_attention_heads is 8 in the checkpoint's"),
    ("transformers", towers(num_attention_heads=4), "num_attention_heads is 4 in the checkpoint's .* 2 in the base"),
    ("transformers", edited("config.json", lambda c: c.update(model_type="siglip")), "'siglip': expected 'clip'"),
    ("transformers", lambda f: sorted(f.glob("*.safetensors"))[1].unlink(), "model-00002-of.*is damaged"),
]


@pytest.mark.parametrize("form, change, message", ANOTHER)
def test_a_folder_of_another_model_or_not_whole_is_refused(base, folder_of, form, change, message):
    refused(message, folder_of(change, form=form), base)


def test_what_a_config_may_say(base, folder_of):
    defaults = {"timm_pool": "avg", "timm_model_name": None, "attn_pooler_heads": 8, "attentional_pool": False}
    place = folder_of(says("vision_cfg", **defaults, pool_type="tok"), says("text_cfg", hf_proj_type="mlp"))
    assert read_checkpoint(place, base)[1].read == 62


@pytest.mark.parametrize("how", ["open_clip", "buffers", "preprocessor", "processor"])
def test_the_checkpoints_own_normalisation_is_taken_and_exported(how, base, theirs, folder_of, tmp_path):
    other = {"interpolation": "bilinear", "resize_mode": "squash"}
    image = {f"image_{k}": v for k, v in IMAGENET.items()}
    if how == "open_clip":
        place = folder_of(edited("open_clip_config.json", lambda c: c.update(preprocess_cfg=IMAGENET | other)))
    elif how == "buffers":
        buffers = {f"normalize.{k}": torch.tensor(v).view(1, 3, 1, 1) for k, v in IMAGENET.items()}
        place = save(under("model.", theirs) | buffers, tmp_path / "a.pt")
    else:
        place = folder_of(form="transformers")
        write_json(place / f"{how}_config.json", {"image_processor": image} if how == "processor" else image)
    model, reading = read_checkpoint(place, base)
    assert_close(embeds(model), reference_embeds(theirs, base, **IMAGENET))
    assert str(reading).count(" the checkpoint's was taken") == 2
    for resized in ("interpolation is 'bilinear', the processor's 'bicubic'", "resize_mode is 'squash'"):
        assert (resized in str(reading)) == (how == "open_clip")
    model.save_pretrained(tmp_path / "out")
    saved = ZeroShotClassifier.from_pretrained(tmp_path / "out")
    assert np.allclose(saved.mean.flatten(), IMAGENET["mean"]) and np.allclose(saved.std.flatten(), IMAGENET["std"])
    assert list(base.processor.image_processor.image_mean) == list(MEAN)


def test_two_normalisations_are_refused_and_the_same_twice_is_none(base, theirs, tmp_path):
    same = {"mean": torch.tensor(MEAN), "std": torch.tensor(STD)}
    assert "taken" not in str(read_checkpoint(save(theirs | same, tmp_path / "a.pt"), base)[1]).split("\n", 1)[1]
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


def test_code_in_a_pickle_is_refused_by_name_and_not_run(base, theirs, tmp_path):
    file, trap = tmp_path / "a.pt", tmp_path / "sprung"
    torch.save({"state_dict": theirs, "extra": Trap(trap)}, file)
    refused(r"a\.pt is a pickle that needs (posix|nt)\.mkdir to be called", file, base)
    assert not trap.exists()
    torch.load(file, weights_only=False)
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
        torch.jit.trace(torch.nn.Linear(2, 2), torch.ones(1, 2)).save(tmp_path / "ViT-B-32.pt")
    refused("TorchScript archive.*openai/clip-vit-base-patch32", tmp_path / "ViT-B-32.pt", base)


@pytest.mark.parametrize("suffix", [".pt", ".safetensors"])
def test_a_truncated_file_or_one_of_something_else_is_named(base, theirs, tmp_path, suffix):
    raw = save(theirs, tmp_path / f"cut{suffix}").read_bytes()
    for content in (b"", raw[: len(raw) // 50], raw[: len(raw) // 2], raw[:-50], b"<!DOCTYPE html>Log in" * 20):
        (tmp_path / f"cut{suffix}").write_bytes(content)
        refused(rf"cut\{suffix} is damaged or not what its name says", tmp_path / f"cut{suffix}", base)


IN_PROJ = "transformer.resblocks.1.attn.in_proj_bias"


def put(name, change):
    return lambda sd: sd | {name: change(sd.get(name))}


def holds_itself(sd):
    content = dict(sd)
    content["model"] = content
    return content


BROKEN = {  # what is in the file: what the message says
    "a list": (lambda sd: list(sd.values()), "broken.pt holds a list: expected a state dict"),
    "a ResNet CLIP": (lambda sd: {"visual.attnpool.x": torch.ones(5)}, "found 1 tensors .*attnpool"),
    "two models": (lambda sd: {"a": visual(sd), "b": visual(sd)}, "holds 2 .*a.class_emb.*', 'b.class_emb"),
    "no proj": (lambda sd: without(visual(sd), "proj"), "lacks 1 .*visual_projection.*same architecture"),
    "one text tensor less": (lambda sd: without(sd, IN_PROJ), "lacks 3 .*layers.1.self_attn"),
    "a layer more": (put("visual.transformer.resblocks.2.ln_1.bias", lambda _: torch.ones(32)), "base has not"),
    "a wrong shape": (put("visual.ln_post.bias", lambda t: t[:7]), r"post.bias .* shape \(7,\), expected \(32,\)"),
    "integers": (put("ln_final.bias", lambda t: t.char()), "ln_final.bias in .* holds torch.int8"),
    "a NaN": (put("ln_final.bias", lambda t: t * np.nan), "ln_final.bias in .* expected finite floats"),
    "float8": (put("visual.proj", lambda t: t.to(torch.float8_e4m3fn)), "proj in .* holds torch.float8"),
    "complex": (put("visual.proj", lambda t: t.cfloat()), "proj in .* holds torch.complex64"),
    "sparse": (put("visual.proj", lambda t: t.to_sparse()), "lacks 1 tensors .*visual_projection"),
    "stride 0": (put("visual.proj", lambda t: torch.zeros(1).expand(10**9, 9)), r"\(1000000000, 9\), expected"),
    "itself": (holds_itself, "dicts in dicts without end"),
}


@pytest.mark.parametrize("what", BROKEN)
def test_what_is_no_clip_is_refused_in_words(what, base, theirs, tmp_path):
    make, message = BROKEN[what]
    refused(message, save(make(theirs), tmp_path / "broken.pt"), base)


def test_a_place_with_nothing_says_what_is_there(base, tmp_path):
    refused("no checkpoint at .*nowhere.pt: found nothing", tmp_path / "nowhere.pt", base)
    (tmp_path / "simclip4.pt").write_bytes(b"")
    refused(r"found \['simclip4.pt'\], expected a file, or weights beside .*_config.json or config", tmp_path, base)
    save({"a": torch.ones(1)}, tmp_path / "open_clip_model.safetensors")
    for content, message in (("{", "is damaged"), ("{}", "has no model_cfg")):
        (tmp_path / "open_clip_config.json").write_text(content)
        refused(f"open_clip_config.json {message}", tmp_path, base)


# --- open_clip's form, written


def sets(where, **values):
    return lambda model: [setattr(place, name, value) for place in where(model) for name, value in values.items()]


def image_processor(model):
    return [model.processor.image_processor]


CHANGES = {
    r"both .* alike, .* \['gelu', 'quick_gelu'\]": sets(lambda m: [m.config.text_config], hidden_act="quick_gelu"),
    r"\['relu'\]": sets(lambda m: [m.config.text_config, m.config.vision_config], hidden_act="relu"),
    "resizes to 32 px.*'shortest_edge': 40": sets(image_processor, size={"shortest_edge": 40}),
    "Pillow's filter 1": sets(image_processor, resample=1),
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
    assert str(reading).count("the checkpoint's was taken") == notes


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
    place = save_tiny_clip(tmp_path / "hf", **({} if callable(variant) else variant))
    model = ZeroShotClassifier(random_clip(place), ZeroShotClassifier.from_pretrained(place).processor).eval()
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
