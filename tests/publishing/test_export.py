"""Proves that an exported folder is, to the stock classes, the model that was in memory; that what is not is never put in place; and that `check` tells."""

from __future__ import annotations

import copy
import hashlib
import json
import os
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import CLASSES, WORDS, weights
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from transformers import (
    AutoModelForZeroShotImageClassification,
    AutoProcessor,
    AutoTokenizer,
    CLIPModel,
    CLIPProcessor,
    CLIPVisionModel,
    CLIPVisionModelWithProjection,
    pipeline,
)

from hpt_hf.data.collator import Collator, to_rgb
from hpt_hf.lab.pretrain import train_tokenizer
from hpt_hf.models.zero_shot import TEMPLATE, ZeroShotClassifier, fingerprint
from hpt_hf.publishing import export as export_module
from hpt_hf.publishing.export import DTYPES, LABELS, SEAL, check, export, pictures

FILES = {
    "README.md",
    "config.json",
    "model.safetensors",
    SEAL,
    "processor_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
}


@pytest.fixture
def model(student):
    return student


@pytest.fixture(scope="module")
def sealed(student_path, tmp_path_factory) -> Path:
    """One exported folder, for tests that only look at it."""
    return export(ZeroShotClassifier.from_pretrained(student_path), tmp_path_factory.mktemp("export") / "robust")


@pytest.fixture
def folder(sealed, tmp_path) -> Path:
    """A copy of it, to spoil."""
    return shutil.copytree(sealed, tmp_path / "robust")


def another(model) -> ZeroShotClassifier:
    """The model with other weights in the vision tower and in the head."""
    with torch.no_grad():
        model.visual_projection.weight.mul_(torch.linspace(0.5, 1.5, len(model.visual_projection.weight))[:, None])
        model.vision_model.embeddings.class_embedding.add_(0.5)
    return model


def contents(folder: Path) -> dict[str, str]:
    files = (f for f in sorted(folder.rglob("*")) if f.is_file())
    return {str(f.relative_to(folder)): hashlib.sha256(f.read_bytes()).hexdigest() for f in files}


def stored_dtypes(folder: Path) -> set[torch.dtype]:
    found = set()
    for file in folder.glob("*.safetensors"):
        with safe_open(file, "pt") as tensors:
            found |= {tensors.get_tensor(name).dtype for name in tensors.keys()}  # noqa: SIM118
    return found


def picture(size: tuple[int, int], mode: str = "RGB") -> Image.Image:
    """(width, height), smooth and noisy, in any mode."""
    width, height = size
    rng = np.random.default_rng(width * height)
    y, x = np.mgrid[0:height, 0:width]
    values = np.stack([128 + 100 * np.sin(x / (2 + c) + y / 5) for c in range(3)], -1) + rng.normal(
        0, 15, (height, width, 3)
    )
    return Image.fromarray(np.clip(values, 0, 255).astype(np.uint8)).convert(mode)


@torch.no_grad()
def evaluated(model: ZeroShotClassifier, *shown: Image.Image) -> torch.Tensor:
    """(pictures, classes): the evaluator's logits, on the batch that the recipes make."""
    model.set_classes(CLASSES)
    batch = Collator(model.processor)([{"image": to_rgb(p), "label": None} for p in shown])
    return model.eval().classify(batch["images"]).logits


def answered(classify, shown: Image.Image) -> torch.Tensor:
    """(classes,): the scores of a plain call of the pipeline."""
    said = classify(shown, candidate_labels=list(CLASSES), hypothesis_template=TEMPLATE)
    return torch.tensor([{a["label"]: a["score"] for a in said}[c] for c in CLASSES])


# --- what a stranger opens --------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def classify(sealed):
    return pipeline("zero-shot-image-classification", model=str(sealed))


@pytest.fixture(scope="module")
def evaluator(sealed):
    return ZeroShotClassifier.from_pretrained(sealed)


@pytest.mark.parametrize("mode", ["RGB", "L", "CMYK", "1"])
@pytest.mark.parametrize("size", [(32, 32), (33, 31), (17, 20), (64, 64), (90, 50), (41, 200)])
def test_pipeline_gives_the_evaluator_s_scores_on_any_picture(evaluator, classify, size, mode):
    shown = picture(size, mode)
    ours = evaluated(evaluator, shown).softmax(1)[0]
    theirs = answered(classify, shown)
    assert ours.max() - ours.min() > 0.01, "or equality would mean little"
    assert torch.allclose(ours, theirs, atol=1e-5)


