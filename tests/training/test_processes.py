"""Proves that two processes train, log, stream, evaluate and estimate as one does, stay in step, and survive a kill.

Run by torchrun this file is its own worker, which does all of it in one launch: gloo on CPU.
"""

from __future__ import annotations

import json
import os
import random
import re
import subprocess
import sys
import time
from pathlib import Path

import datasets
import psutil
import pytest
import torch
from conftest import (
    gpd_schedule,
    largest_difference,
    launch,
    make_images,
    torchrun,
    trainer_from_disk,
    weights,
    write_image_folder,
    write_stream,
)
from safetensors.torch import load_file

from hpt_hf.commands import estimate, evaluate
from hpt_hf.commands import train as train_command
from hpt_hf.evaluation import evaluator
from hpt_hf.utils import processes, shutdown_distributed

pytestmark = pytest.mark.multiprocess
RECIPE = Path(__file__).parent.parent.parent / "recipes" / "train.py"
COMMANDS = {"stream": train_command, "long": train_command, "evaluate": evaluate, "estimate": estimate}


def train(folder: Path, paths, batch_size: int) -> dict:
    """HPT-GPD over its switch and two epochs, then the held-out slice, which no number of processes divides."""
    # Rates at which one pixel whose gradient is rounded to the other sign does not reach the sixth decimal.
    rates = {"warm_up_learning_rate": 3e-4, "learning_rate": 1e-3}
    schedule = gpd_schedule(warm_up_steps=5, steps=5, interval=2, **rates)
    sizes = {f"per_device_{kind}_batch_size": batch_size for kind in ("train", "eval")}
    save = {"save_strategy": "steps", "save_steps": 10}
    trainer = trainer_from_disk(folder, paths, schedule, held_out=make_images(19, seed=3), **sizes, **save)
    vanilla = weights(trainer.model)
    trainer.train()
    metrics = trainer.evaluate()
    return {
        "kind": (trainer.args.world_size, type(trainer.model_wrapped).__name__),
        "log": [e for e in trainer.state.log_history if "loss" in e],
        "metrics": {k: metrics[k] for k in ("eval_clean_accuracy", "eval_robust_accuracy")},
        "vanilla": vanilla,
        "weights": weights(trainer.model),
        "average": dict(trainer.gpd.average),
    }


def worker(place: Path, *paths: str) -> None:
    """Each command would take the group down at its end."""
    datasets.config.SLEEP_TIME_ON_THREADS_SHUTDOWN = 0
    torch.save(train(place / "trained", paths, batch_size=4), place / f"rank{os.environ['RANK']}.pt")
    for name, argv in json.loads((place / "flags.json").read_text()).items():
        COMMANDS[name].shutdown_distributed = lambda: processes().wait_for_everyone()
        COMMANDS[name].main([*argv, "--output_dir", str(place / "two" / name)])
    shutdown_distributed()


@pytest.fixture(scope="module")
def launched(tmp_path_factory, paths, trained) -> tuple[Path, dict[str, list[str]], str]:
    """The folder in which two processes have trained and run every command, the flags of each, and what was said."""
    place = tmp_path_factory.mktemp("processes")
    trained.save_pretrained(place / "model")
    images, stream = write_image_folder(place / "images", make_images()), write_stream(place / "s", make_images(43))
    gpd = f"--method hpt_gpd --use_cpu true --disable_tqdm true --eps 8/255 --model {paths[0]} --proxy {paths[1]}"
    more = {
        "stream": f"{gpd} --dataset {stream} --streaming true --interval 3 --max_steps 8 --learning_rate 1e-3"
        " --ga_learning_rate 1e-3",
        "long": f"{gpd} --dataset {images} --interval 7 --max_steps 30 --learning_rate 1e-2 --ga_learning_rate 1e-3"
        " --save_strategy steps --save_steps 3 --resume_from_checkpoint true",
        "evaluate": f"--attack apgd-ce square --attack_steps 20 --probe 4 --batch_size 8 --eps 16/255"
        f" --model {place / 'model'} --dataset {images}",
        "estimate": f"{gpd} --dataset {images} --held_out 0.2 --num_train_epochs 50 --probe_steps 2",
    }
    flags = {name: told.split() for name, told in more.items()}
    for name in flags.keys() - {"evaluate"}:
        flags[name] += ["--per_device_train_batch_size", "4"]
    (place / "flags.json").write_text(json.dumps(flags))
    return place, flags, launch(2, __file__, str(place), *paths)


