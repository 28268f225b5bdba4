"""Proves that a resumed run ends bit by bit where the uninterrupted one does, and that a checkpoint which cannot be resumed is refused."""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from conftest import CLASSES, gpd_schedule, make_images, make_trainer, single_schedule, weights, write_image_folder
from safetensors.torch import load_file

from hpt_hf.method.gpd import PIVOT_FILE
from hpt_hf.models.zero_shot import ZeroShotClassifier

ROOT = Path(__file__).parent.parent.parent
# Averages after steps 2, 4 and 5; restart before step 6; pulls before steps 8 and 10; an epoch is five steps.
CUTS = {
    2: "right after an average",
    3: "in the warm-up, away from any event",
    5: "exactly at the switch, and at the end of an epoch",
    6: "in the second stage",
    7: "right before a pull",
    8: "right after a step that began with a pull",
}


def trainer_from_disk(folder, student_path, proxy_path, schedule, **changes):
    """What a new process would build; nothing is shared with a trainer built before."""
    student, proxy = (ZeroShotClassifier.from_pretrained(p).set_classes(CLASSES) for p in (student_path, proxy_path))
    settings = {"save_strategy": "steps", "save_steps": 1}
    return make_trainer(folder, student, schedule, proxy=proxy, **(settings | changes))


def files_of(folder: Path) -> dict[str, str]:
    """Every file with a digest of its content."""
    return {
        str(p.relative_to(folder)): hashlib.sha256(p.read_bytes()).hexdigest()
        for p in folder.rglob("*")
        if p.is_file()
    }


def same(a: dict, b: dict) -> bool:
    assert a.keys() == b.keys() and len(a) > 50
    return all(torch.equal(a[n], b[n]) for n in a)


@pytest.fixture(scope="module")
def whole(tmp_path_factory, student_path, proxy_path):
    """The uninterrupted run with a checkpoint after every step: its folder, last weights, and log."""
    folder = tmp_path_factory.mktemp("whole")
    trainer = trainer_from_disk(folder, student_path, proxy_path, gpd_schedule())
    trainer.train()
    assert len(list(folder.glob("checkpoint-*"))) == 10
    return folder, weights(trainer.model), [e for e in trainer.state.log_history if "loss" in e]


@pytest.mark.parametrize("cut", CUTS, ids=lambda c: f"{c}-{CUTS[c].replace(' ', '_')}")
def test_resumed_equals_uninterrupted(cut, whole, tmp_path, student_path, proxy_path):
    folder, end, log = whole
    shutil.copytree(folder / f"checkpoint-{cut}", tmp_path / f"checkpoint-{cut}")
    at_cut = load_file(tmp_path / f"checkpoint-{cut}" / "model.safetensors")
    assert not same(at_cut, end), "or there is nothing left to do"
    trainer = trainer_from_disk(tmp_path, student_path, proxy_path, gpd_schedule())
    trainer.train(resume_from_checkpoint=True)
    assert same(weights(trainer.model), end)
    assert [e for e in trainer.state.log_history if "loss" in e] == log
    # What the run would need to be resumed once more is the same too.
    for name in ("model.safetensors", PIVOT_FILE):
        assert same_file(tmp_path / "checkpoint-10" / name, folder / "checkpoint-10" / name)
    momentum = [torch.load(f / "checkpoint-10" / "optimizer.pt")["state"] for f in (tmp_path, folder)]
    assert momentum[0].keys() == momentum[1].keys() != set()
    assert all(torch.equal(momentum[0][k]["momentum_buffer"], momentum[1][k]["momentum_buffer"]) for k in momentum[0])


def same_file(a: Path, b: Path) -> bool:
    a, b = load_file(a), load_file(b)
    return a.keys() == b.keys() and len(a) > 20 and all(torch.equal(a[n], b[n]) for n in a)


def test_resuming_twice_and_a_finished_run_changes_nothing(whole, tmp_path, student_path, proxy_path):
    folder, end, _ = whole
    shutil.copytree(folder / "checkpoint-10", tmp_path / "checkpoint-10")
    trainer = trainer_from_disk(tmp_path, student_path, proxy_path, gpd_schedule())
    trainer.train(resume_from_checkpoint=True)
    assert same(weights(trainer.model), end) and trainer.state.global_step == 10


@pytest.mark.parametrize("name", ["tecoa", "fare"])
def test_a_single_objective_resumes_too(name, tmp_path, student_path, proxy_path):
    """`fare` also needs its anchor back: the vanilla student and not the checkpoint's."""
    schedule = single_schedule(name, steps=8, learning_rate=1e-4)
    trainer = trainer_from_disk(tmp_path, student_path, proxy_path, schedule, save_steps=3)
    trainer.train()
    end = weights(trainer.model)
    assert not list(tmp_path.rglob(PIVOT_FILE))
    again = trainer_from_disk(tmp_path / "again", student_path, proxy_path, schedule)
    again.train(resume_from_checkpoint=str(tmp_path / "checkpoint-3"))
    assert same(weights(again.model), end)


# --- what cannot be resumed -------------------------------------------------------------------------------------------------


def refuse(whole, tmp_path, student_path, proxy_path, error, says, *, schedule=None, spoil=None):
    """Resuming a copy of the run fails with a clear message, and leaves every file as it was."""
    folder = whole[0]
    for step in (5, 6):
        shutil.copytree(folder / f"checkpoint-{step}", tmp_path / f"checkpoint-{step}")
    if spoil is not None:
        spoil(tmp_path)
    before = files_of(tmp_path)
    assert len(before) > 10
    trainer = trainer_from_disk(tmp_path, student_path, proxy_path, schedule or gpd_schedule())
    with pytest.raises(error, match=says):
        trainer.train(resume_from_checkpoint=str(tmp_path / "checkpoint-6"))
    assert files_of(tmp_path) == before
    assert trainer.state.global_step == 0