@pytest.mark.parametrize(
    ("kind", "opened"),
    [
        (AutoModelForZeroShotImageClassification, CLIPModel),
        (CLIPModel, CLIPModel),
        (CLIPVisionModel, CLIPVisionModel),
        (CLIPVisionModelWithProjection, CLIPVisionModelWithProjection),
    ],
)
def test_stock_classes_open_it_with_no_other_argument_and_compute_the_same(sealed, model, kind, opened):
    stock, info = kind.from_pretrained(sealed, output_loading_info=True)
    assert (
        type(stock) is opened and not info["missing_keys"] and not info["mismatched_keys"] and not info["error_msgs"]
    )
    processor = AutoProcessor.from_pretrained(sealed)
    assert type(processor) is CLIPProcessor
    shown = [picture(s) for s in ((32, 32), (50, 70), (90, 33))]
    inputs = processor(text=[TEMPLATE.format(c) for c in CLASSES], images=shown, padding=True, return_tensors="pt")
    logits = evaluated(model, *shown)
    with torch.no_grad():
        embeds = model.embed_images(Collator(model.processor)([{"image": p, "label": None} for p in shown])["images"])
        if opened is CLIPModel:
            ours, theirs = logits, stock.eval()(**inputs).logits_per_image
        elif opened is CLIPVisionModelWithProjection:
            ours, theirs = embeds, stock.eval()(pixel_values=inputs["pixel_values"]).image_embeds
        else:
            ours, theirs = (
                embeds,
                model.visual_projection(stock.eval()(pixel_values=inputs["pixel_values"]).pooler_output),
            )
    torch.testing.assert_close(ours, theirs, atol=2e-5, rtol=1e-5)


def test_the_folder_holds_a_plain_clip_and_nothing_that_runs(sealed):
    assert {f.name for f in sealed.iterdir()} == FILES
    config = json.loads((sealed / "config.json").read_text())
    assert config["architectures"] == ["CLIPModel"] and config["model_type"] == "clip" and "auto_map" not in config
    with safe_open(sealed / "model.safetensors", "pt") as tensors:
        assert set(tensors.keys()) == set(CLIPModel.from_pretrained(sealed).state_dict())
    assert not [f.name for f in sealed.parent.iterdir() if f != sealed], "nothing is left beside it"


def test_the_weights_come_back_bit_for_bit(sealed, model):
    again = weights(ZeroShotClassifier.from_pretrained(sealed))
    assert fingerprint(ZeroShotClassifier.from_pretrained(sealed)) == fingerprint(model)
    assert again.keys() == weights(model).keys() and all(torch.equal(again[n], t) for n, t in weights(model).items())


def test_the_seal_holds_the_stock_classes_logits(sealed, model):
    """Computed here with CLIPModel and its processor alone."""
    seal = json.loads((sealed / SEAL).read_text())
    processor = AutoProcessor.from_pretrained(sealed, backend="pil")
    texts = [TEMPLATE.format(label) for label in LABELS]
    inputs = processor(text=texts, images=pictures(32), padding=True, return_tensors="pt")
    with torch.no_grad():
        stock = CLIPModel.from_pretrained(sealed).eval()(**inputs).logits_per_image
    sealed_logits = torch.tensor(seal["logits"])
    assert sealed_logits.shape == (5, len(LABELS)) and float(sealed_logits.std()) > 0.1
    torch.testing.assert_close(sealed_logits, stock, atol=1e-4, rtol=0)
    assert seal["fingerprint"] == fingerprint(model) and seal["dtype"] == "float32" and seal["image_size"] == 32
    assert 0 <= seal["difference"] < 1e-4 and 0 <= seal["difference_as_stored"] < 1e-4
    assert seal["labels"] == list(LABELS) and seal["template"] == TEMPLATE
    image = model.processor.image_processor
    for name in ("mean", "std"):
        assert np.allclose(seal[name], getattr(image, f"image_{name}"), atol=1e-7)
    assert check(sealed) == seal


