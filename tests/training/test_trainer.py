"""Proves that HPTTrainer's update is the method's, written out by hand, with its references, rates and costs."""

from __future__ import annotations

import dataclasses
import json
import logging
import math
import subprocess
import sys

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import (
    CLASSES,
    classifier,
    gpd_schedule,
    largest_difference,
    make_images,
    make_trainer,
    save_tiny_clip,
    single_schedule,
    trainer_from_disk,
    weights,
)
from safetensors.torch import load_file
from transformers import TrainerCallback, TrainingArguments

from hpt_hf.attacks.noise import Noise
from hpt_hf.attacks.pgd import TrainingAttack
from hpt_hf.attacks.threat_model import ThreatModel
from hpt_hf.data.collator import Collator
from hpt_hf.method.objectives import OBJECTIVES
from hpt_hf.method.schedule import Phase, Schedule
from hpt_hf.models.zero_shot import ZeroShotClassifier, fingerprint
from hpt_hf.training.config import HPTConfig
from hpt_hf.training.trainer import HPTTrainer

FROZEN = ("text_model.", "text_projection.", "logit_scale")


def logged(trainer) -> list[dict]:
    return [e for e in trainer.state.log_history if "loss" in e]


# --- the update


def by_hand(student, proxy, batch, *, g, b, restart, eps=8 / 255, momentum=0.9):
    """HPT-GPD of five and four steps, an interval of two, without hpt_hf's trainer, schedule, objectives or attack.

    Gradients run into the weights during the attack, as a naive loop has it, and are thrown away before the step.
    """
    trained = [p for n, p in student.model.named_parameters() if not n.startswith(FROZEN)]
    images, labels = batch["images"], batch["labels"]
    vanilla, ema = [p.detach().clone() for p in trained], [p.detach().clone() for p in trained]
    velocity = [torch.zeros_like(p) for p in trained]
    for p in trained:
        p.requires_grad_(True)
    for step in range(9):
        within, steps, peak = (step, 5, 1e-3) if step < 5 else (step - 5, 4, 1e-2)
        rate = peak * (1 + math.cos(math.pi * within / steps)) / 2
        with torch.no_grad():
            if step == 5 and restart:
                for p, v, w in zip(trained, vanilla, velocity, strict=True):
                    p.copy_(v)
                    w.zero_()
            if step == 7:
                for p, e in zip(trained, ema, strict=True):
                    p.copy_(b * p + (1 - b) * e)
        x = ThreatModel("linf", "8/255").random_start(images, Noise(batch["image_ids"], 0, step))
        for _ in range(2):
            x = x.detach().requires_grad_(True)
            F.cross_entropy(student.classify(x).logits, labels, reduction="sum").backward()
            x = torch.clamp(torch.clamp(x + eps * x.grad.sign(), images - eps, images + eps), 0, 1)
        x = x.detach()
        student.zero_grad()
        with torch.no_grad():
            teacher = proxy.classify(images if step < 5 else x).logits.softmax(1)
        answer = student.classify(x).logits.log_softmax(1)
        ((teacher * (teacher.log() - answer)).sum() / len(x)).backward()
        with torch.no_grad():
            for p, v in zip(trained, velocity, strict=True):
                if p.grad is not None:
                    p.sub_(rate * v.mul_(momentum).add_(p.grad))
            if step in (1, 3, 4):
                for e, p in zip(ema, trained, strict=True):
                    e.copy_(g * e + (1 - g) * p)
        student.zero_grad()


