"""A conversion keeps the model, its records and its story, whatever the form; what cannot be converted is one line and no file."""

from __future__ import annotations

import errno
import json
import os
import re
import shutil
from pathlib import Path

import pytest
import torch
from conftest import CLASSES, contents, make_trainer, single_schedule
from loopback_hub import card_data
from safetensors.torch import load_file, save_file
from transformers import CLIPModel, CLIPVisionModel, PreTrainedModel

from hpt_hf.commands import convert
from hpt_hf.commands.convert import ConvertArguments
from hpt_hf.models.zero_shot import ZeroShotClassifier, fingerprint
from hpt_hf.publishing import convert_checkpoint
from hpt_hf.publishing import export as export_module
from hpt_hf.publishing.convert_checkpoint import read_checkpoint
from hpt_hf.publishing.export import check, export
from hpt_hf.publishing.model_card import CONVERTED, MIXED, TRAINED, read_record
from hpt_hf.utils import write_json


@pytest.fixture(scope="module")
def record(student_path, tmp_path_factory) -> dict:
    """A train.json as training writes it."""
    student = ZeroShotClassifier.from_pretrained(student_path).set_classes(CLASSES)
    trainer = make_trainer(tmp_path_factory.mktemp("run"), student, single_schedule("tecoa", steps=2))
    recipe = {"model": "owner/base", "dataset": "owner/data", "license": "mit"}
    origin = {"source": "owner/base", "revision": "abc123", "fingerprint": "0" * 16}
    return json.loads(json.dumps(trainer.record())) | {"method": "tecoa", "student": origin, "recipe": recipe}


@pytest.fixture(scope="module")
def robust(student_path, record, tmp_path_factory) -> Path:
    """A model as training leaves it: exported, with its record, beside a log."""
    classifier = ZeroShotClassifier.from_pretrained(student_path)
    with torch.no_grad():
        classifier.model.visual_projection.weight.mul_(1.1)
    folder = export(classifier, tmp_path_factory.mktemp("convert") / "robust", records={TRAINED: record})
    (folder / "trainer_log.txt").write_text("log")
    return folder


def run(model, output, **changes) -> str:
    return convert.run(ConvertArguments(model=str(model), output_dir=str(output), **changes))


# --- a whole CLIP


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("size", ["5GB", "100KB"])
def test_a_clip_in_another_precision_and_in_shards_is_the_same_clip(robust, tmp_path, dtype, size):
    before = contents(robust)
    compared = run(robust, tmp_path / "out", dtype=dtype, max_shard_size=size)
    assert re.fullmatch(r"logits as the pipeline's within \d(e-\d+)?", compared)
    shards = [f.name for f in (tmp_path / "out").glob("*.safetensors")]
    assert (shards == ["model.safetensors"]) == (size == "5GB")
    stored = {n: t for f in shards for n, t in load_file(tmp_path / "out" / f).items()}
    own = load_file(robust / "model.safetensors")
    assert stored.keys() == own.keys() and all(torch.equal(t, own[n].to(t.dtype)) for n, t in stored.items())
    assert check(tmp_path / "out")["dtype"] == dtype and contents(robust) == before
    run(tmp_path / "out", tmp_path / "back")
    assert fingerprint(ZeroShotClassifier.from_pretrained(tmp_path / "back")) == check(tmp_path / "out")["fingerprint"]
    assert read_record(tmp_path / "back", TRAINED) == read_record(robust, TRAINED)


