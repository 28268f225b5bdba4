"""A wrong command line costs one line that says what is wrong, whatever the command, and writes nothing."""

import importlib
import os
import re
import shlex
from unittest import mock

import pytest
import torch
from conftest import contents, make_images, relabelled, write_image_folder
from transformers import CLIPModel

from hpt_hf import cli
from hpt_hf.commands.parser import exit_on_user_error
from hpt_hf.utils import write_json

TRAIN = "--method tecoa --dataset {data} --model {model} --use_cpu true --max_steps 1 --per_device_train_batch_size 8"
GPD = f"{TRAIN} --method hpt_gpd --proxy {{proxy}}"
EVALUATE, TRANSFER = "--model {model} --dataset {data}", "--model {model} --proxies {proxy} --dataset {data}"
BETWEEN = "transfer is between models: got .* alone, expected at least two"
WHICH = "expected --model STUDENT --proxies"
DIAL = "{model} --origin {model} --choose_on {data}"


def ends(text: str) -> dict[str, str]:
    """Ends of lines whose refusals are told in other tests, or by argparse."""
    return dict.fromkeys(text.split(" | "), "")


def numbers(name: str, *values) -> dict[str, str]:
    return {f"--{name} {value}": rf"{name}: got {value}(\.0)?, expected" for value in values}


