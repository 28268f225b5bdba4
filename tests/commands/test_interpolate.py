"""Proves that the dial mixes weights exactly, chooses by its stated rule on pictures that training left out and on nothing else, and exports what it says."""

from __future__ import annotations

import json
import math
import random
import re
import shutil
from dataclasses import dataclass
from pathlib import Path
from xml.etree import ElementTree

import numpy as np
import pytest
import torch
from conftest import CLASSES, make_images, make_result, save_tiny_clip, weights, write_image_folder
from loopback_hub import FakeHub, card_data
from transformers import CLIPModel, pipeline

from hpt_hf.attacks.suite import EvaluationAttack
from hpt_hf.attacks.threat_model import ThreatModel
from hpt_hf.commands import interpolate as dial
from hpt_hf.commands.interpolate import InterpolateArguments, Point, choose, interpolate
from hpt_hf.commands.parser import RecipeError, parse
from hpt_hf.commands.train import RECIPE
from hpt_hf.commands.train import run as train
from hpt_hf.evaluation.evaluator import evaluate
from hpt_hf.models.zero_shot import ZeroShotClassifier, fingerprint
from hpt_hf.publishing.export import check
from hpt_hf.publishing.model_card import MIXED, TRAINED, check_figures, own_results

# --- interpolate ------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def pair(student_path, trained):
    """A model and what it became by training; every tensor of the second is another."""
    robust = ZeroShotClassifier.from_pretrained(student_path)
    robust.model.load_state_dict(trained.model.state_dict())
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for tensor in robust.model.state_dict().values():
            tensor.add_(0.01 * torch.randn(tensor.shape, generator=generator))
    return ZeroShotClassifier.from_pretrained(student_path), robust


@pytest.mark.parametrize("weight", [0, 0.0, 1, 1.0])
def test_the_ends_are_the_two_models_to_the_last_bit(pair, weight):
    mixed, end = interpolate(*pair, weight), pair[int(weight)]
    assert fingerprint(mixed) == fingerprint(end) != fingerprint(pair[1 - int(weight)])
    assert all(torch.equal(t, end.model.state_dict()[n]) for n, t in mixed.model.state_dict().items())


def test_the_ends_are_exact_whatever_the_other_one_holds(pair, student_path):
    """0 * infinity is no number."""
    broken = ZeroShotClassifier.from_pretrained(student_path)
    with torch.no_grad():
        broken.model.visual_projection.weight.fill_(math.inf)
    assert fingerprint(interpolate(pair[0], broken, 0.0)) == fingerprint(pair[0])
    assert fingerprint(interpolate(broken, pair[1], 1.0)) == fingerprint(pair[1])


@pytest.mark.parametrize("weight", [0.1, 0.25, 0.5, 2 / 3, 0.999])
def test_every_tensor_lies_on_the_line_between(pair, weight):
    original, robust = (m.model.state_dict() for m in pair)
    mixed = interpolate(*pair, weight).model.state_dict()
    assert mixed.keys() == original.keys() == CLIPModel(pair[0].config).state_dict().keys()
    compared = 0
    for name, tensor in mixed.items():
        exact = (1 - weight) * original[name].double() + weight * robust[name].double()
        assert not torch.equal(original[name], robust[name])
        torch.testing.assert_close(tensor.double(), exact, rtol=1e-6, atol=1e-7, msg=name)
        compared += 1
    assert compared == 78, "both towers, both projections and the scale"


def test_a_mixed_model_is_ready_and_nobody_else_s(pair):
    before = [weights(m) for m in pair]
    mixed = interpolate(*pair, 0.5)
    assert not mixed.training and mixed.processor is pair[1].processor and mixed.mean.equal(pair[1].mean)
    with torch.no_grad():
        for tensor in mixed.model.state_dict().values():
            tensor.zero_()
    assert all(
        torch.equal(t, b[n]) for m, b in zip(pair, before, strict=True) for n, t in m.model.state_dict().items()
    )


def test_models_that_no_line_connects_are_refused(pair, proxy_path, tmp_path):
    other = ZeroShotClassifier.from_pretrained(proxy_path)
    deeper = ZeroShotClassifier.from_pretrained(save_tiny_clip(tmp_path / "deeper", layers=3))
    for model in (other, deeper):
        for two in ((pair[0], model), (model, pair[0])):
            with pytest.raises(
                ValueError, match=r"differ in architecture \(\d+ tensors, such as .*\): --origin must be"
            ):
                interpolate(*two, 0.5)
    for name in ("mean", "std"):
        changed = ZeroShotClassifier.from_pretrained(save_tiny_clip(tmp_path / name, seed=1))
        setattr(changed, name, getattr(changed, name) + 0.01)
        with pytest.raises(ValueError, match="normalise their pictures differently"):
            interpolate(pair[0], changed, 0.0)


