"""Weights are mixed exactly, a point is chosen by rule on what training left out, and exported as it was measured."""

import contextlib
import io
import json
import math
import shutil
from pathlib import Path
from types import SimpleNamespace
from xml.etree import ElementTree

import pytest
import torch
from conftest import CLASSES, contents, make_images, make_result, save_tiny_clip, weights, write_image_folder
from loopback_hub import FakeHub, card_data

from hpt_hf.commands import interpolate as command
from hpt_hf.commands.interpolate import InterpolateArguments, Point, choose, interpolate
from hpt_hf.commands.parser import parse
from hpt_hf.commands.train import RECIPE
from hpt_hf.commands.train import run as train
from hpt_hf.evaluation.evaluator import evaluate
from hpt_hf.models.zero_shot import ZeroShotClassifier, fingerprint
from hpt_hf.publishing.export import check
from hpt_hf.publishing.hub import open_repo
from hpt_hf.publishing.model_card import MIXED, TRAINED, check_figures, own_results
from hpt_hf.utils import read_json, write_json


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


@pytest.mark.parametrize("weight", [0, 0.25, 1])
def test_every_tensor_lies_on_the_line_and_the_ends_are_the_two_models(pair, weight):
    before = [weights(m) for m in pair]
    mixed = interpolate(*pair, weight)
    assert not mixed.training and mixed.mean.equal(pair[1].mean) and len(before[0]) == 78
    for name, tensor in weights(mixed).items():
        exact = (1 - weight) * before[0][name].double() + weight * before[1][name].double()
        torch.testing.assert_close(tensor.double(), exact, rtol=1e-6, atol=1e-7, msg=name)
    if weight in (0, 1):
        assert fingerprint(mixed) == fingerprint(pair[weight])
    with torch.no_grad():
        [tensor.zero_() for tensor in mixed.model.state_dict().values()]
    assert all(torch.equal(t, b[n]) for m, b in zip(pair, before, strict=True) for n, t in weights(m).items())


def test_the_ends_are_exact_whatever_the_other_one_holds(pair, student_path):
    """0 * infinity is no number."""
    broken = ZeroShotClassifier.from_pretrained(student_path)
    with torch.no_grad():
        broken.model.visual_projection.weight.fill_(math.inf)
    assert fingerprint(interpolate(pair[0], broken, 0.0)) == fingerprint(pair[0])
    assert fingerprint(interpolate(broken, pair[1], 1.0)) == fingerprint(pair[1])


@pytest.mark.parametrize("what", ["another architecture", "a deeper one", "mean", "std"])
def test_models_that_no_line_connects_are_refused(pair, paths, tmp_path, what):
    source = save_tiny_clip(tmp_path / "other", layers=3) if "deeper" in what else paths["another" in what]
    other = ZeroShotClassifier.from_pretrained(source)
    if what in ("mean", "std"):
        setattr(other, what, getattr(other, what) + 0.01)
    with pytest.raises(ValueError, match="normalise" if what in ("mean", "std") else "differ in architecture"):
        interpolate(pair[0], other, 0.5)


def point(weight, *accuracies, reported=()):
    """(clean, robust) in percent, of 1,000 images, on each set that the choice is made on, and on test sets."""

    def result(clean, robust):
        return make_result(per_class={"cat": (1000, round(10 * clean), round(10 * robust))})

    return Point(weight, *(tuple(result(c, r) for c, r in part) for part in (accuracies, reported)))


RULE = {
    "of those that are allowed": ({0: (60, 10), 0.5: (58, 30), 1: (54.9, 40)}, 5, 0.5),
    "just at the limit": ({0: (60, 50), 0.5: (58, 52), 1: (55, 54)}, 5, 1),
    "at the limit, in floats": ({0: (0.3, 0), 1: (0.2, 0.2)}, 0.1, 1),
    "the original is the best": ({0: (60, 50), 0.5: (60, 40), 1: (60, 30)}, 5, 0),
    "of equals the smallest": ({0: (60, 10), 0.3: (59, 40), 0.6: (60, 40), 1: (61, 40)}, 5, 0.3),
    "clean accuracy has no say beyond the limit": ({0: (60, 10), 0.5: (70, 39), 1: (55, 40)}, 5, 1),
    "nothing may be lost": ({0: (60, 10), 0.5: (60, 20), 1: (59.9, 40)}, 0, 0.5),
    "no accuracy at all": ({0: (0, 0), 0.5: (0, 0), 1: (0, 0)}, 5, 0),
}


@pytest.mark.parametrize("name", RULE)
def test_the_point_is_chosen_by_the_rule_and_test_sets_have_no_say(name):
    accuracies, max_drop, wanted = RULE[name]
    for reported in ((0, 0), (100, 100)):
        points = [point(w, a, reported=(reported,) if w == wanted else ((50, 50),)) for w, a in accuracies.items()]
        for order in (points, points[::-1]):
            assert choose(order, max_drop).weight == wanted


