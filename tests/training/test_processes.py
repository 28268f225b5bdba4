"""Proves that two processes train, log and evaluate as one does at the same global batch, across GPD's switch, and stay in step.

Run by torchrun this file is its own worker: gloo on CPU, weights and metrics of each rank written to a folder.
"""

from __future__ import annotations

import json
import os
import random
import re
import socket
import subprocess
import sys
from pathlib import Path

import datasets
import psutil
import pytest
import torch
from conftest import CLASSES, gpd_schedule, largest_difference, launch, make_images, make_trainer, weights

from hpt_hf.commands.train import main
from hpt_hf.models.zero_shot import ZeroShotClassifier
from hpt_hf.utils import shutdown_distributed

pytestmark = pytest.mark.multiprocess


def train(folder: Path, student_path: str, proxy_path: str, batch_size: int) -> dict:
    """HPT-GPD over its switch and two epochs, then the held-out slice, which no number of processes divides."""
    student, proxy = (ZeroShotClassifier.from_pretrained(p).set_classes(CLASSES) for p in (student_path, proxy_path))
    trainer = make_trainer(
        folder,
        student,
        # Rates at which one pixel whose gradient is rounded to the other sign does not reach the sixth decimal.
        gpd_schedule(warm_up_steps=10, steps=10, interval=4, warm_up_learning_rate=3e-4, learning_rate=1e-3),
        proxy=proxy,
        held_out=make_images(19, seed=3),
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
    shutdown_distributed()


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


def test_there_were_two_processes_and_one(one, two):
    """Without this the rest would compare one process with itself."""
    assert [r["world"] for r in two] == [2, 2] and one["world"] == 1
    assert [r["wrapped"] for r in two] == ["DistributedDataParallel"] * 2 and one["wrapped"] == "ZeroShotClassifier"


def test_both_ranks_end_with_identical_weights_and_pivots(two):
    """A loss that bypassed DDP's wrapper would let them drift apart silently."""
    assert largest_difference(two[0]["weights"], two[1]["weights"]) == 0
    assert largest_difference(two[0]["average"], two[1]["average"]) == 0


def test_two_processes_equal_one_at_the_same_global_batch(one, two, student_path):
    vanilla = weights(ZeroShotClassifier.from_pretrained(student_path))
    assert largest_difference(one["weights"], vanilla) > 1e-3
    assert largest_difference(one["average"], {n: vanilla[n] for n in one["average"]}) > 1e-4
    assert largest_difference(one["weights"], two[0]["weights"]) < 1e-6
    assert largest_difference(one["average"], two[0]["average"]) < 1e-6


def test_the_log_is_the_mean_over_the_processes(one, two):
    assert [e["phase"] for e in one["log"]] == ["ga"] * 10 + ["hpt"] * 10
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
    assert (
        "gpd_pivot.safetensors" in files
        and "model.safetensors" in files
        and not [f for f in files if f.endswith(".part")]
    )
    assert {"rng_state_0.pth", "rng_state_1.pth"} <= set(files)


def train_alone_and_together(folder: Path, flags: str) -> None:
    """A recipe on this process and on two others, into `out1` and `out2`."""
    for count, batch in ((1, 8), (2, 4)):
        argv = [
            *flags.split(),
            "--per_device_train_batch_size",
            str(batch),
            "--output_dir",
            str(folder / f"out{count}"),
        ]
        if count == 1:
            main(argv)
        else:
            launch(count, str(Path(__file__).parent.parent.parent / "recipes" / "train.py"), *argv)


def test_the_recipe_runs_on_two_processes_and_exports_once(tmp_path, student_path, proxy_path):
    """The road users take: `recipes/train.py` under a launcher, its record and its one line of result."""
    from conftest import write_image_folder
    from safetensors.torch import load_file

    data = write_image_folder(tmp_path / "data", make_images())
    flags = f"--method hpt_gpd --max_steps 4 --use_cpu true --disable_tqdm true --eps 8/255 --learning_rate 1e-3 --dataset {data}"
    flags += f" --model {student_path} --proxy {proxy_path} --held_out 0.2"
    train_alone_and_together(tmp_path, flags)
    records = [json.loads((tmp_path / f"out{c}" / "train.json").read_text()) for c in (1, 2)]
    assert records[0]["batch"] == records[1]["batch"] == 8 and records[0]["steps"] == 4
    assert records[0]["held_out"] == records[1]["held_out"] != {}
    exported = [load_file(tmp_path / f"out{c}" / "model.safetensors") for c in (1, 2)]
    assert largest_difference(*exported) < 1e-6
    assert largest_difference(exported[0], load_file(Path(student_path) / "model.safetensors")) > 1e-4


def test_two_processes_estimate_together_and_one_speaks(tmp_path, student_path, proxy_path):
    from conftest import write_image_folder

    data = write_image_folder(tmp_path / "data", make_images())
    flags = f"--method hpt_gpd --use_cpu true --eps 8/255 --dataset {data} --model {student_path} --proxy {proxy_path}"
    flags += f" --held_out 0.2 --num_train_epochs 50 --per_device_train_batch_size 4 --probe_steps 2 --output_dir {tmp_path / 'out'}"
    said = launch(2, str(Path(__file__).parent.parent.parent / "recipes" / "estimate.py"), *flags.split())
    assert len(re.findall(r"a step of hpt +\| +200 \|", said)) == 1 and said.count("hours on 2 processes") == 1
    assert not (tmp_path / "out").exists()


def test_two_processes_stream_as_one(tmp_path, student_path, proxy_path, monkeypatch):
    """Each reads the whole stream and decodes its own half of every batch."""
    from conftest import write_stream
    from safetensors.torch import load_file

    data = write_stream(tmp_path / "data", make_images(43))
    said = f"--method hpt_gpd --streaming true --dataset {data} --max_steps 8 --interval 3 --use_cpu true --disable_tqdm true --eps 8/255"
    said += f" --learning_rate 1e-3 --ga_learning_rate 1e-3 --model {student_path} --proxy {proxy_path}"
    monkeypatch.setattr(datasets.config, "SLEEP_TIME_ON_THREADS_SHUTDOWN", 0)  # in this process
    train_alone_and_together(tmp_path, said)
    exported = [load_file(tmp_path / f"out{c}" / "model.safetensors") for c in (1, 2)]
    assert largest_difference(*exported) < 1e-6
    assert largest_difference(exported[0], load_file(Path(student_path) / "model.safetensors")) > 1e-4


def until_done(folder: Path, flags: list[str], kills: list[float]) -> int:
    """Train on two processes, killing all of them so many seconds after each start, and resuming; returns how many kills struck a run that was not done."""
    script = str(Path(__file__).parent.parent.parent / "recipes" / "train.py")
    struck = 0
    for delay in [*kills, None]:
        with socket.socket() as s:
            s.bind(("127.0.0.1", 0))
            port = s.getsockname()[1]
        launcher = [
            sys.executable,
            "-m",
            "torch.distributed.run",
            "--nproc_per_node",
            "2",
            "--master_port",
            str(port),
            script,
        ]
        log = folder.with_suffix(".log").open("a")
        process = subprocess.Popen(
            [*launcher, *flags, "--output_dir", str(folder), "--resume_from_checkpoint", "true"],
            stdout=log,
            stderr=log,
            start_new_session=True,
        )
        try:
            assert process.wait(timeout=240 if delay is None else delay) == 0, folder.with_suffix(".log").read_text()
        except subprocess.TimeoutExpired:
            assert delay is not None, "the last run must end"
            struck += 1
        finally:
            # The launcher gives each worker a session of its own: they are found as its children.
            for victim in (
                [*psutil.Process(process.pid).children(recursive=True), process] if process.poll() is None else []
            ):
                victim.kill()
            process.wait()
            log.close()
    return struck


def kill_two_processes(tmp_path, student_path, proxy_path, kills: list[float], steps: int) -> None:
    from conftest import write_image_folder
    from safetensors.torch import load_file

    data = write_image_folder(tmp_path / "data", make_images())
    said = f"--method hpt_gpd --max_steps {steps} --interval 7 --use_cpu true --disable_tqdm true --eps 8/255 --learning_rate 1e-2 --ga_learning_rate 1e-3"
    said += f" --model {student_path} --proxy {proxy_path} --dataset {data} --per_device_train_batch_size 4"
    flags = [*said.split(), "--save_strategy", "steps", "--save_steps", "3"]
    assert until_done(tmp_path / "alone", flags, []) == 0
    struck = until_done(tmp_path / "killed", flags, kills)
    print(f"{struck} of {len(kills)} kills struck")
    assert struck >= 1, "killed too late to prove anything"
    ours, theirs = (load_file(tmp_path / name / "model.safetensors") for name in ("killed", "alone"))
    assert largest_difference(ours, theirs) == 0
    assert largest_difference(ours, load_file(Path(student_path) / "model.safetensors")) > 1e-4


def test_two_processes_killed_before_the_first_checkpoint_and_later_end_as_if_left_alone(
    tmp_path, student_path, proxy_path
):
    """The first kill falls into the imports: `--resume_from_checkpoint true` begins then."""
    kill_two_processes(tmp_path, student_path, proxy_path, [2.0, 14.0], steps=150)


@pytest.mark.slow
def test_two_processes_killed_at_random_moments_end_as_if_left_alone(tmp_path, student_path, proxy_path):
    rng = random.Random(int(os.environ.get("KILL_SEED", "0")))
    kill_two_processes(tmp_path, student_path, proxy_path, [rng.uniform(5, 12) for _ in range(6)], steps=600)


# --- evaluation -----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def evaluated(tmp_path_factory, trained) -> tuple[list[str], Path, Path]:
    """The flags of an evaluation, and the folders that one process and two processes filled."""
    from conftest import write_image_folder

    from hpt_hf.commands.evaluate import main

    folder = tmp_path_factory.mktemp("evaluated")
    trained.save_pretrained(folder / "model")
    data = write_image_folder(folder / "data", make_images())
    flags = f"--attack apgd-ce square --attack_steps 20 --probe 4 --batch_size 8 --eps 16/255 --model {folder / 'model'} --dataset {data}"
    main([*flags.split(), "--output_dir", str(folder / "one")])
    script = str(Path(__file__).parent.parent.parent / "recipes" / "evaluate.py")
    launch(2, script, *flags.split(), "--output_dir", str(folder / "two"))
    return flags.split(), folder / "one", folder / "two"


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
    ours, theirs = results(two), results(one)
    for name in theirs:
        assert ours[name].splitlines() == theirs[name].splitlines(), name
    assert ours.keys() == theirs.keys() and len(theirs) == 6
    robust = [json.loads(f.read_text())["robust"] for f in (two / "results").iterdir()]
    assert any(0 < value < 100 for value in robust), "an attack that does all or nothing proves nothing"


def test_each_process_answered_some_of_the_batches_and_none_was_answered_twice(evaluated):
    _, one, two = evaluated
    alone, shared = findings(one), findings(two)
    assert alone.keys() == shared.keys() and len(shared) == 2
    for question, ranks in shared.items():
        assert list(alone[question]) == ["0"] and list(ranks) == ["0", "1"]
        batches = [[name for name in names if name.startswith("batch ")] for names in ranks.values()]
        assert [len(b) for b in batches] == [3, 2] and all(
            len(n) > len(b) for n, b in zip(ranks.values(), batches, strict=True)
        )
        assert sorted(ranks["0"] + ranks["1"]) == sorted(alone[question]["0"])


def test_a_run_begun_by_two_processes_goes_on_with_one(evaluated, tmp_path, monkeypatch):
    """Both journals are cut off in the middle, one of them in the middle of a line."""
    from hpt_hf.commands.evaluate import main
    from hpt_hf.evaluation import evaluator as evaluation

    flags, one, two = evaluated
    (tmp_path / "progress").mkdir()
    left = 0
    for file in (two / "progress").iterdir():
        lines = file.read_bytes().splitlines(keepends=True)
        keep = 2 if file.stem.endswith("-0") else 1
        (tmp_path / "progress" / file.name).write_bytes(b"".join(lines[:keep]) + lines[keep][:-9])
        left += keep
    answered, attack_batch = [], evaluation.attack_batch
    monkeypatch.setattr(evaluation, "attack_batch", lambda *a, **k: answered.append(a[1]) or attack_batch(*a, **k))
    main([*flags, "--output_dir", str(tmp_path)])
    assert left == 6 and len(answered) == 10 - left
    assert results(tmp_path) == results(one)


if __name__ == "__main__":
    worker(*sys.argv[1:])