# --- choose -----------------------------------------------------------------------------------------------------------------


def point(weight, *accuracies, reported=()):
    """(clean, robust) on each set that the choice is made on, and on test sets."""
    scores = [tuple(make_result(clean=c, robust=r) for c, r in part) for part in (accuracies, reported)]
    return Point(weight, *scores)


RULE = {
    "the most robust": ({0: (60, 10), 0.5: (58, 30), 1: (56, 40)}, 5, 1),
    "of those that are allowed": ({0: (60, 10), 0.5: (58, 30), 1: (54.9, 40)}, 5, 0.5),
    "just at the limit": ({0: (60, 10), 0.5: (58, 30), 1: (55, 40)}, 5, 1),
    "at the limit, in floats": ({0: (0.3, 0), 1: (0.1 + 0.1, 40)}, 0.1, 1),
    "a hair below": ({0: (60, 10), 0.5: (58, 30), 1: (54.999, 40)}, 5, 0.5),
    "nothing but the original": ({0: (60, 10), 0.5: (40, 30), 1: (30, 40)}, 5, 0),
    "the original is the best": ({0: (60, 50), 0.5: (60, 40), 1: (60, 30)}, 5, 0),
    "of equals the smallest": ({0: (60, 10), 0.3: (59, 40), 0.6: (60, 40), 1: (61, 40)}, 5, 0.3),
    "all equal": ({0: (60, 40), 0.5: (60, 40), 1: (60, 40)}, 5, 0),
    "clean accuracy has no say beyond the limit": ({0: (60, 10), 0.5: (70, 39), 1: (55, 40)}, 5, 1),
    "nothing may be lost": ({0: (60, 10), 0.5: (60, 20), 1: (59.9, 40)}, 0, 0.5),
    "everything may be lost": ({0: (60, 10), 0.5: (60, 20), 1: (0, 40)}, 100, 1),
    "beyond the line": ({0: (60, 10), 0.5: (90, 80), 1: (50, 40)}, 5, 0.5),
    "no accuracy at all": ({0: (0, 0), 0.5: (0, 0), 1: (0, 0)}, 5, 0),
    "a figure that is none is not allowed": ({0: (60, 10), 0.5: (math.nan, 90), 1: (58, 20)}, 5, 1),
}


@pytest.mark.parametrize("name", RULE)
def test_the_point_is_chosen_by_the_rule(name):
    accuracies, max_drop, wanted = RULE[name]
    points = [point(w, a) for w, a in accuracies.items()]
    for order in (points, points[::-1], random.Random(1).sample(points, len(points))):
        assert choose(order, max_drop).weight == wanted


def test_several_sets_count_alike_whatever_their_size():
    points = [point(0, (90, 10), (10, 10)), point(0.5, (50, 40), (45, 0)), point(1, (90, 18), (0, 18))]
    assert choose(points, 5).weight == 0.5  # clean 47.5 of 50, robust 20; the last: clean 45, robust 18
    assert choose(points, 2).weight == 0


def test_the_rule_holds_for_whatever_was_measured_and_test_sets_have_no_say():
    rng = np.random.default_rng(0)
    chosen = set()
    for _ in range(300):
        grid = [0, *sorted(rng.choice(np.arange(1, 11), size=rng.integers(1, 8), replace=False) / 10)]
        accuracies = {float(w): tuple(rng.integers(0, 12, 2) * 5.0) for w in grid}
        max_drop = float(rng.integers(0, 4) * 5)
        allowed = [w for w, (clean, _) in accuracies.items() if clean >= accuracies[0][0] - max_drop]
        best = max(accuracies[w][1] for w in allowed)
        wanted = min(w for w in allowed if accuracies[w][1] == best)
        points = [point(w, a, reported=[tuple(rng.uniform(0, 100, 2))]) for w, a in accuracies.items()]
        assert (
            choose(points, max_drop).weight
            == wanted
            == choose([point(w, a) for w, a in accuracies.items()], max_drop).weight
        )
        chosen.add(wanted)
    assert len(chosen) > 8, "the draws ask for more than one answer"