def test_several_sets_count_alike():
    points = [point(0, (90, 10), (10, 10)), point(0.5, (50, 40), (45, 0)), point(1, (90, 18), (0, 0))]
    assert choose(points, 5).weight == 0.5 and choose(points, 2).weight == 0


@pytest.fixture(scope="module")
def learned(student_path, tmp_path_factory):
    """A few steps of training as a recipe makes them, with a quarter held out."""
    place = tmp_path_factory.mktemp("line")
    shutil.copytree(student_path, place / "origin")
    write_image_folder(place / "images", make_images(40))
    flags = f"--method tecoa --dataset {place / 'images'} --held_out 0.25 --eps 4/255 --model {place / 'origin'}"
    flags += f" --output_dir {place / 'robust'} --learning_rate 0.05 --max_steps 8 --per_device_train_batch_size 10"
    flags = [*f"{flags} --use_cpu true --disable_tqdm true --templates".split(), "a {}", "the {}."]
    trainer = train(*parse(RECIPE, flags))["trainer"]
    return SimpleNamespace(folder=place / "robust", origin=place / "origin", data=place / "images", trainer=trainer)


@pytest.fixture
def folder(learned, tmp_path) -> Path:
    """A copy of what training wrote, to spoil."""
    return shutil.copytree(learned.folder, tmp_path / "robust")


def change(folder: Path, *gone: str, **changes) -> None:
    """The recipe in the folder's train.json."""
    content = read_json(folder / TRAINED)
    content["recipe"] = {k: v for k, v in content["recipe"].items() if k not in gone} | changes
    write_json(folder / TRAINED, content)


def arguments(model, output, **changes) -> InterpolateArguments:
    settings = {"weights": [0.0, 0.5, 1.0], "attack_steps": 2, "max_drop": 100.0}
    return InterpolateArguments(model=str(model), output_dir=str(output), **(settings | changes))


@pytest.fixture(scope="module")
def test_set(tmp_path_factory) -> str:
    return write_image_folder(tmp_path_factory.mktemp("test") / "unseen", make_images(20, seed=3))


@pytest.fixture(scope="module")
def done(learned, test_set, tmp_path_factory) -> SimpleNamespace:
    """One run of the command: its points and choice, what it printed and wrote, the images of every measurement."""
    output, seen, kept = tmp_path_factory.mktemp("done") / "out", [], []
    flags = f"--weights 0.5 1 --save 0 1 0.6 --report_on {test_set} --attack_steps 2 --max_drop 100"
    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(io.StringIO()) as said:
        patch.setattr(command, "evaluate", lambda m, s, *a, **k: seen.append(s) or evaluate(m, s, *a, **k))
        patch.setattr(command, "run", lambda args, run=command.run: kept.append(run(args)) or kept[0])
        command.main([str(learned.folder), "--output_dir", str(output), *flags.split()])
    points, chosen = kept[0]
    front = json.loads((output / "front.json").read_text())
    return SimpleNamespace(points=points, chosen=chosen, output=output, seen=seen, front=front, said=said.getvalue())


def bytes_of(images) -> list[bytes]:
    return [images[i]["image"].tobytes() for i in range(len(images))]


def test_the_choice_is_made_on_exactly_what_training_left_out(learned, done):
    aside, used = bytes_of(learned.trainer.eval_dataset), bytes_of(learned.trainer.train_dataset)
    slices = [images for images in done.seen if "held out" in images.name]
    assert len(slices) == len(done.points) == 4 and not set(aside) & set(used) and len(set(aside) | set(used)) == 40
    for images in slices:
        assert bytes_of(images) == aside and images.templates == ("a {}", "the {}.")
        assert images.classes == tuple(sorted(CLASSES))


def test_front_holds_every_point_and_the_choice_follows_from_it(done):
    assert [p["weight"] for p in done.front["points"]] == [0.0, 0.5, 0.6, 1.0]
    for told, measured in zip(done.front["points"], done.points, strict=True):
        for part, (result,) in (("chosen_on", measured.chosen_on), ("reported", measured.reported)):
            figures = [result.clean, result.robust, result.n, list(result.interval)]
            assert [told[part][k] for k in ("clean", "robust", "n", "robust_interval")] == figures
            assert list(told[part]["sets"]) == [result.dataset]
    best = max(p["chosen_on"]["robust"] for p in done.front["points"])
    assert best > done.front["points"][0]["chosen_on"]["robust"], "or the choice would be trivial"
    equals = [p["weight"] for p in done.front["points"] if p["chosen_on"]["robust"] == best]
    assert done.front["chosen"] == done.chosen.weight == min(equals)
    text = (done.output / "front.svg").read_text()
    assert len(list(ElementTree.fromstring(text).iter())) > 100 and f"{done.chosen.weight:g} chosen" in text


