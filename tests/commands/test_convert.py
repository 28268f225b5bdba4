"""A conversion keeps the model, its records and its story; what cannot be converted is one line and no file."""

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
from safetensors.torch import load_file
from transformers import CLIPModel, CLIPVisionModel, PreTrainedModel

from hpt_hf.commands import convert
from hpt_hf.commands.convert import ConvertArguments
from hpt_hf.models.zero_shot import ZeroShotClassifier, fingerprint
from hpt_hf.publishing import convert_checkpoint
from hpt_hf.publishing import export as export_module
from hpt_hf.publishing.convert_checkpoint import read_checkpoint
from hpt_hf.publishing.export import check, export
from hpt_hf.publishing.model_card import CONVERTED, MIXED, TRAINED, read_record
from hpt_hf.utils import read_json, write_json


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


@pytest.fixture(scope="module")
def made(student_path, tmp_path_factory) -> Path:
    """What becomes of a folder that save_pretrained wrote."""
    out = tmp_path_factory.mktemp("made") / "out"
    run(student_path, out, license="mit")
    return out


def run(model, output, **changes) -> str:
    return convert.run(ConvertArguments(model=str(model), output_dir=str(output), **changes))


def opened_as(folder) -> str:
    return fingerprint(ZeroShotClassifier.from_pretrained(folder))


def error_of(*argv) -> str:
    with pytest.raises(SystemExit, match="^hpt-hf convert: [^\n]+$") as left:
        convert.main([str(a) for a in argv])
    return left.value.code


def test_a_clip_in_another_precision_and_in_shards_is_the_same_clip(robust, tmp_path):
    out, before = tmp_path / "out", contents(robust)
    compared = run(robust, out, dtype="bfloat16", max_shard_size="50KB")
    assert re.fullmatch(r"logits as the pipeline's within \d(e-\d+)?", compared)
    stored = {n: t for f in out.glob("model-*.safetensors") for n, t in load_file(f).items()}
    own = load_file(robust / "model.safetensors")
    assert stored.keys() == own.keys() and all(torch.equal(t, own[n].bfloat16()) for n, t in stored.items())
    assert check(out)["dtype"] == "bfloat16" and contents(robust) == before
    run(out, tmp_path / "back")
    assert opened_as(tmp_path / "back") == check(out)["fingerprint"]
    assert read_record(tmp_path / "back", TRAINED) == read_record(robust, TRAINED)


def test_the_records_go_along_and_the_card_tells_them(robust, tmp_path):
    mixed = {"weight": 0.5, "origin": "owner/base", "robust": "owner/robust", "rule": ""}
    model, out = shutil.copytree(robust, tmp_path / "model"), tmp_path / "out"
    write_json(model / "dial.json", mixed)  # as the version before named it
    run(model, out, license="cc-by-4.0")
    assert read_record(out, TRAINED)["recipe"]["license"] == "cc-by-4.0" and read_json(out / MIXED) == mixed
    text = (out / "README.md").read_text()
    assert card_data(text)["base_model"] == "owner/base" and card_data(text)["license"] == "cc-by-4.0"
    assert "0.50 × the robust weights" in text and "| method | tecoa |" in text
    assert not any((out / name).exists() for name in (CONVERTED, "trainer_log.txt", "dial.json"))


def test_a_folder_that_save_pretrained_wrote_becomes_one_that_can_be_published(made, student_path):
    with pytest.raises(ValueError, match="hpt-hf convert"):
        check(student_path)
    assert check(made)["fingerprint"] == opened_as(student_path)
    assert read_record(made, CONVERTED) == {"source": student_path, "base": None, "license": "mit"}


def test_a_vision_tower_at_another_size(robust, tmp_path):
    run(robust, tmp_path / "out", to="vision_tower", image_size=64, dtype="bfloat16")
    tower = CLIPVisionModel.from_pretrained(tmp_path / "out")
    assert tower.config.image_size == 64 and tower.dtype == torch.bfloat16


def no_room(*args, **kwargs):
    raise OSError(errno.ENOSPC, "No space left on device")