def test_without_the_original_there_is_no_rule():
    with pytest.raises(ValueError, match="the grid needs weight 0"):
        choose([point(0.5, (60, 40)), point(1, (50, 50))], 5)


# --- from a trained folder to a chosen one --------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Trained:
    folder: Path
    origin: Path
    data: Path
    record: dict


@pytest.fixture(scope="module")
def learned(student_path, tmp_path_factory) -> Trained:
    """A few steps of training as a recipe makes them, with a quarter held out."""
    place = tmp_path_factory.mktemp("dial")
    shutil.copytree(student_path, place / "origin")
    write_image_folder(place / "pictures", make_images(40))
    flags = ["--method", "tecoa", "--dataset", str(place / "pictures"), "--held_out", "0.25", "--eps", "4/255"]
    flags += ["--model", str(place / "origin"), "--output_dir", str(place / "robust"), "--learning_rate", "0.05"]
    flags += ["--max_steps", "8", "--per_device_train_batch_size", "10", "--use_cpu", "true", "--disable_tqdm", "true"]
    record = train(*parse(RECIPE, [*flags, "--templates", "a {}", "the {}."]))
    return Trained(place / "robust", place / "origin", place / "pictures", record)


@pytest.fixture
def folder(learned, tmp_path) -> Path:
    """A copy of what training wrote, to spoil."""
    return shutil.copytree(learned.folder, tmp_path / "robust")


def change(folder: Path, **changes) -> None:
    """The recipe in the folder's train.json."""
    content = json.loads((folder / TRAINED).read_text())
    content["recipe"] |= changes
    (folder / TRAINED).write_text(json.dumps(content))


def arguments(model, output, **changes) -> InterpolateArguments:
    settings = {"weights": [0.0, 0.5, 1.0], "attack_steps": 2, "max_drop": 100.0}
    return InterpolateArguments(model=str(model), output_dir=str(output), **(settings | changes))


@pytest.fixture(scope="module")
def test_set(tmp_path_factory) -> Path:
    return Path(write_image_folder(tmp_path_factory.mktemp("test") / "unseen", make_images(20, seed=3)))


@dataclass(frozen=True)
class Dialled:
    points: list[Point]
    chosen: Point
    output: Path
    seen: list  # (fingerprint, pictures) of every measurement
    front: dict


@pytest.fixture(scope="module")
def dialled(learned, test_set, tmp_path_factory) -> Dialled:
    output, seen = tmp_path_factory.mktemp("dialled") / "out", []

    def watched(model, pictures, *args, **kwargs):
        seen.append((fingerprint(model), pictures))
        return evaluate(model, pictures, *args, **kwargs)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(dial, "evaluate", watched)
        settings = {"weights": [0.25, 0.5, 0.75, 1.0], "save": [0.0, 1.0, 0.6], "report_on": [str(test_set)]}
        points, chosen = dial.run(arguments(learned.folder, output, **settings))
    return Dialled(points, chosen, output, seen, json.loads((output / "front.json").read_text()))


def bytes_of(pictures) -> list[bytes]:
    return [pictures[i]["image"].tobytes() for i in range(len(pictures))]


def test_the_choice_is_made_on_exactly_what_training_left_out(learned, dialled):
    trainer = learned.record["trainer"]
    aside, used = bytes_of(trainer.eval_dataset), bytes_of(trainer.train_dataset)
    slices = [p for _, p in dialled.seen if "held out" in p.name]
    assert len(slices) == len(dialled.points) == 6
    for pictures in slices:
        assert bytes_of(pictures) == aside and len(aside) == 10
        assert not set(bytes_of(pictures)) & set(used) and len(set(aside) | set(used)) == 40
        assert pictures.classes == trainer.eval_dataset.classes and pictures.templates == ("a {}", "the {}.")
        assert [pictures[i]["label"] for i in range(10)] == [trainer.eval_dataset[i]["label"] for i in range(10)]


