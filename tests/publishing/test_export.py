"""To the stock classes an exported folder is the model in memory, or it is not put in place; `check` tells."""

import copy
import json
import os
import re
import shutil
from pathlib import Path
from unittest import mock

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

FILES = {f"{name}.json" for name in ("config", "processor_config", "tokenizer", "tokenizer_config")}
FILES |= {"README.md", "model.safetensors", SEAL}
CONVERTED = {"convert.json": {"source": "their/clip", "base": None, "license": "mit"}}


@pytest.fixture(scope="module")
def sealed(student_path, tmp_path_factory) -> Path:
    return export(ZeroShotClassifier.from_pretrained(student_path), tmp_path_factory.mktemp("export") / "robust")


@pytest.fixture
def folder(sealed, tmp_path) -> Path:
    return shutil.copytree(sealed, tmp_path / "robust")


@torch.no_grad()
def another(classifier) -> ZeroShotClassifier:
    """Other weights in the vision tower and in the head."""
    weight = classifier.model.visual_projection.weight
    weight.mul_(torch.linspace(0.5, 1.5, len(weight))[:, None])
    classifier.model.vision_model.embeddings.class_embedding.add_(0.5)
    return classifier


def image(size, mode="RGB") -> Image.Image:
    width, height = size
    y, x = np.mgrid[0:height, 0:width]
    values = np.stack([128 + 100 * np.sin(x / (2 + c) + y / 5) for c in range(3)], -1)
    values += np.random.default_rng(width * height).normal(0, 15, (height, width, 3))
    return Image.fromarray(np.clip(values, 0, 255).astype(np.uint8)).convert(mode)


@torch.no_grad()
def evaluated(classifier: ZeroShotClassifier, shown: Image.Image) -> torch.Tensor:
    """(classes,): the evaluator's probabilities."""
    batch = Collator(classifier.set_classes(CLASSES).processor)([{"image": to_rgb(shown), "label": None}])
    return classifier.eval().classify(batch["images"]).logits.softmax(1)[0]


def answered(classify, shown: Image.Image) -> torch.Tensor:
    """(classes,): the probabilities of a plain call of the pipeline."""
    said = classify(shown, candidate_labels=list(CLASSES), hypothesis_template=TEMPLATE)
    return torch.tensor([{a["label"]: a["score"] for a in said}[c] for c in CLASSES])


# --- what a stranger opens


@pytest.fixture(scope="module")
def both(sealed):
    """The evaluator's model and the pipeline."""
    return ZeroShotClassifier.from_pretrained(sealed), pipeline("zero-shot-image-classification", model=str(sealed))


@pytest.mark.parametrize("mode", ["RGB", "L", "CMYK"])
@pytest.mark.parametrize("size", [(32, 32), (17, 20), (90, 50), (41, 200)])
def test_pipeline_gives_the_evaluators_probabilities_on_any_image(both, size, mode):
    (classifier, classify), shown = both, image(size, mode)
    ours = evaluated(classifier, shown)
    assert ours.max() - ours.min() > 0.01, "or equality would mean little"
    assert torch.allclose(ours, answered(classify, shown), atol=1e-5)


@pytest.mark.parametrize("template", ["a {} in the wild", "{x} {}: {{y}}"])
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


OPENED = {AutoModelForZeroShotImageClassification: CLIPModel}
OPENED |= {kind: kind for kind in (CLIPModel, CLIPVisionModel, CLIPVisionModelWithProjection)}


@pytest.mark.parametrize("kind", OPENED)
def test_stock_classes_open_it_with_no_other_argument_and_compute_the_same(sealed, student, kind):
    stock, info = kind.from_pretrained(sealed, output_loading_info=True)
    assert type(stock) is OPENED[kind] and not info["missing_keys"] and not info["mismatched_keys"]
    processor = AutoProcessor.from_pretrained(sealed, backend="pil")
    texts, shown = [TEMPLATE.format(label) for label in LABELS], probe_images(32)
    inputs = processor(text=texts, images=shown, padding=True, return_tensors="pt")
    with torch.no_grad():
        if type(stock) is CLIPModel:
            ours, theirs = torch.tensor(check(sealed)["logits"]), stock.eval()(**inputs).logits_per_image
        else:
            batch = Collator(student.processor)([{"image": i.convert("RGB"), "label": None} for i in shown])
            ours = student.embed_images(batch["images"])
            out = stock.eval()(pixel_values=inputs["pixel_values"])
            theirs = student.model.visual_projection(out[1]) if kind is CLIPVisionModel else out.image_embeds
    assert float(theirs.std()) > 0.1 and type(processor) is CLIPProcessor
    torch.testing.assert_close(ours, theirs, atol=2e-5, rtol=1e-5)