@pytest.mark.parametrize(("g", "b", "restart"), [(0.9, 0.2, True), (0.5, 0.5, False)])
def test_hpt_gpd_equals_the_method_written_out_by_hand(g, b, restart, student, student_path, proxy, tmp_path):
    """Also: only the vision side moves, and no gradient of the attack leaks into the update, for by hand it cannot."""
    data, own = make_images(8), classifier(student_path)
    schedule = gpd_schedule(steps=4, ema=g, pull=b, restart=restart)
    make_trainer(tmp_path, student, schedule, proxy=proxy, data=data, seed=0).train()
    vanilla = weights(own)
    by_hand(own, proxy, Collator(own.processor)(list(data)), g=g, b=b, restart=restart)
    assert largest_difference(weights(student), vanilla) > 5e-3, "or equality proves nothing"
    assert largest_difference(weights(student), weights(own)) < 1e-5


class Watcher(TrainerCallback):
    """The optimizer's rate at each step, and what trackers get."""

    def __init__(self):
        self.rates, self.logs = [], []

    def on_pre_optimizer_step(self, args, state, control, optimizer=None, **kwargs):
        self.rates.append(optimizer.param_groups[0]["lr"])

    def on_log(self, args, state, control, logs=None, **kwargs):
        self.logs.append(dict(logs))


def test_rates_terms_accuracy_and_phase_are_the_schedules_and_logged_by_name(paths, tmp_path):
    second = Phase(OBJECTIVES["pmg_aft"], 4, 2e-3, warmup_steps=3)
    schedule = Schedule((Phase(OBJECTIVES["ga"], 2, 1e-3), second), interval=2)
    watcher = Watcher()
    trainer = trainer_from_disk(tmp_path, paths, schedule, logging_steps=2, callbacks=[watcher])
    trainer.train()
    entries, rates = logged(trainer), [trainer.schedule.learning_rate(s) for s in range(6)]
    assert watcher.rates == pytest.approx(rates, abs=1e-15)
    assert [e["learning_rate"] for e in entries] == pytest.approx(rates[1::2], abs=1e-15)
    assert [e["phase"] for e in entries] == ["ga", "pmg_aft", "pmg_aft"]
    assert [e["phase"] for e in watcher.logs if "loss" in e] == ["ga", "pmg_aft", "pmg_aft"]
    for entry, names in zip(entries, (("ga",), *2 * [("ce", "anchor", "clean")]), strict=True):
        terms = {k.removeprefix("loss_"): v for k, v in entry.items() if k.startswith("loss_")}
        # Means over the interval, so the terms sum to the loss that the Trainer logs on its own.
        assert set(terms) == set(names) and sum(terms.values()) == pytest.approx(entry["loss"], abs=1e-4)
        assert 0 <= entry["robust_batch_accuracy"] <= 1
        assert (entry["robust_batch_accuracy"] * 16) % 1 == pytest.approx(0, abs=2e-3), "a share of two batches of 8"


# --- HPTConfig from Python


def test_the_configs_values_decide_the_schedule_are_recorded_and_not_changed(student, proxy, tmp_path):
    said = {"learning_rate": 0.02, "num_train_epochs": 2, "warmup_steps": 3, "lr_scheduler_type": "linear"}
    args = HPTConfig(str(tmp_path), **said, per_device_train_batch_size=8, use_cpu=True, report_to="none")
    before = args.to_dict()
    images = make_images()  # five steps an epoch
    common = {"attack": TrainingAttack(ThreatModel("linf", "8/255")), "proxy": proxy, "train_dataset": images}
    common |= {"data_collator": Collator(student.processor)}
    gpd = Schedule.gpd(OBJECTIVES["ga"], OBJECTIVES["hpt"], warm_up_epochs=1)
    trainer = HPTTrainer(student, args, schedule=gpd, **common)
    trainer.train()
    trainer.save_model()
    assert args.to_dict() == before and args.max_steps == -1
    record = json.loads((tmp_path / "train.json").read_text())
    told = [list(phase.values()) for phase in record["phases"]]
    assert told == [["ga", 5, pytest.approx(2e-5), 0, "cosine"], ["hpt", 10, 0.02, 3, "linear"]]
    assert record["steps"] == 15 == trainer.state.global_step and record["learning_rate"] == 0.02
    rates = [trainer.schedule.learning_rate(s) for s in range(5, 15)]
    assert rates[:4] == pytest.approx([0.02 / 3, 0.04 / 3, 0.02, 0.02]) and rates[-1] == pytest.approx(0.02 / 7)
    args.max_steps = 6
    shorter = HPTTrainer(student, args, schedule=gpd, **common)
    assert [p.steps for p in shorter.schedule.phases] == [2, 4], "in proportion to their lengths"