def test_front_json_holds_every_point_and_the_choice_follows_from_it(dialled):
    front = dialled.front
    assert (
        [p["weight"] for p in front["points"]]
        == [0.0, 0.25, 0.5, 0.6, 0.75, 1.0]
        == [p.weight for p in dialled.points]
    )
    for told, point in zip(front["points"], dialled.points, strict=True):
        for part, scores in (("chosen_on", point.chosen_on), ("reported", point.reported)):
            (score,) = scores
            assert (told[part]["clean"], told[part]["robust"], told[part]["n"]) == (score.clean, score.robust, score.n)
            assert told[part]["clean_interval"] == list(score.clean_interval)
            assert told[part]["robust_interval"] == list(score.interval) and list(told[part]["sets"]) == [
                score.dataset
            ]
    best = max(p["chosen_on"]["robust"] for p in front["points"])
    assert (
        front["chosen"]
        == dialled.chosen.weight
        == min(p["weight"] for p in front["points"] if p["chosen_on"]["robust"] == best)
    )
    assert best > front["points"][0]["chosen_on"]["robust"], "training did something, or the choice would be trivial"
    assert "at most 100 points below the original's" in front["rule"] and front["attack"]["threat"] == {
        "norm": "linf",
        "eps": "4/255",
    }


def test_front_svg_is_a_picture_that_names_the_choice(dialled):
    root = ElementTree.fromstring((dialled.output / "front.svg").read_text())
    assert root.tag.endswith("svg") and len(list(root.iter())) > 100
    comments = (dialled.output / "front.svg").read_text()
    assert f"{dialled.chosen.weight:g} chosen" in comments and "test sets, which have no say" in comments


def test_the_measured_model_is_the_one_that_is_exported(dialled, learned, test_set):
    saved = sorted({0.0, 0.6, 1.0, dialled.chosen.weight})
    assert sorted(f.name for f in dialled.output.iterdir() if f.is_dir()) == [f"w{w:.2f}" for w in saved]
    original, robust = (
        ZeroShotClassifier.from_pretrained(learned.origin),
        ZeroShotClassifier.from_pretrained(learned.folder),
    )
    for weight in saved:
        folder = dialled.output / f"w{weight:.2f}"
        (point,) = [p for p in dialled.points if p.weight == weight]
        model = ZeroShotClassifier.from_pretrained(folder)
        assert check(folder)["fingerprint"] == fingerprint(model) == fingerprint(interpolate(original, robust, weight))
        assert point.reported[0].fingerprint == point.chosen_on[0].fingerprint == fingerprint(model)
        attack = EvaluationAttack(ThreatModel("linf", "4/255"), "pgd", 2)
        again = evaluate(model, learned.record["trainer"].eval_dataset, attack, name="again", probe=0)
        assert (again.clean, again.robust) == (point.chosen_on[0].clean, point.chosen_on[0].robust)
    assert fingerprint(ZeroShotClassifier.from_pretrained(dialled.output / "w0.00")) == fingerprint(original)
    assert fingerprint(ZeroShotClassifier.from_pretrained(dialled.output / "w1.00")) == fingerprint(robust)


def test_the_chosen_folder_opens_with_pipeline_and_its_card_tells_the_weight(dialled):
    folder = dialled.output / f"w{dialled.chosen.weight:.2f}"
    classify = pipeline("zero-shot-image-classification", model=str(folder))
    said = classify(make_images(1)[0]["image"], candidate_labels=list(CLASSES))
    assert {a["label"] for a in said} == set(CLASSES) and sum(a["score"] for a in said) == pytest.approx(1, abs=1e-5)
    text, weight = (folder / "README.md").read_text(), dialled.chosen.weight
    assert f"{weight:.2f} × the robust weights + {1 - weight:.2f} × the original's (origin)" in text
    assert (
        "This point was chosen: the most robust point whose clean accuracy on pictures (held out) is at most 100 points below"
        in text
    )
    assert json.loads((folder / MIXED).read_text())["weight"] == weight and (folder / TRAINED).is_file()


def test_every_card_holds_the_figures_of_the_test_sets_and_the_chosen_one_alone_is_called_so(dialled):
    for weight in (0.0, 0.6, 1.0, dialled.chosen.weight):
        folder = dialled.output / f"w{weight:.2f}"
        text, scores = (folder / "README.md").read_text(), own_results(folder)
        assert [s.dataset for s in scores] == ["unseen"] and check_figures(text, scores) == 2 and card_data(text)
        assert ("This point was chosen" in text) == (weight == dialled.chosen.weight)
        assert str(dialled.output.parent) not in text


def test_no_card_tells_of_the_robust_model_what_these_weights_are_not(dialled):
    text = (dialled.output / "w0.00" / "README.md").read_text()
    assert "fine-tuned with" not in text and "Trained against perturbations" not in text


