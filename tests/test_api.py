"""From Python: whatever classifies images is measured as the command line measures it, attacked, and trained."""

from __future__ import annotations

from pathlib import Path

import datasets
import numpy as np
import pytest
import torch
from conftest import CLASSES, make_images
from transformers import CLIPModel, pipeline

import hpt_hf
from hpt_hf.api import classifier_of
from hpt_hf.commands import evaluate as command
from hpt_hf.commands.parser import parse
from hpt_hf.data.collator import to_images

QUICK = {"attack": "pgd", "eps": "8/255", "steps": 2, "probe": 0}


@pytest.fixture(scope="module")
def images():
    return make_images(20)


@pytest.fixture(scope="module")
def parquet(images, tmp_path_factory):
    file = tmp_path_factory.mktemp("api") / "pictures.parquet"
    images.data.select_columns(["image", "label"]).to_parquet(file)
    return str(file)


@pytest.fixture(scope="module")
def by_command(paths, parquet, tmp_path_factory):
    """What `hpt-hf evaluate` finds."""
    flags = f"--model {paths[0]} --dataset {parquet} --eps 8/255 --attack_steps 2 --probe 0"
    folder = tmp_path_factory.mktemp("command")
    (args,) = parse((command.EvaluateArguments,), [*flags.split(), "--output_dir", str(folder)])
    (result,) = command.run(args)
    return result


MODELS = {
    "folder": lambda path: path,
    "pipeline": lambda path: pipeline("zero-shot-image-classification", model=path),
    "CLIPModel": lambda path: CLIPModel.from_pretrained(path),
    "classifier": lambda path: hpt_hf.ZeroShotClassifier.from_pretrained(path),
}


@pytest.mark.parametrize("kind", MODELS)
def test_every_form_of_a_model_and_of_data_gives_what_the_command_gives(kind, paths, images, parquet, by_command):
    model = MODELS[kind](str(paths[0]))
    before = [*model.parameters()][0].clone() if isinstance(model, torch.nn.Module) else None
    kinds = [*map(type, model.modules())] if isinstance(model, CLIPModel) else None
    stored = datasets.Dataset.from_parquet(parquet)
    for data in (parquet, [parquet], stored, images):
        (found,) = hpt_hf.evaluate(model, data, **QUICK)
        for what in ("n", "n_clean", "n_robust", "ends", "fingerprint", "images_digest"):
            assert getattr(found, what) == getattr(by_command, what)
    if kinds:
        assert torch.equal(before, [*model.parameters()][0]) and kinds == [*map(type, model.modules())], "untouched"


def test_several_models_are_measured_at_once(paths, images):
    first, second = map(str, paths[:2])
    one, other = (hpt_hf.evaluate(path, images, **QUICK)[0] for path in (first, second))
    found = hpt_hf.evaluate([first, Path(second)], images, **QUICK)
    assert [(r.model, r.ends) for r in found] == [(first, one.ends), (second, other.ends)]
    found = hpt_hf.evaluate({"x": hpt_hf.ZeroShotClassifier.from_pretrained(first), "y": second}, images, **QUICK)
    assert [(r.model, r.ends) for r in found] == [("x", one.ends), ("y", other.ends)]
    with pytest.raises(ValueError, match="expected a name for each"):
        hpt_hf.evaluate([first, first], images, **QUICK)


class Brightness(torch.nn.Module):
    """Two classes, dark and light, that an attack shifts by its radius: robust within half the distance."""

    def __init__(self, output=lambda logits: logits):
        super().__init__()
        self.gain, self.output = torch.nn.Parameter(torch.tensor(50.0)), output

    def forward(self, images):
        light = self.gain * (images.mean((1, 2, 3)) - 0.5)
        return self.output(torch.stack([-light, light], 1))


def shades(values, side=8):
    return torch.tensor(values).view(-1, 1, 1, 1).expand(-1, 3, side, side).clone()


@pytest.mark.parametrize("attack", ["pgd", "apgd-ce", "standard"])
def test_any_module_is_measured_exactly(attack):
    """Within 10/255 of the border an image falls, beyond it stands; the fifth is wrong from the start."""
    pixels = shades([0.5 - 20 / 255, 0.5 - 5 / 255, 0.5 + 5 / 255, 0.5 + 20 / 255, 0.9])
    labels = torch.tensor([0, 0, 1, 1, 0])
    radii = ["10/255", "1/255"]
    results = hpt_hf.evaluate(Brightness(), (pixels, labels), attack, eps=radii, classes=["dark", "light"])
    assert [(r.n, r.n_clean, r.n_robust, r.ends[::4]) for r in results] == [(5, 4, 2, "rw"), (5, 4, 4, "rw")]
    assert list(results.to_pandas()["eps"]) == ["10/255", "1/255"]
    adversarial = hpt_hf.attack(Brightness(), pixels, labels, "pgd", eps="10/255")
    assert (adversarial - pixels).abs().max() <= 10 / 255 + 1e-6 and adversarial.dtype == torch.float32
    answers = Brightness()(adversarial).argmax(1)
    assert answers.tolist() == [0, 1, 0, 1, 1]


