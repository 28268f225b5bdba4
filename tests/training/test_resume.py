"""Proves that a resumed run ends bit by bit where the uninterrupted one does, and what cannot be resumed."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from conftest import contents, gpd_schedule, largest_difference, make_images, trainer_from_disk, weights
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from transformers import pipeline

from hpt_hf.method.gpd import PIVOT_FILE, GPDCallback

SAVE = {"save_strategy": "steps", "save_steps": 1}


@pytest.fixture(scope="module")
def whole(tmp_path_factory, paths):
    """The uninterrupted run with a checkpoint after every step: its folder, last weights, and log."""
    folder = tmp_path_factory.mktemp("whole")
    trainer = trainer_from_disk(folder, paths, **SAVE)
    trainer.train()
    return folder, weights(trainer.model), [e for e in trainer.state.log_history if "loss" in e]


@pytest.fixture
def stopped(whole, tmp_path):
    """Copies checkpoints into the folder of a run that is to go on."""

    def copy(*steps):
        for step in steps:
            shutil.copytree(whole[0] / f"checkpoint-{step}", tmp_path / f"checkpoint-{step}")
        return tmp_path / f"checkpoint-{steps[-1]}"

    return copy


def test_every_checkpoint_has_record_card_and_pivot_and_opens_with_pipeline(whole):
    checkpoints = sorted(whole[0].glob("checkpoint-*"))
    assert len(checkpoints) == 10
    for folder in checkpoints:
        assert {"train.json", "parity.json", "README.md", PIVOT_FILE} <= {f.name for f in folder.iterdir()}
        assert json.loads((folder / "train.json").read_text())["steps"] == int(folder.name.split("-")[1])
    image, labels = make_images(1)[0]["image"], ["cat", "dog"]
    assert len(pipeline("zero-shot-image-classification", model=str(folder))(image, candidate_labels=labels)) == 2


# Averages after steps 2, 4 and 5; restart before step 6; pulls before steps 8 and 10; an epoch is five steps.
CUTS = {
    2: "right after an average",
    3: "in the warm-up, away from any event",
    5: "exactly at the switch, and at the end of an epoch",
    7: "right before a pull",
    8: "right after a step that began with a pull",
    10: "at the end",
}


@pytest.mark.parametrize("cut", CUTS, ids=lambda c: f"{c}-{CUTS[c].replace(' ', '_')}")
def test_resumed_equals_uninterrupted(cut, whole, stopped, tmp_path, paths):
    folder, end, log = whole
    at_cut = load_file(stopped(cut) / "model.safetensors")
    assert (largest_difference(at_cut, end) == 0) == (cut == 10), "or there is nothing left to do"
    trainer = trainer_from_disk(tmp_path, paths, **SAVE | {"save_steps": 10})
    trainer.train(resume_from_checkpoint=True)
    assert largest_difference(weights(trainer.model), end) == 0
    assert [e for e in trainer.state.log_history if "loss" in e] == log and trainer.state.global_step == 10
    # What the run would need to be resumed once more is the same too.
    last = tmp_path / "checkpoint-10", folder / "checkpoint-10"
    ours, theirs = (torch.load(f / "optimizer.pt")["state"] for f in last)
    assert all(torch.equal(ours[n]["momentum_buffer"], state["momentum_buffer"]) for n, state in theirs.items())
    assert largest_difference(*(load_file(f / PIVOT_FILE) for f in last)) == 0


@pytest.mark.parametrize(
    ("argument", "config"), [(None, "true"), (None, "PATH"), ("PATH", "false"), ("PATH", "/no/such/checkpoint")]
)
def test_train_and_args_both_name_the_checkpoint_and_train_wins(argument, config, whole, stopped, tmp_path, paths):
    path = str(stopped(6))
    argument, config = (path if said == "PATH" else said for said in (argument, config))
    trainer = trainer_from_disk(tmp_path, paths, resume_from_checkpoint=config)
    trainer.train(resume_from_checkpoint=argument)
    assert sum(map(len, trainer.stopwatch.steps)) == 4, "of ten"
    assert largest_difference(weights(trainer.model), whole[1]) == 0


def test_a_checkpoint_of_the_version_before_resumes(whole, stopped, tmp_path, paths):
    """It held the Trainer's pickled arguments, and neither record nor card; its pivot said no decay."""
    folder = stopped(6)
    for name in ("train.json", "parity.json", "README.md", "digests.json"):
        (folder / name).unlink()
    torch.save({"learning_rate": 0.01}, folder / "training_args.bin")
    with safe_open(folder / PIVOT_FILE, framework="pt") as file:
        vanilla = file.metadata()["vanilla"]
    schedule = [2, ["ga", 5, 0.001, 0, False, 0.9, None], ["hpt", 5, 0.01, 0, True, None, 0.5]]
    metadata = {"vanilla": vanilla, "schedule": json.dumps(schedule)}
    save_file(load_file(folder / PIVOT_FILE), folder / PIVOT_FILE, metadata=metadata)
    trainer = trainer_from_disk(tmp_path, paths)
    trainer.train(resume_from_checkpoint=str(folder))
    assert largest_difference(weights(trainer.model), whole[1]) == 0


