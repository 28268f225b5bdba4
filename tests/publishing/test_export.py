"""An exported folder is, to the stock classes, the model that was in memory; what is not is never put in place; `check` tells."""

from __future__ import annotations

import copy
import json
import os
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import CLASSES, WORDS, contents, weights
from PIL import Image
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
from hpt_hf.publishing.export import DTYPES, LABELS, SEAL, check, export, probe_images

FILES = {"README.md", "config.json", "model.safetensors", SEAL, "processor_config.json", "tokenizer.json"}
FILES |= {"tokenizer_config.json"}
CONVERTED = {"convert.json": {"source": "their/clip", "base": None, "license": "mit"}}


@pytest.fixture(scope="module")
def sealed(student_path, tmp_path_factory) -> Path:
    """One exported folder, for tests that only look at it."""
    return export(ZeroShotClassifier.from_pretrained(student_path), tmp_path_factory.mktemp("export") / "robust")


@pytest.fixture
def folder(sealed, tmp_path) -> Path:
    """A copy of it, to spoil."""
    return shutil.copytree(sealed, tmp_path / "robust")


def another(classifier) -> ZeroShotClassifier:
    """Other weights in the vision tower and in the head."""
    with torch.no_grad():
        weight = classifier.model.visual_projection.weight
        weight.mul_(torch.linspace(0.5, 1.5, len(weight))[:, None])
        classifier.model.vision_model.embeddings.class_embedding.add_(0.5)
    return classifier


def image(size: tuple[int, int], mode: str = "RGB") -> Image.Image:
    """(width, height), smooth and noisy, in any mode."""
    width, height = size
    y, x = np.mgrid[0:height, 0:width]
    values = np.stack([128 + 100 * np.sin(x / (2 + c) + y / 5) for c in range(3)], -1)
    values += np.random.default_rng(width * height).normal(0, 15, (height, width, 3))
    return Image.fromarray(np.clip(values, 0, 255).astype(np.uint8)).convert(mode)


@torch.no_grad()
def evaluated(classifier: ZeroShotClassifier, *shown: Image.Image) -> torch.Tensor:
    """(images, classes): the evaluator's logits."""
    classifier.set_classes(CLASSES)
    batch = Collator(classifier.processor)([{"image": to_rgb(i), "label": None} for i in shown])
    return classifier.eval().classify(batch["images"]).logits


def answered(classify, shown: Image.Image) -> torch.Tensor:
    """(classes,): the probabilities of a plain call of the pipeline."""
    said = classify(shown, candidate_labels=list(CLASSES), hypothesis_template=TEMPLATE)
    return torch.tensor([{a["label"]: a["score"] for a in said}[c] for c in CLASSES])


# --- what a stranger opens


@pytest.mark.parametrize("mode", ["RGB", "L", "CMYK"])
@pytest.mark.parametrize("size", [(32, 32), (17, 20), (90, 50), (41, 200)])
def test_pipeline_gives_the_evaluators_probabilities_on_any_image(sealed, size, mode):
    shown = image(size, mode)
    ours = evaluated(ZeroShotClassifier.from_pretrained(sealed), shown).softmax(1)[0]
    assert ours.max() - ours.min() > 0.01, "or equality would mean little"
    classify = pipeline("zero-shot-image-classification", model=str(sealed))
    assert torch.allclose(ours, answered(classify, shown), atol=1e-5)