def test_a_missing_pivot_is_refused(whole, tmp_path, student_path, proxy_path):
    spoil = lambda folder: (folder / "checkpoint-6" / PIVOT_FILE).unlink()  # noqa: E731
    refuse(whole, tmp_path, student_path, proxy_path, FileNotFoundError, f"{PIVOT_FILE} is missing", spoil=spoil)


def test_other_vanilla_weights_are_refused(whole, tmp_path, student_path, proxy_path):
    """The same architecture from another seed: every shape fits, and only the digest tells."""
    from conftest import save_tiny_clip

    other = save_tiny_clip(tmp_path / "other", patch_size=8, seed=77)
    refuse(whole, tmp_path, other, proxy_path, ValueError, "vanilla weights: got .*--model")


@pytest.mark.parametrize(
    "changes",
    [
        {"steps": 6},
        {"interval": 3},
        {"pull": 0.4},
        {"ema": 0.8},
        {"learning_rate": 0.02},
        {"restart": False},
        {"decay": "linear"},
    ],
    ids=str,
)
def test_another_schedule_is_refused(changes, whole, tmp_path, student_path, proxy_path):
    schedule = gpd_schedule(**changes)
    refuse(whole, tmp_path, student_path, proxy_path, ValueError, "schedule: got", schedule=schedule)


def test_nothing_to_resume_is_an_error(tmp_path, student_path, proxy_path):
    trainer = trainer_from_disk(tmp_path / "out", student_path, proxy_path, gpd_schedule())
    with pytest.raises(FileNotFoundError, match="nothing to resume"):
        trainer.train(resume_from_checkpoint=True)
    with pytest.raises(FileNotFoundError, match="no checkpoint at .*checkpoint-99"):
        trainer.train(resume_from_checkpoint=str(tmp_path / "out" / "checkpoint-99"))
    assert files_of(tmp_path) == {}


@pytest.mark.parametrize("missing", [PIVOT_FILE, "trainer_state.json"])
def test_a_checkpoint_cut_off_while_being_saved_is_passed_over(
    missing, whole, tmp_path, student_path, proxy_path, caplog
):
    """Preemption strikes while saving, too: the run goes on from the checkpoint before, after a warning."""
    folder, end, _ = whole
    for step in (5, 6):
        shutil.copytree(folder / f"checkpoint-{step}", tmp_path / f"checkpoint-{step}")
    (tmp_path / "checkpoint-6" / missing).unlink()
    trainer = trainer_from_disk(tmp_path, student_path, proxy_path, gpd_schedule())
    trainer.train(resume_from_checkpoint=True)
    assert "checkpoint-6 was cut off while being saved" in caplog.text
    assert same(weights(trainer.model), end)


def test_only_cut_off_checkpoints_are_an_error(whole, tmp_path, student_path, proxy_path):
    shutil.copytree(whole[0] / "checkpoint-6", tmp_path / "checkpoint-6")
    (tmp_path / "checkpoint-6" / PIVOT_FILE).unlink()
    trainer = trainer_from_disk(tmp_path, student_path, proxy_path, gpd_schedule())
    with pytest.raises(FileNotFoundError, match=r"nothing to resume"):
        trainer.train(resume_from_checkpoint=True)


# --- a run that is killed -----------------------------------------------------------------------------------------------------


@pytest.mark.multiprocess
def test_a_killed_run_ends_like_one_left_alone(tmp_path, student_path, proxy_path):
    """SIGKILL at some step of a real `recipes/train.py`, then `--resume_from_checkpoint true`."""
    data = write_image_folder(tmp_path / "data", make_images())
    command = [sys.executable, str(ROOT / "recipes" / "train.py"), "--method", "hpt_gpd", "--dataset", data]
    command += ["--model", student_path, "--proxy", proxy_path, "--use_cpu", "true", "--eps", "8/255"]
    command += [
        "--per_device_train_batch_size",
        "8",
        "--max_steps",
        "60",
        "--interval",
        "7",
        "--learning_rate",
        "0.01",
    ]
    command += [
        "--ga_learning_rate",
        "0.001",
        "--save_strategy",
        "steps",
        "--save_steps",
        "4",
        "--disable_tqdm",
        "true",
    ]

    def start(name, *more):
        with open(tmp_path / f"{name}.log", "a") as log:
            return subprocess.Popen(
                [*command, "--output_dir", str(tmp_path / name), *more], stdout=log, stderr=log, env=os.environ
            )

    killed = start("killed")
    deadline = time.time() + 120
    # Checkpoint 8 is in the warm-up, 36 behind the switch at 30: whatever the delay, the kill falls in the middle.
    while not (tmp_path / "killed" / "checkpoint-8" / PIVOT_FILE).exists():
        assert killed.poll() is None and time.time() < deadline, (tmp_path / "killed.log").read_text()
        time.sleep(0.01)
    killed.kill()
    killed.wait()
    checkpoints = len(list((tmp_path / "killed").glob("checkpoint-*")))
    assert 2 <= checkpoints < 15 and not (tmp_path / "killed" / "model.safetensors").exists(), (
        "killed too late to prove anything"
    )
    for name, more in (("killed", ["--resume_from_checkpoint", "true"]), ("alone", [])):
        assert start(name, *more).wait(timeout=200) == 0, (tmp_path / f"{name}.log").read_text()
    assert same(*(load_file(tmp_path / name / "model.safetensors") for name in ("killed", "alone")))
    assert not same(
        load_file(tmp_path / "alone" / "model.safetensors"), load_file(Path(student_path) / "model.safetensors")
    )
