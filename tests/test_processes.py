"""Proves that two processes train, log and evaluate as one does at the same global batch, across GPD's switch, and stay in step.

Run by torchrun this file is its own worker: gloo on CPU, weights and metrics of each rank written to a folder.
"""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import CLASSES, gpd_schedule, make_pictures, make_trainer, weights

from hpt_hf.zero_shot import ZeroShotCLIP

pytestmark = pytest.mark.multiprocess


def train(folder: Path, student_path: str, proxy_path: str, batch_size: int) -> dict:
    """HPT-GPD over its switch and two epochs, then the held-out slice, which no number of processes divides."""
    student, proxy = (ZeroShotCLIP.load(p).set_classes(CLASSES) for p in (student_path, proxy_path))
    trainer = make_trainer(
        folder,
        student,
        # Rates at which one pixel whose gradient is rounded to the other sign does not reach the sixth decimal.
        gpd_schedule(warm_up_learning_rate=3e-4, learning_rate=1e-3),
        proxy=proxy,
        held_out=make_pictures(19, seed=3),
        per_device_train_batch_size=batch_size,
        per_device_eval_batch_size=batch_size,
        save_strategy="steps",
        save_steps=10,
    )
    trainer.train()
    metrics = trainer.evaluate()
    return {
        "world": trainer.args.world_size,
        "wrapped": type(trainer.model_wrapped).__name__,
        "log": [e for e in trainer.state.log_history if "loss" in e],
        "metrics": {k: metrics[k] for k in ("eval_loss", "eval_clean_accuracy", "eval_robust_accuracy")},
        "weights": weights(student),
        "average": dict(trainer.gpd.average),
    }


def worker(folder: str, student_path: str, proxy_path: str) -> None:
    result = train(Path(folder) / "out", student_path, proxy_path, batch_size=4)
    torch.save(result, Path(folder) / f"rank{os.environ['RANK']}.pt")
    torch.distributed.destroy_process_group()


def launch(count: int, *command: str) -> None:
    """torchrun on a free port; `accelerate launch --cpu --num_processes 2` would silently start one process."""
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    launcher = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", str(count), "--master_port", str(port)]
    done = subprocess.run([*launcher, *command], capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.fixture(scope="module")
def two(tmp_path_factory, student_path, proxy_path) -> list[dict]:
    folder = tmp_path_factory.mktemp("two")
    launch(2, __file__, str(folder), student_path, proxy_path)
    ranks = [torch.load(folder / f"rank{r}.pt") for r in (0, 1)]
    ranks[0]["files"] = sorted(p.name for p in (folder / "out" / "checkpoint-10").iterdir())
    return ranks


@pytest.fixture(scope="module")
def one(tmp_path_factory, student_path, proxy_path) -> dict:
    return train(tmp_path_factory.mktemp("one"), student_path, proxy_path, batch_size=8)


def largest_difference(a: dict, b: dict) -> float:
    assert a.keys() == b.keys() and len(a) > 20
    return max(float((a[n] - b[n]).abs().max()) for n in a)


def test_there_were_two_processes_and_one(one, two):
    """Without this the rest would compare one process with itself."""
    assert [r["world"] for r in two] == [2, 2] and one["world"] == 1
    assert [r["wrapped"] for r in two] == ["DistributedDataParallel"] * 2 and one["wrapped"] == "ZeroShotCLIP"


def test_both_ranks_end_with_identical_weights_and_pivots(two):
    """A loss that bypassed DDP's wrapper would let them drift apart silently."""
    assert largest_difference(two[0]["weights"], two[1]["weights"]) == 0
    assert largest_difference(two[0]["average"], two[1]["average"]) == 0


def test_two_processes_equal_one_at_the_same_global_batch(one, two, student_path):
    vanilla = weights(ZeroShotCLIP.load(student_path))
    assert largest_difference(one["weights"], vanilla) > 1e-3
    assert largest_difference(one["average"], {n: vanilla[n] for n in one["average"]}) > 1e-4
    assert largest_difference(one["weights"], two[0]["weights"]) < 1e-6
    assert largest_difference(one["average"], two[0]["average"]) < 1e-6


def test_the_log_is_the_mean_over_the_processes(one, two):
    assert [e["phase"] for e in one["log"]] == ["ga"] * 5 + ["hpt"] * 5
    for a, b in zip(one["log"], two[0]["log"], strict=True):
        assert a.keys() == b.keys()
        for key in a.keys() - {"phase", "grad_norm"}:
            assert b[key] == pytest.approx(a[key], rel=1e-3, abs=2e-5), key


def test_evaluation_counts_every_picture_once(one, two):
    for rank in two:
        assert rank["metrics"]["eval_clean_accuracy"] == pytest.approx(one["metrics"]["eval_clean_accuracy"])
        assert rank["metrics"]["eval_robust_accuracy"] == pytest.approx(one["metrics"]["eval_robust_accuracy"])


def test_one_pivot_is_saved_beside_the_checkpoint(two):
    files = two[0]["files"]
    assert "gpd_pivot.safetensors" in files and "model.safetensors" in files and not [f for f in files if f.endswith(".part")]
    assert {"rng_state_0.pth", "rng_state_1.pth"} <= set(files)


def test_the_recipe_runs_on_two_processes_and_exports_once(tmp_path, student_path, proxy_path):
    """The road users take: `recipes/train.py` under a launcher, its record and its one line of result."""
    from conftest import write_image_folder
    from safetensors.torch import load_file

    root = Path(__file__).parent.parent
    data = write_image_folder(tmp_path / "data", make_pictures())
    flags = f"--method hpt_gpd --max_steps 4 --use_cpu true --disable_tqdm true --eps 8/255 --learning_rate 1e-3 --dataset {data}"
    flags += f" --model_name_or_path {student_path} --proxy_name_or_path {proxy_path} --held_out 0.2"
    for count, batch in ((1, 8), (2, 4)):
        more = ["--per_device_train_batch_size", str(batch), "--output_dir", str(tmp_path / f"out{count}")]
        launch(count, str(root / "recipes" / "train.py"), *flags.split(), *more)
    records = [json.loads((tmp_path / f"out{c}" / "train.json").read_text()) for c in (1, 2)]
    assert records[0]["batch"] == records[1]["batch"] == 8 and records[0]["steps"] == 4
    assert records[0]["held_out"] == records[1]["held_out"] != {}
    exported = [load_file(tmp_path / f"out{c}" / "model.safetensors") for c in (1, 2)]
    assert largest_difference(*exported) < 1e-6
    assert largest_difference(exported[0], load_file(Path(student_path) / "model.safetensors")) > 1e-4


if __name__ == "__main__":
    worker(*sys.argv[1:])