# --- what cannot be resumed


def test_the_pivot_alone_knows_its_schedule_and_its_vanilla_weights(whole, student):
    """Of the version before, which kept no record, it is all that tells."""
    others = {"interval": 3, "pull": 0.4, "ema": 0.8, "learning_rate": 0.02, "restart": False, "decay": "linear"}
    for name, value in (others | {"steps": 6, "average_last": 0.5}).items():
        with pytest.raises(ValueError, match="schedule: got"):
            GPDCallback(gpd_schedule(**{name: value}), student.freeze_text()).load(whole[0] / "checkpoint-6")
    student.model.visual_projection.weight.data *= 2  # every shape fits, and only the digest tells
    with pytest.raises(ValueError, match="vanilla weights: got .*--model"):
        GPDCallback(gpd_schedule(), student.freeze_text()).load(whole[0] / "checkpoint-6")


# --- another run's checkpoints


def test_overwrite_removes_another_runs_checkpoints_and_no_others(stopped, tmp_path, paths):
    stopped(10)
    trainer_from_disk(tmp_path, paths).check_run(None)
    trainer_from_disk(tmp_path, paths, seed=5, overwrite=True).check_run(None)
    assert not list(tmp_path.iterdir())


def test_two_runs_exclude_each_other_and_a_checkpoint_without_an_optimizer_is_refused(stopped, tmp_path, paths):
    trainer = trainer_from_disk(stopped(10).parent, paths)
    with trainer.sole_run(), pytest.raises(ValueError, match="is in use by another run"):
        trainer_from_disk(tmp_path, paths).train()
    assert not (tmp_path / ".lock").exists()
    for name in ("optimizer.pt", "digests.json"):  # as --save_only_model leaves it
        (tmp_path / "checkpoint-10" / name).unlink()
    with pytest.raises(ValueError, match="holds no optimizer"):
        trainer_from_disk(tmp_path, paths).train(resume_from_checkpoint=True)


def test_nothing_to_resume_is_an_error(tmp_path, paths):
    trainer = trainer_from_disk(tmp_path / "out", paths)
    for said, says in ((True, "nothing to resume"), (str(tmp_path / "checkpoint-99"), "no checkpoint at .*-99")):
        with pytest.raises(FileNotFoundError, match=says):
            trainer.train(resume_from_checkpoint=said)
    assert contents(tmp_path) == {}


def torn(file: Path):
    file.write_text("{")


def flip_a_bit(file: Path):
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)


DAMAGES = {
    "cut off before its state": ("trainer_state.json", Path.unlink),
    "cut off before its pivot": (PIVOT_FILE, Path.unlink),
    "torn by a full disk": ("trainer_state.json", torn),
    "a flipped bit": ("model.safetensors", flip_a_bit),
    "no momentum": ("optimizer.pt", Path.unlink),
    "torn digests": ("digests.json", torn),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_checkpoint_that_is_not_what_was_saved_is_passed_over_or_refused(damage, stopped, tmp_path, paths, caplog):
    name, act = DAMAGES[damage]
    act(stopped(5, 6) / name)
    trainer = trainer_from_disk(tmp_path, paths)
    with pytest.raises(ValueError, match="checkpoint-6 (was cut off|cannot be used|is damaged)"):
        trainer.train(resume_from_checkpoint=str(tmp_path / "checkpoint-6"))
    assert trainer.last_checkpoint() == str(tmp_path / "checkpoint-5")
    assert "checkpoint-6" in caplog.text and "looking for an earlier one" in caplog.text
    shutil.rmtree(tmp_path / "checkpoint-5")
    with pytest.raises(FileNotFoundError, match="nothing to resume"):
        trainer.last_checkpoint()


FULL = [OSError(28, "No space left on device"), RuntimeError("[enforce fail] PytorchStreamWriter failed writing file")]
FULL += [SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)")]


def test_a_full_disk_leaves_no_half_checkpoint_and_the_run_goes_on_after_making_room(whole, tmp_path, paths):
    """Three times in a row, at every second save of two steps each."""
    for done, error in enumerate(FULL, 1):
        trainer = trainer_from_disk(tmp_path, paths, **SAVE | {"save_steps": 2})
        save, errors = trainer._save_optimizer_and_scheduler, iter([None, error])

        def full(folder, save=save, errors=errors):
            if error := next(errors):
                raise error
            save(folder)

        trainer._save_optimizer_and_scheduler = full
        with pytest.raises(OSError, match=f"no space left for .*checkpoint-{2 * done + 2}. Fix: make room"):
            trainer.train(resume_from_checkpoint=done > 1)
        assert {f.name for f in tmp_path.iterdir()} == {f"checkpoint-{2 * number}" for number in range(1, done + 1)}
    again = trainer_from_disk(tmp_path, paths)
    again.train(resume_from_checkpoint=True)
    assert largest_difference(weights(again.model), whole[1]) == 0