def test_parity_is_measured_on_pictures_of_every_kind():
    for side in (32, 224):
        shown = pictures(side)
        sizes = [p.size for p in shown]
        assert (side, side) in sizes and {p.mode for p in shown} == {"RGB", "L"}
        assert any(min(s) < side for s in sizes) and any(min(s) > side for s in sizes)
        assert any(w > h for w, h in sizes) and any(w < h for w, h in sizes)
        again = pictures(side)
        assert all(a.tobytes() == b.tobytes() for a, b in zip(shown, again, strict=True))


# --- what export leaves as it was -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("train", [True, False])
def test_the_model_in_memory_is_not_touched(model, tmp_path, dtype, train):
    model.train(train).freeze_text()
    model(torch.rand(2, 3, 32, 32)).logits.square().sum().backward()
    before, grads = (
        weights(model),
        {n: None if p.grad is None else p.grad.clone() for n, p in model.named_parameters()},
    )
    asked = {n: p.requires_grad for n, p in model.named_parameters()}
    buffers, state = copy.deepcopy(dict(model.named_buffers())), (torch.get_rng_state(), np.random.get_state())
    export(model, tmp_path / "robust", dtype=dtype)
    assert torch.equal(torch.get_rng_state(), state[0])
    assert all(np.array_equal(a, b) for a, b in zip(np.random.get_state(), state[1], strict=True))
    assert model.training == train and all(m.training == train for m in model.modules())
    assert {p.dtype for p in model.parameters()} == {torch.float32}
    assert all(torch.equal(t, before[n]) for n, t in model.state_dict().items())
    assert all(
        t.dtype == torch.float32 and torch.equal(t, buffers[n])
        for n, t in model.named_buffers()
        if t.is_floating_point()
    )
    assert {n: p.requires_grad for n, p in model.named_parameters()} == asked
    for name, p in model.named_parameters():
        assert p.grad is None and grads[name] is None or torch.equal(p.grad, grads[name])
    assert model.classes == CLASSES and sum(p.grad is not None for p in model.parameters()) > 20


# --- precision and shards -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["bfloat16", "float16", "float32"])
def test_the_stored_precision_is_what_was_asked_for(model, tmp_path, name):
    folder, dtype = export(model, tmp_path / "robust", dtype=name), DTYPES[name]
    assert stored_dtypes(folder) == {dtype}
    assert {p.dtype for p in CLIPModel.from_pretrained(folder).parameters()} == {dtype}, (
        "what the stock classes open by default"
    )
    ours = ZeroShotClassifier.from_pretrained(folder)
    assert {p.dtype for p in ours.parameters()} == {torch.float32}
    rounded = {n: t.to(dtype).float() for n, t in model.state_dict().items()}
    assert all(torch.equal(t, rounded[n]) for n, t in ours.state_dict().items()), "rounded once"
    shown = [picture((32, 32)), picture((70, 40)), picture((20, 24), "L")]
    classify = pipeline("zero-shot-image-classification", model=str(folder))
    assert classify.model.dtype == dtype
    theirs = torch.stack([answered(classify, p) for p in shown])
    assert torch.allclose(
        evaluated(ours, *shown).softmax(1), theirs, atol={"float32": 1e-5, "float16": 5e-3}.get(name, 5e-2)
    )
    seal = check(folder)
    assert seal["dtype"] == name and seal["fingerprint"] == fingerprint(ours) and seal["difference"] < 1e-4
    assert (seal["difference_as_stored"] > 1e-3) == (name != "float32") and f"stored as {name}" in (
        folder / "README.md"
    ).read_text()


@pytest.mark.parametrize("kind", [CLIPVisionModel, CLIPVisionModelWithProjection])
@pytest.mark.parametrize("name", ["bfloat16", "float32"])
def test_the_towers_open_in_the_stored_precision_too(model, tmp_path, kind, name):
    folder = export(model, tmp_path / "robust", dtype=name)
    # These two read the towers' own configs, which `to` does not change.
    assert {p.dtype for p in kind.from_pretrained(folder).parameters()} == {DTYPES[name]}


