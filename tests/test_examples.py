"""The scripts of `examples/` run as they stand, and objects of one's own are taken from files."""

from __future__ import annotations

import json
import runpy
import shutil
import sys
from pathlib import Path
from unittest import mock

import pytest
import torch
from conftest import make_images, write_image_folder

from hpt_hf.attacks.suite import EvaluationAttack
from hpt_hf.attacks.threat_model import ThreatModel
from hpt_hf.commands import evaluate, verify
from hpt_hf.commands.common import load_model
from hpt_hf.commands.parser import parse
from hpt_hf.commands.train import RECIPE, build_schedule, run
from hpt_hf.models.families import FAMILIES

EXAMPLES = Path(__file__).parent.parent / "examples"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_image_folder(tmp_path_factory.mktemp("examples") / "images", make_images(20))


def play(name: str, monkeypatch, *argv) -> None:
    monkeypatch.setattr(sys, "argv", [name, *map(str, argv)])
    runpy.run_path(str(EXAMPLES / f"{name}.py"), run_name="__main__")


def test_each_example_runs_and_prints_what_it_says(folder, paths, tmp_path, monkeypatch, capsys):
    torch.manual_seed(0)
    play("evaluate_pipeline", monkeypatch, paths[0], folder)
    assert "| mean " in capsys.readouterr().out
    play("evaluate_module", monkeypatch)
    assert "apgd-ce" in capsys.readouterr().out
    play("compare_two_models", monkeypatch, *paths[:2], folder)
    assert "against" in (told := capsys.readouterr().out) and " to " in told
    play("save_adversarial_images", monkeypatch, paths[0], folder, tmp_path / "adversarial")
    assert capsys.readouterr().out.count("->") == 20
    own = EXAMPLES.parent / "recipes" / "own_images.yaml"
    quick = own.read_text().replace("num_train_epochs: 10", "max_steps: 2").replace("_size: 32", "_size: 8")
    (tmp_path / "own_images").write_text(quick + "use_cpu: true\n")
    monkeypatch.chdir(tmp_path)
    play("train_on_a_folder", monkeypatch, *paths[:2], folder, tmp_path / "out")
    assert f"model='{tmp_path / 'out'}'" in capsys.readouterr().out and (tmp_path / "out" / "README.md").is_file()


def test_an_attack_of_ones_own_is_evaluated_by_its_path_and_again(folder, paths, tmp_path, capsys):
    own = f"{EXAMPLES / 'own_attack.py'}:lower_gap"
    flags = ["--model", paths[0], "--dataset", str(folder), "--eps", "8/255", "--output_dir", str(tmp_path)]
    (result,) = evaluate.run(*parse((evaluate.EvaluateArguments,), [*flags, "--attack", own]))
    (cw,) = evaluate.run(*parse((evaluate.EvaluateArguments,), [*flags, "--attack", "cw", "--attack_steps", "10"]))
    assert result.attack == f"{own}-10" and result.ends == cw.ends, "the example's loss is CW's"
    with pytest.raises(SystemExit) as verdict:
        verify.main([paths[0], "--results", str(tmp_path)])
    assert verdict.value.code == 0 and own in capsys.readouterr().out


@mock.patch.dict(FAMILIES)
def test_a_model_of_a_family_of_ones_own_is_opened_by_its_path(folder, paths, tmp_path):
    theirs = shutil.copytree(paths[1], tmp_path / "theirs")
    config = json.loads((theirs / "config.json").read_text())
    (theirs / "config.json").write_text(json.dumps(config | {"model_type": "my_clip"}))
    with pytest.raises(ValueError, match="a model of type 'my_clip': expected one of 'clip'"):
        load_model(str(theirs))
    own = f"{EXAMPLES / 'own_family.py'}:my_family:{theirs}"
    images = torch.rand(2, 3, 32, 32)
    classes = [load_model(name).set_classes(["a", "b"]) for name in (own, paths[1])]
    torch.testing.assert_close(*(model.classify(images).logits for model in classes))
    record = run(*recipe("hpt", folder, (paths[0], own), tmp_path / "out", "--proxy", own))
    assert record["proxy"]["source"] == str(theirs) and record["recipe"]["proxy"] == [own]


def test_there_is_no_other_example():
    assert {f.stem for f in EXAMPLES.glob("*.py")} == {
        *("evaluate_pipeline", "evaluate_module", "compare_two_models", "train_on_a_folder", "own_objective"),
        *("save_adversarial_images", "own_attack", "own_family"),
    }
    assert all(len(f.read_text().splitlines()) <= 24 for f in EXAMPLES.glob("*.py"))


FLAGS = "--max_steps 2 --per_device_train_batch_size 8 --use_cpu true --disable_tqdm true --eps 8/255 --learning_rate 1e-3 --logging_steps 1"


def recipe(method: str, folder, paths, output, *more):
    flags = f"--method {method} --dataset {folder} --model {paths[0]} {FLAGS} --output_dir {output}"
    return parse(RECIPE, [*flags.split(), *more])


def test_an_objective_of_ones_own_trains_and_is_called_by_its_name(folder, paths, tmp_path):
    record = run(*recipe(f"{EXAMPLES / 'own_objective.py'}:half_and_half", folder, paths, tmp_path))
    assert [p["objective"] for p in record["phases"]] == ["half_and_half"]
    logged = record["trainer"].state.log_history[0]
    assert {"loss_ce", "loss_half_and_half"} <= logged.keys()
    assert json.loads((tmp_path / "train.json").read_text())["method"].endswith("half_and_half")
    assert "half_and_half" in (tmp_path / "README.md").read_text()


def test_a_schedule_of_ones_own_is_taken_as_it_is(folder, paths, tmp_path):
    (tmp_path / "mine.py").write_text(
        "from hpt_hf.method.objectives import OBJECTIVES as o\nfrom hpt_hf.method.schedule import Phase, Schedule\n"
        "mine = Schedule((Phase(o['fare'], epochs=1), Phase(o['tecoa'], epochs=2)))\n"
    )
    _, method, training = recipe(f"{tmp_path / 'mine.py'}:mine", folder, paths, tmp_path / "out")
    assert [p.objective.name for p in build_schedule(method).phases] == ["fare", "tecoa"]


@pytest.mark.parametrize(
    ("method", "says"),
    [
        ("tecoaa", "method: got 'tecoaa'; did you mean tecoa"),
        ("{place}/none.py:x", "no file"),
        ("{place}/broken.py:x", "cannot be imported .SyntaxError"),
        ("{place}/raises.py:x", "ZeroDivisionError"),
        ("{place}/other.py:x", "got int, expected Objective or Schedule"),
        ("{place}/other.py:y", "got no 'y'"),
        ("no.such.module:x", "no.such.module cannot be imported"),
    ],
)
def test_a_broken_file_of_ones_own_is_told_in_a_line(method, says, folder, paths, tmp_path):
    """An attack's file as well as an objective's."""
    (tmp_path / "broken.py").write_text("def")
    (tmp_path / "raises.py").write_text("1 / 0")
    (tmp_path / "other.py").write_text("x = 1")
    _, args, _ = recipe(method.format(place=tmp_path), folder, paths, tmp_path / "out")
    with pytest.raises(ValueError, match=says):
        build_schedule(args)
    with pytest.raises(ValueError, match="got int, expected OwnAttack"):
        EvaluationAttack(ThreatModel("linf", "1/255"), f"{tmp_path / 'other.py'}:x")