@pytest.mark.parametrize("template", ["a {} in the wild", "{x} {}: {{y}}", TEMPLATE])
def test_the_cards_own_lines_give_the_evaluators_answers(student_path, tmp_path, monkeypatch, template):
    """The prompt that was trained travels with the model: another one would be another classifier."""
    classifier = ZeroShotClassifier.from_pretrained(student_path).set_classes(CLASSES, (template, "the {}"))
    folder = export(classifier, tmp_path / "robust")
    (code,) = re.findall(r"```python\n(.*?)```", (folder / "README.md").read_text(), re.DOTALL)
    image((50, 40)).save(tmp_path / "image.png")
    monkeypatch.chdir(tmp_path)
    *lines, call = code.strip().splitlines()
    names: dict = {}
    exec("\n".join(lines), names)
    said = {a["label"]: a["score"] for a in eval(call, names)}
    labels = ["a cat", "a dog"]
    batch = Collator(classifier.processor)([{"image": image((50, 40)), "label": None}])
    expected = classifier.set_classes(labels, (template,)).classify(batch["images"]).logits.softmax(1)[0]
    assert [said[n] for n in labels] == pytest.approx(expected.tolist(), abs=1e-5)
    assert json.loads((folder / SEAL).read_text())["template"] == template and check(folder)


def test_only_what_would_be_opened_in_its_place_goes(folder, student_path):
    goes = ("pytorch_model.bin", "model-00001-of-00002.safetensors", "model.safetensors.index.json", "dial.json")
    stays = ("model_backup.safetensors", "my_model.safetensors", "pytorch_model_old.bin", "model.safetensors.bak")
    for name in (*goes, *stays):
        (folder / name).write_text("mine")
    export(ZeroShotClassifier.from_pretrained(student_path), folder)
    left = {f.name for f in folder.iterdir()}
    assert left >= set(stays) and not left & set(goes)


def test_a_seal_of_the_version_before_says_no_template(folder):
    seal = json.loads((folder / SEAL).read_text())
    del seal["template"]
    (folder / SEAL).write_text(json.dumps(seal))
    assert check(folder)["fingerprint"] == seal["fingerprint"]


OPENED = {AutoModelForZeroShotImageClassification: CLIPModel}
OPENED |= {kind: kind for kind in (CLIPModel, CLIPVisionModel, CLIPVisionModelWithProjection)}


@pytest.mark.parametrize("kind", OPENED)
def test_stock_classes_open_it_with_no_other_argument_and_compute_the_same(sealed, student, kind):
    stock, info = kind.from_pretrained(sealed, output_loading_info=True)
    assert type(stock) is OPENED[kind] and not info["missing_keys"] and not info["mismatched_keys"]
    processor = AutoProcessor.from_pretrained(sealed)
    assert type(processor) is CLIPProcessor
    shown = [image(s) for s in ((32, 32), (50, 70), (90, 33))]
    inputs = processor(text=[TEMPLATE.format(c) for c in CLASSES], images=shown, padding=True, return_tensors="pt")
    batch = Collator(student.processor)([{"image": i, "label": None} for i in shown])["images"]
    with torch.no_grad():
        if type(stock) is CLIPModel:
            ours, theirs = evaluated(student, *shown), stock.eval()(**inputs).logits_per_image
        else:
            out = stock.eval()(pixel_values=inputs["pixel_values"])
            ours = student.embed_images(batch)
            theirs = student.model.visual_projection(out[1]) if kind is CLIPVisionModel else out.image_embeds
    torch.testing.assert_close(ours, theirs, atol=2e-5, rtol=1e-5)


def test_the_folder_holds_a_plain_clip_bit_for_bit_and_nothing_that_runs(sealed, student):
    assert {f.name for f in sealed.iterdir()} == FILES and list(sealed.parent.iterdir()) == [sealed]
    config = json.loads((sealed / "config.json").read_text())
    assert config["architectures"] == ["CLIPModel"] and config["model_type"] == "clip" and "auto_map" not in config
    stored, own = load_file(sealed / "model.safetensors"), student.model.state_dict()
    assert stored.keys() == own.keys() and all(torch.equal(stored[n], own[n]) for n in own)


