"""Proves that HPTTrainer's update is the method's, written out by hand, whatever the batching, precision, proxy or data at hand."""

from __future__ import annotations

import dataclasses
import logging
import math

import pytest
import torch
import torch.nn.functional as F
from conftest import (
    CLASSES,
    gpd_schedule,
    largest_difference,
    make_images,
    make_trainer,
    relabelled,
    save_tiny_clip,
    single_schedule,
    weights,
)
from safetensors.torch import load_file
from transformers import CLIPModel, TrainerCallback

from hpt_hf.attacks.noise import Noise
from hpt_hf.attacks.threat_model import ThreatModel
from hpt_hf.data.collator import Collator
from hpt_hf.method.objectives import OBJECTIVES
from hpt_hf.method.schedule import Phase, Schedule
from hpt_hf.models.zero_shot import ZeroShotClassifier, ZeroShotOutput, fingerprint
from hpt_hf.training.trainer import HPTTrainer

FROZEN = ("text_model.", "text_projection.", "logit_scale")


# --- the update ---------------------------------------------------------------------------------------------------------


def by_hand(student, proxy, batch, *, eps=8 / 255, g=0.9, b=0.5, momentum=0.9) -> ZeroShotClassifier:
    """HPT-GPD of four and four steps, an interval of two, without any of hpt_hf's trainer, schedule, objectives or attack loop.

    Gradients run into the weights during the attack, as a naive loop would have it, and are thrown away before the step.
    """
    trained = [p for n, p in student.model.named_parameters() if not n.startswith(FROZEN)]
    images, labels = batch["images"], batch["labels"]
    vanilla, ema = [p.detach().clone() for p in trained], [p.detach().clone() for p in trained]
    for p in trained:
        p.requires_grad_(True)
    for step in range(8):
        within, peak = (step, 1e-3) if step < 4 else (step - 4, 1e-2)
        rate = peak * (1 + math.cos(math.pi * within / 4)) / 2
        with torch.no_grad():
            if step == 4:
                for p, v in zip(trained, vanilla, strict=True):
                    p.copy_(v)
            if step == 6:
                for p, e in zip(trained, ema, strict=True):
                    p.copy_(b * p + (1 - b) * e)
        if step in (0, 4):
            velocity = [torch.zeros_like(p) for p in trained]
        x = ThreatModel("linf", "8/255").random_start(images, Noise(batch["image_ids"], 0, step))
        for _ in range(2):
            x = x.detach().requires_grad_(True)
            F.cross_entropy(student.classify(x).logits, labels, reduction="sum").backward()
            x = torch.clamp(torch.clamp(x + eps * x.grad.sign(), images - eps, images + eps), 0, 1)
        x = x.detach()
        student.zero_grad()
        with torch.no_grad():
            teacher = proxy.classify(images if step < 4 else x).logits.softmax(1)
        answer = student.classify(x).logits.log_softmax(1)
        ((teacher * (teacher.log() - answer)).sum() / len(x)).backward()
        with torch.no_grad():
            for p, v in zip(trained, velocity, strict=True):
                if p.grad is not None:
                    p.sub_(rate * v.mul_(momentum).add_(p.grad))
            if step in (1, 3):
                for e, p in zip(ema, trained, strict=True):
                    e.copy_(g * e + (1 - g) * p)
        student.zero_grad()
    return student


def test_hpt_gpd_equals_the_method_written_out_by_hand(student, student_path, proxy, tmp_path):
    """Also: no gradient of the attack leaks into the update, for by hand it cannot."""
    data = make_images(8)
    trainer = make_trainer(
        tmp_path, student, gpd_schedule(warm_up_steps=4, steps=4), proxy=proxy, data=data, seed=0, max_grad_norm=0.0
    )
    before = weights(student)
    trainer.train()
    own = ZeroShotClassifier.from_pretrained(student_path).set_classes(CLASSES)
    by_hand(own, proxy, Collator(own.processor)([data[i] for i in range(8)]))
    assert largest_difference(weights(student), before) > 1e-2, "or equality proves nothing"
    assert largest_difference(weights(student), weights(own)) < 1e-5


