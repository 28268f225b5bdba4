"""Proves what `hpt-hf train` does before the first step and after the last one."""

from __future__ import annotations

import json
import math
import shutil

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


OTHER = {
    "deepspeed": "x.json",
    "do_train": False,
    "optim_target_modules": "x",
    "parallelism_config": object(),
    "label_names": ["y"],
}
OTHER |= {"lr_scheduler_kwargs": {"a": 1}, "neftune_noise_alpha": 5.0, "length_column_name": "x"}
OTHER |= {"train_sampling_strategy": "group_by_length", "label_smoothing_factor": 0.1}


@pytest.mark.parametrize("name", KEPT)
def test_a_flag_that_cannot_be_carried_out_is_refused_with_what_to_use_instead(name, tmp_path):
    kept, instead = KEPT[name]
    value = OTHER.get(name, not kept)
    with pytest.raises(ValueError, match=f"{name}: got .*, expected .* Fix: ") as refused:
        HPTConfig(output_dir=str(tmp_path), use_cpu=True, **{name: value})
    assert str(refused.value).endswith(instead)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        *(("num_train_epochs", v) for v in (0, -1, math.inf, math.nan)),
        *((name, 0) for name in ("per_device_train_batch_size", "gradient_accumulation_steps", "save_steps")),
        *((name, -1) for name in ("logging_steps", "learning_rate", "weight_decay", "warmup_steps", "seed")),
        *(("max_steps", v) for v in (0, -2)),
        *((name, math.nan) for name in ("learning_rate", "max_grad_norm")),
    ],
)
def test_a_number_that_cannot_be_is_refused(name, value, tmp_path):
    with pytest.raises(ValueError, match=f"{name}: got {value}, expected"):
        HPTConfig(output_dir=str(tmp_path), use_cpu=True, **{name: value})


def test_the_vanilla_student_stands_beside_the_result_and_changes_nothing(flags, tmp_path, capsys):
    train.main(flags("--learning_rate", "1e-9"))
    said = capsys.readouterr()
    record = json.loads((tmp_path / "out" / "train.json").read_text())
    before, after = record["held_out_vanilla"], record["held_out"]
    assert [before[f"vanilla_{k}_accuracy"] for k in ("clean", "robust")] == list(after.values())
    assert f"n = {record['held_out_images']}" in said.out and "vanilla student: clean" in said.out
    assert "worse than the vanilla" not in said.err


@pytest.mark.parametrize(
    ("changed", "says"),
    [
        ({"held_out": (20, 0), "n": 100}, "at chance"),
        ({"largest_class_share": 99.0}, "predicts one class for 99%"),
        ({"held_out": (40, 20)}, "worse than the vanilla student"),
        ({"held_out": (40, 40)}, None),
        ({"held_out": (80, 10)}, None),
    ],
)
def test_a_collapsed_model_is_no_result_without_a_word(changed, says):
    clean, robust = changed.get("held_out", (80, 40))
    record = {"held_out_images": 100, "classes": 5, "largest_class_share": changed.get("largest_class_share", 25.0)}
    record["held_out"] = {"eval_clean_accuracy": clean, "eval_robust_accuracy": robust}
    record["held_out_vanilla"] = {"vanilla_clean_accuracy": 70.0, "vanilla_robust_accuracy": 30.0}
    text, doubts = held_out_report(record)
    assert f"clean {clean:.1f}% (" in text and "vanilla student: clean 70.0% (" in text
    assert any(says in doubt for doubt in doubts) if says else not doubts


def damaged(folder):
    """All images of one class but the first byte: whichever is held out, it is among them."""
    for file in folder.rglob("*.png"):
        file.write_bytes(file.read_bytes()[:60])


def test_what_would_fail_behind_the_last_step_is_refused_before_the_first(flags, tmp_path, monkeypatch):
    monkeypatch.setattr(HPTTrainer, "train", lambda *a, **k: pytest.fail("it trained"))
    flat = tmp_path / "flat"
    flat.mkdir()
    for number, file in enumerate(sorted((tmp_path / "data").rglob("*.png"))):
        shutil.copy(file, flat / f"{number}.png")
    unlabelled = ("--method", "fare", "--dataset", flat, "--classes", "a", "b")
    for more, says in ((unlabelled, "no labels to measure with"), (("--bf16_full_eval", "true"), "bf16_full_eval")):
        with pytest.raises(ValueError, match=says):
            run(flags(*more))
    damaged(tmp_path / "data")
    with pytest.raises(ValueError, match="cannot be read"):
        run(flags())
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("inside", ["model", "proxy", "dataset"])
def test_an_output_in_what_is_read_is_refused(flags, tmp_path, paths, inside):
    source = {"model": paths[0], "proxy": paths[1], "dataset": str(tmp_path / "data")}[inside]
    for output in (source, f"{source}/robust"):
        with pytest.raises(ValueError, match=f"lies in --{inside} .*, which is read"):
            run(flags("--method", "hpt", "--proxy", paths[1], "--output_dir", output))


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


def test_a_method_that_cannot_move_is_refused_and_one_that_does_not_is_stopped(flags, student, tmp_path):
    with pytest.raises(ValueError, match="fare: got an attack that starts from the image itself"):
        run(flags("--method", "fare", "--attack_random_start", "false"))
    still = Objective("still", lambda views, kl: {"still": 0 * views.student.adversarial.logits.sum()})
    for every, steps in ((1, 2), (3, 3)):
        trainer = make_trainer(tmp_path, student, Schedule.single(still, steps=6), logging_steps=every)
        with pytest.raises(
            FloatingPointError, match=f"the gradient was exactly 0 in {steps} steps before step {steps}"
        ):
            trainer.train()