def test_the_folder_holds_a_plain_clip_bit_for_bit_and_nothing_that_runs(sealed, student):
    assert {f.name for f in sealed.iterdir()} == FILES and list(sealed.parent.iterdir()) == [sealed]
    config, seal = json.loads((sealed / "config.json").read_text()), json.loads((sealed / SEAL).read_text())
    assert config["architectures"] == ["CLIPModel"] and config["model_type"] == "clip" and "auto_map" not in config
    stored, own = load_file(sealed / "model.safetensors"), student.model.state_dict()
    assert stored.keys() == own.keys() and all(torch.equal(stored[n], own[n]) for n in own)
    assert (seal["fingerprint"], seal["dtype"], seal["image_size"]) == (fingerprint(student), "float32", 32)
    assert 0 <= seal["difference"] == seal["difference_as_stored"] < 1e-4


@pytest.mark.parametrize("name, tolerance", [("float32", 1e-5), ("float16", 5e-3)])
def test_the_stored_precision_is_what_was_asked_for_and_the_model_is_not_touched(student, tmp_path, name, tolerance):
    student.train().freeze_text()
    student(torch.rand(2, 3, 32, 32)).logits.square().sum().backward()
    before, grads = weights(student), {n: p.grad for n, p in student.named_parameters()}
    state = torch.get_rng_state()
    folder, dtype = export(student, tmp_path / "robust", dtype=name), DTYPES[name]
    assert torch.equal(torch.get_rng_state(), state) and all(m.training for m in student.modules())
    assert all(torch.equal(t, before[n]) and t.dtype == before[n].dtype for n, t in weights(student).items())
    assert all(p.grad is grads[n] for n, p in student.named_parameters()) and student.classes == CLASSES
    for kind in OPENED:  # the vision towers read the tower's own config
        assert {p.dtype for p in kind.from_pretrained(folder).parameters()} == {dtype}
    ours = ZeroShotClassifier.from_pretrained(folder)
    assert all(torch.equal(t, before[n].to(dtype).float()) for n, t in weights(ours).items()), "rounded once"
    theirs = answered(pipeline("zero-shot-image-classification", model=str(folder)), image((70, 40)))
    assert torch.allclose(evaluated(ours, image((70, 40))), theirs, atol=tolerance)
    seal = check(folder)
    assert seal["dtype"] == name and seal["fingerprint"] == fingerprint(ours) and seal["difference"] < 1e-4
    assert (seal["difference_as_stored"] > 1e-3) == (name != "float32")
    assert f"stored as {name}" in (folder / "README.md").read_text()


def test_a_precision_that_there_is_not_is_refused_before_anything_is_written(student, tmp_path):
    with pytest.raises(ValueError, match="'int8': expected one of float32, bfloat16, float16"):
        export(student, tmp_path / "robust", dtype="int8")
    assert not list(tmp_path.iterdir())


def test_shards_open_and_only_weights_that_would_be_opened_in_their_place_go(student, tmp_path):
    folder, stays = tmp_path / "robust", {"model_backup.safetensors", "pytorch_model_old.bin", "model.safetensors.bak"}
    folder.mkdir()
    for name in (*stays, "pytorch_model.bin", "model-00001-of-00002.safetensors", "dial.json"):
        (folder / name).write_text("mine")
    for size, least in (("100KB", 2), ("5GB", 1), ("60KB", 3)):
        export(student, folder, max_shard_size=size)
        written = {"model.safetensors"}
        if least > 1:
            written = {*json.loads((folder / "model.safetensors.index.json").read_text())["weight_map"].values()}
            assert len(written) >= least
            written.add("model.safetensors.index.json")
        left = {f.name for f in folder.iterdir()}
        assert left - (FILES - {"model.safetensors"}) == written | stays
        stock = CLIPModel.from_pretrained(folder).state_dict()
        assert all(torch.equal(t, student.model.state_dict()[n]) for n, t in stock.items())
    assert check(folder)


def test_exporting_twice_leaves_the_second_and_what_else_lay_there(student, folder):
    export(student, folder, records=CONVERTED)
    others = {"notes.txt": "mine", "results/one.txt": "1", "checkpoint-3/optimizer.pt": "state"}
    for name, text in others.items():
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text(text)
    first = json.loads((folder / SEAL).read_text())
    export(another(student), folder)
    second = check(folder)
    assert second["fingerprint"] == fingerprint(student) != first["fingerprint"]
    assert second["logits"] != first["logits"] and {n: (folder / n).read_text() for n in others} == others
    assert not (folder / "convert.json").exists() and "their/clip" not in (folder / "README.md").read_text()
    once = contents(folder)
    export(student, folder)
    assert contents(folder) == once, "the same again is the same to the last bit"


