"""Proves that a conversion keeps the model, its records and its story, whatever the form; and that what cannot be converted is one line and no file."""

from __future__ import annotations

import hashlib
import json
import re
import shutil
import warnings
from pathlib import Path

import pytest
import torch
from conftest import CLASSES, make_pictures, make_trainer, save_tiny_clip, single_schedule
from loopback_hub import card_problems
from safetensors.torch import load_file, save_file
from transformers import AutoImageProcessor, CLIPModel, CLIPVisionModel, pipeline

from hpt_hf.commands import convert
from hpt_hf.commands.convert import ConvertArguments
from hpt_hf.commands.parser import RecipeError
from hpt_hf.models.zero_shot import ZeroShotClassifier, fingerprint
from hpt_hf.publishing.convert_checkpoint import read_checkpoint
from hpt_hf.publishing.export import SEAL, check, export
from hpt_hf.publishing.model_card import CONVERTED, MIXED, TRAINED
from hpt_hf.utils import write_json


@pytest.fixture(scope="module")
def record(student_path, tmp_path_factory) -> dict:
    """A train.json as training writes it."""
    student = ZeroShotClassifier.from_pretrained(student_path).set_classes(CLASSES)
    trainer = make_trainer(tmp_path_factory.mktemp("run"), student, single_schedule("tecoa", steps=2))
    recipe = {"model_name_or_path": "owner/base", "dataset": "owner/data", "license": "mit"}
    origin = {"source": "owner/base", "revision": "abc123", "fingerprint": "0" * 16}
    return json.loads(json.dumps(trainer.record())) | {"method": "tecoa", "student": origin, "recipe": recipe}


@pytest.fixture(scope="module")
def robust(student_path, record, tmp_path_factory) -> Path:
    """A model as training leaves it: exported, with its record, beside a EvalResult and a log."""
    model = ZeroShotClassifier.from_pretrained(student_path)
    with torch.no_grad():
        model.visual_projection.weight.mul_(1.1)
    folder = export(model, tmp_path_factory.mktemp("convert") / "robust", records={TRAINED: record})
    (folder / "trainer_log.txt").write_text("log")
    return folder


def run(model, output, **changes) -> str:
    return convert.run(ConvertArguments(model=str(model), output=str(output), **changes))


def contents(folder: Path) -> dict[str, str]:
    files = (f for f in sorted(folder.rglob("*")) if f.is_file())
    return {str(f.relative_to(folder)): hashlib.sha256(f.read_bytes()).hexdigest() for f in files}


def said(folder) -> dict[str, float]:
    with warnings.catch_warnings(action="ignore"):
        classify = pipeline("zero-shot-image-classification", model=str(folder), dtype="float32")
    return {a["label"]: a["score"] for a in classify(make_pictures(1)[0]["image"], candidate_labels=list(CLASSES))}


# --- a whole CLIP -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("size", ["5GB", "100KB"])
def test_a_clip_in_another_precision_and_in_shards_is_the_same_clip(robust, tmp_path, dtype, size):
    before = contents(robust)
    compared = run(robust, tmp_path / "out", dtype=dtype, max_shard_size=size)
    assert re.fullmatch(r"logits as the pipeline's within \d(e-\d+)?", compared)
    shards = sorted(f.name for f in (tmp_path / "out").glob("*.safetensors"))
    assert (shards == ["model.safetensors"]) == (size == "5GB") and len(shards) == len({*shards})
    stored = {n: t for f in shards for n, t in load_file(tmp_path / "out" / f).items()}
    own = load_file(robust / "model.safetensors")
    assert stored.keys() == own.keys() and all(
        torch.equal(t, own[n].to(getattr(torch, dtype))) for n, t in stored.items()
    )
    assert check(tmp_path / "out")["dtype"] == dtype and contents(robust) == before
    if dtype == "float32":
        assert said(tmp_path / "out") == pytest.approx(said(robust), abs=1e-6)


def test_there_and_back_is_the_same_model(robust, tmp_path):
    run(robust, tmp_path / "half", dtype="bfloat16", max_shard_size="100KB")
    run(tmp_path / "half", tmp_path / "back", dtype="float32")
    run(tmp_path / "back", tmp_path / "again", dtype="bfloat16")
    folders = [tmp_path / name for name in ("half", "back", "again")]
    assert len({fingerprint(ZeroShotClassifier.from_pretrained(f)) for f in folders}) == 1
    assert (
        CLIPVisionModel.from_pretrained(tmp_path / "back").dtype
        == CLIPModel.from_pretrained(tmp_path / "back").dtype
        == torch.float32
    )
    assert all(json.loads((f / TRAINED).read_text()) == json.loads((robust / TRAINED).read_text()) for f in folders)