def test_two_processes_equal_one_at_the_same_global_batch_and_each_other(launched, tmp_path, paths):
    """A loss that bypassed DDP's wrapper would let them drift apart silently."""
    one, two = train(tmp_path, paths, batch_size=8), [torch.load(launched[0] / f"rank{r}.pt") for r in (0, 1)]
    kinds = [r["kind"] for r in (one, *two)]
    assert kinds == [(1, "ZeroShotClassifier"), *2 * [(2, "DistributedDataParallel")]], "or one is its own equal"
    for what, moved in (("weights", 1e-3), ("average", 1e-4)):
        assert largest_difference(two[0][what], two[1][what]) == 0
        assert largest_difference(one[what], two[0][what]) < 1e-6
        assert largest_difference(one[what], {n: one["vanilla"][n] for n in one[what]}) > moved
    # The log is the mean over the processes, and every held-out image counts once.
    assert [e["phase"] for e in one["log"]] == ["ga"] * 5 + ["hpt"] * 5
    for a, b in zip(one["log"], two[0]["log"], strict=True):
        assert a.keys() == b.keys()
        for key in a.keys() - {"phase", "grad_norm"}:
            assert b[key] == pytest.approx(a[key], rel=1e-3, abs=2e-5), key
    for rank in two:
        assert rank["metrics"] == pytest.approx(one["metrics"])
    # One pivot stands beside the checkpoint, and the random state of both.
    files = {p.name for p in (launched[0] / "trained" / "checkpoint-10").iterdir()}
    assert {"gpd_pivot.safetensors", "model.safetensors", "rng_state_0.pth", "rng_state_1.pth"} <= files
    assert not [f for f in files if f.endswith(".part")]


# --- the commands


def test_the_recipe_trains_on_two_processes_as_on_one_and_exports_once(launched, tmp_path, paths, monkeypatch):
    """Of a stream, where each process decodes its own half of every batch."""
    monkeypatch.setattr(datasets.config, "SLEEP_TIME_ON_THREADS_SHUTDOWN", 0)  # in this process
    place, flags, _ = launched
    train_command.main([*flags["stream"][:-1], "8", "--output_dir", str(tmp_path)])
    out = [tmp_path, place / "two" / "stream"]
    alone, together = (json.loads((folder / "train.json").read_text()) for folder in out)
    assert alone["batch"] == together["batch"] == 8 and (alone["processes"], together["processes"]) == (1, 2)
    ours, theirs, vanilla = (load_file(Path(f) / "model.safetensors") for f in (*out, paths[0]))
    assert largest_difference(ours, theirs) < 1e-6 and largest_difference(ours, vanilla) > 1e-4


def test_two_processes_estimate_together_and_one_speaks(launched):
    place, _, said = launched
    assert len(re.findall(r"a step of hpt +\| +200 \|", said)) == 1 and said.count("hours on 2 processes") == 1
    assert not (place / "two" / "estimate").exists()


def kill(command: list[str], folder: Path, saves: int, seconds: float) -> None:
    """Start the launcher, and kill it with its workers so many seconds after so many more checkpoints stand."""

    def stand() -> int:
        return len(list(folder.glob("checkpoint-*")))

    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True)
    try:
        awaited, deadline = stand() + saves, time.monotonic() + 240
        while stand() < awaited and process.poll() is None and time.monotonic() < deadline:
            time.sleep(0.005)
        time.sleep(seconds)
        assert process.poll() is None, "killed too late to prove anything"
    finally:
        if process.poll() is None:
            # The launcher gives each worker a session of its own: they are found as its children.
            for victim in (*psutil.Process(process.pid).children(recursive=True), process):
                victim.kill()
        process.wait()