def test_a_decay_that_is_none_of_ours_and_a_token_are_refused_and_no_secret_is_repeated(tmp_path):
    with pytest.raises(ValueError, match="lr_scheduler_type: got 'polynomial', expected one of cosine"):
        HPTConfig(str(tmp_path), use_cpu=True, lr_scheduler_type="polynomial")
    with pytest.raises(ValueError, match="^hub_token would be stored in clear((?!hf_secret).)*$"):
        HPTConfig(str(tmp_path), use_cpu=True, hub_token="hf_secret")


def test_building_and_training_leave_the_callers_random_states_alone(student, proxy, tmp_path):
    def states():
        # Not Python's: threads that transformers starts when it loads a model draw from that at any time.
        return np.random.get_state()[1].tolist(), torch.get_rng_state().tolist()

    torch.manual_seed(77)
    before = states()
    trainer = make_trainer(tmp_path, student, single_schedule("hpt", steps=2), proxy=proxy)
    assert states() == before and torch.initial_seed() == 77
    trainer.train()
    assert states() == before


def test_importing_all_of_it_changes_nothing_of_the_process():
    code = """
import importlib, pkgutil, random, sys
import numpy, torch
torch.manual_seed(5)
before = random.getstate(), torch.get_rng_state(), numpy.random.get_state()[1].copy(), torch.get_num_threads()
import hpt_hf
names = [m.name for m in pkgutil.walk_packages(hpt_hf.__path__, "hpt_hf.") if not m.name.endswith("__main__")]
for name in names:
    importlib.import_module(name)
assert len(names) > 50 and random.getstate() == before[0] and torch.equal(torch.get_rng_state(), before[1])
assert (numpy.random.get_state()[1] == before[2]).all() and torch.get_num_threads() == before[3]
assert "matplotlib.pyplot" not in sys.modules and not torch.are_deterministic_algorithms_enabled()
"""
    subprocess.run([sys.executable, "-c", code], check=True)


def test_other_arguments_than_an_hptconfig_are_refused(student, tmp_path):
    with pytest.raises(TypeError, match="expected HPTConfig"):
        HPTTrainer(student, TrainingArguments(str(tmp_path), use_cpu=True), schedule=gpd_schedule(), attack=None)


# --- references


def test_references_stay_as_they_are_and_out_of_checkpoint_and_optimizer(student, proxy, tmp_path):
    both = Schedule((Phase(OBJECTIVES["fare"], 3, 1e-3), Phase(OBJECTIVES["hpt"], 3, 1e-2)), interval=3)
    proxy_before, vanilla, names = fingerprint(proxy), fingerprint(student), weights(student).keys()
    trainer = make_trainer(tmp_path, student, both, proxy=proxy, save_strategy="steps", save_steps=6)
    trainer.train()
    assert fingerprint(student) != vanilla
    assert fingerprint(trainer.proxy) == proxy_before and fingerprint(trainer.anchor) == vanilla
    for reference in (trainer.proxy, trainer.anchor):
        assert not reference.training and all(p.grad is None and not p.requires_grad for p in reference.parameters())
    saved = load_file(tmp_path / "checkpoint-6" / "model.safetensors")
    assert saved.keys() == names and largest_difference(saved, weights(student)) == 0
    optimized = {id(p) for group in trainer.optimizer.param_groups for p in group["params"]}
    assert optimized == {id(p) for n, p in student.model.named_parameters() if not n.startswith(FROZEN)}


