"""To the stock classes an exported folder is the model in memory, or it is not put in place; `check` tells."""

import copy
import os
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import CLASSES, contents, weights
from PIL import Image
from safetensors.torch import load_file, save_file
from transformers import (
    AutoModelForZeroShotImageClassification,
    AutoTokenizer,
    CLIPModel,
    CLIPVisionModel,
    CLIPVisionModelWithProjection,
    pipeline,
)

from hpt_hf.data.collator import Collator, to_rgb
from hpt_hf.models.zero_shot import TEMPLATE, ZeroShotClassifier, fingerprint
from hpt_hf.publishing.export import DTYPES, LABELS, SEAL, check, export
from hpt_hf.publishing.model_card import card
from hpt_hf.utils import read_json, write_json, write_text

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
    values = np.random.default_rng(size[0]).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    return Image.fromarray(values).convert(mode)


@pytest.mark.parametrize("mode", ["RGB", "L", "CMYK"])
def test_pipeline_gives_the_evaluators_probabilities_on_any_image(sealed, mode):
    classifier = ZeroShotClassifier.from_pretrained(sealed).set_classes(CLASSES)
    classify = pipeline("zero-shot-image-classification", model=str(sealed))
    for size in ((32, 32), (17, 20), (90, 50), (41, 200)):
        batch = Collator(classifier.processor)([{"image": to_rgb(image(size, mode)), "label": None}])
        ours = classifier.classify(batch["images"]).logits.softmax(1)[0].tolist()
        assert max(ours) - min(ours) > 0.01, "or equality would mean little"
        said = classify(image(size, mode), candidate_labels=list(CLASSES), hypothesis_template=TEMPLATE)
        assert {a["label"]: a["score"] for a in said} == pytest.approx(dict(zip(CLASSES, ours, strict=True)), abs=1e-5)


@pytest.mark.parametrize("template", ["a {} in the wild", "{x} {}: {{y}}"])
def test_the_cards_own_lines_give_the_evaluators_answers(student, tmp_path, monkeypatch, template):
    """The prompt that was trained travels with the model: another one would be another classifier."""
    folder = export(student.set_classes(CLASSES, (template, "the {}")), tmp_path / "robust")
    (code,) = re.findall(r"```python\n(.*?)```", (folder / "README.md").read_text(), re.DOTALL)
    image((50, 40)).save(tmp_path / "image.png")
    monkeypatch.chdir(tmp_path)
    *lines, call = code.strip().splitlines()
    names: dict = {}
    exec("\n".join(lines), names)
    said = {a["label"]: a["score"] for a in eval(call, names)}
    batch = Collator(student.processor)([{"image": image((50, 40)), "label": None}])
    expected = student.set_classes(["a cat", "a dog"], (template,)).classify(batch["images"]).logits.softmax(1)[0]
    assert [said["a cat"], said["a dog"]] == pytest.approx(expected.tolist(), abs=1e-5)
    assert read_json(folder / SEAL)["template"] == template and check(folder)


OPENED = {AutoModelForZeroShotImageClassification: CLIPModel}
OPENED |= {kind: kind for kind in (CLIPModel, CLIPVisionModel, CLIPVisionModelWithProjection)}


@pytest.mark.parametrize("kind", OPENED)
def test_stock_classes_open_it_with_no_other_argument_bit_for_bit(sealed, student, kind):
    stock, info = kind.from_pretrained(sealed, output_loading_info=True)
    assert type(stock) is OPENED[kind] and not info["missing_keys"] and not info["mismatched_keys"]
    state, own = stock.state_dict(), student.model.state_dict()
    own |= {n.removeprefix("vision_model."): t for n, t in own.items()}  # as CLIPVisionModel calls them
    assert state and all(torch.equal(t, own[n]) for n, t in state.items())


def test_the_folder_holds_a_plain_clip_and_nothing_that_runs(sealed, student):
    assert {f.name for f in sealed.iterdir()} == FILES and list(sealed.parent.iterdir()) == [sealed]
    config, seal = read_json(sealed / "config.json"), read_json(sealed / SEAL)
    assert config["architectures"] == ["CLIPModel"] and config["model_type"] == "clip" and "auto_map" not in config
    assert (seal["fingerprint"], seal["dtype"], seal["image_size"]) == (fingerprint(student), "float32", 32)
    assert 0 <= seal["difference"] == seal["difference_as_stored"] < 1e-4


@pytest.mark.parametrize("name", ["float32", "float16"])
def test_the_stored_precision_is_what_was_asked_for_and_the_model_is_not_touched(student, tmp_path, name):
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
    seal = check(folder)
    assert seal["dtype"] == name and seal["fingerprint"] == fingerprint(ours) and seal["difference"] < 1e-4
    assert (seal["difference_as_stored"] > 1e-3) == (name != "float32")
    assert f"stored as {name}" in (folder / "README.md").read_text()