def test_hpt_gpd_lowers_its_loss_and_touches_the_vision_side_only(student, proxy, tmp_path):
    before = weights(student)
    trainer = make_trainer(tmp_path, student, gpd_schedule(warm_up_steps=5, steps=25, interval=5), proxy=proxy)
    trainer.train()
    after = weights(student)
    for stage in ("ga", "hpt"):
        losses = [entry["loss"] for entry in trainer.state.log_history if entry.get("phase") == stage]
        assert losses[-1] < 0.5 * losses[0], f"{stage}: {losses}"
    still = {n for n in before if torch.equal(before[n], after[n])}
    text = {n for n in before if n.startswith(FROZEN)}
    assert len(text) > 20 and text <= still
    # A key's bias shifts all scores of a query alike: softmax does not see it, so rounding alone moves it or does not.
    assert {n for n in still - text if "k_proj.bias" not in n} == set()


OBJECTIVE_NAMES = sorted(OBJECTIVES)


@pytest.mark.parametrize("name", OBJECTIVE_NAMES)
def test_batch_8_equals_4_accumulated_batches_of_2(name, student_path, proxy, tmp_path):
    results = []
    # The attack takes signs: one gradient near 0 rounded the other way moves a pixel, the more so by fare's large gradients.
    rate = 1e-5 if name == "fare" else 1e-3
    for size, accumulate in ((8, 1), (2, 4)):
        student = ZeroShotClassifier.from_pretrained(student_path).set_classes(CLASSES)
        before = weights(student)
        trainer = make_trainer(
            tmp_path,
            student,
            single_schedule(name, steps=5, learning_rate=rate),
            proxy=proxy,
            per_device_train_batch_size=size,
            gradient_accumulation_steps=accumulate,
        )
        trainer.train()
        results.append((weights(student), [e["loss"] for e in trainer.state.log_history if "loss" in e]))
    (whole, losses), (parts, accumulated) = results
    assert len(losses) == len(accumulated) == 5 and accumulated == pytest.approx(losses, rel=1e-3)
    assert largest_difference(whole, before) > 1e-4 and largest_difference(whole, parts) < 1e-6


def test_another_seed_is_another_run(student_path, proxy, tmp_path):
    """The equalities of this file would hold for a Trainer that ignores its data and noise; this one does not."""
    results = []
    for seed in (0, 1, 1):
        student = ZeroShotClassifier.from_pretrained(student_path).set_classes(CLASSES)
        make_trainer(tmp_path, student, single_schedule("hpt"), proxy=proxy, seed=seed).train()
        results.append(weights(student))
    assert largest_difference(results[0], results[1]) > 1e-4
    assert largest_difference(results[1], results[2]) == 0


class Recorder(TrainerCallback):
    """What a callback sees of each step, the optimizer's rate above all."""

    def __init__(self):
        self.rates, self.gradients, self.logs = [], [], []

    def on_pre_optimizer_step(self, args, state, control, model=None, optimizer=None, **kwargs):
        self.rates.append(optimizer.param_groups[0]["lr"])
        self.gradients.append({n for n, p in model.model.named_parameters() if p.grad is not None})

    def on_log(self, args, state, control, logs=None, **kwargs):
        self.logs.append(dict(logs))


def test_rates_used_and_logged_are_the_schedules(student, proxy, tmp_path):
    schedule = gpd_schedule(warmup_steps=2)
    recorder = Recorder()
    trainer = make_trainer(tmp_path, student, schedule, proxy=proxy, callbacks=[recorder])
    trainer.train()
    expected = [schedule.learning_rate(s) for s in range(10)]
    assert recorder.rates == pytest.approx(expected, abs=1e-15)
    logged = [e["learning_rate"] for e in trainer.state.log_history if "learning_rate" in e]
    assert logged == pytest.approx(expected, abs=1e-15)
    assert all(g and not any(n.startswith(FROZEN) for n in g) for g in recorder.gradients)


