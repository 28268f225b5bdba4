"""What `hpt-hf train` does before the first step and after the last one."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import make_images, make_trainer, write_image_folder
from safetensors import SafetensorError
from transformers import CLIPModel

from hpt_hf.commands import train
from hpt_hf.commands.parser import parse
from hpt_hf.method.objectives import Objective
from hpt_hf.method.schedule import Schedule
from hpt_hf.training.config import KEPT, HPTConfig
from hpt_hf.training.record import held_out_report
from hpt_hf.training.trainer import HPTTrainer


@pytest.fixture
def flags(tmp_path, paths):
    data = write_image_folder(tmp_path / "data", make_images())
    common = f"--method tecoa --dataset {data} --model {paths[0]} --use_cpu true --disable_tqdm true --max_steps 2"
    common += f" --per_device_train_batch_size 8 --held_out 0.25 --output_dir {tmp_path / 'out'} --report_to none"
    return lambda *more: [*common.split(), *map(str, more)]


def run(argv):
    return train.run(*parse(train.RECIPE, argv))


OTHER = {"deepspeed": "x.json", "do_train": False, "optim_target_modules": "x", "parallelism_config": object()}
OTHER |= {"lr_scheduler_kwargs": {"a": 1}, "neftune_noise_alpha": 5.0, "length_column_name": "x", "label_names": ["y"]}
OTHER |= {"train_sampling_strategy": "group_by_length", "label_smoothing_factor": 0.1}


@pytest.mark.parametrize("name", KEPT)
def test_a_flag_that_cannot_be_carried_out_is_refused_with_what_to_use_instead(name, tmp_path):
    kept, instead = KEPT[name]
    value = OTHER.get(name, not kept)
    with pytest.raises(ValueError, match=f"{name}: got .*, expected .* Fix: ") as refused:
        HPTConfig(output_dir=str(tmp_path), use_cpu=True, **{name: value})
    assert str(refused.value).endswith(instead)


def test_the_vanilla_student_stands_beside_the_result_and_changes_nothing(flags, tmp_path, capsys):
    train.main(flags("--learning_rate", "1e-9"))
    said = capsys.readouterr()
    record = json.loads((tmp_path / "out" / "train.json").read_text())
    before, after = record["held_out_vanilla"], record["held_out"]
    assert [before[f"vanilla_{k}_accuracy"] for k in ("clean", "robust")] == list(after.values())
    assert f"n = {record['held_out_images']}" in said.out and "vanilla student: clean" in said.out
    assert "worse than the vanilla" not in said.err


@pytest.mark.parametrize(
    ("clean", "robust", "share", "says"),
    [
        (20, 0, 25.0, "at chance"),
        (80, 40, 99.0, "predicts one class for 99%"),
        (40, 20, 25.0, "worse than the vanilla student"),
        (40, 40, 25.0, None),
        (80, 10, 25.0, None),
    ],
)
def test_a_collapsed_model_is_no_result_without_a_word(clean, robust, share, says):
    record = {"held_out_images": 100, "classes": 5, "largest_class_share": share}
    record["held_out"] = {"eval_clean_accuracy": clean, "eval_robust_accuracy": robust}
    record["held_out_vanilla"] = {"vanilla_clean_accuracy": 70.0, "vanilla_robust_accuracy": 30.0}
    text, doubts = held_out_report(record)
    assert f"clean {clean:.1f}% (" in text and "vanilla student: clean 70.0% (" in text
    assert any(says in doubt for doubt in doubts) if says else not doubts


def test_an_epoch_has_as_many_steps_as_the_trainers_own(flags, tmp_path):
    """Seven micro-batches in threes: the epoch's third step has one, and one epoch is the whole of it."""
    data = write_image_folder(tmp_path / "more", make_images(14))
    more = f"--dataset {data} --held_out 0 --per_device_train_batch_size 2 --gradient_accumulation_steps 3"
    record = run(flags(*more.split(), "--num_train_epochs", 2, "--max_steps", -1))
    assert (record["steps"], record["trainer"].state.epoch) == (6, 2.0)


def corrupt(tmp_path) -> None:
    picture = sorted((tmp_path / "data").rglob("*.png"))[3]
    picture.write_bytes(picture.read_bytes()[:100])