def test_the_records_go_along_and_the_card_tells_them(robust, record, tmp_path):
    mixed = {"weight": 0.5, "origin": "owner/base", "robust": "owner/robust", "rule": ""}
    model = shutil.copytree(robust, tmp_path / "model")
    write_json(model / MIXED, mixed)
    run(model, tmp_path / "out", dtype="bfloat16")
    assert json.loads((tmp_path / "out" / TRAINED).read_text()) == record
    assert json.loads((tmp_path / "out" / MIXED).read_text()) == mixed and not (tmp_path / "out" / CONVERTED).exists()
    text = (tmp_path / "out" / "README.md").read_text()
    assert "base_model: owner/base" in text and "license: mit" in text and "0.50 × the robust weights" in text
    assert "| method | tecoa |" in text and "stored as bfloat16" in text and card_problems(text) == ([], [])
    assert not (tmp_path / "out" / "trainer_log.txt").exists()


def test_a_clip_without_records_is_said_to_be_what_it_was(student_path, tmp_path):
    run(student_path, tmp_path / "out", license="apache-2.0")
    told = json.loads((tmp_path / "out" / CONVERTED).read_text())
    assert told == {"source": student_path, "base": None, "license": "apache-2.0"}
    text = (tmp_path / "out" / "README.md").read_text()
    assert f"The weights of {Path(student_path).name}, as they are." in text and student_path not in text
    assert "license: apache-2.0" in text and "fine-tuned" not in text
    run(tmp_path / "out", tmp_path / "again", dtype="float16")
    assert json.loads((tmp_path / "again" / CONVERTED).read_text()) == told


def test_a_license_is_written_whatever_records_there_are(robust, student_path, tmp_path):
    run(robust, tmp_path / "trained", license="cc-by-4.0")
    assert "license: cc-by-4.0" in (tmp_path / "trained" / "README.md").read_text()
    assert json.loads((robust / TRAINED).read_text())["recipe"]["license"] == "mit"
    run(student_path, tmp_path / "first")
    run(tmp_path / "first", tmp_path / "second", license="cc-by-4.0")
    assert "license: cc-by-4.0" in (tmp_path / "second" / "README.md").read_text()


def test_a_model_that_says_no_license_can_be_given_one(robust, record, tmp_path):
    model = shutil.copytree(robust, tmp_path / "model")
    write_json(model / TRAINED, {k: v for k, v in record.items() if k != "recipe"})
    run(model, tmp_path / "out", license="mit")
    assert "license: mit" in (tmp_path / "out" / "README.md").read_text()


def test_a_folder_that_save_pretrained_wrote_becomes_one_that_can_be_published(student_path, tmp_path):
    with pytest.raises(ValueError, match="recipes/convert.py"):
        check(student_path)
    run(student_path, tmp_path / "out")
    assert check(tmp_path / "out")["fingerprint"] == fingerprint(ZeroShotClassifier.from_pretrained(student_path))


# --- other forms ------------------------------------------------------------------------------------------------------------


def test_open_clip_s_form_is_read_back_as_the_same_model(robust, tmp_path):
    compared = run(robust, tmp_path / "out", to="open_clip")
    model = ZeroShotClassifier.from_pretrained(robust)
    written = load_file(tmp_path / "out" / "open_clip_model.safetensors")
    assert compared == f"{len(written)} tensors written and read back" and len(written) == 8 + 12 * 2 + 5 + 12 * 2 + 1
    again, reading = read_checkpoint(tmp_path / "out", model)
    assert fingerprint(again) == fingerprint(model) and reading.from_base == ()
    run(tmp_path / "out", tmp_path / "back", base=str(robust))
    assert fingerprint(ZeroShotClassifier.from_pretrained(tmp_path / "back")) == fingerprint(model)
    assert said(tmp_path / "back") == pytest.approx(said(robust), abs=1e-6)


@pytest.mark.parametrize(("size", "count"), [(None, 5 * (2 + 3)), (32, 5 * (2 + 3)), (64, 5 * (2 + 2))])
def test_a_vision_tower_at_its_own_and_at_another_size(robust, tmp_path, size, count):
    assert (
        run(robust, tmp_path / "out", to="vision_tower", image_size=size)
        == f"{count} tensors of hidden states compared"
    )
    assert CLIPVisionModel.from_pretrained(tmp_path / "out").config.image_size == (size or 32)
    assert AutoImageProcessor.from_pretrained(tmp_path / "out").size == {"shortest_edge": size or 32}