def test_the_records_go_along_and_the_card_tells_them(robust, record, tmp_path):
    mixed = {"weight": 0.5, "origin": "owner/base", "robust": "owner/robust", "rule": ""}
    model = shutil.copytree(robust, tmp_path / "model")
    write_json(model / "dial.json", mixed)  # as the version before named it
    run(model, tmp_path / "out")
    assert json.loads((tmp_path / "out" / MIXED).read_text()) == mixed and not (tmp_path / "out" / CONVERTED).exists()
    text = (tmp_path / "out" / "README.md").read_text()
    assert card_data(text)["base_model"] == "owner/base" and card_data(text)["license"] == "mit"
    assert "0.50 × the robust weights" in text and "| method | tecoa |" in text
    assert not (tmp_path / "out" / "trainer_log.txt").exists() and not (tmp_path / "out" / "dial.json").exists()
    run(model, tmp_path / "licensed", license="cc-by-4.0")
    assert read_record(tmp_path / "licensed", TRAINED)["recipe"]["license"] == "cc-by-4.0"
    assert card_data((tmp_path / "licensed" / "README.md").read_text())["license"] == "cc-by-4.0"


def test_a_folder_that_save_pretrained_wrote_becomes_one_that_can_be_published(student_path, tmp_path):
    with pytest.raises(ValueError, match="hpt-hf convert"):
        check(student_path)
    run(student_path, tmp_path / "out", license="mit")
    assert check(tmp_path / "out")["fingerprint"] == fingerprint(ZeroShotClassifier.from_pretrained(student_path))
    told = read_record(tmp_path / "out", CONVERTED)
    assert told == {"source": student_path, "base": None, "license": "mit"}
    run(tmp_path / "out", tmp_path / "again")
    assert read_record(tmp_path / "again", CONVERTED) == told


# --- other forms


def test_open_clips_form_is_read_back_as_the_same_model(robust, tmp_path):
    assert run(robust, tmp_path / "out", to="open_clip") == "62 tensors written and read back"
    run(tmp_path / "out", tmp_path / "back", base=str(robust))
    model = ZeroShotClassifier.from_pretrained(robust)
    assert fingerprint(ZeroShotClassifier.from_pretrained(tmp_path / "back")) == fingerprint(model)


@pytest.mark.parametrize("size", [None, 64])
def test_a_vision_tower_at_its_own_and_at_another_size(robust, tmp_path, size):
    said = run(robust, tmp_path / "out", to="vision_tower", image_size=size, dtype="bfloat16")
    tower = CLIPVisionModel.from_pretrained(tmp_path / "out")
    assert said == "20 hidden states compared" and tower.config.image_size == (size or 32)
    assert tower.dtype == torch.bfloat16


def no_room(*args, **kwargs):
    raise OSError(errno.ENOSPC, "No space left on device")


WRITERS = {  # what of a form fails on a full disk
    "transformers": [(PreTrainedModel, "save_pretrained"), (export_module, "write_json"), (os, "replace")],
    "open_clip": [(convert_checkpoint, "save_file"), (convert_checkpoint, "write_json"), (os, "replace")],
    "vision_tower": [(PreTrainedModel, "save_pretrained"), (export_module, "write_json"), (os, "replace")],
}


@pytest.mark.parametrize("there", [True, False])
@pytest.mark.parametrize(("to", "place", "name"), [(to, *w) for to, writers in WRITERS.items() for w in writers])
def test_on_a_full_disk_one_line_and_the_same_command_works_after(
    robust, tmp_path, monkeypatch, to, place, name, there
):
    out = tmp_path / "out"
    if there and to != "vision_tower":  # which goes into a folder of its own
        run(robust, out, to=to)
    before = contents(tmp_path)
    with monkeypatch.context() as patch:
        patch.setattr(place, name, no_room)
        said = error_of(robust, out, "--to", to)
    assert "no space left for" in said and "what stood there before still does" in said
    assert contents(tmp_path) == before
    run(robust, out, to=to)
    assert check(out)["fingerprint"] == fingerprint(ZeroShotClassifier.from_pretrained(robust))


@pytest.mark.parametrize("to", WRITERS)
def test_whoever_may_read_other_files_may_read_all_of_a_form(robust, tmp_path, to):
    run(robust, tmp_path / "out", to=to)
    (tmp_path / "plain").touch()
    modes = {f.name: f.stat().st_mode for f in (tmp_path / "out").iterdir()}
    assert len(modes) >= 4 and set(modes.values()) == {(tmp_path / "plain").stat().st_mode}, modes