@pytest.mark.parametrize(("name", "kept"), [("tecoa", []), ("fare", ["anchor"]), ("hpt", ["proxy"])])
def test_only_the_references_an_objective_asks_for_are_kept(name, kept, paths, tmp_path):
    trainer = trainer_from_disk(tmp_path, paths, single_schedule(name))
    assert [reference for reference in ("proxy", "anchor") if getattr(trainer, reference)] == kept


@pytest.mark.parametrize(
    ("student_classes", "proxy_classes", "says"),
    [
        (CLASSES, None, "learns from a proxy: got none"),
        (CLASSES, CLASSES[:3], r"different classes \(5 and 3 names\)"),
        (CLASSES, CLASSES[::-1], "different classes"),  # as many, in another order: it would teach the wrong names
        (None, CLASSES, "the student has no classes"),
        (CLASSES, "the student", "proxy: got the student itself, expected another model.*anchor_clean"),
    ],
)
def test_a_missing_proxy_other_classes_or_none_are_refused(student_classes, proxy_classes, says, paths, tmp_path):
    if proxy_classes == "the student":
        paths, proxy_classes = (paths[0], paths[0]), CLASSES
    student, proxy = (ZeroShotClassifier.from_pretrained(path) for path in paths)
    if student_classes:
        student.set_classes(student_classes)
    proxy = proxy_classes and proxy.set_classes(proxy_classes)
    with pytest.raises(ValueError, match=says):
        make_trainer(tmp_path / "out", student, gpd_schedule(), proxy=proxy)
    assert not (tmp_path / "out").exists()


def warnings_of(caplog) -> list[str]:
    return [r.getMessage() for r in caplog.records if r.levelno >= logging.WARNING and r.name.startswith("hpt_hf")]


@pytest.mark.parametrize(
    ("proxy", "says"),
    [
        ({"patch_size": 16, "width": 24, "layers": 1, "seed": 2}, []),
        ({"seed": 9}, ["same architecture"]),
        ({"patch_size": 12, "image_size": 48, "width": 24, "layers": 1}, ["resized to the proxy's 48 px"]),
    ],
)
def test_a_proxy_that_may_not_teach_is_a_warning_and_a_good_one_silence(proxy, says, student, tmp_path, caplog):
    proxy = classifier(save_tiny_clip(tmp_path / "proxy", **proxy))
    trainer = make_trainer(tmp_path, student, single_schedule("hpt"), proxy=proxy)
    warnings = warnings_of(caplog)
    assert len(warnings) == len(says) and all(part in warning for part, warning in zip(says, warnings, strict=True))
    trainer.train()
    losses = [e["loss"] for e in logged(trainer)]
    assert losses[-1] < losses[0]


def test_attack_on_proxy_crafts_there(student, proxy, tmp_path, monkeypatch):
    asked, classify = [], ZeroShotClassifier.classify

    def spy(self, images):
        if images.requires_grad:
            asked.append(self)
        return classify(self, images)

    monkeypatch.setattr(ZeroShotClassifier, "classify", spy)
    objective = dataclasses.replace(OBJECTIVES["hpt"], attack_on="proxy")
    make_trainer(tmp_path, student, Schedule.single(objective, steps=2, learning_rate=1e-3), proxy=proxy).train()
    assert len(asked) == 4 and all(model is proxy for model in asked), "two steps of PGD-2"


# --- what can go wrong while training


def test_a_broken_proxy_stops_the_run_in_the_phase_that_asks_it(student, proxy, tmp_path):
    with torch.no_grad():
        proxy.model.visual_projection.weight.fill_(torch.nan)
    schedule = Schedule((Phase(OBJECTIVES["tecoa"], 3, 1e-3), Phase(OBJECTIVES["hpt"], 3, 1e-3)), interval=3)
    says = r"the loss is nan at step 3 of 6, in phase hpt \(hpt nan\).*a lower rate"
    with pytest.raises(FloatingPointError, match=says):
        make_trainer(tmp_path, student, schedule, proxy=proxy).train()