def test_the_measured_models_are_those_that_are_exported(done, learned):
    saved = sorted({0.0, 0.6, 1.0, done.chosen.weight})
    assert sorted(f.name for f in done.output.iterdir() if f.is_dir()) == [f"w{w:.2f}" for w in saved]
    ends = [ZeroShotClassifier.from_pretrained(path) for path in (learned.origin, learned.folder)]
    for weight in saved:
        folder = done.output / f"w{weight:.2f}"
        (measured,) = [p for p in done.points if p.weight == weight]
        own = fingerprint(interpolate(*ends, weight))
        assert check(folder)["fingerprint"] == own == measured.reported[0].fingerprint
        text, results = (folder / "README.md").read_text(), own_results(folder)
        assert [r.dataset for r in results] == ["unseen"] and check_figures(text, results) == 2 and card_data(text)
        assert ("This point was chosen" in text) == (weight == done.chosen.weight)
        # What is true of the robust model is not told of a mixture.
        of_robust = ("fine-tuned with", "Trained against", "held-out slice of the training")
        assert not any(said in text for said in (*of_robust, str(done.output.parent)))
        assert f"{weight:.2f} × the robust weights + {1 - weight:.2f} × the original's" in text


def pretend(monkeypatch, chosen_on=lambda i: (60, 10 * i), export=True):
    """Measurements by number of the weight in the grid: (clean, robust); a list of what was asked for."""
    asked, order = [], []

    def measured(model, images, attack, **kwargs):
        if (own := fingerprint(model)) not in order:
            order.append(own)
        asked.append((images, attack, kwargs))
        counts = {"cat": (100, *chosen_on(len(order) - 1))}
        return make_result(per_class=counts, fingerprint=own, dataset=images.name, eps=str(attack.threat.eps))

    monkeypatch.setattr(command, "evaluate", measured)
    if not export:
        monkeypatch.setattr(command, "_publish", lambda *_: None)
    return asked


def test_other_training_images_may_be_named_and_several(folder, test_set, learned, tmp_path, monkeypatch):
    change(folder, held_out=0.0)
    asked, more = pretend(monkeypatch, export=False), str(learned.data)
    command.run(arguments(folder, tmp_path / "out", choose_on=[test_set, more], limit=7, batch_size=3))
    assert [images.name for images, _, _ in asked[:2]] == ["unseen", "images"]
    assert all(k["limit"] == 7 and k["batch_size"] == 3 and k["probe"] == 0 for _, _, k in asked)


ATTACKS = [
    ({}, ("linf", "4/255", "pgd-20")),
    ({"norm": "l2", "eps": "1"}, ("l2", "1", "pgd-20")),
    ({"attack": "apgd-ce", "attack_steps": 5}, ("linf", "4/255", "apgd-ce-5")),
]


@pytest.mark.parametrize("given, wanted", ATTACKS)
def test_the_attack_is_that_of_training_unless_another_is_named(folder, tmp_path, monkeypatch, given, wanted):
    asked = pretend(monkeypatch, export=False)
    command.run(arguments(folder, tmp_path / "out", **{"attack_steps": None} | given))
    (attack,) = {a for _, a, _ in asked}
    assert (attack.threat.norm, attack.threat.eps, str(attack)) == wanted


SPOKEN = {"cat": "puss", "dog": "hound", "house": "home", "red car": "red motor", "tree": "oak"}


@pytest.mark.parametrize("how", ["map", "templates", "moved", "an older record"])
def test_the_slice_is_asked_about_as_in_training(learned, folder, tmp_path, monkeypatch, how):
    """Names and prompts of the recipe: other prompts are another classifier, and a choice for that."""
    if how == "moved":
        shutil.copytree(learned.data, tmp_path / "images")
    write_json(tmp_path / "names.json", SPOKEN)
    recipe = read_json(folder / TRAINED)["recipe"]
    changes = {
        "map": {"classes_file": str(tmp_path / "names.json")},
        "templates": {"templates": ["{}!"]},
        "moved": {"dataset": str(tmp_path / "images")},
        "an older record": {"model_name_or_path": recipe["model"], "dataset_split": recipe["split"]},
    }
    change(folder, *(("model", "split") if "older" in how else ()), **changes[how])
    asked = pretend(monkeypatch, export=False)
    command.run(arguments(folder, tmp_path / "out"))
    images = asked[0][0]
    assert bytes_of(images) == bytes_of(learned.trainer.eval_dataset)
    assert images.templates == (("{}!",) if how == "templates" else ("a {}", "the {}."))
    assert images.classes == tuple(SPOKEN.values() if how == "map" else SPOKEN)


