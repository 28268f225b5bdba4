"""Proves that the classifier is plain CLIP, in memory and on disk, and that nothing is opened that is not whole."""

from __future__ import annotations

import io
import json
import os
import pickle
import shutil
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from conftest import CLASSES
from safetensors.torch import load_file, save_file
from transformers import BertConfig, BertModel, CLIPModel

from hpt_hf.models.zero_shot import TEMPLATE, ZeroShotClassifier, build_zero_shot_head, fingerprint

TEMPLATES = (TEMPLATE, "a drawing of the {}.", "{}")


def head_of(classifier, classes, *templates):
    return build_zero_shot_head(classifier.model, classifier.processor.tokenizer, classes, templates or (TEMPLATE,))


def test_an_ensemble_is_the_normalised_mean_of_normalised_prompts(student):
    singles = torch.stack([head_of(student, CLASSES, t) for t in TEMPLATES])
    together = head_of(student, CLASSES, *TEMPLATES)
    assert torch.allclose(together, F.normalize(singles.mean(0), dim=1), atol=1e-6)
    assert not torch.allclose(together, singles[0], atol=1e-3)
    braces = head_of(student, ("{cat}", "{}"), "a {} {of} sorts")
    assert torch.allclose(braces.norm(dim=1), torch.ones(2), atol=1e-6)


def test_a_class_is_embedded_the_same_whatever_stands_beside_it(student):
    many = (*(f"cat {i}" for i in range(299)), "a red car beside a house")  # padded to the longest, in chunks of 256
    some = [0, 255, 256, 298]
    assert torch.allclose(head_of(student, many)[some], head_of(student, [many[i] for i in some]), atol=1e-6)


def test_classes_and_templates_that_cannot_be_told_apart_are_refused(student, student_path):
    before = student.head.clone()
    for classes, templates, message in (
        (["cat"], [TEMPLATE], "at least two"),
        (["cat", "  "], [TEMPLATE], "class 1"),
        (["cat", "dog", "cat"], [TEMPLATE], "classes 0 and 2 are both called 'cat'"),
        *((CLASSES, t, "{}") for t in ([], ["a photo of {} and {}"], ["a photo of {}", "another"])),
        (
            ["cat", *(f"cat {'dog ' * i}cat" for i in range(3)), "dog", " dog "],
            [TEMPLATE],
            "'dog' and ' dog ' have equal",
        ),
    ):
        with pytest.raises(ValueError, match=message):
            student.set_classes(classes, templates)
        assert student.classes == CLASSES and torch.equal(student.head, before)
    for where in (student.model.text_model, student.model.config.text_config):
        where.eos_token_id = 999_999
    with pytest.raises(ValueError, match="'cat' and 'dog' have equal embeddings"):
        student.set_classes(["cat", "dog"])
    with pytest.raises(RuntimeError, match="set_classes"):
        ZeroShotClassifier.from_pretrained(student_path)(torch.rand(1, 3, 32, 32))


def test_a_prompt_too_long_for_the_text_tower_is_named(student):
    context = student.config.text_config.max_position_embeddings
    fits = " ".join(["cat"] * (context - 2))  # start, words, end
    student.set_classes(("dog", fits), ("{}",))
    with pytest.raises(ValueError, match=f"cat cat.* has {context + 1} tokens.* reads {context}"):
        student.set_classes(("dog", fits + " cat"), ("{}",))


def test_under_autocast_the_tower_is_bfloat16_and_the_head_float32(student):
    images, before = torch.rand(4, 3, 32, 32, generator=torch.Generator().manual_seed(0)), student.head.clone()
    with torch.no_grad():
        full = student(images)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            half = student.set_classes(CLASSES)(images)
        logits = student.model.logit_scale.exp() * F.normalize(half.embeds, dim=-1) @ student.head.T
    assert half.logits.dtype == half.embeds.dtype == torch.float32
    assert not torch.equal(half.embeds, full.embeds), "or autocast did not reach the tower"
    assert torch.equal(half.logits, logits) and torch.equal(student.head, before)


def test_it_is_saved_by_the_main_process_and_opened_as_the_same_model_and_a_hair_makes_another(student, tmp_path):
    weight = student.model.visual_projection.weight
    with torch.no_grad():
        weight += 0.1 * torch.randn_like(weight)
        student.save_pretrained(tmp_path, is_main_process=False)
        assert not list(tmp_path.rglob("*.json"))
        student.save_pretrained(tmp_path)
        assert fingerprint(ZeroShotClassifier.from_pretrained(tmp_path)) == fingerprint(student)
        weight[0, 0] += 1e-6
    assert fingerprint(ZeroShotClassifier.from_pretrained(tmp_path)) != fingerprint(student)


def test_a_model_from_the_hub_knows_its_commit(student_path, tmp_path):
    commit, place = "0123456789abcdef0123456789abcdef01234567", tmp_path / "models--owner--name"
    shutil.copytree(student_path, place / "snapshots" / commit)  # as the Hub's client lays its cache out
    (place / "refs").mkdir()
    (place / "refs" / "main").write_text(commit)
    model, local = (ZeroShotClassifier.from_pretrained(s, cache_dir=tmp_path) for s in ("owner/name", student_path))
    assert (model.revision, local.revision) == (commit, None) and fingerprint(model) == fingerprint(local)