def test_a_precision_that_there_is_not_is_refused_before_anything_is_written(model, tmp_path):
    with pytest.raises(ValueError, match="'int8': expected one of float32, bfloat16, float16"):
        export(model, tmp_path / "robust", dtype="int8")
    assert not list(tmp_path.iterdir())


def test_shards_open_and_no_weights_of_an_earlier_form_stay(model, tmp_path):
    folder = tmp_path / "robust"
    forms = (
        ("100KB", "float32", 2),
        ("5GB", "bfloat16", 1),
        ("30KB", "bfloat16", 4),
        ("60KB", "float32", 3),
        ("1GB", "float32", 1),
    )
    for size, dtype, least in forms:
        if least == 1:  # a pickle of other weights must not stay either
            torch.save({}, folder / "pytorch_model.bin")
        export(model, folder, dtype=dtype, max_shard_size=size)
        files = {f.name for f in folder.iterdir() if ".safetensors" in f.name or ".bin" in f.name}
        if least > 1:
            index = json.loads((folder / "model.safetensors.index.json").read_text())["weight_map"]
            assert files == {"model.safetensors.index.json", *index.values()} and len(set(index.values())) >= least
            assert set(index) == set(model.state_dict())
        else:
            assert files == {"model.safetensors"}
        stock, info = CLIPModel.from_pretrained(folder, output_loading_info=True)
        assert not info["missing_keys"]
        assert all(torch.equal(t, model.state_dict()[n].to(DTYPES[dtype])) for n, t in stock.state_dict().items())
        check(folder)


# --- into a folder that holds something -----------------------------------------------------------------------------------


def test_exporting_twice_leaves_the_second_and_what_else_lay_there(model, tmp_path):
    folder = export(
        model, tmp_path / "robust", records={"convert.json": {"source": "a/b", "base": None, "license": None}}
    )
    others = {"notes.txt": "mine", "scores/one.txt": "1", "checkpoint-3/optimizer.pt": "state", "runs/events": "log"}
    for name, text in others.items():
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text(text)
    first = check(folder)
    export(another(model), folder, records={"convert.json": {"source": "c/d", "base": None, "license": None}})
    second = check(folder)
    assert second["fingerprint"] == fingerprint(model) != first["fingerprint"] and second["logits"] != first["logits"]
    assert {n: (folder / n).read_text() for n in others} == others
    assert (
        json.loads((folder / "convert.json").read_text())["source"] == "c/d"
        and "c/d" in (folder / "README.md").read_text()
    )
    once = contents(folder)
    export(model, folder, records={"convert.json": {"source": "c/d", "base": None, "license": None}})
    assert contents(folder) == once, "the same again is the same to the last bit"


def test_a_record_of_what_stood_there_before_does_not_tell_of_the_new_weights(model, tmp_path):
    folder = export(
        model, tmp_path / "robust", records={"convert.json": {"source": "their/clip", "base": None, "license": "mit"}}
    )
    export(another(model), folder)
    assert "their/clip" not in (folder / "README.md").read_text()


def broken(model, **changes):
    """A processor other than the one that the model was made with."""
    processor = copy.deepcopy(model.processor)
    for name, value in changes.items():
        setattr(processor.image_processor, name, value)
    model.processor = processor
    return model


def no_numbers(model):
    with torch.no_grad():
        model.vision_model.post_layernorm.weight.fill_(float("nan"))
    return model


REFUSED = {
    "mean in memory": (
        lambda m: setattr(m, "mean", m.mean + 0.05) or m,
        r"normalises its pictures with mean \(0\.531\d*, 0\.507\d*, 0\.458\d*\).*processor .* says \(0\.481\d*, 0\.457\d*, 0\.408\d*\)",
    ),
    "std in memory": (
        lambda m: setattr(m, "std", torch.full_like(m.std, 0.5)) or m,
        r"with std \(0.5, 0.5, 0.5\).*says \(0\.268\d*, 0\.261\d*, 0\.275\d*\)",
    ),
    "mean of the processor": (
        lambda m: broken(m, image_mean=[0.5, 0.5, 0.5]),
        r"mean \(0\.481.*says \(0.5, 0.5, 0.5\)",
    ),
    "std of the processor": (
        lambda m: broken(m, image_std=[0.25, 0.25, 0.25]),
        r"std \(0\.268.*says \(0.25, 0.25, 0.25\)",
    ),
    "another rescaling": (
        lambda m: broken(m, rescale_factor=1 / 127.5),
        "logits differ by .* between the evaluator and `pipeline`",
    ),
    "no normalisation": (
        lambda m: broken(m, do_normalize=False),
        "logits differ by .* between the evaluator and `pipeline`",
    ),
    "no crop": (lambda m: broken(m, do_center_crop=False), "processor"),
    "a larger crop": (lambda m: broken(m, crop_size={"height": 40, "width": 40}), "processor"),
    "no numbers": (no_numbers, "logits differ by nan between the evaluator and `pipeline`"),
}


