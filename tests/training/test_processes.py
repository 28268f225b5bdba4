"""Proves that two processes train, log, stream, evaluate and estimate as one does, stay in step, and survive a kill.

Run by torchrun this file is its own worker: gloo on CPU, weights and metrics of each rank written to a folder.
"""

from __future__ import annotations

import json
import os
import random
import re
import subprocess
import sys
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
    save_tiny_clip,
    torchrun,
    trainer_from_disk,
    weights,
    write_image_folder,
    write_stream,
)
from safetensors.torch import load_file

from hpt_hf.commands import evaluate
from hpt_hf.commands.train import main
from hpt_hf.evaluation import evaluator
from hpt_hf.utils import shutdown_distributed

pytestmark = pytest.mark.multiprocess
RECIPES = Path(__file__).parent.parent.parent / "recipes"


# --- the Trainer


def train(folder: Path, paths, batch_size: int) -> dict:
    """HPT-GPD over its switch and two epochs, then the held-out slice, which no number of processes divides."""
    # Rates at which one pixel whose gradient is rounded to the other sign does not reach the sixth decimal.
    rates = {"warm_up_learning_rate": 3e-4, "learning_rate": 1e-3}
    schedule = gpd_schedule(warm_up_steps=10, steps=10, interval=4, **rates)
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


def worker(folder: str, *paths: str) -> None:
    torch.save(train(Path(folder) / "out", paths, batch_size=4), Path(folder) / f"rank{os.environ['RANK']}.pt")
    shutdown_distributed()


@pytest.fixture(scope="module")
def two(tmp_path_factory, paths) -> list[dict]:
    folder = tmp_path_factory.mktemp("two")
    launch(2, __file__, str(folder), *paths)
    ranks = [torch.load(folder / f"rank{r}.pt") for r in (0, 1)]
    ranks[0]["files"] = {p.name for p in (folder / "out" / "checkpoint-10").iterdir()}
    return ranks


@pytest.fixture(scope="module")
def one(tmp_path_factory, paths) -> dict:
    return train(tmp_path_factory.mktemp("one"), paths, batch_size=8)


def test_two_processes_equal_one_at_the_same_global_batch_and_each_other(one, two):
    """A loss that bypassed DDP's wrapper would let them drift apart silently."""
    kinds = [r["kind"] for r in (one, *two)]
    assert kinds == [(1, "ZeroShotClassifier"), *2 * [(2, "DistributedDataParallel")]], (
        "or one is compared with itself"
    )
    for what, moved in (("weights", 1e-3), ("average", 1e-4)):
        assert largest_difference(two[0][what], two[1][what]) == 0
        assert largest_difference(one[what], two[0][what]) < 1e-6
        assert largest_difference(one[what], {n: one["vanilla"][n] for n in one[what]}) > moved


def test_the_log_is_the_mean_over_the_processes_and_every_held_out_image_counts_once(one, two):
    assert [e["phase"] for e in one["log"]] == ["ga"] * 10 + ["hpt"] * 10
    for a, b in zip(one["log"], two[0]["log"], strict=True):
        assert a.keys() == b.keys()
        for key in a.keys() - {"phase", "grad_norm"}:
            assert b[key] == pytest.approx(a[key], rel=1e-3, abs=2e-5), key
    for rank in two:
        assert rank["metrics"] == pytest.approx(one["metrics"])


def test_one_pivot_is_saved_beside_the_checkpoint_and_the_state_of_both(two):
    files = two[0]["files"]
    assert {"gpd_pivot.safetensors", "model.safetensors", "rng_state_0.pth", "rng_state_1.pth"} <= files
    assert not [f for f in files if f.endswith(".part")]


# --- the commands


FLAGS = "--method hpt_gpd --use_cpu true --disable_tqdm true --eps 8/255"


@pytest.mark.parametrize("source", ["folder", "stream"])
def test_the_recipe_trains_on_two_processes_as_on_one_and_exports_once(source, tmp_path, paths, monkeypatch):
    """`recipes/train.py` under a launcher; of a stream, each process decodes its own half of every batch.

    Of a folder with two proxies at once.
    """
    proxies = paths[1] if source == "stream" else f"{paths[1]} {save_tiny_clip(tmp_path / 'second', seed=7)}"
    monkeypatch.setattr(datasets.config, "SLEEP_TIME_ON_THREADS_SHUTDOWN", 0)  # in this process
    if source == "folder":
        more = f"--dataset {write_image_folder(tmp_path / 'data', make_images())} --held_out 0.2 --max_steps 4"
    else:
        data = write_stream(tmp_path / "data", make_images(43))
        more = f"--dataset {data} --streaming true --interval 3 --ga_learning_rate 1e-3 --max_steps 8"
    flags = f"{FLAGS} --learning_rate 1e-3 --model {paths[0]} --proxy {proxies} {more} --per_device_train_batch_size"
    out = [tmp_path / f"out{count}" for count in (1, 2)]
    main([*flags.split(), "8", "--output_dir", str(out[0])])
    launch(2, str(RECIPES / "train.py"), *flags.split(), "4", "--output_dir", str(out[1]))
    alone, together = (json.loads((folder / "train.json").read_text()) for folder in out)
    assert alone["batch"] == together["batch"] == 8 and (alone["processes"], together["processes"]) == (1, 2)
    assert alone["held_out"] == together["held_out"] and bool(alone["held_out"]) == (source == "folder")
    ours, theirs, vanilla = (load_file(Path(f) / "model.safetensors") for f in (*out, paths[0]))
    assert largest_difference(ours, theirs) < 1e-6 and largest_difference(ours, vanilla) > 1e-4