def test_an_objective_of_labels_refuses_images_without(student, tmp_path):
    with pytest.raises(ValueError, match="tecoa needs labels"):
        make_trainer(tmp_path, student, single_schedule("tecoa"), data=make_images(labelled=False)).train()


def test_sharding_that_accelerate_would_leave_out_in_silence_is_a_warning(paths, tmp_path, monkeypatch, caplog):
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    trainer_from_disk(tmp_path, paths)
    assert ["every process holds all weights" in w for w in warnings_of(caplog)] == [True]


def test_deepspeed_is_refused_before_anything_is_trained(paths, tmp_path, monkeypatch):
    prepared = HPTTrainer.create_accelerator_and_postprocess

    def sharded(self):
        prepared(self)
        self.is_deepspeed_enabled = True

    monkeypatch.setattr(HPTTrainer, "create_accelerator_and_postprocess", sharded)
    with pytest.raises(ValueError, match=r"DeepSpeed.*FSDP2"):
        trainer_from_disk(tmp_path, paths)


# --- cost and side effects


@pytest.mark.parametrize(
    ("name", "forwards"), [("hpt", {"student": 3, "proxy": 1}), ("pmg_aft", {"student": 4, "proxy": 0})]
)
def test_a_step_costs_the_forwards_its_equations_name_and_text_is_read_once(name, forwards, paths, tmp_path):
    """PGD-2 is two of the student's; then one for each view that the loss names."""
    calls, models = {}, {}
    for key, path in zip(("student", "proxy"), paths, strict=True):
        models[key] = ZeroShotClassifier.from_pretrained(path)
        for tower in ("vision", "text"):
            count = calls.setdefault((key, tower), [])
            module = getattr(models[key].model, f"{tower}_model")
            module.register_forward_hook(lambda module, inputs, output, count=count: count.append(1))
        models[key].set_classes(CLASSES)
    others = {"proxy": models["proxy"], "held_out": make_images(8)}
    trainer = make_trainer(tmp_path, models["student"], single_schedule(name, steps=3), **others)
    trainer.train()
    assert {key: len(calls[key, "vision"]) for key in models} == {key: 3 * n for key, n in forwards.items()}
    trainer.evaluate()
    assert [len(calls[key, "text"]) for key in models] == [1, 1]


def test_evaluate_measures_every_held_out_image_and_leaves_no_trace(student, proxy, tmp_path):
    held_out = make_images(19, seed=3)  # two full batches and three more
    trainer = make_trainer(tmp_path, student, single_schedule("hpt"), proxy=proxy, held_out=held_out)
    before, trained = weights(student), [n for n, p in student.model.named_parameters() if p.requires_grad]
    metrics, again = (trainer.evaluate() for _ in range(2))
    assert largest_difference(weights(student), before) == 0 and all(p.grad is None for p in student.parameters())
    assert trained == [n for n, p in student.model.named_parameters() if p.requires_grad] != []
    for key in ("eval_loss", "eval_clean_accuracy", "eval_robust_accuracy"):
        assert metrics[key] == again[key]
    batch = Collator(student.processor)(list(held_out))
    images, labels, ids = batch["images"], batch["labels"], batch["image_ids"]

    def logits(x):
        return student.eval().classify(x).logits

    def loss(x):
        return F.cross_entropy(logits(x), labels, reduction="none")

    with torch.no_grad():
        for name, x in (("clean", images), ("robust", trainer.attack(loss, images, ids, seed=42, round=-1))):
            share = (logits(x).argmax(1) == labels).double().mean().item()
            assert metrics[f"eval_{name}_accuracy"] == pytest.approx(100 * share) and (
                0 < share < 1 or name != "clean"
            )