WRITERS = {  # what of a form fails on a full disk
    "transformers": [(PreTrainedModel, "save_pretrained"), (export_module, "write_json"), (os, "replace")],
    "open_clip": [(convert_checkpoint, "save_file"), (os, "replace")],
    "vision_tower": [(PreTrainedModel, "save_pretrained"), (os, "replace")],
}
# A vision tower goes into a folder of its own.
FULL = [(to, *w, there) for to in WRITERS for w in WRITERS[to] for there in {False, to != "vision_tower"}]


@pytest.mark.parametrize("to, place, name, there", FULL)
def test_on_a_full_disk_one_line_and_the_same_command_works_after(
    robust, tmp_path, monkeypatch, to, place, name, there
):
    out = tmp_path / "out"
    if there:
        run(robust, out, to=to)
    before = contents(tmp_path)
    with monkeypatch.context() as patch:
        patch.setattr(place, name, no_room)
        said = error_of(robust, out, "--to", to)
    assert "no space left for" in said and "what stood there before still does" in said
    assert contents(tmp_path) == before
    run(robust, out, to=to)
    assert check(out)["fingerprint"] == opened_as(robust)
    (tmp_path / "plain").touch()  # whoever may read other files may read all of a form
    modes = {f.name: f.stat().st_mode for f in out.iterdir()}
    assert len(modes) >= 4 and set(modes.values()) == {(tmp_path / "plain").stat().st_mode}, modes


@pytest.fixture(scope="module")
def theirs(student_path):
    """Somebody's fine-tuned tower: transformers' names, all tensors of the vision side changed."""
    state = CLIPModel.from_pretrained(student_path).state_dict()
    return {n: 1.1 * t + 0.01 if n.startswith("vis") else t for n, t in state.items()}


def test_a_file_of_weights_gets_all_else_from_the_base(theirs, student_path, tmp_path, capsys):
    from_file = {n: t for n, t in theirs.items() if n.startswith("vision_model.")}
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


@pytest.mark.parametrize(
    "to, said", [("open_clip", "62 tensors written and read back"), ("vision_tower", "20 hidden")]
)
def test_a_file_of_weights_goes_straight_into_another_form(theirs, student_path, tmp_path, to, said):
    torch.save(theirs, tmp_path / "x.pt")
    assert said in run(tmp_path / "x.pt", tmp_path / "out", base=student_path, to=to)
    again, reading = read_checkpoint(tmp_path / "out", ZeroShotClassifier.from_pretrained(student_path))
    found = again.model.state_dict()
    assert found and all(torch.equal(found[n], t) for n, t in theirs.items() if n not in reading.from_base)


def test_the_hubs_name_of_a_checkpoint_is_told_with_a_base(student_path, tmp_path, monkeypatch):
    """`owner/name` that is no folder is fetched; here its files lie in a cache already."""
    asked = {}
    monkeypatch.setattr(convert, "snapshot_download", lambda *a, **k: asked.update(name=a[0], **k) or student_path)
    run("owner/their-clip", tmp_path / "out", base=student_path, model_revision="abc")
    assert asked["name"] == "owner/their-clip" and asked["revision"] == "abc"
    assert not any(p.endswith((".py", "*")) for p in asked["allow_patterns"])
    assert read_record(tmp_path / "out", CONVERTED)["source"] == "owner/their-clip"


DAMAGED = {  # the rest stands in tests/models/test_zero_shot.py
    "no processor": (lambda f: (f / "processor_config.json").unlink(), "no processor.*--base"),
    "a record of another version": (lambda f: (f / TRAINED).write_text('{"method": "x"}'), "train.json lacks"),
    "a damaged record": (lambda f: (f / CONVERTED).write_text("{"), "convert.json is damaged"),
}


@pytest.mark.parametrize("what", DAMAGED)
def test_a_damaged_checkpoint_is_one_line_and_changes_nothing(made, student_path, tmp_path, what):
    model, (spoil, message) = shutil.copytree(student_path, tmp_path / "model"), DAMAGED[what]
    spoil(model)
    before = contents(made)
    assert re.search(message, error_of(model, made)) and contents(made) == before