RANDOM = random.Random(int(os.environ.get("KILL_SEED", "0")))
MOMENTS = [(0, RANDOM.uniform(1, 5)), *((1, RANDOM.uniform(0, 0.1)) for _ in range(4))]


# Once while a checkpoint is being saved; or first while it starts, and then anywhere.
@pytest.mark.parametrize(
    "moments", [[(2, 0)], pytest.param(MOMENTS, marks=pytest.mark.slow)], ids=["once", "at random moments"]
)
def test_two_processes_that_are_killed_end_as_if_left_alone(moments, launched, tmp_path, paths):
    place, flags, _ = launched
    command = [str(RECIPE), *flags["long"], "--output_dir", str(tmp_path)]
    for saves, seconds in moments:
        kill(torchrun(2, *command), tmp_path, saves, seconds)
    launch(2, *command)
    ours, theirs, vanilla = (load_file(Path(f, "model.safetensors")) for f in (tmp_path, place / "two/long", paths[0]))
    assert largest_difference(ours, theirs) == 0 and largest_difference(ours, vanilla) > 1e-4


# --- evaluation


@pytest.fixture(scope="module")
def evaluated(launched) -> tuple[list[str], Path, Path]:
    """The flags of an evaluation, and the folders that one process and two processes filled."""
    place, flags, _ = launched
    evaluate.main([*flags["evaluate"], "--output_dir", str(place / "one")])
    return flags["evaluate"], place / "one", place / "two" / "evaluate"


def findings(folder: Path) -> dict[str, dict[str, list[str]]]:
    """Question -> rank -> the names of what it found, in order."""
    found: dict[str, dict[str, list[str]]] = {}
    for file in sorted((folder / "progress").iterdir()):
        question, rank = file.stem.split("-")
        found.setdefault(question, {})[rank] = [json.loads(line)["name"] for line in file.read_text().splitlines()]
    return found


def results(folder: Path) -> dict[str, str]:
    """What an evaluation leaves for its reader, the seconds it took apart."""
    files = [*folder.glob("results/*"), *folder.glob("gallery/*"), folder / "report.md", folder / "report.html"]
    seconds = r'"seconds": [\d.]+|[\d.]+ s on '
    return {str(f.relative_to(folder)): re.sub(seconds, "", f.read_text()) for f in files}


def test_two_processes_evaluate_as_one(evaluated):
    _, one, two = evaluated
    assert results(two) == results(one) and len(results(one)) == 6
    robust = [json.loads(f.read_text())["robust"] for f in (two / "results").iterdir()]
    assert any(0 < value < 100 for value in robust), "an attack that does all or nothing proves nothing"
    # Each answered some of the batches, and none was answered twice.
    alone, shared = findings(one), findings(two)
    assert alone.keys() == shared.keys() and len(shared) == 2
    for question, ranks in shared.items():
        assert [sum(name.startswith("batch ") for name in names) for names in ranks.values()] == [3, 2]
        assert sorted(ranks["0"] + ranks["1"]) == sorted(alone[question]["0"])


def test_a_run_begun_by_two_processes_goes_on_with_one(evaluated, tmp_path, monkeypatch):
    """What both left is cut off in the middle, one of them in the middle of a line."""
    flags, one, two = evaluated
    (tmp_path / "progress").mkdir()
    for file in (two / "progress").iterdir():
        lines = file.read_bytes().splitlines(keepends=True)
        keep = 2 if file.stem.endswith("-0") else 1
        (tmp_path / "progress" / file.name).write_bytes(b"".join(lines[:keep]) + lines[keep][:-9])
    answered, attack_batch = [], evaluator.attack_batch
    monkeypatch.setattr(evaluator, "attack_batch", lambda *a, **k: answered.append(a[1]) or attack_batch(*a, **k))
    evaluate.main([*flags, "--output_dir", str(tmp_path)])
    assert len(answered) == 4, "of ten batches six were left"
    assert results(tmp_path) == results(one)


if __name__ == "__main__":
    worker(Path(sys.argv[1]), *sys.argv[2:])
