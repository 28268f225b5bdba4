"""Every field of a recipe changed: a checkpoint of the other run is refused by that field, or the field is free."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import datasets
import pytest
from conftest import CLASSES, contents, make_images, save_tiny_clip
from PIL import ImageOps

from hpt_hf.commands.parser import parse
from hpt_hf.commands.train import RECIPE, DataArguments, MethodArguments, build
from hpt_hf.training.config import KEPT, HPTConfig

STEPS = "--method hpt_gpd --ga_epochs 1 --num_train_epochs 1 --per_device_train_batch_size 8 --learning_rate 0.01"
STEPS += " --ga_learning_rate 0.001 --use_cpu true --disable_tqdm true --eps 8/255 --interval 2 --held_out 0.2"
# Field -> another value, and what the refusal names.
DECIDES = {
    # which images, which classes
    "dataset": ("{other_data}", "data"),
    "image_column": ("mirrored", "data"),
    "label_column": ("reverse", "data"),
    "classes": ("a b c d e", "classes"),
    "classes_file": ("{names}", "classes"),
    "templates": ("a_{{}}", "templates"),
    "held_out": ("0.3", "images"),
    "leave_out_classes": ("0.4", "classes"),
    # the method
    "method": ("tecoa", "phase 1"),
    "model": ("{other_student}", "student"),
    "proxy": ("{other_proxy}", "proxy"),
    "proxy_weights": ("3 1", "proxy_weights"),
    "proxy_on": ("clean", "phase 2 objective"),
    "proxy_dtype": ("bfloat16", "proxy_dtype"),
    "lora_r": ("4", "lora"),
    "norm": ("l2", "attack norm"),
    "eps": ("4/255", "attack eps"),
    "attack_steps": ("3", "attack steps"),
    "attack_step_size": ("1/255", "attack step_size"),
    "attack_random_start": ("false", "attack random_start"),
    "attack_on": ("proxy", "phase 1 attack_on"),
    "kl_direction": ("reverse", "phase 1 direction"),
    "student_temperature": ("2", "phase 1 student_temperature"),
    "teacher_temperature": ("2", "phase 1 teacher_temperature"),
    "attack_loss": ("kl", "phase 1 attack_loss"),
    "average_last": ("0.5", "phase 2 average_last"),
    "final_pull": ("true", "phase 2 final_pull"),
    "layer_rate_decay": ("0.8", "layer_rate_decay"),
    "ga_epochs": ("2", "phase 1 steps"),
    "ga_learning_rate": ("0.002", "phase 1 learning_rate"),
    "ema": ("0.8", "phase 1 ema"),
    "pull": ("0.6", "phase 2 pull"),
    "interval": ("3", "interval"),
    "restart": ("false", "phase 2 restart"),
    # the Trainer's
    "num_train_epochs": ("2", "phase 2 steps"),
    "max_steps": ("6", "phase 1 steps|phase 2 steps"),
    "learning_rate": ("0.02", "phase 2 learning_rate"),
    "warmup_steps": ("2", "phase 2 warmup_steps"),
    "lr_scheduler_type": ("linear", "phase 2 decay"),
    "optim": ("adamw_torch", "optim"),
    "optim_args": ("momentum=0.8", "optim_args"),
    "weight_decay": ("0.1", "weight_decay"),
    "max_grad_norm": ("1", "max_grad_norm"),
    "adam_beta1": ("0.8", "adam_beta1"),
    "adam_beta2": ("0.9", "adam_beta2"),
    "adam_epsilon": ("1e-6", "adam_epsilon"),
    "bf16": ("true", "bf16"),
    "fp16": ("true", "fp16"),
    "seed": ("5", "seed"),
    "data_seed": ("5", "data_seed"),
    "dataloader_drop_last": ("false", "dataloader_drop_last"),
    "per_device_train_batch_size": ("4", "batch"),
    "gradient_accumulation_steps": ("2", "batch"),
}
# They change the data or the model, whose digests are compared, where these come from the Hub or a named set; a stream
# has no held-out slice.
BY_DIGEST = {"dataset_revision", "model_revision", "proxy_revision", "data_dir", "split", "streaming", "images"}
ON_GPU = {"tf32"}  # decides, and is refused without one
# Decide with `lora_r`, or `--method distillation`, alone.
WITH = {"lora_alpha", "teachers", "teacher_weights", "teachers_agreeing"}
FREE = {"license": "mit", "proxy_device": "cpu", "on_corrupt": "skip", "save_strategy": "epoch", "save_steps": "7"}
FREE |= {"save_total_limit": "2", "eval_strategy": "epoch", "per_device_eval_batch_size": "3", "logging_steps": "3"}
FREE |= {"run_name": "x", "report_to": "none", "dataloader_num_workers": "1", "log_level": "error", "project": "x"}
FREE |= {"dataloader_persistent_workers": "true", "load_best_model_at_end": "true", "overwrite": "false"}
FREE |= {"activation_checkpointing": "true", "hub_strategy": "every_save", "logging_first_step": "true"}
FREE |= {"logging_strategy": "epoch", "torch_compile": "true", "torch_compile_backend": "eager"}


def two_columns(file: Path, seed: int) -> Path:
    """Sixty images and labels, and beside each the same otherwise."""
    images, label = make_images(60, seed=seed), datasets.ClassLabel(names=list(CLASSES))
    rows = [images[i]["image"] for i in range(60)]
    columns = {"image": rows, "mirrored": [ImageOps.mirror(image) for image in rows]}
    columns |= {"label": images.labels, "reverse": [len(CLASSES) - 1 - i for i in images.labels]}
    kinds = {"image": datasets.Image(), "mirrored": datasets.Image(), "label": label, "reverse": label}
    datasets.Dataset.from_dict(columns, features=datasets.Features(kinds)).to_parquet(file)
    return file


@pytest.fixture(scope="module")
def run(tmp_path_factory, paths) -> tuple[list[str], Path, dict]:
    """(the command line of a run, its folder with a checkpoint, other things to name)."""
    place = tmp_path_factory.mktemp("mismatches")
    data, other = (two_columns(place / f"{seed}.parquet", seed) for seed in (0, 9))
    (place / "names.txt").write_text("\n".join(f"a {name}" for name in CLASSES))
    named = {"other_data": other, "names": place / "names.txt"}
    named |= {"other_student": save_tiny_clip(place / "student", seed=77)}
    second = save_tiny_clip(place / "second", patch_size=16, seed=79)
    named |= {"other_proxy": save_tiny_clip(place / "proxy", patch_size=16, seed=78)}
    argv = f"--dataset {data} --image_column image --label_column label --output_dir {place / 'out'}"
    argv = f"{argv} --model {paths[0]} --proxy {paths[1]} {second} {STEPS}".split()
    trainer(argv, "--save_steps", "3", "--save_strategy", "steps").train()
    assert len(list((place / "out").glob("checkpoint-*"))) >= 2
    return argv, place / "out", named


def trainer(argv: list[str], *more: str):
    return build(*parse(RECIPE, [*argv, *more]))


def flags(name: str, value: str, named: dict) -> list[str]:
    values = [part.replace("_", " ") if name == "templates" else part for part in value.format(**named).split()]
    return [f"--{name}", *values]


@pytest.mark.parametrize("name", DECIDES)
def test_what_decides_the_weights_is_refused_by_its_name_whatever_begins_the_run(name, run):
    """Resumed, it would end at other weights under this run's name; begun beside it, a kill would mix the two."""
    argv, folder, named = run
    value, field = DECIDES[name]
    before, started = contents(folder), trainer(argv, *flags(name, value, named))
    for resume in (True, None):
        with pytest.raises(ValueError, match=f"of another run: (.*; )?({field})[^;]*: got .*, expected "):
            started.train(resume_from_checkpoint=resume)
    assert contents(folder) == before


def test_what_cannot_change_the_weights_is_free(run):
    """All at once: a refusal would name the field."""
    argv, _, named = run
    started = trainer(argv, *(part for name, value in FREE.items() for part in flags(name, value, named)))
    for resume in (started.last_checkpoint(), None):
        started.check_run(resume)


def test_no_field_is_forgotten():
    """Of ours every one; transformers' own are refused at another value, decide, or are among those that it names."""
    ours = {f.name for part in (DataArguments, MethodArguments) for f in dataclasses.fields(part)}
    assert ours == ours & (DECIDES.keys() | BY_DIGEST | WITH | FREE.keys())
    of_transformers = {f.name for f in dataclasses.fields(HPTConfig)}
    assert (DECIDES.keys() | FREE.keys() | BY_DIGEST) - ours <= of_transformers and not DECIDES.keys() & FREE.keys()
    free = sorted(of_transformers - DECIDES.keys() - KEPT.keys() - ON_GPU)
    text = Path(__file__, "../../../docs/reliability.md").resolve().read_text()
    assert [name for name in free if f"`{name}`" not in text] == []