# --- with a base


@pytest.fixture(scope="module")
def theirs(student_path):
    """Somebody's fine-tuned tower: transformers' names, all tensors of the vision side changed."""
    model = CLIPModel.from_pretrained(student_path)
    generator = torch.Generator().manual_seed(4)
    with torch.no_grad():
        for name, tensor in model.named_parameters():
            if name.startswith("vis"):
                tensor.add_(0.05 * torch.randn(tensor.shape, generator=generator))
    return model.state_dict()


@pytest.mark.parametrize("whole", [True, False])
def test_a_file_of_weights_gets_all_else_from_the_base(theirs, student_path, tmp_path, capsys, whole):
    from_file = {n: t for n, t in theirs.items() if whole or n.startswith("vision_model.")}
    file = tmp_path / "checkpoint.pth.tar"
    torch.save({"epoch": 10, "state_dict": {f"module.{n}": t for n, t in from_file.items()}}, file)
    convert.main([str(file), str(tmp_path / "out"), "--base", student_path, "--license", "mit"])
    out, err = capsys.readouterr()
    assert re.fullmatch(rf"{file} -> {tmp_path}/out \(transformers; logits as the pipeline's within \S+\)\n", out)
    base, model = (CLIPModel.from_pretrained(f).state_dict() for f in (student_path, tmp_path / "out"))
    assert all(torch.equal(t, from_file.get(n, base[n])) for n, t in model.items())
    told = read_record(tmp_path / "out", CONVERTED)
    assert told["read"] == len(from_file) and told["from_base"] == len(theirs) - len(from_file)
    assert (told["source"], told["base"], told["license"]) == (str(file), student_path, "mit")
    assert f"{told['read']} tensors read, {told['from_base']} taken from the base" in err
    text = (tmp_path / "out" / "README.md").read_text()
    assert f"Read from {file.name} " in text and all(f"\n- {note}" in text for note in told["notes"])
    assert str(tmp_path) not in text and student_path not in text and "base_model" not in card_data(text)


@pytest.mark.parametrize("to", ["open_clip", "vision_tower"])
def test_a_file_of_weights_goes_straight_into_another_form(theirs, student_path, tmp_path, to):
    torch.save(theirs, tmp_path / "x.pt")
    run(tmp_path / "x.pt", tmp_path / "out", base=student_path, to=to)
    if to == "open_clip":
        again, _ = read_checkpoint(tmp_path / "out", ZeroShotClassifier.from_pretrained(student_path))
        found = again.model.state_dict()
    else:
        found = {
            f"vision_model.{n}": t for n, t in CLIPVisionModel.from_pretrained(tmp_path / "out").state_dict().items()
        }
    assert found and all(
        torch.equal(t, theirs[n.replace("vision_model.vision_model", "vision_model")]) for n, t in found.items()
    )


def test_the_hubs_name_of_a_checkpoint_is_told_with_a_base(student_path, theirs, tmp_path, monkeypatch):
    """`owner/name` that is no folder is fetched; here its files lie in a cache already."""
    place, asked = tmp_path / "snapshot", {}
    place.mkdir()
    torch.save(theirs, place / "pytorch_model.bin")
    shutil.copy(Path(student_path) / "config.json", place)
    monkeypatch.setattr(convert, "snapshot_download", lambda *a, **k: asked.update(name=a[0], **k) or str(place))
    run("owner/their-clip", tmp_path / "out", base=student_path, model_revision="abc")
    assert asked["name"] == "owner/their-clip" and asked["revision"] == "abc"
    assert not any(p.endswith((".py", "*")) for p in asked["allow_patterns"])
    assert read_record(tmp_path / "out", CONVERTED)["source"] == "owner/their-clip"


# --- mistakes