def test_a_vision_tower_in_half_precision(robust, tmp_path):
    run(robust, tmp_path / "out", to="vision_tower", dtype="bfloat16")
    assert CLIPVisionModel.from_pretrained(tmp_path / "out").dtype == torch.bfloat16


# --- with a base --------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def theirs(student_path):
    """Somebody's fine-tuned tower: transformers' names, all tensors of the vision side changed."""
    model = CLIPModel.from_pretrained(student_path)
    generator = torch.Generator().manual_seed(4)
    with torch.no_grad():
        for name, tensor in model.named_parameters():
            if name.startswith(("vision_model.", "visual_projection.")):
                tensor.add_(0.05 * torch.randn(tensor.shape, generator=generator))
    return model.state_dict()


def saved(theirs, tmp_path, form) -> Path:
    """The same weights as others keep them."""
    vision = {n: t for n, t in theirs.items() if n.startswith("vision_model.")}
    file = tmp_path / {"safetensors": "x.safetensors", "nested": "checkpoint.pth.tar"}.get(form, "x.pt")
    if form == "safetensors":
        save_file(vision, file, metadata={"format": "pt"})
    elif form == "nested":
        torch.save({"epoch": 10, "best_acc1": 61.5, "state_dict": {f"module.{n}": t for n, t in theirs.items()}}, file)
    else:
        torch.save(vision if form == "vision" else theirs, file)
    return file


@pytest.mark.parametrize(
    ("form", "whole"), [("whole", True), ("vision", False), ("safetensors", False), ("nested", True)]
)
def test_a_file_of_weights_gets_all_else_from_the_base(theirs, student_path, tmp_path, capsys, form, whole):
    file = saved(theirs, tmp_path, form)
    convert.main([str(file), str(tmp_path / "out"), "--base", student_path, "--license", "mit"])
    out, err = capsys.readouterr()
    assert re.fullmatch(rf"{file} -> {tmp_path}/out \(transformers; logits as the pipeline's within \S+\)\n", out)
    base, model = (
        CLIPModel.from_pretrained(student_path).state_dict(),
        CLIPModel.from_pretrained(tmp_path / "out").state_dict(),
    )
    from_file = {n for n in theirs if whole or n.startswith("vision_model.")}
    assert all(torch.equal(t, (theirs if n in from_file else base)[n]) for n, t in model.items())
    assert not torch.equal(
        model["vision_model.embeddings.class_embedding"], base["vision_model.embeddings.class_embedding"]
    )
    told = json.loads((tmp_path / "out" / CONVERTED).read_text())
    assert told["read"] == len(from_file) and told["from_base"] == len(theirs) - len(from_file)
    assert (told["source"], told["base"], told["license"]) == (str(file), student_path, "mit") and told["notes"]
    assert f"{told['read']} tensors read, {told['from_base']} taken from the base" in err
    text = (tmp_path / "out" / "README.md").read_text()
    assert (
        f"Read from {file.name} " in text
        and f"{told['read']} tensors from the checkpoint, {told['from_base']} from the base." in text
    )
    assert (
        all(f"- {note}" in text for note in told["notes"])
        and "license: mit" in text
        and card_problems(text) == ([], [])
    )
    assert str(tmp_path) not in text and student_path not in text and "base_model" not in text
    assert check(tmp_path / "out") and sum(said(tmp_path / "out").values()) == pytest.approx(1, abs=1e-5)


def test_a_folder_without_processor_gets_the_base_s(theirs, student_path, tmp_path):
    model = CLIPModel.from_pretrained(student_path)
    model.load_state_dict(theirs)
    model.save_pretrained(tmp_path / "bare")
    with pytest.raises(SystemExit, match="weights but no processor .*--base"):
        convert.main([str(tmp_path / "bare"), str(tmp_path / "out")])
    assert not (tmp_path / "out").exists()
    run(tmp_path / "bare", tmp_path / "out", base=student_path)
    assert all(torch.equal(t, theirs[n]) for n, t in load_file(tmp_path / "out" / "model.safetensors").items())