def test_a_zero_shot_model_is_attacked_with_its_classes(paths, images):
    pixels = torch.cat([to_images(np.array(images[i]["image"])[None]) for i in range(6)])
    labels = torch.tensor(images.labels[:6])
    made = hpt_hf.attack(str(paths[0]), pixels, labels, eps="8/255", steps=3, classes=CLASSES)
    assert made.shape == pixels.shape and 0 < (made - pixels).abs().max() <= 8 / 255 + 1e-6
    with pytest.raises(ValueError, match="classes: got none"):
        hpt_hf.attack(str(paths[0]), pixels, labels)


DATA, NAMES = (shades([0.2, 0.8]), torch.tensor([0, 1])), ["dark", "light"]
UNLABELLED = make_images(4).data.select_columns("image").cast_column("image", datasets.Image())


def measured(output=lambda logits: logits, data=DATA, attack="pgd", classes=NAMES):
    return lambda: hpt_hf.evaluate(Brightness(output), data, attack, classes=classes)


BROKEN = {
    "got probabilities, expected": measured(lambda v: v.softmax(1)),
    r"got \(2, 1\), expected \(2, 2\)": measured(lambda v: v[:, :1]),
    r"got \(2,\), expected": measured(lambda v: v.argmax(1)),
    "got dict, expected": measured(lambda v: {"a": v}),
    "not finite": measured(lambda v: v / 0),
    "labels: got 2, expected": measured(data=(DATA[0], torch.tensor([0, 2]))),
    "got 1 for 2 images": measured(data=(DATA[0], torch.tensor([0]))),
    r"in \[0, 1\]": measured(data=(DATA[0] * 255, DATA[1])),
    "did you mean pgd": measured(attack="pgdd"),
    "dataset has no labels": measured(data=UNLABELLED),
    "names no classes": measured(data=UNLABELLED.add_column("label", [0, 1, 0, 1]), classes=None),
    "image_size: got none": lambda: classifier_of(Brightness()),
    "model: got int": lambda: classifier_of(3),
}


@pytest.mark.parametrize("says", BROKEN)
def test_what_cannot_be_measured_is_told_in_a_line(says):
    with pytest.raises((ValueError, TypeError), match=says):
        BROKEN[says]()


def test_a_student_by_name_is_trained_as_the_command_trains_it(paths, images, tmp_path):
    settings = {"method": "anchor_clean", "max_steps": 2, "per_device_train_batch_size": 8, "use_cpu": True}
    settings |= {"eps": "8/255", "learning_rate": 1e-3, "output_dir": str(tmp_path / "m"), "disable_tqdm": True}
    trainer = hpt_hf.HPTTrainer(str(paths[0]), dataset=images, **settings)
    assert trainer.args.optim_args == "momentum=0.9" and trainer.args.max_grad_norm == 0, "the method's own optimizer"
    trainer.train()
    folder = trainer.save()
    opened = hpt_hf.ZeroShotClassifier.from_pretrained(folder)
    assert opened.plain_state().keys() == trainer.model.plain_state().keys() and (folder / "README.md").is_file()
    with pytest.raises(ValueError, match="unknown key --learnin_rate"):
        hpt_hf.HPTTrainer(str(paths[0]), dataset=images, **settings | {"learnin_rate": 1})
    with pytest.raises(ValueError, match="learns from a proxy"):
        hpt_hf.HPTTrainer(str(paths[0]), dataset=images, **settings | {"method": "hpt"})


def test_adversarial_images_are_kept_with_answers_and_distances(paths, images, tmp_path):
    settings = {"attack": "pgd", "eps": "8/255", "steps": 3, "probe": 0, "batch_size": 8}
    (found,) = hpt_hf.evaluate(str(paths[0]), images, output_dir=tmp_path, save_images=True, **settings)
    files = sorted(map(str, tmp_path.glob("images/*/*.parquet")))
    assert len(files) == 3
    kept = datasets.Dataset.from_parquet(files)
    assert "".join(kept["end"]) == found.ends and kept["label"][:] == images.labels
    for row in kept:
        clean, attacked = (np.asarray(row[name], float) / 255 for name in ("image", "adversarial"))
        assert (row["clean_answer"] == row["label"]) == (row["end"] != "w")
        assert (row["answer"] == row["label"]) == (row["end"] == "r") or row["end"] == "w"
        assert row["linf"] <= 8 / 255 + 1e-6 and abs(np.abs(attacked - clean).max() - row["linf"]) <= 1 / 255
        assert abs(np.sqrt(((attacked - clean) ** 2).sum()) - row["l2"]) < 0.1
        assert row["linf"] > 0 or row["end"] == "w"
    with pytest.raises(ValueError, match="save_images: got no output_dir"):
        hpt_hf.evaluate(str(paths[0]), images, save_images=True)