def test_shards_open_and_only_weights_that_would_be_opened_in_their_place_go(student, tmp_path):
    folder, stays = tmp_path / "robust", {"model_backup.safetensors", "pytorch_model_old.bin", "model.safetensors.bak"}
    folder.mkdir()
    for name in (*stays, "pytorch_model.bin", "model-00001-of-00002.safetensors", "dial.json"):
        (folder / name).write_text("mine")
    for size, least in (("100KB", 2), ("5GB", 1)):
        export(student, folder, max_shard_size=size)
        written, index = {"model.safetensors"}, folder / "model.safetensors.index.json"
        if least > 1:
            written = {*read_json(index)["weight_map"].values(), index.name}
        assert {f.name for f in folder.iterdir()} == (FILES - {"model.safetensors"}) | written | stays
        assert len(written) > least or size == "5GB"
        assert check(folder)["fingerprint"] == fingerprint(student)


def test_exporting_twice_leaves_the_second_and_what_else_lay_there(student, folder):
    export(student, folder, records=CONVERTED)
    first, others = read_json(folder / SEAL), {"notes.txt": "mine", "checkpoint-3/optimizer.pt": "state"}
    for name, text in others.items():
        write_text(folder / name, text)
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
    assert check(export(student, tmp_path / "link")) and (tmp_path / "a" / SEAL).is_file()


REFUSED = {
    "mean in memory": (lambda m: setattr(m, "mean", m.mean + 0.05), r"with mean \[0.53.* says \[0.48"),
    "std in memory": (lambda m: setattr(m, "std", torch.full_like(m.std, 0.5)), r"with std \[0.5.* says \[0.26"),
    "the processor's mean": (
        lambda m: setattr(m.processor.image_processor, "image_mean", [0.5] * 3),
        r"mean \[0.48.* says \[0.5",
    ),
    "no crop": (lambda m: setattr(m.processor.image_processor, "do_center_crop", False), "processor"),
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


def test_an_export_killed_while_moving_into_place_is_never_taken_for_whole(student, folder, monkeypatch):
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
        export(another(student), folder, max_shard_size="100KB")
    for state in (*states, folder):
        try:
            seen.append(check(state)["fingerprint"])
        except ValueError:
            seen.append("refused")
    assert len(states) >= len(FILES) and "refused" in seen
    assert set(seen) <= {"refused", old, fingerprint(student)} and (seen[0], seen[-1]) == (old, fingerprint(student))


# --- check


def change_json(name, change):
    def tamper(folder: Path) -> None:
        content = read_json(folder / name)
        change(content)
        write_json(folder / name, content)

    return tamper


def processor(**changes):
    return change_json("processor_config.json", lambda c: c["image_processor"].update(changes))


def config(tower, **changes):
    return change_json("config.json", lambda c: c[f"{tower}_config"].update(changes))


def one_weight(folder: Path) -> None:
    state = load_file(folder / "model.safetensors")
    state["logit_scale"].sub_(1e-4)
    save_file(state, folder / "model.safetensors", metadata={"format": "pt"})


def swap_two_unused_tokens(folder: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(folder)
    read = {i for label in LABELS for i in tokenizer(TEMPLATE.format(label))["input_ids"]}
    a, b = [name for name, i in tokenizer.get_vocab().items() if i not in read and i < len(tokenizer) - 2][:2]
    vocab = tokenizer.get_vocab()
    change_json("tokenizer.json", lambda c: c["model"]["vocab"].update({a: vocab[b], b: vocab[a]}))(folder)


CHANGED = "processor, tokenizer or config was changed"
TAMPERED = {
    "mean": (processor(image_mean=[0.5, 0.5, 0.5]), r"another mean than was checked: \[0.5, 0.5, 0.5\], not \[0\.48"),
    "std, a little": (processor(image_std=[0.268, 0.261, 0.275]), "another std"),
    "another filter": (processor(resample=2), CHANGED),
    "one weight": (one_weight, "another fingerprint"),
    "hidden_act": (config("text", hidden_act="relu"), CHANGED),
    "end of text": (config("text", eos_token_id=5), "equal embeddings"),
    "two tokens swapped": (swap_two_unused_tokens, "another vocabulary"),
    "no seal": (lambda f: (f / SEAL).unlink(), f"has no {SEAL}: it was never checked.*hpt-hf convert"),
    "other logits in the seal": (change_json(SEAL, lambda c: c["logits"][2].reverse()), CHANGED),
    "nonsense for logits": (change_json(SEAL, lambda c: c.update(logits="x")), CHANGED),
    "a seal without logits": (change_json(SEAL, lambda c: c.pop("logits")), CHANGED),
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
    assert f'hypothesis_template="{TEMPLATE}"' in card(folder)
    shifted(3e-4)(folder)
    check(folder)
    shifted(2e-3)(folder)
    with pytest.raises(ValueError, match=CHANGED):
        check(folder)