@pytest.mark.parametrize("why", REFUSED)
def test_what_does_not_answer_as_the_model_is_not_put_in_place(model, folder, why):
    """As if training had normalised with other numbers than the processor's: the fault that makes a checkpoint wrong under pipeline."""
    refused, before = folder.with_name("robust-refused"), contents(folder)
    refused.mkdir()
    (refused / "of-an-earlier-time").write_text("")
    spoil, reason = REFUSED[why]
    dtype = "bfloat16" if "in memory" in why else "float32"
    with pytest.raises(ValueError, match=reason) as raised:
        export(spoil(another(model)), folder, dtype=dtype)
    assert str(refused) in str(raised.value) and "was not written" in str(raised.value)
    assert contents(folder) == before
    assert {f.name for f in folder.parent.iterdir()} == {"robust", "robust-refused"}
    assert {f.name for f in refused.iterdir()} == FILES - {"README.md", SEAL}
    assert set(load_file(refused / "model.safetensors")) == set(model.state_dict()) and stored_dtypes(refused) == {
        DTYPES[dtype]
    }
    with pytest.raises(ValueError, match=f"has no {SEAL}"):
        check(refused)


def test_nothing_is_made_of_a_folder_that_was_refused(model, tmp_path):
    with pytest.raises(ValueError, match="was not written"):
        export(broken(model, image_mean=[0.5, 0.5, 0.5]), tmp_path / "deep" / "robust")
    assert not (tmp_path / "deep" / "robust").exists() and (tmp_path / "deep" / "robust-refused").is_dir()


def test_a_difference_in_the_fifth_digit_is_named_so_that_one_sees_it(model, tmp_path):
    mean = [*model.processor.image_processor.image_mean]
    with pytest.raises(ValueError) as raised:
        export(broken(model, image_mean=[mean[0] + 2e-5, *mean[1:]]), tmp_path / "robust")
    numbers = str(raised.value).split("mean ")[1].split(" says ")
    assert numbers[0].split(")")[0] != numbers[1].split(")")[0]


def test_other_weights_on_the_disk_than_in_memory_are_refused(model, tmp_path, monkeypatch):
    """A save that loses or changes a tensor, whoever is to blame."""
    save = ZeroShotClassifier.save_pretrained

    def lossy(self, folder, **kwargs):
        save(self, folder, **kwargs)
        state = load_file(Path(folder) / "model.safetensors")
        state["visual_projection.weight"][0, 0] += 1e-6
        save_file(state, Path(folder) / "model.safetensors", metadata={"format": "pt"})

    monkeypatch.setattr(ZeroShotClassifier, "save_pretrained", lossy)
    with pytest.raises(ValueError, match="holds other weights than the model in memory"):
        export(model, tmp_path / "robust")


def test_a_model_without_processor_is_not_exported(student_path, tmp_path):
    with pytest.raises(OSError, match="has weights but no processor"):
        export(ZeroShotClassifier.from_pretrained(student_path), tmp_path / "robust")
    assert not (tmp_path / "robust").exists()


# --- interrupted ----------------------------------------------------------------------------------------------------------


class Stop(BaseException):
    """As Ctrl-C: nothing may catch it."""


WHERE = {
    **{name: (export_module, name) for name in ("write_json", "_unlike", "pipeline_logits", "logits", "digest")},
    "loading": (ZeroShotClassifier, "load"),
    "saving weights": (CLIPModel, "save_pretrained"),
    "saving the processor": (CLIPProcessor, "save_pretrained"),
}