def test_the_accuracy_of_the_robust_model_is_not_told_of_a_mixture(dialled):
    assert "held-out slice of the training data" not in (dialled.output / "w0.60" / "README.md").read_text()


# --- what has a say and what has none --------------------------------------------------------------------------------------


def pretend(monkeypatch, chosen_on, reported=lambda w: (50.0, 50.0), *, write=True):
    """Measurements by the weight that is being measured, in the order of the grid: (clean, robust) on either kind of data.

    With `write=False` what is exported is an empty folder, for tests that ask for the choice alone.
    """
    asked, order = [], []

    def evaluate(model, pictures, attack, **kwargs):
        own = fingerprint(model)
        if own not in order:
            order.append(own)
        test = pictures.source.get("split") == "test"
        clean, robust = (reported if test else chosen_on)(len(order) - 1)
        asked.append((pictures, attack, kwargs))
        return make_result(
            clean=clean, robust=robust, fingerprint=own, dataset=pictures.name, eps=str(attack.threat.eps)
        )

    monkeypatch.setattr(dial, "evaluate", evaluate)
    if not write:
        monkeypatch.setattr(dial, "export", lambda model, folder, **_: folder.mkdir(parents=True))
        for name in ("write_model_card", "front"):
            monkeypatch.setattr(dial, name, lambda *_, **__: None)
    return asked


@pytest.mark.parametrize("reported", [(0, 0), (100, 100), "falling", "rising", None])
def test_test_sets_have_no_say(folder, test_set, tmp_path, monkeypatch, reported):
    says = {"falling": lambda i: (90 - 20 * i, 90 - 20 * i), "rising": lambda i: (20 * i, 20 * i)}.get(
        reported, lambda i: reported
    )
    pretend(monkeypatch, lambda i: (60 - 4 * i, (10, 35, 30)[i]), says, write=False)
    sets = None if reported is None else [str(test_set)]
    points, chosen = dial.run(arguments(folder, tmp_path / "out", max_drop=5.0, report_on=sets))
    assert chosen.weight == 0.5 and [len(p.reported) for p in points] == [reported is not None] * 3
    front = json.loads((tmp_path / "out" / "front.json").read_text())
    assert front["chosen"] == 0.5 and (front["points"][0]["reported"] is None) == (reported is None)
    assert [f.name for f in (tmp_path / "out").iterdir() if f.is_dir()] == ["w0.50"]


def test_other_training_pictures_may_be_named_and_several(folder, test_set, tmp_path, monkeypatch):
    change(folder, held_out=0.0)
    more = write_image_folder(tmp_path / "more", make_images(10, seed=7))
    asked = pretend(monkeypatch, lambda i: (60, 10 * i), write=False)
    points, chosen = dial.run(
        arguments(folder, tmp_path / "out", choose_on=[str(test_set), more], limit=7, batch_size=3)
    )
    assert [p.name for p, _, _ in asked[:2]] == ["unseen", "more"] and chosen.weight == 1
    assert all(k["limit"] == 7 and k["batch_size"] == 3 and k["probe"] == 0 for _, _, k in asked)
    assert (
        "clean accuracy on unseen, more is at most"
        in json.loads((tmp_path / "out" / "front.json").read_text())["rule"]
    )


@pytest.mark.parametrize(
    ("given", "wanted"),
    [
        ({}, ("linf", "4/255", "pgd-20")),
        ({"eps": "8/255"}, ("linf", "8/255", "pgd-20")),
        ({"norm": "l2", "eps": "1"}, ("l2", "1", "pgd-20")),
        ({"attack": "apgd-ce", "attack_steps": 5}, ("linf", "4/255", "apgd-ce-5")),
    ],
)
def test_the_attack_is_that_of_training_unless_another_is_named(folder, tmp_path, monkeypatch, given, wanted):
    asked = pretend(monkeypatch, lambda i: (60, 10 * i), write=False)
    dial.run(arguments(folder, tmp_path / "out", **{"attack_steps": None} | given))
    (attack,) = {a for _, a, _ in asked}
    assert (attack.threat.norm, attack.threat.eps, str(attack)) == wanted


class Enough(Exception):
    """The pictures were seen."""


def names_file(tmp_path, name, content) -> str:
    (tmp_path / name).write_text(content)
    return str(tmp_path / name)


SPOKEN = {"cat": "puss", "dog": "hound", "house": "home", "red car": "red motor", "tree": "oak"}