def test_the_seal_holds_the_stock_classes_logits(sealed, student):
    """Computed here with CLIPModel and its processor alone."""
    seal = check(sealed)
    processor = AutoProcessor.from_pretrained(sealed, backend="pil")
    texts = [TEMPLATE.format(label) for label in LABELS]
    inputs = processor(text=texts, images=probe_images(32), padding=True, return_tensors="pt")
    with torch.no_grad():
        stock = CLIPModel.from_pretrained(sealed).eval()(**inputs).logits_per_image
    assert stock.shape == (5, len(LABELS)) and float(stock.std()) > 0.1
    torch.testing.assert_close(torch.tensor(seal["logits"]), stock, atol=1e-4, rtol=0)
    assert (seal["fingerprint"], seal["dtype"], seal["image_size"]) == (fingerprint(student), "float32", 32)
    assert 0 <= seal["difference"] == seal["difference_as_stored"] < 1e-4


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_model_in_memory_is_not_touched(student, tmp_path, dtype):
    student.train().freeze_text()
    student(torch.rand(2, 3, 32, 32)).logits.square().sum().backward()
    before, grads = weights(student), {n: p.grad for n, p in student.named_parameters()}
    state = torch.get_rng_state()
    export(student, tmp_path / "robust", dtype=dtype)
    assert torch.equal(torch.get_rng_state(), state) and all(m.training for m in student.modules())
    assert all(torch.equal(t, before[n]) and t.dtype == before[n].dtype for n, t in weights(student).items())
    assert all(p.grad is grads[n] for n, p in student.named_parameters()) and student.classes == CLASSES


# --- precision and shards


@pytest.mark.parametrize("name", DTYPES)
def test_the_stored_precision_is_what_was_asked_for(student, tmp_path, name):
    folder, dtype = export(student, tmp_path / "robust", dtype=name), DTYPES[name]
    for kind in OPENED:  # the vision towers read the tower's own config
        assert {p.dtype for p in kind.from_pretrained(folder).parameters()} == {dtype}
    ours = ZeroShotClassifier.from_pretrained(folder)
    rounded = {n: t.to(dtype).float() for n, t in student.model.state_dict().items()}
    assert all(torch.equal(t, rounded[n]) for n, t in ours.model.state_dict().items()), "rounded once"
    shown = [image((32, 32)), image((70, 40)), image((20, 24), "L")]
    classify = pipeline("zero-shot-image-classification", model=str(folder))
    theirs, tolerance = torch.stack([answered(classify, i) for i in shown]), {"float32": 1e-5, "float16": 5e-3}
    assert torch.allclose(evaluated(ours, *shown).softmax(1), theirs, atol=tolerance.get(name, 5e-2))
    seal = check(folder)
    assert seal["dtype"] == name and seal["fingerprint"] == fingerprint(ours) and seal["difference"] < 1e-4
    assert (seal["difference_as_stored"] > 1e-3) == (name != "float32")
    assert f"stored as {name}" in (folder / "README.md").read_text()


def test_a_precision_that_there_is_not_is_refused_before_anything_is_written(student, tmp_path):
    with pytest.raises(ValueError, match="'int8': expected one of float32, bfloat16, float16"):
        export(student, tmp_path / "robust", dtype="int8")
    assert not list(tmp_path.iterdir())


def test_shards_open_and_no_weights_of_an_earlier_form_stay(student, tmp_path):
    folder = tmp_path / "robust"
    for size, least in (("100KB", 2), ("5GB", 1), ("60KB", 3)):
        if least == 1:  # a pickle of other weights must not stay either
            torch.save({}, folder / "pytorch_model.bin")
        export(student, folder, max_shard_size=size)
        files = {f.name for f in folder.iterdir() if ".safetensors" in f.name or ".bin" in f.name}
        if least > 1:
            index = json.loads((folder / "model.safetensors.index.json").read_text())["weight_map"]
            assert files == {"model.safetensors.index.json", *index.values()} and len(set(index.values())) >= least
        else:
            assert files == {"model.safetensors"}
        stock = CLIPModel.from_pretrained(folder).state_dict()
        assert all(torch.equal(t, student.model.state_dict()[n]) for n, t in stock.items()) and check(folder)