@pytest.mark.parametrize("where", WHERE)
def test_an_export_that_is_interrupted_leaves_what_stood_there(model, folder, monkeypatch, where):
    before = contents(folder)

    def stop(*_, **__):
        raise Stop

    monkeypatch.setattr(*WHERE[where], stop)
    with pytest.raises(Stop):
        export(another(model), folder, records={"convert.json": {"source": "a/b", "base": None, "license": None}})
    assert contents(folder) == before


def test_what_an_interrupted_export_left_is_no_part_of_the_next(model, folder, monkeypatch):
    with monkeypatch.context() as patch, pytest.raises(FileExistsError):
        patch.setattr(export_module, "_unlike", lambda *_: (_ for _ in ()).throw(FileExistsError))
        export(model, folder, records={"convert.json": {"source": "a/b"}}, max_shard_size="50KB")
    export(another(model), folder)
    assert check(folder)["fingerprint"] == fingerprint(model) and {f.name for f in folder.iterdir()} == FILES
    assert [f.name for f in folder.parent.iterdir()] == ["robust"]


@pytest.mark.parametrize("size", ["5GB", "100KB"])
def test_an_export_that_is_killed_while_moving_into_place_is_never_taken_for_whole(
    model, sealed, tmp_path, monkeypatch, size
):
    """After every single step of it: `check` refuses, or what it lets pass is the old model or the new one, as a whole."""
    seal = check(sealed)
    old = (seal["fingerprint"], tuple(seal["mean"]))
    changed = broken(another(model), image_mean=[0.5, 0.5, 0.5])
    changed.set_processor(changed.processor)
    second = export(changed, tmp_path / "second", max_shard_size=size)
    whole = (fingerprint(changed), (0.5, 0.5, 0.5))
    # What is killed here comes after the check, which takes its time.
    monkeypatch.setattr(
        export_module, "_unlike", lambda model, stored, stage: shutil.copy(second / SEAL, stage) and None
    )
    seen, replace, unlink = [], os.replace, Path.unlink
    for steps in range(20):
        folder, left = shutil.copytree(sealed, tmp_path / f"killed-{steps}"), [steps]

        def count(path, folder=folder, left=left):
            if Path(path).parent == folder:
                left[0] -= 1
                if left[0] < 0:
                    raise Stop

        with monkeypatch.context() as patch:
            patch.setattr(os, "replace", lambda a, b, count=count: (count(b), replace(a, b)))
            patch.setattr(Path, "unlink", lambda self, *a, count=count, **k: (count(self), unlink(self, *a, **k)))
            try:
                export(changed, folder, max_shard_size=size)
                break
            except Stop:
                pass
        try:
            seal = check(folder)
            seen.append((fingerprint(ZeroShotClassifier.from_pretrained(folder)), tuple(seal["mean"])))
        except ValueError:
            seen.append("refused")
    assert (
        len(seen) >= len(FILES) - 1 and set(seen) <= {"refused", old, whole} and seen[0] == old and "refused" in seen
    )
    export(changed, tmp_path / "killed-3", max_shard_size=size)
    assert (
        contents(tmp_path / "killed-3").keys() == contents(folder).keys()
        and check(tmp_path / "killed-3")["mean"] == [0.5] * 3
    )


def test_a_card_that_cannot_be_written_is_no_half_export(model, folder):
    """All of it, or nothing."""
    before = contents(folder)
    with pytest.raises(ValueError, match="train.json lacks"):
        export(another(model), folder, records={"train.json": {"method": "of another version"}})
    assert contents(folder) == before


def test_a_folder_on_another_disk_can_be_written(model, tmp_path):
    """output_dir as a mount point or a link to a larger disk: a file cannot be renamed from one file system to another."""
    elsewhere = Path("/dev/shm")
    if (
        not elsewhere.is_dir()
        or elsewhere.stat().st_dev == tmp_path.stat().st_dev
        or not os.access(elsewhere, os.W_OK)
    ):
        pytest.skip("one file system only")
    place = elsewhere / f"hpt_hf-{os.getpid()}-{tmp_path.name}"
    place.mkdir()
    try:
        (tmp_path / "robust").symlink_to(place)
        assert check(export(model, tmp_path / "robust"))
    finally:
        shutil.rmtree(place)