@pytest.fixture
def folder(student_path, tmp_path):
    """A copy of the student's folder, to spoil."""
    return shutil.copytree(student_path, tmp_path / "model")


def tensors(change):
    def spoil(folder):
        state = load_file(folder / "model.safetensors")
        change(state)
        save_file(state, folder / "model.safetensors", metadata={"format": "pt"})

    return spoil


def keep(*wanted):
    """Only the tensors with one of these beginnings."""
    return tensors(lambda s: [s.pop(name) for name in list(s) if not name.startswith(wanted)])


def content(name, data):
    return lambda folder: (folder / name).write_bytes(data)


def without(*names):
    return lambda folder: [(folder / name).unlink() for name in names]


def cut_shard(folder):
    ZeroShotClassifier.from_pretrained(folder).save_pretrained(folder, max_shard_size="100KB")
    (folder / "model.safetensors").unlink(missing_ok=True)
    min(folder.glob("model-*")).write_bytes(b"x" * 100)


def edited(file, *keys, value):
    """Another value in a JSON file."""

    def spoil(folder):
        inner = whole = json.loads((folder / file).read_text())
        for key in keys[:-1]:
            inner = inner[key]
        inner[keys[-1]] = value
        (folder / file).write_text(json.dumps(whole))

    return spoil


def vision(key, value):
    return edited("config.json", "vision_config", key, value=value)


def pickled(obj, **kwargs) -> bytes:
    file = io.BytesIO()
    torch.save(obj, file, **kwargs)
    return file.getvalue()


def as_pickle(make):
    """The weights as pytorch_model.bin, from what `make` gives for the tensors."""

    def spoil(folder):
        state = load_file(folder / "model.safetensors")
        (folder / "model.safetensors").unlink()
        (folder / "pytorch_model.bin").write_bytes(make(state))

    return spoil


def a_bert(folder):
    size = dict.fromkeys(("hidden_size", "intermediate_size", "vocab_size"), 8)
    BertModel(BertConfig(**size, num_hidden_layers=1, num_attention_heads=2)).save_pretrained(folder)


LACKS = r"lack \d+ tensors, such as .*hpt-hf convert with --base"
DAMAGED, SHAPES, USELESS = "damaged or not one", "not have the shapes", "cannot be used"
NO_PROCESSOR, NO_TOKENIZER = (
    "no processor that can be read.*hpt-hf convert with --base",
    "no tokenizer.*hpt-hf convert",
)
POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n"
BROKEN = {
    "one tensor is missing": (tensors(lambda s: s.pop("logit_scale")), "lack 1 tensors, such as .*logit_scale"),
    "the text tower is missing": (keep("vision_model.", "visual_projection", "logit_scale"), LACKS),
    "names of other code": (tensors(lambda s: [s.update({f"module.{n}": s.pop(n)}) for n in list(s)]), LACKS),
    "a layer too many": (vision("num_hidden_layers", 1), "vision_model.encoder.layers.1"),
    "another width": (vision("hidden_size", 64), SHAPES),
    "cut off": (lambda folder: os.truncate(folder / "model.safetensors", 9000), DAMAGED),
    "empty": (content("model.safetensors", b""), DAMAGED),
    "a pointer of git-lfs": (content("model.safetensors", POINTER), DAMAGED),
    "a damaged shard": (cut_shard, DAMAGED),
    "a pickle of noise": (as_pickle(lambda state: b"\x80\x02noise" * 40), USELESS),
    "a pickle cut off": (as_pickle(lambda state: pickled(state)[:9000]), USELESS),
    "an empty pickle": (as_pickle(lambda state: b""), USELESS),
    "a pickle of a list": (as_pickle(lambda state: pickled([1, 2])), USELESS),
    "no weights": (without("model.safetensors"), "no file named model.safetensors"),
    "no processor": (without("processor_config.json"), NO_PROCESSOR),
    "an empty processor": (content("processor_config.json", b"{}"), NO_PROCESSOR),
    "no tokenizer": (without("tokenizer.json"), NO_TOKENIZER),
    "no tokenizer and no config of it": (without("tokenizer.json", "tokenizer_config.json"), NO_TOKENIZER),
    "a tokenizer of nonsense": (content("tokenizer.json", b"{}"), "tokenizer"),
    "no config": (without("config.json"), "no config.json.*model.safetensors"),
    "a config of nonsense": (content("config.json", b"{"), "no model could be loaded"),
    "a config that is a list": (content("config.json", b"[]"), "config"),
    "another family": (a_bert, "type 'bert': expected one of 'clip', "),
}


@pytest.mark.parametrize("what", BROKEN)
def test_a_folder_that_does_not_hold_a_whole_clip_is_refused(folder, what):
    """Where transformers would fill in random numbers, leave out, or speak of something else."""
    spoil, message = BROKEN[what]
    spoil(folder)
    with pytest.raises((ValueError, OSError), match=message) as raised:
        ZeroShotClassifier.from_pretrained(folder)
    assert str(folder) in str(raised.value)