# --- into a folder that holds something


def test_exporting_twice_leaves_the_second_and_what_else_lay_there(student, tmp_path):
    folder = export(student, tmp_path / "robust", records=CONVERTED)
    others = {"notes.txt": "mine", "results/one.txt": "1", "checkpoint-3/optimizer.pt": "state", "runs/events": "log"}
    for name, text in others.items():
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text(text)
    first = check(folder)
    export(another(student), folder)
    second = check(folder)
    assert (
        second["fingerprint"] == fingerprint(student) != first["fingerprint"] and second["logits"] != first["logits"]
    )
    assert {n: (folder / n).read_text() for n in others} == others
    assert not (folder / "convert.json").exists() and "their/clip" not in (folder / "README.md").read_text()
    once = contents(folder)
    export(student, folder)
    assert contents(folder) == once, "the same again is the same to the last bit"


def test_a_folder_may_be_relative_or_a_link_to_another_place(student, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert export(student, "a/robust") == tmp_path / "a" / "robust" and check("a/robust")
    (tmp_path / "place").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "place")
    assert check(export(student, tmp_path / "link")) and (tmp_path / "place" / SEAL).is_file()


def with_processor(classifier, **changes):
    """A processor other than the one that the model was made with."""
    classifier.processor = copy.deepcopy(classifier.processor)
    for name, value in changes.items():
        setattr(classifier.processor.image_processor, name, value)
    return classifier


def no_numbers(classifier):
    with torch.no_grad():
        classifier.model.vision_model.post_layernorm.weight.fill_(float("nan"))
    return classifier


REFUSED = {
    "mean in memory": (lambda m: setattr(m, "mean", m.mean + 0.05) or m, r"with mean \[0.53.* says \[0.48"),
    "std in memory": (lambda m: setattr(m, "std", torch.full_like(m.std, 0.5)) or m, r"with std \[0.5.* says \[0.26"),
    "mean of the processor": (lambda m: with_processor(m, image_mean=[0.5, 0.5, 0.5]), r"mean \[0.48.* says \[0.5"),
    "another rescaling": (lambda m: with_processor(m, rescale_factor=1 / 127.5), r"mean \[0.48.* says \[0.24"),
    "no normalisation": (lambda m: with_processor(m, do_normalize=False), r"mean \[0.48.* says \[0.0"),
    "no crop": (lambda m: with_processor(m, do_center_crop=False), "processor"),
    "a larger crop": (lambda m: with_processor(m, crop_size={"height": 40, "width": 40}), "processor"),
    "no numbers": (no_numbers, "logits differ by nan"),
}


@pytest.mark.parametrize("why", REFUSED)
def test_what_does_not_answer_as_the_model_is_not_put_in_place(student, folder, why):
    """As if training had normalised with other numbers than the processor's: such a checkpoint is wrong under pipeline."""
    refused, before = folder.with_name("robust-refused"), contents(folder)
    refused.mkdir()
    (refused / "of-an-earlier-time").write_text("")
    spoil, reason = REFUSED[why]
    with pytest.raises(ValueError, match=f"was not written: .*{reason}.*robust-refused"):
        export(spoil(another(student)), folder)
    assert contents(folder) == before and {f.name for f in folder.parent.iterdir()} == {"robust", "robust-refused"}
    assert {f.name for f in refused.iterdir()} == FILES - {"README.md", SEAL}
    with pytest.raises(ValueError, match=f"has no {SEAL}"):
        check(refused)
    with pytest.raises(ValueError, match="was not written"):
        export(student, folder.parent / "new")
    assert not (folder.parent / "new").exists(), "nothing is made of a folder that was refused"