def test_a_folder_may_be_relative_or_moved_or_a_link_and_looking_changes_nothing(student, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert export(student, "a/robust") == tmp_path / "a" / "robust"
    shutil.move("a/robust", "renamed")
    before = contents("renamed")
    assert check("renamed") and contents("renamed") == before
    (tmp_path / "link").symlink_to(tmp_path / "a")
    export(student, tmp_path / "link")
    assert (tmp_path / "a" / SEAL).is_file() and check(tmp_path / "link")


def in_processor(**changes):
    """A processor other than the one that the model was made with."""

    def change(model):
        model.processor = copy.deepcopy(model.processor)
        vars(model.processor.image_processor).update(changes)

    return change


REFUSED = {
    "mean in memory": (lambda m: setattr(m, "mean", m.mean + 0.05), r"with mean \[0.53.* says \[0.48"),
    "std in memory": (lambda m: setattr(m, "std", torch.full_like(m.std, 0.5)), r"with std \[0.5.* says \[0.26"),
    "mean of the processor": (in_processor(image_mean=[0.5, 0.5, 0.5]), r"mean \[0.48.* says \[0.5"),
    "another rescaling": (in_processor(rescale_factor=1 / 127.5), r"mean \[0.48.* says \[0.24"),
    "no normalisation": (in_processor(do_normalize=False), r"mean \[0.48.* says \[0.0"),
    "no crop": (in_processor(do_center_crop=False), "processor"),
    "a larger crop": (in_processor(crop_size={"height": 40, "width": 40}), "processor"),
    "no numbers": (lambda m: m.model.vision_model.post_layernorm.weight.data.fill_(np.nan), "logits differ by nan"),
}


@pytest.mark.parametrize("why", REFUSED)
def test_what_does_not_answer_as_the_model_is_not_put_in_place(student, folder, why):
    """As if training had normalised with other numbers than the processor's: that is wrong under pipeline."""
    refused, before = folder.with_name("robust-refused"), contents(folder)
    refused.mkdir()
    (refused / "of-an-earlier-time").write_text("")
    spoil, reason = REFUSED[why]
    spoil(another(student))
    with pytest.raises(ValueError, match=f"was not written: .*{reason}.*robust-refused"):
        export(student, folder)
    assert contents(folder) == before and {f.name for f in folder.parent.iterdir()} == {"robust", "robust-refused"}
    assert {f.name for f in refused.iterdir()} == FILES - {"README.md", SEAL}
    with pytest.raises(ValueError, match="was not written"):
        export(student, folder.with_name("new"))
    assert not folder.with_name("new").exists(), "nothing is made of a folder that was refused"


def test_other_weights_on_the_disk_than_in_memory_are_refused(student, tmp_path, monkeypatch):
    save = CLIPModel.save_pretrained

    def lossy(self, folder, **options):
        other = copy.deepcopy(self)
        other.logit_scale.data.add_(1e-6)
        save(other, folder, **options)

    monkeypatch.setattr(CLIPModel, "save_pretrained", lossy)
    with pytest.raises(ValueError, match="holds other weights than the model in memory"):
        export(student, tmp_path / "robust")


def test_an_export_that_is_interrupted_at_its_last_file_leaves_what_stood_there(student, folder, monkeypatch):
    before = contents(folder)
    monkeypatch.setattr(export_module, "card", mock.Mock(side_effect=KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        export(another(student), folder, records=CONVERTED)
    assert contents(folder) == before


@pytest.mark.parametrize("size", ["5GB", "100KB"])
def test_an_export_killed_while_moving_into_place_is_never_taken_for_whole(student, folder, monkeypatch, size):
    """Before every single step of it: `check` refuses, or what it lets pass is the old model or the new one, whole."""
    old, states, seen = check(folder)["fingerprint"], [], []

    def before(step, place):
        def stepping(*args, **options):
            if Path(args[place]).parent == folder:
                states.append(shutil.copytree(folder, folder.with_name(f"killed-{len(states)}")))
            return step(*args, **options)

        return stepping

    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", before(os.replace, 1))
        patch.setattr(Path, "unlink", before(Path.unlink, 0))
        export(another(student), folder, max_shard_size=size)
    for state in (*states, folder):
        try:
            check(state)
            seen.append(fingerprint(ZeroShotClassifier.from_pretrained(state)))
        except ValueError:
            seen.append("refused")
    assert len(states) >= len(FILES) and "refused" in seen
    assert set(seen) <= {"refused", old, fingerprint(student)} and (seen[0], seen[-1]) == (old, fingerprint(student))


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
    "a smaller resize": (processor(size={"shortest_edge": 24}), "expected a square of at most the size"),
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


def shifted(by):
    return change_json(SEAL, lambda c: c.update(logits=(torch.tensor(c["logits"]) + by).tolist()))


def test_neither_rounding_on_another_machine_nor_a_seal_of_the_version_before_is_a_change(folder):
    """Kernels add up in another order: that is less than the tolerance, and a changed model is more."""
    change_json(SEAL, lambda c: c.pop("template"))(folder)
    shifted(3e-4)(folder)
    check(folder)
    shifted(2e-3)(folder)
    with pytest.raises(ValueError, match=CHANGED):
        check(folder)