@pytest.mark.parametrize("how", ["classes", "classes_file", "map", "templates", "moved"])
def test_the_slice_is_asked_about_as_in_training(learned, folder, tmp_path, monkeypatch, how):
    """Names and prompts of the recipe: other prompts are another classifier, and a choice for that."""
    spoken, names = tuple(SPOKEN.values()), tuple(SPOKEN)
    if how == "moved":
        shutil.copytree(learned.data, tmp_path / "pictures")
    recipes = {
        "classes": lambda: {"classes": list(spoken)},
        "classes_file": lambda: {"classes_file": names_file(tmp_path, "names.txt", "\n".join(spoken))},
        "map": lambda: {"classes_file": names_file(tmp_path, "names.json", json.dumps(SPOKEN))},
        "templates": lambda: {"templates": ["{}!"]},
        "moved": lambda: {"dataset": str(tmp_path / "pictures")},
    }
    change(folder, **recipes[how]())
    seen = []

    def watched(model, pictures, *_, **__):
        seen.append(pictures)
        raise Enough

    monkeypatch.setattr(dial, "evaluate", watched)
    with pytest.raises(Enough):
        dial.run(arguments(folder, tmp_path / "out"))
    assert bytes_of(seen[0]) == bytes_of(learned.record["trainer"].eval_dataset)
    assert seen[0].templates == (("{}!",) if how == "templates" else ("a {}", "the {}."))
    assert seen[0].classes == (spoken if how in ("classes", "classes_file", "map") else names)


# --- several points -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("save", "best"), [([0.501, 0.504], 1), ([0.504], 1), ([0.004], 0)])
def test_points_close_to_each_other_do_not_take_each_other_s_folder(folder, tmp_path, monkeypatch, save, best):
    pretend(monkeypatch, lambda i: (60, 90 if i == best else 10))
    _, chosen = dial.run(arguments(folder, tmp_path / "out", weights=[0.0, 0.5, 1.0], save=save))
    told = {json.loads(f.read_text())["weight"]: f.parent for f in (tmp_path / "out").glob(f"*/{MIXED}")}
    assert told.keys() == {*save, chosen.weight}
    assert "This point was chosen" in (told[chosen.weight] / "README.md").read_text()


def test_saved_points_join_the_grid_and_none_is_measured_twice(folder, tmp_path, monkeypatch):
    asked = pretend(monkeypatch, lambda i: (60, 10 * i))
    points, _ = dial.run(arguments(folder, tmp_path / "out", weights=[1.0, 0.5, 0.5], save=[0.25, 0.5]))
    assert [p.weight for p in points] == [0, 0.25, 0.5, 1] and len(asked) == 4
    assert sorted(f.name for f in (tmp_path / "out").iterdir() if f.is_dir()) == ["w0.25", "w0.50", "w1.00"]


def test_the_command_prints_the_front_and_where_the_model_lies(learned, test_set, tmp_path, capsys):
    output = str(tmp_path / "out")
    flags = [
        "--output_dir",
        output,
        "--weights",
        "0",
        "1",
        "--attack_steps",
        "1",
        "--max_drop",
        "100",
        "--report_on",
        str(test_set),
    ]
    dial.main([str(learned.folder), *flags])
    out, err = capsys.readouterr()
    rows = [[c.strip() for c in line.strip("|").split("|")] for line in out.splitlines() if line.startswith("|")]
    assert rows[0] == ["weight", "held out: clean %", "robust %", "test: clean %", "robust %"] and len(rows) == 4
    front = json.loads((tmp_path / "out" / "front.json").read_text())
    for row, point in zip(rows[2:], front["points"], strict=True):
        figures = [point[part][k] for part in ("chosen_on", "reported") for k in ("clean", "robust")]
        assert row[0].startswith(f"{point['weight']:.2f}") and row[1:] == [f"{f:.1f}" for f in figures]
        assert ("← chosen" in row[0]) == (point["weight"] == front["chosen"])
    assert (
        out.splitlines()[-1]
        == f"{output}/w{front['chosen']:.2f} is the chosen model; {output}/front.svg shows the front."
    )
    assert "w = 0.00; chosen on: clean" in err and "w = 1.00; chosen on: clean" in err


# --- mistakes -----------------------------------------------------------------------------------------------------------------