MISTAKES = {
    "{model} {out} --image_size 64": "--image_size is for --to vision_tower, this is --to transformers",
    "{model} {out} --to open_clip --dtype float16": "--to open_clip writes float32",
    "{model} {out} --to vision_tower --image_size 50": "image_size 50: .*; 48 would do",
    "{model} {out} --dtype int4": "--dtype: invalid choice: 'int4'",
    "{model} {out} --max_shard_size much": "much|size",
    "{model} {model}/../model": "lies in --model .*, which is read",
    "{model} {link}": "lies in --(model|base) .*, which is read",
    "{file} {base} --base {base}": "lies in --(model|base) .*, which is read",
    "{out} {out}-2": "no model at .*out",
    "{out}.pt {out} --base {base}": "no checkpoint at .*out.pt: neither a file",
    "{file} {out}": "a file of weights: name the CLIP .*--base",
    "{file} {out} --base {out}-3": "no model at .*out-3",
    "{file} {out} --base {other}": "a base of the same architecture",
    "{model}": "--output_dir",
    "{model} {out} --dtpye float16": "unknown key --dtpye; did you mean dtype",
}


def error_of(*argv) -> str:
    with pytest.raises(SystemExit) as left:
        convert.main([str(a) for a in argv])
    assert isinstance(left.value.code, str) and left.value.code.count("\n") == 0
    assert left.value.code.startswith("hpt-hf convert: ")
    return left.value.code


@pytest.mark.parametrize("argv", MISTAKES)
def test_a_mistake_is_one_line_and_writes_nothing(theirs, student_path, proxy_path, tmp_path, argv):
    model, base = (shutil.copytree(student_path, tmp_path / name) for name in ("model", "base"))
    (tmp_path / "link").symlink_to(model)
    torch.save(theirs, tmp_path / "x.pt")
    places = {"model": model, "base": base, "other": proxy_path, "file": tmp_path / "x.pt"}
    places |= {name: tmp_path / name for name in ("link", "out")}
    before = contents(tmp_path)
    assert re.search(MISTAKES[argv], error_of(*argv.format(**places).split()))
    assert contents(tmp_path) == before


def cut(folder):
    (folder / "model.safetensors").write_bytes((folder / "model.safetensors").read_bytes()[:5000])


def no_text(folder):
    state = {n: t for n, t in load_file(folder / "model.safetensors").items() if not n.startswith("text")}
    save_file(state, folder / "model.safetensors", metadata={"format": "pt"})


def not_resized(folder):
    content = json.loads((folder / "processor_config.json").read_text())
    content["image_processor"]["do_resize"] = False
    (folder / "processor_config.json").write_text(json.dumps(content))


DAMAGED = {
    "cut weights": (cut, "damaged"),
    "no weights": (lambda f: (f / "model.safetensors").unlink(), "model.safetensors"),
    "one tower": (no_text, r"lack \d+ tensors.*--base"),
    "no tokenizer": (lambda f: (f / "tokenizer.json").unlink(), "no tokenizer.*--base"),
    "no processor": (lambda f: (f / "processor_config.json").unlink(), "no processor.*--base"),
    "no config": (lambda f: (f / "config.json").unlink(), "no config.json"),
    "a processor that does not resize": (not_resized, "the processor of .*model.*expected one that resizes"),
    "a record of another version": (lambda f: (f / TRAINED).write_text('{"method": "x"}'), "train.json lacks"),
    "a damaged record": (lambda f: (f / CONVERTED).write_text("{"), "convert.json is damaged"),
}


@pytest.mark.parametrize("what", DAMAGED)
def test_a_damaged_checkpoint_is_one_line_and_changes_nothing(student_path, tmp_path, what):
    run(student_path, tmp_path / "out")
    model = shutil.copytree(student_path, tmp_path / "model")
    spoil, message = DAMAGED[what]
    spoil(model)
    before = contents(model), contents(tmp_path / "out")
    assert re.search(message, error_of(model, tmp_path / "out"))
    assert (contents(model), contents(tmp_path / "out")) == before and check(tmp_path / "out")