def test_other_weights_on_the_disk_than_in_memory_are_refused(student, tmp_path, monkeypatch):
    save = CLIPModel.save_pretrained

    def lossy(self, folder, **options):
        save(self, folder, **options)
        state = load_file(Path(folder) / "model.safetensors")
        state["visual_projection.weight"][0, 0] += 1e-6
        save_file(state, Path(folder) / "model.safetensors", metadata={"format": "pt"})

    monkeypatch.setattr(CLIPModel, "save_pretrained", lossy)
    with pytest.raises(ValueError, match="holds other weights than the model in memory"):
        export(student, tmp_path / "robust")


class Stop(BaseException):
    """As Ctrl-C: nothing may catch it."""


WHERE = {name: (export_module, name) for name in ("write_json", "pipeline_logits", "logits", "digest", "card")}
WHERE |= {"weights": (CLIPModel, "save_pretrained"), "processor": (CLIPProcessor, "save_pretrained")}


@pytest.mark.parametrize("where", WHERE)
def test_an_export_that_is_interrupted_leaves_what_stood_there(student, folder, monkeypatch, where):
    before = contents(folder)

    def stop(*_, **__):
        raise Stop

    monkeypatch.setattr(*WHERE[where], stop)
    with pytest.raises(Stop):
        export(another(student), folder, records=CONVERTED)
    assert contents(folder) == before


@pytest.mark.parametrize("size", ["5GB", "100KB"])
def test_an_export_killed_while_moving_into_place_is_never_taken_for_whole(
    student, sealed, tmp_path, monkeypatch, size
):
    """After every single step of it: `check` refuses, or what it lets pass is the old model or the new one, as a whole."""
    old, seen, replace, unlink = check(sealed)["fingerprint"], [], os.replace, Path.unlink
    new = fingerprint(another(student))
    for steps in range(20):
        folder, left = shutil.copytree(sealed, tmp_path / f"killed-{steps}"), [steps]

        def count(path, folder=folder, left=left):
            left[0] -= Path(path).parent == folder
            if left[0] < 0:
                raise Stop

        with monkeypatch.context() as patch:
            patch.setattr(os, "replace", lambda a, b, count=count: (count(b), replace(a, b)))
            patch.setattr(Path, "unlink", lambda self, *a, count=count, **k: (count(self), unlink(self, *a, **k)))
            try:
                export(student, folder, max_shard_size=size)
                break
            except Stop:
                pass
        try:
            check(folder)
            seen.append(fingerprint(ZeroShotClassifier.from_pretrained(folder)))
        except ValueError:
            seen.append("refused")
    assert len(seen) >= len(FILES) - 1 and set(seen) <= {"refused", old, new} and seen[0] == old and "refused" in seen


# --- check


def change_json(name, change):
    def tamper(folder: Path) -> None:
        content = json.loads((folder / name).read_text())
        change(content)
        (folder / name).write_text(json.dumps(content))

    return tamper


def processor(**changes):
    return change_json("processor_config.json", lambda c: c["image_processor"].update(changes))


def config(tower, **changes):
    return change_json("config.json", lambda c: c[f"{tower}_config"].update(changes))


def tensors(change):
    def tamper(folder: Path) -> None:
        state = load_file(folder / "model.safetensors")
        change(state)
        save_file(state, folder / "model.safetensors", metadata={"format": "pt"})

    return tamper


def another_tokenizer(folder: Path) -> None:
    train_tokenizer([w for w in WORDS if w not in ("photo", "cat")], vocab_size=600).save_pretrained(folder)


