"""Foreign checkpoints give here what their own code gives, nothing in a file is run, every tensor is accounted for.

What their code computes is written out below in plain torch; with open_clip installed, it is asked itself.
"""

import os
import warnings

import numpy as np
import pytest
import torch
from conftest import save_tiny_clip
from openai_clip import PROMPTS, assert_close, changed, embeds, images, pooled_elsewhere, random_clip, reference_embeds
from PIL import Image
from safetensors.torch import load_file, save_file
from transformers import CLIPModel, CLIPVisionModelWithProjection

from hpt_hf.data.collator import Collator
from hpt_hf.models.zero_shot import ZeroShotClassifier
from hpt_hf.publishing.convert_checkpoint import read_checkpoint, write_open_clip

VISUAL, TEXT = 8 + 12 * 2, 5 + 12 * 2  # tensors of the student's towers in open_clip's form, projections included


def refused(message, place, base):
    with pytest.raises(ValueError, match=message):
        read_checkpoint(place, base)


def save(content, file):
    if str(file).endswith(".safetensors"):
        save_file({n: t.contiguous() for n, t in content.items()}, file)
    else:
        torch.save(content, file)
    return file


@pytest.fixture(scope="module")
def theirs(open_clip_folder):
    """Other weights than the base's, in open_clip's names."""
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
    "a part of others": (put("visual.attn_pool.query", lambda _: torch.ones(2)), "base has not: visual.attn_pool.q"),
    "a text tower of others": (put("text.transformer.x", lambda _: torch.ones(2)), "base has not: transformer.x"),
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