@pytest.mark.parametrize("given", [str, Path, lambda p: os.path.relpath(p, Path.cwd())])
def test_the_folder_may_be_named_in_any_way(model, tmp_path, monkeypatch, given):
    monkeypatch.chdir(tmp_path)
    folder = export(model, given(tmp_path / "a" / "robust"))
    assert folder == tmp_path / "a" / "robust" and check(folder)


# --- check ------------------------------------------------------------------------------------------------------------------


def test_an_exported_folder_passes_wherever_it_lies_and_from_wherever_one_looks(folder, tmp_path, monkeypatch):
    seal = check(folder)
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    shutil.move(folder, tmp_path / "elsewhere" / "renamed")
    assert check("renamed") == check(Path("renamed")) == check(tmp_path / "elsewhere" / "renamed") == seal


def test_check_changes_nothing_and_draws_no_random_number(folder):
    before, state = contents(folder), torch.get_rng_state()
    check(folder)
    assert contents(folder) == before and torch.equal(torch.get_rng_state(), state)


def change_json(name, change):
    def tamper(folder: Path) -> None:
        content = json.loads((folder / name).read_text())
        change(content)
        (folder / name).write_text(json.dumps(content))

    return tamper


def processor(**changes):
    return change_json("processor_config.json", lambda c: c["image_processor"].update(changes))


def towers(**changes):
    return change_json(
        "config.json", lambda c: [c[tower].update(changes) for tower in ("vision_config", "text_config")]
    )


def tensors(change):
    def tamper(folder: Path) -> None:
        state = load_file(folder / "model.safetensors")
        change(state)
        save_file(state, folder / "model.safetensors", metadata={"format": "pt"})

    return tamper


def another_tokenizer(folder: Path) -> None:
    train_tokenizer([w for w in WORDS if w not in ("photo", "cat")], vocab_size=600).save_pretrained(folder)


def swap_two_tokens(*, used: bool):
    """Two entries of the vocabulary change places: of those that the seal's prompts read, or of the others."""

    def tamper(folder: Path) -> None:
        tokenizer = AutoTokenizer.from_pretrained(folder)
        read = {i for label in LABELS for i in tokenizer(TEMPLATE.format(label))["input_ids"]}
        last = len(tokenizer) - 2  # start and end of text stay
        a, b = [name for name, i in tokenizer.get_vocab().items() if (i in read) == used and i < last][:2]

        def change(content):
            vocab = content["model"]["vocab"]
            vocab[a], vocab[b] = vocab[b], vocab[a]

        change_json("tokenizer.json", change)(folder)

    return tamper


def other_model(folder: Path) -> None:
    """Weights, seal and all of a folder that was exported, under this one's config and processor."""
    tensors(lambda s: s.update({n: t + 1e-3 for n, t in s.items()}))(folder)