def swap_two_unused_tokens(folder: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(folder)
    read = {i for label in LABELS for i in tokenizer(TEMPLATE.format(label))["input_ids"]}
    a, b = [name for name, i in tokenizer.get_vocab().items() if i not in read and i < len(tokenizer) - 2][:2]

    def change(content):
        vocab = content["model"]["vocab"]
        vocab[a], vocab[b] = vocab[b], vocab[a]

    change_json("tokenizer.json", change)(folder)


CHANGED = "processor, tokenizer or config was changed"
TAMPERED = {
    "mean": (processor(image_mean=[0.5, 0.5, 0.5]), r"another mean than was checked: \[0.5, 0.5, 0.5\], not \[0\.48"),
    "std, a little": (processor(image_std=[0.268, 0.261, 0.275]), "another std"),
    "a smaller resize": (
        processor(size={"shortest_edge": 24}),
        "expected a square of at most the size that is resized to",
    ),
    "no resize": (processor(do_resize=False), "expected one that resizes"),
    "no crop": (processor(do_center_crop=False), "processor"),
    "another filter": (processor(resample=2), CHANGED),
    "no normalisation": (processor(do_normalize=False), "another mean than was checked"),
    "another rescaling": (processor(rescale_factor=1 / 254), "another mean than was checked"),
    "one weight": (tensors(lambda s: s["logit_scale"].sub_(1e-4)), "another fingerprint"),
    "a lost tensor": (tensors(lambda s: s.pop("visual_projection.weight")), "lack 1 tensors"),
    "hidden_act": (config("text", hidden_act="relu"), CHANGED),
    "heads": (config("vision", num_attention_heads=4), CHANGED),
    "end of text": (config("text", eos_token_id=5), "equal embeddings"),
    "image_size": (config("vision", image_size=64), "shapes that config.json says"),
    "another tokenizer": (another_tokenizer, "equal embeddings"),
    "two tokens swapped": (swap_two_unused_tokens, "another vocabulary"),
    "no tokenizer": (lambda f: (f / "tokenizer.json").unlink(), "no tokenizer"),
    "no seal": (lambda f: (f / SEAL).unlink(), f"has no {SEAL}: it was never checked.*hpt-hf convert"),
    "a seal of another model": (change_json(SEAL, lambda c: c.update(fingerprint="0" * 16)), "another fingerprint"),
    "other logits in the seal": (change_json(SEAL, lambda c: c["logits"][2].reverse()), CHANGED),
    "fewer logits in the seal": (change_json(SEAL, lambda c: c["logits"].pop()), CHANGED),
    "nonsense for logits": (change_json(SEAL, lambda c: c.update(logits="x")), CHANGED),
    "a seal without logits": (change_json(SEAL, lambda c: c.pop("logits")), "damaged: it lacks logits"),
    "an empty seal": (lambda f: (f / SEAL).write_text(""), f"{SEAL} is damaged"),
    "a seal that is a list": (lambda f: (f / SEAL).write_text("[1]"), f"{SEAL} is damaged"),
    "a seal of other bytes": (lambda f: (f / SEAL).write_bytes(b"b\xff"), f"{SEAL} is damaged"),
}


@pytest.mark.parametrize("what", TAMPERED)
def test_what_was_changed_since_is_told(folder, what):
    tamper, reason = TAMPERED[what]
    tamper(folder)
    with pytest.raises(ValueError, match=reason) as raised:
        check(folder)
    assert str(folder) in str(raised.value)


def test_an_exported_folder_passes_wherever_it_lies_and_is_not_changed_by_looking(folder, tmp_path, monkeypatch):
    before, seal = contents(folder), check(folder)
    shutil.move(folder, tmp_path / "renamed")
    monkeypatch.chdir(tmp_path)
    assert check("renamed") == seal and contents(tmp_path / "renamed") == before


def test_rounding_on_another_machine_is_no_change(folder):
    """Kernels add up in another order: that is less than the tolerance, and a changed model is more."""
    change_json(SEAL, lambda c: c.update(logits=(torch.tensor(c["logits"]) + 3e-4).tolist()))(folder)
    check(folder)
    change_json(SEAL, lambda c: c.update(logits=(torch.tensor(c["logits"]) + 2e-3).tolist()))(folder)
    with pytest.raises(ValueError, match=CHANGED):
        check(folder)