@pytest.mark.parametrize("to", ["open_clip", "vision_tower"])
def test_a_file_of_weights_goes_straight_into_another_form(theirs, student_path, tmp_path, to):
    file = saved(theirs, tmp_path, "whole")
    run(file, tmp_path / "out", base=student_path, to=to)
    if to == "open_clip":
        found = read_checkpoint(tmp_path / "out", ZeroShotClassifier.from_pretrained(student_path))[0].state_dict()
        assert all(torch.equal(t, theirs[n]) for n, t in found.items())
    else:
        found = CLIPVisionModel.from_pretrained(tmp_path / "out").state_dict()
        own = {n.removeprefix("vision_model."): t for n, t in theirs.items() if n.startswith("vision_model.")}
        assert {n.removeprefix("vision_model.") for n in found} == own.keys()
        assert all(torch.equal(t, own[n.removeprefix("vision_model.")]) for n, t in found.items())


def test_the_hub_s_name_of_a_checkpoint_is_told_with_a_base(student_path, theirs, tmp_path, monkeypatch):
    """`owner/name` that is no folder is fetched; here its files lie in a cache already."""
    place = tmp_path / "snapshot"
    place.mkdir()
    saved(theirs, place, "whole").rename(place / "pytorch_model.bin")
    shutil.copy(Path(student_path) / "config.json", place)
    asked = {}
    monkeypatch.setattr(convert, "snapshot_download", lambda *a, **k: asked.update(name=a[0], **k) or str(place))
    run("owner/their-clip", tmp_path / "out", base=student_path, model_revision="abc")
    assert asked["name"] == "owner/their-clip" and asked["revision"] == "abc"
    assert not any(p.endswith((".py", "*")) for p in asked["allow_patterns"])
    assert json.loads((tmp_path / "out" / CONVERTED).read_text())["source"] == "owner/their-clip"
    assert "Read from owner/their-clip (" in (tmp_path / "out" / "README.md").read_text()


# --- mistakes -----------------------------------------------------------------------------------------------------------------


def error_of(*argv) -> str:
    with pytest.raises(SystemExit) as left:
        convert.main([str(a) for a in argv])
    assert isinstance(left.value.code, str), "an error exits 1 with a message"
    assert left.value.code.count("\n") == 0 and left.value.code.startswith("recipes/convert.py: ")
    return left.value.code


MISTAKES = {
    "a size for a whole CLIP": (
        ["{model}", "{out}", "--image_size", "64"],
        "--image_size is for --to vision_tower, this is --to trans",
    ),
    "a size for open_clip": (
        ["{model}", "{out}", "--image_size", "64", "--to", "open_clip"],
        "this is --to open_clip",
    ),
    "a precision for open_clip": (
        ["{model}", "{out}", "--to", "open_clip", "--dtype", "float16"],
        "--to open_clip writes float32",
    ),
    "a size that does not fit": (
        ["{model}", "{out}", "--to", "vision_tower", "--image_size", "50"],
        "image_size 50: .*; 48 would do",
    ),
    "no size at all": (
        ["{model}", "{out}", "--to", "vision_tower", "--image_size", "0"],
        "image_size 0: .*; 8 would do",
    ),
    "another precision": (["{model}", "{out}", "--dtype", "int4"], "--dtype: invalid choice: 'int4'"),
    "another form": (["{model}", "{out}", "--to", "onnx"], "--to: invalid choice: 'onnx'"),
    "shards of no size": (["{model}", "{out}", "--max_shard_size", "much"], "much|size"),
    "the checkpoint itself": (
        ["{model}", "{model}"],
        "--output_dir .*model is the checkpoint itself: name another folder",
    ),
    "the checkpoint by another name": (["{model}", "{model}/../model"], "is the checkpoint itself"),
    "the checkpoint by a link": (["{model}", "{link}"], "is the checkpoint itself"),
    "the file itself": (["{file}", "{file}", "--base", "{base}"], "is the checkpoint itself"),
    "the base": (["{file}", "{base}", "--base", "{base}"], "--output_dir .*base"),
    "no model": (["{out}", "{out}-2"], "no model at .*out: the folder does not exist"),
    "no file": (
        ["{out}.pt", "{out}", "--base", "{base}"],
        "no checkpoint at .*out.pt: neither a file nor a folder, and not a Hub id",
    ),
    "a file without a base": (["{file}", "{out}"], "--base"),
    "no base": (["{file}", "{out}", "--base", "{out}-3"], "no model at .*out-3"),
    "a base of another architecture": (
        ["{file}", "{out}", "--base", "{other}"],
        "expected a base of the same architecture",
    ),
    "no output": (["{model}"], "--output_dir"),
    "nothing": ([], "--model"),
    "a key that there is not": (["{model}", "{out}", "--dtpye", "float16"], "unknown key --dtpye; did you mean dtype"),
}