def test_terms_accuracy_and_phase_are_logged_by_name(student, proxy, tmp_path):
    objective = OBJECTIVES["pmg_aft"]
    schedule = Schedule((Phase(OBJECTIVES["ga"], 2, 1e-3), Phase(objective, 4, 1e-3)), interval=2)
    recorder = Recorder()
    trainer = make_trainer(tmp_path, student, schedule, proxy=proxy, logging_steps=2, callbacks=[recorder])
    trainer.train()
    entries = [e for e in trainer.state.log_history if "loss" in e]
    assert [e["phase"] for e in entries] == ["ga", "pmg_aft", "pmg_aft"]
    assert {k for k in entries[0] if k.startswith("loss_")} == {"loss_ga"}
    assert {k for k in entries[1] if k.startswith("loss_")} == {"loss_ce", "loss_anchor", "loss_clean"}
    for entry in entries:  # means over the interval, so the terms sum to the loss the Trainer logs on its own
        assert sum(v for k, v in entry.items() if k.startswith("loss_")) == pytest.approx(entry["loss"], abs=1e-4)
        assert 0 <= entry["robust_batch_accuracy"] <= 1
        assert (entry["robust_batch_accuracy"] * 16) % 1 == pytest.approx(0, abs=2e-3), "a share of two batches of 8"
    # What trackers get is what the history keeps.
    assert [e["phase"] for e in recorder.logs if "loss" in e] == ["ga", "pmg_aft", "pmg_aft"]


def test_tensorboard_gets_the_terms(student, proxy, tmp_path, monkeypatch):
    pytest.importorskip("tensorboard", reason="tensorboard is an extra: pip install hpt_hf[track]")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    monkeypatch.setenv("TENSORBOARD_LOGGING_DIR", str(tmp_path / "runs"))
    make_trainer(tmp_path, student, single_schedule("hpt"), proxy=proxy, report_to=["tensorboard"]).train()
    events = EventAccumulator(str(tmp_path / "runs"))
    events.Reload()
    assert len(events.Scalars("train/loss_hpt")) == 5


# --- references -----------------------------------------------------------------------------------------------------------


def test_references_stay_as_they_are_and_out_of_the_checkpoint(student, student_path, proxy, tmp_path):
    both = Schedule((Phase(OBJECTIVES["fare"], 3, 1e-3), Phase(OBJECTIVES["hpt"], 3, 1e-2)), interval=3)
    proxy_before, vanilla = fingerprint(proxy), fingerprint(student)
    trainer = make_trainer(tmp_path, student, both, proxy=proxy, save_strategy="steps", save_steps=6)
    trainer.train()
    assert fingerprint(student) != vanilla
    assert fingerprint(trainer.proxy) == proxy_before and fingerprint(trainer.anchor) == vanilla
    for reference in (trainer.proxy, trainer.anchor):
        assert not reference.training and all(p.grad is None and not p.requires_grad for p in reference.parameters())
    saved = load_file(tmp_path / "checkpoint-6" / "model.safetensors")
    assert saved.keys() == CLIPModel.from_pretrained(student_path).state_dict().keys()
    assert all(torch.equal(saved[n], student.model.state_dict()[n]) for n in saved)
    optimized = {id(p) for group in trainer.optimizer.param_groups for p in group["params"]}
    assert optimized == {id(p) for n, p in student.model.named_parameters() if not n.startswith(FROZEN)}


def test_only_the_references_an_objective_asks_for_are_kept(student, proxy, tmp_path):
    trainer = make_trainer(tmp_path, student, single_schedule("tecoa"), proxy=proxy)
    assert trainer.proxy is None and trainer.anchor is None
    assert make_trainer(tmp_path, student, single_schedule("fare")).anchor is not None