def error_of(*argv) -> str:
    with pytest.raises(SystemExit) as left:
        dial.main([str(a) for a in argv])
    assert (
        isinstance(left.value.code, str)
        and left.value.code.count("\n") == 0
        and left.value.code.startswith("hpt-hf interpolate: ")
    )
    return left.value.code


def without_record(folder, tmp_path):
    (folder / TRAINED).unlink()


def without_recipe(folder, tmp_path):
    content = json.loads((folder / TRAINED).read_text())
    del content["recipe"]
    (folder / TRAINED).write_text(json.dumps(content))


def without_origin(folder, tmp_path):
    change(folder, model=str(tmp_path / "gone"))


def of_another_version(folder, tmp_path):
    (folder / TRAINED).write_text('{"method": "tecoa"}')


def damaged(folder, tmp_path):
    (folder / TRAINED).write_text("{")


def other_architecture(folder, tmp_path):
    change(folder, model=save_tiny_clip(tmp_path / "other", patch_size=16, width=24))


def nothing(folder, tmp_path):
    pass


MISTAKES = {
    "no record": (
        without_record,
        [],
        "has no train.json that says what it was fine-tuned from: name it with --origin",
    ),
    "a record without a recipe": (without_recipe, [], "name it with --origin"),
    "no record, but an origin": (
        without_record,
        ["--origin", "{origin}"],
        "held nothing out .* name other training pictures",
    ),
    "a record of another version": (of_another_version, [], "train.json lacks "),
    "a damaged record": (damaged, [], "train.json"),
    "nothing held out": (lambda f, t: change(f, held_out=0.0), [], "held nothing out of its training data"),
    "an origin that is gone": (without_origin, [], "no model at .*gone"),
    "pictures that are gone": (lambda f, t: change(f, dataset=str(t / "gone")), [], "no data at .*gone"),
    "another architecture": (other_architecture, [], "differ in architecture .* --origin must be what"),
    "the same weights": (nothing, ["--origin", "{model}"], "are the same weights: there is nothing between them"),
    "below 0": (nothing, ["--weights", "-0.1", "1"], r"--weights -0.1 1.0: expected shares from 0 .* to 1"),
    "above 1": (nothing, ["--weights", "0.5", "1.5"], r"--weights 0.5 1.5: expected shares"),
    "no number": (nothing, ["--weights", "nan", "1"], "--weights nan 1.0: expected shares"),
    "percent": (nothing, ["--weights", "0", "50", "100"], "expected shares from 0 .* to 1"),
    "the original alone": (nothing, ["--weights", "0"], "two at least"),
    "a point to save above 1": (nothing, ["--save", "1.5"], "--save 1.5"),
    "a gain that is asked for": (
        nothing,
        ["--max_drop", "-1"],
        "--max_drop -1.0: expected points of clean accuracy, at least 0",
    ),
    "no limit": (nothing, ["--max_drop", "inf"], "--max_drop inf"),
    "no such attack": (nothing, ["--attack", "pdg"], "no attack is called 'pdg'; did you mean pgd"),
    "no such eps": (nothing, ["--eps", "8"], "Fix: '8/255'"),
    "no test set": (nothing, ["--report_on", "/nowhere/at/all"], "no data at /nowhere"),
    "no training pictures": (nothing, ["--choose_on", "/nowhere/at/all"], "no data at /nowhere"),
    "no picture": (nothing, ["--limit", "0"], "--limit 0: expected at least 1"),
    "fewer than none": (nothing, ["--limit", "-3", "--weights", "0", "1"], "--limit -3: expected at least 1"),
    "no batch": (nothing, ["--batch_size", "0", "--weights", "0", "1"], "--batch_size 0: expected at least 1"),
}


@pytest.mark.parametrize("what", MISTAKES)
def test_a_mistake_is_one_line_before_anything_is_measured(learned, folder, tmp_path, monkeypatch, what):
    spoil, flags, message = MISTAKES[what]
    spoil(folder, tmp_path)
    if what not in ("no picture", "fewer than none", "no batch"):  # these are found by measuring, if at all
        monkeypatch.setattr(dial, "_measure", lambda *_: pytest.fail("something was measured"))
    flags = [f.format(origin=learned.origin, model=folder) for f in flags]
    assert re.search(message, error_of(folder, "--output_dir", tmp_path / "out", "--attack_steps", "1", *flags))
    assert not (tmp_path / "out").exists()