def test_resuming_what_never_began_begins_and_a_corrupt_picture_may_be_skipped(flags, tmp_path, caplog):
    """Whoever restarts a run in a loop need not look whether it lived to its first checkpoint."""
    corrupt(tmp_path)
    train.main(flags("--resume_from_checkpoint", "true", "--on_corrupt", "skip"))
    assert "nothing to resume" in caplog.text and "it begins at the beginning" in caplog.text
    assert (tmp_path / "out" / "model.safetensors").is_file()


@pytest.mark.multiprocess
def test_the_script_itself_says_one_line_and_fails(flags, tmp_path):
    """`recipes/train.py` as a process, in the midst of training: exit status, standard error, and no traceback."""
    corrupt(tmp_path)
    script = Path(__file__).parents[2] / "recipes" / "train.py"
    command = [sys.executable, str(script), *flags("--held_out", 0, "--max_steps", 5)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=200)
    lines = [line for line in done.stderr.splitlines() if line.startswith("hpt-hf ")]  # libraries warn on the way
    assert done.returncode == 1 and done.stdout == "" and "Traceback" not in done.stderr, done.stderr
    assert len(lines) == 1 and done.stderr.rstrip().endswith(lines[0])
    assert all(part in lines[0] for part in ("hpt-hf train: ", "cannot be read", "file ", "--on_corrupt skip"))
    assert not list((tmp_path / "out").rglob("*.*")), "nothing half-made is left that looks like a result"


def test_what_would_fail_behind_the_last_step_is_refused_before_the_first(flags, tmp_path, monkeypatch):
    monkeypatch.setattr(HPTTrainer, "train", lambda *a, **k: pytest.fail("it trained"))
    images = sorted((tmp_path / "data").rglob("*.png"))
    (tmp_path / "flat").mkdir()
    for number, file in enumerate(images):
        shutil.copy(file, tmp_path / "flat" / f"{number}.png")
    unlabelled = flags("--method", "fare", "--dataset", tmp_path / "flat", "--classes", "a", "b")
    with pytest.raises(ValueError, match="no labels to measure with"):
        run(unlabelled)
    for file in images:  # whichever is held out, it is among them
        file.write_bytes(file.read_bytes()[:60])
    with pytest.raises(ValueError, match="cannot be read"):
        run(flags())
    assert not (tmp_path / "out").exists()


def test_the_model_stands_before_it_is_measured(flags, tmp_path, monkeypatch, capsys):
    evaluate = HPTTrainer.evaluate

    def fails(self, *args, metric_key_prefix="eval", **options):
        if metric_key_prefix == "eval":
            raise RuntimeError("out of memory")
        return evaluate(self, *args, metric_key_prefix=metric_key_prefix, **options)

    monkeypatch.setattr(HPTTrainer, "evaluate", fails)
    record = run(flags())
    assert CLIPModel.from_pretrained(tmp_path / "out") and record["held_out"] == {}
    assert "the held-out slice could not be measured (out of memory); the model stands in" in capsys.readouterr().err


def test_a_full_disk_at_the_end_loses_no_training(flags, tmp_path, monkeypatch):
    save = HPTTrainer.save_model

    def full(self, output_dir=None, **options):
        if output_dir is None:
            raise SafetensorError("I/O error: No space left on device (os error 28)")
        save(self, output_dir, **options)

    monkeypatch.setattr(HPTTrainer, "save_model", full)
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    with pytest.raises(OSError, match="no space left for .*: the model lies in") as error:
        run(flags())
    assert CLIPModel.from_pretrained(str(error.value).split("lies in ")[1].split(". Fix")[0])


def test_a_method_that_does_not_move_is_stopped(student, tmp_path):
    still = Objective("still", lambda views, kl: {"still": 0 * views.student.adversarial.logits.sum()})
    for every, steps in ((1, 2), (3, 3)):
        trainer = make_trainer(tmp_path, student, Schedule.single(still, steps=6), logging_steps=every)
        says = f"the gradient was exactly 0 in {steps} steps before step {steps}"
        with pytest.raises(FloatingPointError, match=says):
            trainer.train()