def test_a_missing_proxy_other_classes_or_none_are_errors(student, student_path, proxy, tmp_path):
    with pytest.raises(ValueError, match="learns from a proxy"):
        make_trainer(tmp_path / "out", student, gpd_schedule())
    proxy.set_classes(CLASSES[:3])
    with pytest.raises(ValueError, match=r"different classes \(5 and 3 names\)"):
        make_trainer(tmp_path / "out", student, gpd_schedule(), proxy=proxy)
    proxy.set_classes(CLASSES[::-1])  # as many, in another order: the proxy would teach the wrong names
    with pytest.raises(ValueError, match="different classes"):
        make_trainer(tmp_path / "out", student, gpd_schedule(), proxy=proxy)
    with pytest.raises(ValueError, match="the student has no classes"):
        make_trainer(tmp_path / "out", ZeroShotClassifier.from_pretrained(student_path), gpd_schedule(), proxy=proxy)
    assert not (tmp_path / "out").exists()


def warnings_of(caplog) -> list[str]:
    return [r.getMessage() for r in caplog.records if r.levelno >= logging.WARNING and r.name.startswith("hpt_hf")]


def test_a_proxy_that_cannot_teach_is_a_warning_and_a_good_one_silence(student, student_path, proxy, tmp_path, caplog):
    make_trainer(tmp_path, student, single_schedule("hpt"), proxy=proxy)
    assert warnings_of(caplog) == []
    same = ZeroShotClassifier.from_pretrained(student_path).set_classes(CLASSES)
    make_trainer(tmp_path, student, single_schedule("hpt"), proxy=same)
    assert ["same model" in w for w in warnings_of(caplog)] == [True]
    caplog.clear()
    twin = ZeroShotClassifier.from_pretrained(save_tiny_clip(tmp_path / "twin", patch_size=8, seed=9)).set_classes(
        CLASSES
    )
    make_trainer(tmp_path, student, single_schedule("hpt"), proxy=twin)
    assert ["same architecture" in w for w in warnings_of(caplog)] == [True]


def test_a_proxy_of_another_image_size_teaches_after_a_warning(student, tmp_path, caplog):
    path = save_tiny_clip(tmp_path / "large", patch_size=12, image_size=48, width=24, layers=1, seed=5)
    trainer = make_trainer(
        tmp_path,
        student,
        single_schedule("hpt", steps=10),
        proxy=ZeroShotClassifier.from_pretrained(path).set_classes(CLASSES),
    )
    assert ["48 px" in w for w in warnings_of(caplog)] == [True]
    trainer.train()
    losses = [e["loss"] for e in trainer.state.log_history if "loss" in e]
    assert losses[-1] < losses[0]


def test_attack_on_proxy_crafts_there(student, student_path, proxy, tmp_path, monkeypatch):
    """The option changes which model the images are crafted on, and nothing else is attacked."""
    asked = []
    classify = ZeroShotClassifier.classify

    def spy(self, images):
        if images.requires_grad:
            asked.append(self)
        return classify(self, images)

    monkeypatch.setattr(ZeroShotClassifier, "classify", spy)
    for on, target in (("student", student), ("proxy", proxy)):
        asked.clear()
        objective = dataclasses.replace(OBJECTIVES["hpt"], attack_on=on)
        make_trainer(tmp_path, student, Schedule.single(objective, steps=2, learning_rate=1e-3), proxy=proxy).train()
        assert len(asked) == 4 and all(model is target for model in asked), "two steps of PGD-2"


# --- what can go wrong while training ---------------------------------------------------------------------------------------


def test_a_diverged_run_stops_and_says_where(student, proxy, tmp_path):
    with pytest.raises(FloatingPointError, match=r"the loss is nan at step [1-9] of 20, in phase hpt .*a lower rate"):
        make_trainer(tmp_path, student, single_schedule("hpt", steps=20, learning_rate=1e30), proxy=proxy).train()


def test_a_broken_proxy_stops_the_run_in_the_phase_that_asks_it(student, proxy, tmp_path):
    with torch.no_grad():
        proxy.model.visual_projection.weight.fill_(torch.nan)
    schedule = Schedule((Phase(OBJECTIVES["tecoa"], 3, 1e-3), Phase(OBJECTIVES["hpt"], 3, 1e-3)), interval=3)
    with pytest.raises(FloatingPointError, match=r"the loss is nan at step 3 of 6, in phase hpt \(hpt nan\)"):
        make_trainer(tmp_path, student, schedule, proxy=proxy).train()