def test_an_origin_that_the_model_was_not_fine_tuned_from_is_refused(folder, tmp_path):
    """Of the same architecture, so that a mixture could be made, and would mean nothing."""
    record = json.loads((folder / TRAINED).read_text())
    record["student"]["fingerprint"] = "0" * 16
    (folder / TRAINED).write_text(json.dumps(record))
    assert "holds other weights than" in error_of(folder, "--output_dir", tmp_path / "out")
    assert "say its radius with --eps" in error_of(folder, "--output_dir", tmp_path / "out", "--norm", "l2")
    assert not (tmp_path / "out").exists()


def test_a_model_or_an_output_that_is_not_named(tmp_path):
    assert "--model" in error_of("--output_dir", tmp_path / "out")
    assert "--output_dir" in error_of(tmp_path)
    assert "unknown key --weigths; did you mean weights" in error_of(
        tmp_path, "--output_dir", tmp_path, "--weigths", "1"
    )


def test_pictures_without_labels_cannot_choose(folder, tmp_path):
    (tmp_path / "bare").mkdir()
    make_images(1)[0]["image"].save(tmp_path / "bare" / "0.png")
    with pytest.raises((RecipeError, ValueError), match="names no classes|has no labels"):
        dial.run(arguments(folder, tmp_path / "out", choose_on=[str(tmp_path / "bare")]))


# --- to the Hub ---------------------------------------------------------------------------------------------------------------


@pytest.fixture
def hub(monkeypatch):
    return FakeHub(monkeypatch)


def test_every_exported_point_becomes_a_revision(hub, folder, test_set, tmp_path, monkeypatch, capsys):
    pretend(monkeypatch, lambda i: (60, 10 * i), lambda i: (70 - i, 20 + i))
    settings = {"save": [0.0, 0.5], "report_on": [str(test_set)], "push_to": "alice/dial", "private": True}
    dial.run(arguments(folder, tmp_path / "out", **settings))
    said = capsys.readouterr().err
    assert hub.repos["alice/dial"].private and set(hub.repos["alice/dial"].branches) == {
        "main",
        "w0.00",
        "w0.50",
        "w1.00",
    }
    assert set(hub.files("alice/dial")) == {".gitattributes"}
    for number, name in enumerate(("w0.00", "w0.50", "w1.00")):
        files = hub.files("alice/dial", name)
        assert files["model.safetensors"] == (tmp_path / "out" / name / "model.safetensors").read_bytes()
        assert json.loads(files[MIXED])["weight"] == float(name[1:])
        assert [json.loads(c)["robust"] for n, c in files.items() if n.startswith("results/")] == [20 + number]
        assert f"{name} -> " in said and "/alice/dial/commit/" in said
        assert not any(str(tmp_path).encode() in content for content in files.values())
        assert card_data(files["README.md"].decode())


def test_the_card_of_a_revision_opens_that_revision(hub, folder, tmp_path, monkeypatch):
    pretend(monkeypatch, lambda i: (60, 10 * i))
    dial.run(arguments(folder, tmp_path / "out", weights=[0.5], push_to="alice/dial"))
    (code,) = re.findall(r"```python\n(.*?)```", hub.files("alice/dial", "w0.50")["README.md"].decode(), re.DOTALL)
    assert 'revision="w0.50"' in code


def test_a_revision_that_holds_another_model_is_left_alone_until_asked(hub, folder, tmp_path, monkeypatch):
    pretend(monkeypatch, lambda i: (60, 10 * i))
    dial.run(arguments(folder, tmp_path / "out", weights=[1.0], push_to="alice/dial"))
    stood = hub.files("alice/dial", "w1.00")
    other = ZeroShotClassifier.from_pretrained(folder)
    with torch.no_grad():
        other.model.visual_projection.weight.mul_(1.5)
    record = (folder / TRAINED).read_text()
    other.save_pretrained(folder)
    (folder / TRAINED).write_text(record)
    pretend(monkeypatch, lambda i: (60, 10 * i))
    with pytest.raises(ValueError, match=r"alice/dial \(w1.00\) holds another model.*--overwrite"):
        dial.run(arguments(folder, tmp_path / "again", weights=[1.0], push_to="alice/dial"))
    assert hub.files("alice/dial", "w1.00") == stood
    pretend(monkeypatch, lambda i: (60, 10 * i))
    dial.run(arguments(folder, tmp_path / "third", weights=[1.0], push_to="alice/dial", overwrite=True))
    assert hub.files("alice/dial", "w1.00")["model.safetensors"] != stood["model.safetensors"]