# Command -> how its line begins -> how it ends -> what the refusal says.
WRONG = {
    "train": {
        TRAIN: {
            **ends("--eps 0 | --eps -1 | --eps nan | --eps 1e400 | --norm l3 | --ga_epochs -3 | --temperature 0"),
            **ends("--held_out nan | --method nope | --config | --model {file} | --dataset {empty} | --split nope"),
            **ends("--dataset {file} | --classes a | --classes_file /nowhere | --config {empty} | --license"),
            **ends("--config /nowhere.yaml | --output_dir {file} | --resume_from_checkpoint /nowhere"),
            **ends("--lr_scheduler_type nope | --optim nope | --report_to nope | --report_to wandb | --seed x"),
            **ends("--eval_strategy steps | --load_best_model_at_end true | --fsdp full_shard"),
            **ends("--deepspeed x.json | --hub_token x | --label_smoothing_factor 0.1 | --model {empty}"),
            **ends("--do_train false | --bf16_full_eval true | --ignore_data_skip true"),
            **numbers("num_train_epochs", 0, -1, "inf", "nan"),
            **numbers("per_device_train_batch_size", 0),
            **numbers("gradient_accumulation_steps", 0),
            **numbers("save_steps", 0),
            **numbers("logging_steps", -1),
            **numbers("learning_rate", -1, "nan"),
            **numbers("max_grad_norm", "nan"),
            **numbers("weight_decay", -1),
            **numbers("warmup_steps", -1),
            **numbers("seed", -1),
            **numbers("max_steps", 0, -2),
            "--dataset /nowhere/pictures": "no data at /nowhere/pictures",
            "--dataset nobody/no-such-pictures": "nobody/no-such-pictures",
            "--model /nowhere/clip": "no model at /nowhere/clip",
            "--model nobody/no-such-clip": "nobody/no-such-clip",
            "--eps 8": "Fix: '8/255'",
            "--learning_rat 1": "did you mean learning_rate",
            "--per_device_train_batch_size 64": "40 training images do not fill one batch of 64",
            "--method hpt": "hpt learns from a proxy",
            "--method fare --attack_random_start false": "fare: got an attack that starts from the image itself",
            "--output_dir {data}": "lies in --dataset .*, which is read",
            "--images 5": "--images says how long a stream is",
            "--streaming true": "cannot be streamed",
            "--streaming true --held_out 0.1": "a stream is not looked at",
            "--held_out 1": "held_out=1.0: expected a share of at least 0 and below 1",
            "--templates x": "'{}' exactly once",
            "--classes a b --classes_file {file}": "both --classes and --classes_file",
            "--attack_steps 0": "attack_steps: got 0, expected at least 1",
            "--attack_step_size 0": "attack_step_size: got '0', expected more than 0",
            "--attack_step_size 2": "attack_step_size: got '2'.* did you mean '2/255'",
            "--attack_step_size=-1/255": "attack_step_size: got '-1/255', expected a fraction",
        },
        GPD: {
            **ends("--ga_epochs nan | --pull nan | --interval 0 | --ga_learning_rate -1"),
            "--ema 9": "ema: got 9.0, expected a ratio between 0 and 1",
            "--max_steps 1": "max_steps: got 1, expected at least 2",
            "--output_dir {proxy}": "lies in --proxy .*, which is read",
        },
    },
    "evaluate": {
        EVALUATE: {
            **ends("--eps 0 | --eps -1 | --eps 2 | --eps x | --attack_steps -2 | --norm l7 | --target nobody"),
            **ends("--baseline /nowhere | --dataset | --model {file} | --split nope | --classes a b"),
            **ends("--output_dir {file} | --templates a | --suite no"),
            "--suite lab": "one of them",
            "--limit 0": "--limit: got 0",
            "--batch_size 0": "--batch_size: got 0",
            "--probe -1": "--probe: got -1, expected at least 0 images",
            "--eps 1/255 4": "Fix: '4/255'",
            "--attack apgd": "no attack is called 'apgd'; did you mean pgd or apgd-t or apgd-ce",
            "--attack standard --target a": "no attack towards a target is called",
            "--attack_steps 0": "steps=0: expected at least 1",
            "--protocol full": "invalid choice: 'full'",
            "--dataset {data} /nowhere": "no data at /nowhere",  # opened before the first is attacked
            "--dataset {data} {few} --target cat": "'cat' is none of the 2 classes of few",
            "--dataset cifar11": "no set of that name; did you mean cifar10 or cifar100",
            "--dataset lab:digit": "the lab has no task 'digit'; it has digits",
            "--dataset real:digits": "real:digits lies in a folder of real images: give it with --data_dir",
            "--dataset pets --classes a b": "its own classes and prompts: leave out --classes",
            "--output_dir {old}": "old.json is no result that can be read: missing",
        },
        "--model {model}": {
            "": "say what to evaluate on",
            "--suite zero-shot-17 --templates x --label_column y": "cifar10 .*leave out --templates, --label_column",
        },
    },
    "transfer": {
        "--dataset {data}": {
            **dict.fromkeys(("", "--model {model}", "--proxies {model}"), WHICH),
            "--model {model} --proxies {model} --models {model}": WHICH,
            **dict.fromkeys(("--models {model}", "--model {model} --proxies {model}"), BETWEEN),
            "--models {model} /gone/or/never": "no model at /gone",
        },
        TRANSFER: ends("--eps 0 | --eps -1 | --dataset /nowhere | --attack_steps 0 | --limit -1"),
    },
    "verify": {
        "": {"": "required: --model", "/nowhere": "/nowhere", "--limit 3": "required: --model"},
        "{model}": {
            "": "no results in .*: nothing is claimed",
            "--results {empty}": "no results in .*empty: nothing is claimed",
            "--results /nowhere": "/nowhere",
        },
    },
    "interpolate": {
        DIAL: {
            "": "are the same weights",
            "--weights": "expected at least one argument",
            "--weights -0.1 1": "expected shares from 0",
            **dict.fromkeys(("--weights 0.5 1.5", "--weights nan 1", "--save 1.5"), "expected shares"),
            "--weights 0": "two at least",
            **{f"--max_drop {drop}": f"--max_drop: got {drop}" for drop in ("-1", "inf", "nan")},
            "--mask 1": "--mask: got 1.0",
            "--norm l2": "Fix: --eps",
            "--eps 8": "Fix: '8/255'",
            "--origin {proxy}": "differ in architecture .*--origin",
        },
        "": {"": "required: --model", "/nowhere": "/nowhere", "{model}": "has no train.json .*--origin"},
    },
    "convert": {
        "": {
            "": "required: --model, --output_dir",
            "{model}": "--output_dir",
            "/nowhere {out}": "no model at /nowhere",
            "{file} {out}": "a file of weights: name the CLIP .*--base",
            "{model} {link}": "lies in --model .*, which is read",
            "{weights} {model} --base {model}": "lies in --base .*, which is read",
            "{out}.pt {out} --base {model}": "no checkpoint at .*out.pt: neither a file",
            "{weights} {out} --base {out}-3": "no model at .*out-3",
            "{weights} {out} --base {proxy}": "a base of the same architecture",
        },
        "{model} {out}": {
            "--dtype int8": "--dtype: invalid choice: 'int8'",
            "--max_shard_size much": "much|size",
            "--image_size 64": "--image_size is for --to vision_tower, this is --to transformers",
            "--to open_clip --dtype float16": "--to open_clip writes float32",
            "--to vision_tower --image_size 50": "image_size 50: .*; 48 would do",
        },
    },
    "leaderboard": {
        "": {
            "": "results: got none, expected folders",
            "{empty}": "results: got .*, expected a folder with results",
            "--zoo {empty}": "--zoo: got .*, expected a folder with a JSON file a model",
        }
    },
    "push": {"": dict.fromkeys(("", "/nowhere a/b", "{model} a/b", "{empty} a/b", "{model}"), "")},
    "estimate": {
        TRAIN: ends("--probe_steps -1 | --model /nowhere")
        | {"--probe_steps 0": "probe_steps: got 0", "--probe_stepz 4": "probe_stepz"},
        "": {"": ""},
    },
    "quickstart": {"": ends("--limit 0 | --limit -1 | --seed x | --nope | --smoke --output_dir {file}")},
    "pretrain": {"": {"": ""} | ends("--nope | --steps 0 | --batch_size 0 | --start /nowhere")},
    "demo": {"": ends("--nope | --port x")},
}
LINES = [
    pytest.param(command, f"{start} {end}", says, id=f"{command} {end}".replace("--", ""))
    for command, lines in WRONG.items()
    for start, part in lines.items()
    for end, says in part.items()
]