@pytest.mark.parametrize("what", MISTAKES)
def test_a_mistake_is_one_line_and_writes_nothing(theirs, student_path, proxy_path, tmp_path, what):
    argv, message = MISTAKES[what]
    model, base = (shutil.copytree(student_path, tmp_path / name) for name in ("model", "base"))
    (tmp_path / "link").symlink_to(model)
    places = {"model": model, "base": base, "link": tmp_path / "link", "other": proxy_path, "out": tmp_path / "out"}
    places["file"] = saved(theirs, tmp_path, "whole")
    before = contents(tmp_path)
    assert re.search(message, error_of(*(a.format(**places) for a in argv)))
    assert contents(tmp_path) == before


def cut(folder):
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:5000])


def no_text(folder):
    state = load_file(folder / "model.safetensors")
    save_file(
        {n: t for n, t in state.items() if not n.startswith("text")},
        folder / "model.safetensors",
        metadata={"format": "pt"},
    )


def shifted(folder):
    file = folder / "processor_config.json"
    content = json.loads(file.read_text())
    content["image_processor"]["rescale_factor"] = 1 / 127.5
    file.write_text(json.dumps(content))


def damaged(name, text):
    return lambda folder: (folder / name).write_bytes(text)


DAMAGED = {
    "cut weights": (cut, "damaged or not one"),
    "no weights": (lambda f: (f / "model.safetensors").unlink(), "model.safetensors"),
    "one tower": (no_text, r"lack \d+ tensors of a whole CLIP.*--base"),
    "no tokenizer": (lambda f: (f / "tokenizer.json").unlink(), "no tokenizer: .*--base"),
    "no config": (lambda f: (f / "config.json").unlink(), "no config.json"),
    "a config of nonsense": (damaged("config.json", b"{"), "config.json"),
    "a processor that pipeline reads otherwise": (
        shifted,
        "out was not written: .*logits differ by .* between the evaluator and",
    ),
    "a record of another version": (damaged(TRAINED, b'{"method": "x"}'), "train.json lacks .*another version"),
    "a damaged record": (damaged(CONVERTED, b"{"), CONVERTED),
    "a record that is a list": (damaged(TRAINED, b"[1]"), TRAINED),
}


# A tower is not asked through pipeline.
FORMS = [
    (what, to)
    for what in DAMAGED
    for to in ("transformers", "vision_tower")
    if "pipeline" not in what or to == "transformers"
]


@pytest.mark.parametrize(("what", "to"), FORMS)
def test_a_damaged_checkpoint_is_one_line_and_no_folder(student_path, tmp_path, what, to):
    model = shutil.copytree(student_path, tmp_path / "model")
    spoil, message = DAMAGED[what]
    spoil(model)
    before = contents(model)
    assert re.search(message, error_of(model, tmp_path / "out", "--to", to))
    assert not (tmp_path / "out").exists() and contents(model) == before


def test_what_stood_in_the_output_stays_when_the_conversion_fails(student_path, tmp_path):
    run(student_path, tmp_path / "out")
    before = contents(tmp_path / "out")
    shifted(model := shutil.copytree(student_path, tmp_path / "model"))
    assert "was not written" in error_of(model, tmp_path / "out", "--dtype", "float16")
    assert contents(tmp_path / "out") == before and check(tmp_path / "out")


def test_a_pickle_with_code_in_it_runs_nothing(student_path, tmp_path):
    class Evil:
        def __reduce__(self):
            return Path.touch, (tmp_path / "it-ran",)

    torch.save({"visual.class_embedding": Evil()}, tmp_path / "x.pt")
    assert "pickle" in error_of(tmp_path / "x.pt", tmp_path / "out", "--base", student_path)
    assert not (tmp_path / "it-ran").exists() and not (tmp_path / "out").exists()


def test_a_read_error_of_the_arguments_is_a_recipe_error(student_path, tmp_path):
    with pytest.raises(RecipeError, match="--image_size is for"):
        run(student_path, tmp_path / "out", image_size=64)
    other = save_tiny_clip(tmp_path / "other", layers=3)
    with pytest.raises(ValueError, match="same architecture"):
        run(Path(student_path) / "model.safetensors", tmp_path / "out", base=other)
    assert (
        not (tmp_path / "out").exists()
        and (Path(student_path) / "config.json").is_file()
        and SEAL not in contents(tmp_path)
    )
