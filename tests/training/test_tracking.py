"""Proves that a tracker can tell runs apart, its files lie beside the model, and a missing one costs a line."""

from __future__ import annotations

import json

import pytest
from conftest import classifier, gpd_schedule, make_images, make_trainer, single_schedule, write_image_folder
from transformers.integrations import TensorBoardCallback

from hpt_hf.commands.parser import parse
from hpt_hf.commands.train import RECIPE, build, run
from hpt_hf.models.ensemble import Ensemble
from hpt_hf.training import config
from hpt_hf.training.config import TRACKERS, HPTConfig

FLAGS = "--max_steps 2 --per_device_train_batch_size 8 --use_cpu true --disable_tqdm true --learning_rate 1e-3"


class Board(TensorBoardCallback):
    """Without tensorboard: notes the folder that each of its writers would write to."""

    def __init__(self):
        self.logging_dir = self.tb_writer = None
        self.folders = []

    def _init_summary_writer(self, args):
        self.folders.append(self.logging_dir)

    def on_train_begin(self, args, state, control, **kwargs):
        super().on_train_begin(args, state, control)


@pytest.fixture(scope="module")
def flags(tmp_path_factory, paths):
    data = write_image_folder(tmp_path_factory.mktemp("tracking") / "images", make_images())
    return f"{FLAGS} --model {paths[0]} --dataset {data}".split()


@pytest.mark.parametrize(
    ("more", "expected", "named"),
    [
        ("--method hpt_gpd --eps 8/255", {"method": "hpt_gpd", "eps": "8/255", "norm": "linf"}, "hpt_gpd, linf 8/255"),
        ("--method tecoa --norm l2 --eps 0.5", {"method": "tecoa", "eps": "0.5", "proxy": None}, "tecoa, l2 0.5"),
        ("--method hpt --run_name mine", {"method": "hpt", "ga_epochs": 1.0}, "mine"),
    ],
)
def test_a_tracker_is_told_method_attack_models_and_data(more, expected, named, flags, paths, tmp_path):
    """By what transformers' trackers read of a run: the name, and the arguments as a dict."""
    more = more.split() + (["--proxy", paths[1]] if "hpt" in more else [])
    args = build(*parse(RECIPE, [*flags, "--output_dir", str(tmp_path / "out"), *more])).args
    name, told = args.run_name, json.loads(args.to_json_string())
    assert {k: told[k] for k in expected} == expected
    assert told["student"] == paths[0] and told["dataset"] == "images"
    assert named in name and (("proxy" in name) == ("--proxy" in more) or named == "mine")
    assert name == "mine" or name.startswith(f"{tmp_path / 'out'}: ") and "images" in name


def test_a_trainer_made_of_parts_tells_it_as_well_and_names_every_proxy(paths, student, proxy, tmp_path):
    other = classifier(paths[0]).with_weights({n: w + 1e-3 for n, w in student.plain_state().items()})
    proxies = Ensemble([proxy, other])
    trainer = make_trainer(tmp_path, student, gpd_schedule(), proxy=proxies)
    told = trainer.args.to_dict()
    assert (told["method"], told["eps"], told["dataset"]) == ("ga+hpt", "8/255", "made")
    assert told["proxy"] == " + ".join(str(m.model.name_or_path) for m in proxies.members)
    assert trainer.args.run_name.count("proxy ") == 2


def test_what_tensorboard_writes_lies_beside_the_model_whatever_is_logged_first(student, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    schedule, held_out = single_schedule("tecoa", steps=2), make_images(8, seed=3)
    trainer = make_trainer(tmp_path / "out", student, schedule, held_out=held_out, callbacks=[board := Board()])
    trainer.evaluate(metric_key_prefix="vanilla")
    trainer.train()
    (folder,) = set(board.folders)
    assert folder.startswith(f"{tmp_path / 'out' / 'runs'}/")
    assert folder.endswith("tecoa-linf-8-255-2-attack-steps-made")


def test_a_missing_tracker_is_told_before_anything_is_loaded(tmp_path, monkeypatch):
    others = [t for t in TRACKERS if t != "wandb"]
    monkeypatch.setattr(config, "get_available_reporting_integrations", lambda: others)
    with pytest.raises(ValueError, match="^report_to: got 'wandb', which is not installed. Fix: pip install wandb$"):
        HPTConfig(output_dir=str(tmp_path), report_to="wandb")
    assert HPTConfig(output_dir=str(tmp_path), report_to=others).report_to == others
    assert HPTConfig(output_dir=str(tmp_path)).report_to == []


def test_the_log_stays_beside_the_model_and_the_card_shows_the_runs_curve_but_no_earlier_one(flags, tmp_path):
    drawn = []
    for name, every, held_out in (("one", 1, 0), ("again", 1, 0), ("again", 50, 0.2)):
        out = tmp_path / name
        more = f"--method tecoa --logging_steps {every} --held_out {held_out} --output_dir {out}"
        run(*parse(RECIPE, [*flags, *more.split()]))
        log = json.loads((out / "trainer_state.json").read_text())["log_history"]
        assert [row["step"] for row in log if "loss" in row] == ([1, 2] if every == 1 else [])
        assert any("eval_robust_accuracy" in row for row in log) == (held_out > 0)
        drawn.append(file.read_bytes() if (file := out / "training.png").exists() else None)
        assert ("](training.png)" in (out / "README.md").read_text()) == (drawn[-1] is not None)
    assert drawn[0] == drawn[1] != drawn[2] is None