@pytest.fixture(scope="module")
def places(tmp_path_factory, paths):
    root = tmp_path_factory.mktemp("wrong")
    names = {name: root / name for name in ("file", "empty", "old", "link", "weights", "data", "few")}
    names["file"].write_text("x")
    names["empty"].mkdir()
    write_json(names["old"] / "scores" / "old.json", {"robust": 1.0, "versions": {"hpt_hf": "0.0.9"}})
    names["link"].symlink_to(paths[0])
    torch.save(CLIPModel.from_pretrained(paths[0]).state_dict(), names["weights"])
    write_image_folder(names["data"], make_images())
    few = make_images(10).select((1, 2, 6, 7))
    write_image_folder(names["few"], relabelled(few, [0, 1, 0, 1], ("dog", "house")))
    return names | {"model": paths[0], "proxy": paths[1]}


@pytest.mark.parametrize(("command", "line", "says"), LINES)
@pytest.mark.filterwarnings("ignore")
@mock.patch.dict(os.environ)  # --fsdp sets variables, for good
def test_a_wrong_line_is_one_line_and_writes_nothing(command, line, says, places, tmp_path):
    argv = shlex.split(line.format(**places, out=tmp_path / "out"))
    if "--output_dir" not in argv and command not in ("verify", "convert", "push", "demo"):
        argv += ["--output_dir", str(tmp_path / "out")]
    read = places["data"].parent, places["model"]
    stood = [contents(folder) for folder in read]
    with pytest.raises(SystemExit) as stop:
        importlib.import_module(f"hpt_hf.commands.{command}").main(argv)
    said = stop.value.code
    assert isinstance(said, str) and said.startswith(f"hpt-hf {command}: ") and "\n" not in said and len(said) < 900
    assert re.search(says, said) and not [f for f in tmp_path.rglob("*") if f.is_file()]
    assert [contents(folder) for folder in read] == stood


def test_an_unknown_command_is_one_line(capsys):
    with pytest.raises(SystemExit) as stop:
        cli.main(["trian"])
    assert stop.value.code == 2 and "did you mean train" in capsys.readouterr().err


STOPS = [
    (KeyboardInterrupt(), "130", "interrupted. The same command goes on"),
    (RuntimeError("PytorchStreamWriter failed writing file"), "x: no space left on the disk", ""),
    (OSError(28, "No space left on device"), "x: [Errno 28] No space left on device", ""),
]


@pytest.mark.parametrize(("error", "code", "says"), STOPS)
def test_what_stops_a_command_from_outside_says_how_to_go_on(error, code, says, capsys):
    with pytest.raises(SystemExit) as stop, exit_on_user_error("x"):
        raise error
    assert str(stop.value.code).startswith(code) and says in capsys.readouterr().err


def test_a_fault_of_ours_is_a_traceback():
    with pytest.raises(KeyError), exit_on_user_error("x"):
        raise KeyError("a")