CHANGED = "though the weights are the same: its processor, tokenizer or config was changed"
TAMPERED = {
    "mean": (
        processor(image_mean=[0.5, 0.5, 0.5]),
        r"processor in .* says mean \(0.5, 0.5, 0.5\).*checked with \(0\.481\d*, 0\.457",
    ),
    "std": (
        processor(image_std=[0.3, 0.3, 0.3]),
        r"processor in .* says std \(0.3, 0.3, 0.3\).*checked with \(0\.268\d*, 0\.261",
    ),
    "mean, a little": (processor(image_mean=[0.485, 0.456, 0.406]), r"says mean \(0.485, 0.456, 0.406\)"),
    "a smaller resize": (processor(size={"shortest_edge": 24}), CHANGED),
    "a larger resize": (processor(size={"shortest_edge": 40}), CHANGED),
    "no resize": (processor(do_resize=False), CHANGED),
    "squashed": (processor(do_center_crop=False, size={"height": 32, "width": 32}), CHANGED),
    "no crop": (processor(do_center_crop=False), "processor"),
    "a larger crop": (processor(crop_size={"height": 40, "width": 40}), "processor"),
    "another filter": (processor(resample=2), CHANGED),
    "no normalisation": (processor(do_normalize=False), f"the pipeline's logits .* {CHANGED}"),
    "another rescaling": (processor(rescale_factor=1 / 254), f"the pipeline's logits .* {CHANGED}"),
    "one weight": (
        tensors(lambda s: s["vision_model.encoder.layers.0.mlp.fc1.weight"][0].add_(1e-4)),
        "weights in .* are not those that were checked",
    ),
    "a weight of the text": (
        tensors(lambda s: s["text_model.embeddings.token_embedding.weight"][7].mul_(1.1)),
        "weights in .* are not those that were checked",
    ),
    "logit_scale": (tensors(lambda s: s["logit_scale"].sub_(0.1)), "weights in .* are not those that were checked"),
    "all weights": (other_model, "weights in .* are not those that were checked"),
    "a lost tensor": (
        tensors(lambda s: s.pop("visual_projection.weight")),
        "lack 1 tensors.*visual_projection.weight",
    ),
    "hidden_act": (towers(hidden_act="quick_gelu"), CHANGED),
    "hidden_act of one": (change_json("config.json", lambda c: c["text_config"].update(hidden_act="relu")), CHANGED),
    "heads": (change_json("config.json", lambda c: c["vision_config"].update(num_attention_heads=4)), CHANGED),
    "end of text": (change_json("config.json", lambda c: c["text_config"].update(eos_token_id=5)), CHANGED),
    "image_size": (
        change_json("config.json", lambda c: c["vision_config"].update(image_size=64)),
        "shapes that config.json says",
    ),
    "another tokenizer": (another_tokenizer, "tokenizer"),
    "two tokens swapped": (swap_two_tokens(used=True), "tokenizer"),
    "two other tokens swapped": (swap_two_tokens(used=False), "another vocabulary"),
    "no tokenizer": (lambda f: (f / "tokenizer.json").unlink(), "no tokenizer"),
    "no seal": (lambda f: (f / SEAL).unlink(), f"has no {SEAL}: it was never checked.*recipes/convert.py"),
    "a seal of another model": (
        change_json(SEAL, lambda c: c.update(fingerprint="0" * 16)),
        "weights in .* are not those",
    ),
    "other logits in the seal": (change_json(SEAL, lambda c: c["logits"][2].reverse()), CHANGED),
    "fewer logits in the seal": (change_json(SEAL, lambda c: c["logits"].pop()), CHANGED),
}


@pytest.mark.parametrize("what", TAMPERED)
def test_what_was_changed_since_is_told(folder, what):
    tamper, reason = TAMPERED[what]
    tamper(folder)
    with pytest.raises(ValueError, match=reason) as raised:
        check(folder)
    assert str(folder) in str(raised.value)


@pytest.mark.parametrize(
    "text", ["", "{", "[]", "null", "3", "{}", '{"logits": "x"}', '{"logits": []}', "\0\0", "b\xff"]
)
def test_a_seal_that_cannot_be_read_is_damaged(folder, text):
    (folder / SEAL).write_bytes(text.encode("latin-1"))
    with pytest.raises(ValueError, match=f"{SEAL} is damaged .*recipes/convert.py"):
        check(folder)


@pytest.mark.parametrize("key", ["fingerprint", "mean", "std", "logits"])
def test_a_seal_that_lacks_something_is_damaged(folder, key):
    change_json(SEAL, lambda c: c.pop(key))(folder)
    with pytest.raises(ValueError, match=f"{SEAL} is damaged .*{key}"):
        check(folder)


def test_a_folder_without_a_model_is_an_error_that_names_it(tmp_path):
    with pytest.raises(ValueError, match=f"{tmp_path} has no {SEAL}"):
        check(tmp_path)
    with pytest.raises(ValueError, match=f"nowhere has no {SEAL}"):
        check(tmp_path / "nowhere")


def test_rounding_on_another_machine_is_no_change(folder):
    """Kernels add up in another order: that is less than the tolerance, and a changed model is more."""
    change_json(SEAL, lambda c: c.update(logits=(torch.tensor(c["logits"]) + 3e-4).tolist()))(folder)
    check(folder)
    change_json(SEAL, lambda c: c.update(logits=(torch.tensor(c["logits"]) + 2e-3).tolist()))(folder)
    with pytest.raises(ValueError, match=CHANGED):
        check(folder)