VISION, TEXT = ("config.json", "vision_config"), ("config.json", "text_config")
PROCESSOR = ("processor_config.json", "image_processor")
ODD = {
    (*VISION, "num_attention_heads"): ("x", -1, 0, None),
    (*VISION, "hidden_act"): ("x", None),
    (*TEXT, "vocab_size"): ("x", 3),  # the pad token is beyond 3
    (*TEXT, "num_attention_heads"): (-1, 0),
    (*PROCESSOR, "image_mean"): ("x", None, [0.5], [0.5, 0.5, None]),
    (*PROCESSOR, "image_std"): ("x", [], [0.0, 0.0, 0.0], [0.2, -0.2, 0.2]),
    (*PROCESSOR, "crop_size"): (0, None, [], {"height": 64, "width": 64}, {"shortest_edge": 8}),
    (*PROCESSOR, "size"): ([], "x"),
    (*PROCESSOR, "do_center_crop"): (False,),
}


@pytest.mark.parametrize(("keys", "value"), [(keys, value) for keys, values in ODD.items() for value in values])
def test_odd_values_of_a_config_are_one_clear_error(folder, keys, value):
    edited(*keys, value=value)(folder)
    with pytest.raises((ValueError, OSError)):
        ZeroShotClassifier.from_pretrained(folder)


@pytest.mark.parametrize("file", ["config.json", "processor_config.json", "tokenizer_config.json"])
def test_code_in_a_model_folder_is_never_run_nor_asked_about(folder, file, tmp_path, monkeypatch):
    monkeypatch.setattr("builtins.input", lambda *a: pytest.fail("it asked"))
    (folder / "own.py").write_text(f"from pathlib import Path\nPath({str(tmp_path / 'it-ran')!r}).touch()\nX = object")
    names = dict.fromkeys(("AutoConfig", "AutoModel", "AutoProcessor", "AutoImageProcessor"), "own.X")
    edited(file, "auto_map", value=names | {"AutoTokenizer": ["own.X", "own.X"]})(folder)
    if file == "config.json":
        with pytest.raises(ValueError, match="asks to run code of its own"):
            ZeroShotClassifier.from_pretrained(folder)
    else:  # a known class opens it
        ZeroShotClassifier.from_pretrained(folder)
    assert not (tmp_path / "it-ran").exists()


def test_the_attention_is_ours_whatever_the_config_names_and_half_precision_is_opened_in_float32(folder):
    CLIPModel.from_pretrained(folder).half().save_pretrained(folder)
    for key in ("_attn_implementation", "attn_implementation"):
        edited("config.json", key, value="somebody/kernel")(folder)
    model = ZeroShotClassifier.from_pretrained(folder)
    assert model.config._attn_implementation == "sdpa" and not model.training
    assert {p.dtype for p in model.parameters()} == {torch.float32}


def test_a_model_that_is_nowhere_or_a_file_is_named(tmp_path):
    for source in ("/nowhere/at/all", "./nowhere", "~/nowhere", "some/where/else", "nobody/nothing"):
        with pytest.raises(OSError if source == "nobody/nothing" else ValueError, match=f"no model .*{source}"):
            ZeroShotClassifier.from_pretrained(source)
    (tmp_path / "x.pt").touch()
    with pytest.raises(ValueError, match="x.pt is a file, .*Fix: hpt-hf convert .*x.pt OUT --base"):
        ZeroShotClassifier.from_pretrained(tmp_path / "x.pt")


PICKLES = {
    "torch.save": pickled,
    "torch.save of old": lambda o: pickled(o, _use_new_zipfile_serialization=False),
    "pickle": pickle.dumps,
}


@pytest.mark.parametrize("kind", PICKLES)
@pytest.mark.parametrize("sharded", [False, True])
@pytest.mark.filterwarnings("ignore:Detected pickle protocol")
def test_a_pickle_is_never_run(folder, tmp_path, kind, sharded):
    ran = tmp_path / "it-ran"

    class Evil:
        def __reduce__(self):
            return Path.touch, (ran,)

    names = list(load_file(folder / "model.safetensors"))
    as_pickle(lambda state: PICKLES[kind]({**state, "evil": Evil()}))(folder)
    if kind == "pickle":  # or this would prove nothing
        pickle.loads((folder / "pytorch_model.bin").read_bytes())
        assert ran.exists()
        ran.unlink()
    if sharded:
        shard = (folder / "pytorch_model.bin").rename(folder / "pytorch_model-00001-of-00001.bin")
        index = {"metadata": {}, "weight_map": dict.fromkeys(names, shard.name)}
        (folder / "pytorch_model.bin.index.json").write_text(json.dumps(index))
    with pytest.raises(ValueError, match=f"{folder}.*a pickle that is damaged or holds more than tensors"):
        ZeroShotClassifier.from_pretrained(folder)
    assert not ran.exists()


def test_an_honest_pickle_of_tensors_is_the_same_model(folder, student_path):
    as_pickle(pickled)(folder)
    one, other = (fingerprint(ZeroShotClassifier.from_pretrained(source)) for source in (folder, student_path))
    assert one == other