@pytest.mark.parametrize("name", OBJECTIVE_NAMES)
def test_pictures_without_labels(name, student, proxy, tmp_path):
    trainer = make_trainer(tmp_path, student, single_schedule(name), proxy=proxy, data=make_images(labelled=False))
    if name in ("tecoa", "pmg_aft"):
        with pytest.raises(ValueError, match=f"{name} needs labels"):
            trainer.train()
    else:
        before = weights(student)
        trainer.train()
        assert largest_difference(before, weights(student)) > 1e-4


def test_without_labels_the_attack_aims_at_the_proxys_answer(student, student_path, proxy, tmp_path):
    """Training on no labels is training on the labels that the proxy reads off the clean pictures, bit by bit."""
    bare = make_images(labelled=False)
    batch = Collator(proxy.processor)([bare[i] for i in range(len(bare))])
    with torch.no_grad():
        read = proxy.classify(batch["images"]).logits.argmax(1).tolist()
    told = make_images()
    assert read != told.labels
    told = relabelled(told, read)
    results = []
    for data in (bare, told):
        student = ZeroShotClassifier.from_pretrained(student_path).set_classes(CLASSES)
        make_trainer(tmp_path, student, single_schedule("hpt"), proxy=proxy, data=data).train()
        results.append(weights(student))
    assert largest_difference(*results) == 0


@dataclasses.dataclass
class Unchecked(ZeroShotOutput):
    """Under bf16 accelerate rebuilds a model's output from a dict, as ModelOutput allows and the tests' shape checks do not."""


def test_under_bf16_the_loss_is_computed_in_bf16_and_the_attack_in_float32(student, proxy, tmp_path, monkeypatch):
    monkeypatch.setattr("hpt_hf.models.zero_shot.ZeroShotOutput", Unchecked)
    seen = {"attack": set(), "loss": set(), "proxy": set()}
    layer = student.model.vision_model.encoder.layers[0].mlp.fc1

    def watch(module, inputs, output):  # the attack freezes the weights, the loss does not
        seen["loss" if module.weight.requires_grad else "attack"].add(output.dtype)

    layer.register_forward_hook(watch)
    proxy.model.vision_model.encoder.layers[0].mlp.fc1.register_forward_hook(
        lambda m, i, o: seen["proxy"].add(o.dtype)
    )
    trainer = make_trainer(tmp_path, student, gpd_schedule(warm_up_steps=2, steps=8), proxy=proxy, bf16=True)
    trainer.train()
    assert seen == {"attack": {torch.float32}, "loss": {torch.bfloat16}, "proxy": {torch.bfloat16}}
    assert all(p.dtype == torch.float32 for p in student.parameters())
    losses = [e["loss"] for e in trainer.state.log_history if e.get("phase") == "hpt"]
    assert losses[-1] < losses[0]


# --- cost and side effects ----------------------------------------------------------------------------------------------------


def test_the_text_towers_run_once_per_class_list(student_path, proxy_path, tmp_path):
    calls = {"student": 0, "proxy": 0}
    models = {}
    for name, path in (("student", student_path), ("proxy", proxy_path)):
        models[name] = ZeroShotClassifier.from_pretrained(path)

        def count(module, inputs, output, name=name):
            calls[name] += 1

        models[name].model.text_model.register_forward_hook(count)
        models[name].set_classes(CLASSES)
    assert calls == {"student": 1, "proxy": 1}
    trainer = make_trainer(
        tmp_path, models["student"], gpd_schedule(), proxy=models["proxy"], held_out=make_images(8, seed=1)
    )
    trainer.train()
    trainer.evaluate()
    assert calls == {"student": 1, "proxy": 1}