def test_two_processes_estimate_together_and_one_speaks(tmp_path, paths):
    data = write_image_folder(tmp_path / "data", make_images())
    flags = f"{FLAGS} --dataset {data} --model {paths[0]} --proxy {paths[1]} --held_out 0.2 --num_train_epochs 50"
    flags += f" --per_device_train_batch_size 4 --probe_steps 2 --output_dir {tmp_path / 'out'}"
    said = launch(2, str(RECIPES / "estimate.py"), *flags.split())
    assert len(re.findall(r"a step of hpt +\| +200 \|", said)) == 1 and said.count("hours on 2 processes") == 1
    assert not (tmp_path / "out").exists()


def until_done(folder: Path, flags: list[str], kills: list[float]) -> int:
    """Train on two processes, killing all of them so many seconds after each start, and resuming.

    Returns how many kills struck a run that was not done.
    """
    options = [*flags, "--output_dir", str(folder), "--resume_from_checkpoint", "true"]
    log, struck = folder.with_suffix(".log"), 0
    for delay in (*kills, None):
        command = torchrun(2, str(RECIPES / "train.py"), *options)
        with log.open("a") as file:
            process = subprocess.Popen(command, stdout=file, stderr=file, start_new_session=True)
        try:
            assert process.wait(timeout=delay or 240) == 0, log.read_text()
        except subprocess.TimeoutExpired:
            assert delay is not None, "the last run must end"
            struck += 1
        finally:
            if process.poll() is None:
                # The launcher gives each worker a session of its own: they are found as its children.
                for victim in (*psutil.Process(process.pid).children(recursive=True), process):
                    victim.kill()
            process.wait()
    return struck


RANDOM = random.Random(int(os.environ.get("KILL_SEED", "0")))


@pytest.mark.parametrize(
    ("kills", "steps"),
    [
        ([2.0, 14.0], 150),  # the first falls into the imports: `--resume_from_checkpoint true` begins then
        pytest.param([RANDOM.uniform(5, 12) for _ in range(6)], 600, marks=pytest.mark.slow),
    ],
    ids=["twice", "at random moments"],
)
def test_two_processes_that_are_killed_end_as_if_left_alone(kills, steps, tmp_path, paths):
    data = write_image_folder(tmp_path / "data", make_images())
    flags = f"{FLAGS} --max_steps {steps} --interval 7 --learning_rate 1e-2 --ga_learning_rate 1e-3 --dataset {data}"
    flags += f" --model {paths[0]} --proxy {paths[1]} --per_device_train_batch_size 4"
    flags += " --save_strategy steps --save_steps 3"
    assert until_done(tmp_path / "alone", flags.split(), []) == 0
    assert until_done(tmp_path / "killed", flags.split(), kills) >= 1, "killed too late to prove anything"
    folders = (tmp_path / "killed", tmp_path / "alone", Path(paths[0]))
    ours, theirs, vanilla = (load_file(folder / "model.safetensors") for folder in folders)
    assert largest_difference(ours, theirs) == 0 and largest_difference(ours, vanilla) > 1e-4


# --- evaluation


@pytest.fixture(scope="module")
def evaluated(tmp_path_factory, trained) -> tuple[list[str], Path, Path]:
    """The flags of an evaluation, and the folders that one process and two processes filled."""
    folder = tmp_path_factory.mktemp("evaluated")
    trained.save_pretrained(folder / "model")
    data = write_image_folder(folder / "data", make_images())
    flags = "--attack apgd-ce square --attack_steps 20 --probe 4 --batch_size 8 --eps 16/255"
    flags = [*flags.split(), "--model", str(folder / "model"), "--dataset", data]
    evaluate.main([*flags, "--output_dir", str(folder / "one")])
    launch(2, str(RECIPES / "evaluate.py"), *flags, "--output_dir", str(folder / "two"))
    return flags, folder / "one", folder / "two"


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


def test_each_process_answered_some_of_the_batches_and_none_was_answered_twice(evaluated):
    _, one, two = evaluated
    alone, shared = findings(one), findings(two)
    assert alone.keys() == shared.keys() and len(shared) == 2
    for question, ranks in shared.items():
        assert list(alone[question]) == ["0"] and list(ranks) == ["0", "1"]
        batches = [[name for name in names if name.startswith("batch ")] for names in ranks.values()]
        assert [len(b) for b in batches] == [3, 2]
        assert all(len(names) > len(b) for names, b in zip(ranks.values(), batches, strict=True))
        assert sorted(ranks["0"] + ranks["1"]) == sorted(alone[question]["0"])


def test_a_run_begun_by_two_processes_goes_on_with_one(evaluated, tmp_path, monkeypatch):
    """What both left is cut off in the middle, one of them in the middle of a line."""
    flags, one, two = evaluated
    (tmp_path / "progress").mkdir()
    left = 0
    for file in (two / "progress").iterdir():
        lines = file.read_bytes().splitlines(keepends=True)
        keep = 2 if file.stem.endswith("-0") else 1
        (tmp_path / "progress" / file.name).write_bytes(b"".join(lines[:keep]) + lines[keep][:-9])
        left += keep
    answered, attack_batch = [], evaluator.attack_batch
    monkeypatch.setattr(evaluator, "attack_batch", lambda *a, **k: answered.append(a[1]) or attack_batch(*a, **k))
    evaluate.main([*flags, "--output_dir", str(tmp_path)])
    assert left == 6 and len(answered) == 10 - left
    assert results(tmp_path) == results(one)


if __name__ == "__main__":
    worker(*sys.argv[1:])
