"""Proves that a wrong command line costs one line, whatever the command, and writes nothing."""

from __future__ import annotations

import importlib
import os
from unittest import mock

import pytest
from conftest import make_images, write_image_folder

from hpt_hf import cli
from hpt_hf.commands.parser import exit_on_user_error

TRAIN = "--method tecoa --dataset {data} --model {model} --use_cpu true --max_steps 1 --per_device_train_batch_size 8"
GPD = f"{TRAIN} --method hpt_gpd --proxy {{proxy}}"
EVALUATE, TRANSFER = "--model {model} --dataset {data}", "--model {model} --proxies {proxy} --dataset {data}"
DIAL = "{model} --origin {model} --choose_on {data}"

WRONG = {
    "train": {
        TRAIN: (
            *(
                "--eps 0",
                "--eps -1",
                "--eps nan",
                "--eps 1e400",
                "--norm l3",
                "--ga_epochs -3",
                "--num_train_epochs 0",
            ),
            *("--num_train_epochs inf", "--save_steps 0", "--gradient_accumulation_steps 0", "--learning_rate nan"),
            *("--per_device_train_batch_size 0", "--temperature 0", "--attack_steps 0", "--attack_step_size 0"),
            *("--held_out 1", "--held_out nan", "--method nope", "--method hpt", "--model /nowhere", "--model {file}"),
            *("--model {empty}", "--dataset {empty}", "--dataset {file}", "--dataset /nowhere", "--split nope"),
            *("--classes a", "--templates x", "--classes_file /nowhere", "--config {empty}", "--config /nowhere.yaml"),
            *("--config", "--output_dir {file}", "--resume_from_checkpoint /nowhere", "--max_steps 0", "--unknown 3"),
            *("--lr_scheduler_type nope", "--optim nope", "--report_to nope", "--report_to wandb", "--images 5"),
            *("--streaming true", "--warmup_steps -1", "--seed -1", "--seed x", "--license", "--eval_strategy steps"),
            *("--load_best_model_at_end true", "--fsdp full_shard", "--deepspeed x.json", "--hub_token x"),
            *("--label_smoothing_factor 0.1", "--do_train false", "--bf16_full_eval true", "--ignore_data_skip true"),
        ),
        GPD: ("--ga_epochs nan", "--ema 2", "--pull nan", "--interval 0", "--ga_learning_rate -1"),
    },
    "evaluate": {
        EVALUATE: (
            *("--eps 0", "--eps -1", "--eps 2", "--eps x", "--attack nope", "--attack_steps 0", "--attack_steps -2"),
            *("--limit 0", "--batch_size 0", "--probe -1", "--norm l7", "--protocol x", "--target nobody"),
            *("--baseline /nowhere", "--dataset", "--suite lab", "--model {file}", "--split nope", "--classes a b"),
            *("--output_dir {file}", "--templates a"),
        )
    },
    "transfer": {
        "": ("", "--models {model} --dataset {data}", "--model {model} --dataset {data}"),
        TRANSFER: (
            "--eps 0",
            "--eps -1",
            "--dataset /nowhere",
            "--proxies /nowhere",
            "--attack_steps 0",
            "--limit -1",
        ),
    },
    "verify": {"": ("", "/nowhere", "{model}", "{model} --results /nowhere", "{model} --limit 0")},
    "interpolate": {
        DIAL: (
            *(
                "--weights",
                "--weights 2",
                "--weights nan",
                "--origin {proxy}",
                "--max_drop nan",
                "--eps -1",
                "--limit 0",
            ),
            *("--batch_size 0", "--attack nope", "--attack_steps 0", "--output_dir {model}/in"),
        ),
        "": ("", "/nowhere"),
    },
    "convert": {
        "": ("", "{model}", "/nowhere {out}", "{file} {out}", "{file} {out} --base {model}", "{model} {model}"),
        "{model} {out}": ("--to nope", "--dtype int8", "--to vision_tower --image_size 0", "--image_size 64"),
    },
    "push": {"": ("", "/nowhere a/b", "{model} a/b", "{empty} a/b", "{model}")},
    "estimate": {TRAIN: ("--probe_steps 0", "--probe_steps -1", "--model /nowhere"), "": ("",)},
    "quickstart": {"": ("--limit 0", "--limit -1", "--seed x", "--nope", "--output_dir {file}")},
    "pretrain": {"": ("", "--nope", "--steps 0", "--batch_size 0", "--start /nowhere")},
    "demo": {"": ("--nope", "--port x")},
}
LINES = [(c, f"{start} {more}".strip()) for c, part in WRONG.items() for start, ends in part.items() for more in ends]


@pytest.fixture(scope="module")
def places(tmp_path_factory, paths):
    root = tmp_path_factory.mktemp("wrong")
    (root / "file.txt").write_text("x")
    (root / "empty").mkdir()
    data = write_image_folder(root / "data", make_images())
    return {"data": data, "model": paths[0], "proxy": paths[1], "file": root / "file.txt", "empty": root / "empty"}


@pytest.mark.parametrize(("command", "line"), LINES, ids=lambda v: v.replace("--", ""))
@pytest.mark.filterwarnings("ignore")
@mock.patch.dict(os.environ)  # --fsdp sets variables, for good
def test_a_wrong_line_is_one_line_and_writes_nothing(command, line, places, tmp_path):
    argv = line.format(**places, out=tmp_path / "out").split()
    if "--output_dir" not in argv and command not in ("verify", "convert", "push", "demo"):
        argv += ["--output_dir", str(tmp_path / "out")]
    with pytest.raises(SystemExit) as stop:
        importlib.import_module(f"hpt_hf.commands.{command}").main(argv)
    said = stop.value.code
    assert isinstance(said, str) and said.startswith(f"hpt-hf {command}: ") and "\n" not in said and len(said) < 900
    assert not [f for f in tmp_path.rglob("*") if f.is_file()]


def test_an_unknown_command_is_one_line(capsys):
    with pytest.raises(SystemExit) as stop:
        cli.main(["trian"])
    assert stop.value.code == 2 and "did you mean train" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("error", "code", "says"),
    [
        (KeyboardInterrupt(), 130, "interrupted. The same command goes on"),
        (RuntimeError("PytorchStreamWriter failed writing file"), "x: no space left on the disk", ""),
        (OSError(28, "No space left on device"), "x: [Errno 28] No space left on device", ""),
    ],
)
def test_what_stops_a_command_from_outside_says_how_to_go_on(error, code, says, capsys):
    with pytest.raises(SystemExit) as stop, exit_on_user_error("x"):
        raise error
    assert str(stop.value.code).startswith(str(code)) and says in capsys.readouterr().err


def test_a_fault_of_ours_is_a_traceback():
    with pytest.raises(KeyError), exit_on_user_error("x"):
        raise KeyError("a")