@pytest.mark.parametrize(
    ("name", "forwards"), [("hpt", {"student": 3, "proxy": 1}), ("pmg_aft", {"student": 4, "proxy": 0})]
)
def test_a_step_costs_the_forwards_its_equations_name(name, forwards, student, proxy, tmp_path):
    """PGD-2 is two of the student's; then one for each view that the loss names."""
    calls = {"student": 0, "proxy": 0}
    for key, model in (("student", student), ("proxy", proxy)):
        model.model.vision_model.register_forward_hook(lambda m, i, o, key=key: calls.__setitem__(key, calls[key] + 1))
    make_trainer(tmp_path, student, single_schedule(name, steps=3), proxy=proxy).train()
    assert calls == {k: 3 * v for k, v in forwards.items()}


def test_evaluate_measures_every_held_out_picture_and_leaves_no_trace(student, proxy, tmp_path):
    held_out = make_images(19, seed=3)  # two full batches and three more
    trainer = make_trainer(tmp_path, student, single_schedule("hpt"), proxy=proxy, held_out=held_out)
    before, trained = weights(student), [n for n, p in student.model.named_parameters() if p.requires_grad]
    metrics = [trainer.evaluate() for _ in range(2)]
    assert largest_difference(weights(student), before) == 0 and all(p.grad is None for p in student.parameters())
    assert trained == [n for n, p in student.model.named_parameters() if p.requires_grad] != []
    assert not student.training
    for key in ("eval_loss", "eval_clean_accuracy", "eval_robust_accuracy"):
        assert metrics[0][key] == metrics[1][key]
    batch = Collator(student.processor)([held_out[i] for i in range(19)])
    images, labels = batch["images"], batch["labels"]
    x = trainer.attack(
        lambda x: F.cross_entropy(student.classify(x).logits, labels, reduction="none"),
        images,
        batch["image_ids"],
        seed=42,
        round=-1,
    )
    with torch.no_grad():
        clean, robust = (
            100 * (student.classify(i).logits.argmax(1) == labels).double().mean().item() for i in (images, x)
        )
    assert metrics[0]["eval_clean_accuracy"] == pytest.approx(clean) and 0 < clean < 100
    assert metrics[0]["eval_robust_accuracy"] == pytest.approx(robust)


def test_evaluating_on_the_way_does_not_change_the_run(student_path, proxy, tmp_path):
    results = []
    for strategy in ("no", "steps"):
        student = ZeroShotClassifier.from_pretrained(student_path).set_classes(CLASSES)
        trainer = make_trainer(
            tmp_path,
            student,
            gpd_schedule(),
            proxy=proxy,
            held_out=make_images(8, seed=3),
            eval_strategy=strategy,
            eval_steps=1,
        )
        trainer.train()
        evaluated = [e for e in trainer.state.log_history if "eval_robust_accuracy" in e]
        assert len(evaluated) == (10 if strategy == "steps" else 0)
        history = [
            {k: e[k] for k in ("loss", "robust_batch_accuracy")} for e in trainer.state.log_history if "loss" in e
        ]
        results.append((weights(student), history))
    assert largest_difference(results[0][0], results[1][0]) == 0
    assert results[0][1] == results[1][1]


def test_sharding_asked_for_where_accelerate_would_leave_it_out_in_silence_is_a_warning(
    student, proxy, tmp_path, monkeypatch, caplog
):
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    make_trainer(tmp_path, student, gpd_schedule(), proxy=proxy)
    assert ["every process holds all weights" in w for w in warnings_of(caplog)] == [True]


def test_deepspeed_is_refused_before_anything_is_trained(tmp_path, student, proxy, monkeypatch):
    prepared = HPTTrainer.create_accelerator_and_postprocess

    def sharded(self):
        prepared(self)
        self.is_deepspeed_enabled = True

    monkeypatch.setattr(HPTTrainer, "create_accelerator_and_postprocess", sharded)
    with pytest.raises(ValueError, match=r"DeepSpeed.*FSDP2 .accelerate/fsdp2.yaml"):
        make_trainer(tmp_path, student, gpd_schedule(), proxy=proxy)