def test_saved_points_join_the_grid_each_in_a_folder_of_its_own(folder, tmp_path, monkeypatch):
    asked, save = pretend(monkeypatch, lambda i: (95, 90 if i == 4 else 10)), [0.501, 0.504, 0.5]
    points, chosen = command.run(arguments(folder, tmp_path / "out", weights=[1.0, 0.5, 0.5], save=save))
    told = {read_json(f)["weight"] for f in (tmp_path / "out").glob(f"*/{MIXED}")}
    assert told == {*save, 1.0} and len(asked) == len(points) == 5 and chosen.weight == 1


def test_the_command_prints_the_front_and_where_the_model_lies(done):
    rows = [line.split("|")[1:-1] for line in done.said.splitlines() if line[:1] == "|"][2:]
    for (weight, *shown), told in zip(rows, done.front["points"], strict=True):
        figures = [told[part][k] for part in ("chosen_on", "reported") for k in ("clean", "robust")]
        assert f"{told['weight']:.2f}" in weight and [cell.strip() for cell in shown] == [f"{f:.1f}" for f in figures]
        assert ("← chosen" in weight) == (told["weight"] == done.front["chosen"])
    assert f"w{done.front['chosen']:.2f} is the chosen model" in done.said.splitlines()[-1]


def other_fingerprint(folder, learned):
    record = read_json(folder / TRAINED)
    record["student"]["fingerprint"] = "0" * 16
    write_json(folder / TRAINED, record)


def one_image_more(folder, learned):
    """The random slice would hold images that the model was trained on."""
    images = shutil.copytree(learned.data, folder.parent / "images")
    first = min(images.rglob("*.png"))
    shutil.copy(first, first.with_name("zzz.png"))
    change(folder, dataset=str(images))


MISTAKES = {  # what is spoilt, flags, what is said; those of the line alone stand in test_wrong_lines.py
    "no record, but an origin": (
        lambda f, _: (f / TRAINED).unlink(),
        "--origin {origin}",
        "held nothing out.*--choose",
    ),
    "nothing held out": (lambda f, _: change(f, held_out=0.0), "", "held nothing out of its training data"),
    "an origin that is gone": (lambda f, _: change(f, model="/nowhere/gone"), "", "no model at .*gone"),
    "images that are gone": (lambda f, _: change(f, dataset="/nowhere/gone"), "", "no data at .*gone"),
    "images that changed": (one_image_more, "", "is not what .* was trained on"),
    "another origin": (other_fingerprint, "", "holds other weights .* was fine-tuned from"),
    "no test set": (lambda f, _: None, "--report_on /nowhere/at/all", "no data at /nowhere"),
    "into what is read": (lambda f, _: None, "--output_dir {model}/in", "lies in --model"),
}


@pytest.mark.parametrize("what", MISTAKES)
def test_a_mistake_is_one_line_before_anything_is_measured(learned, folder, tmp_path, monkeypatch, what):
    spoil, flags, message = MISTAKES[what]
    spoil(folder, learned)
    before = contents(tmp_path)
    monkeypatch.setattr(command, "evaluate", lambda *_, **__: pytest.fail("something was measured"))
    flags = flags.format(origin=learned.origin, model=folder).split()
    with pytest.raises(SystemExit, match=f"^hpt-hf interpolate: .*{message}.*$"):
        command.main([str(folder), "--output_dir", str(tmp_path / "out"), "--attack_steps", "1", *flags])
    assert contents(tmp_path) == before


@pytest.mark.parametrize("overwrite", [False, True])
def test_exported_points_become_revisions(folder, test_set, tmp_path, monkeypatch, overwrite):
    hub, line = FakeHub(monkeypatch), "alice/line"
    pretend(monkeypatch)
    settings = {"weights": [1.0], "save": [0.5], "report_on": [test_set], "push_to": line, "private": True}
    open_repo(line, private=True)
    hub.repos[line].branches["w1.00"] = [{"model.safetensors": b"another"}]
    with contextlib.nullcontext() if overwrite else pytest.raises(ValueError, match=r"\(w1.00\) holds another model"):
        command.run(arguments(folder, tmp_path / "out", overwrite=overwrite, **settings))
    assert hub.repos[line].private and set(hub.files(line)) == {".gitattributes"}
    assert set(hub.repos[line].branches) == {"main", "w0.50", "w1.00"}
    for name in ("w0.50", "w1.00")[: 1 + overwrite]:
        files = hub.files(line, name)
        assert files["model.safetensors"] == (tmp_path / "out" / name / "model.safetensors").read_bytes()
        assert json.loads(files[MIXED])["weight"] == float(name[1:]) and any(n.startswith("results/") for n in files)
        assert not any(str(tmp_path).encode() in content for content in files.values())
        assert f'revision="{name}"' in files["README.md"].decode() and card_data(files["README.md"].decode())
