"""Proves that what saves time or memory, or only looks on, ends at the same weights, on one process without a stop."""

from __future__ import annotations

import functools
from collections import Counter

import pytest
import torch
from conftest import (
    classifier,
    gpd_schedule,
    largest_difference,
    make_images,
    relabelled,
    single_schedule,
    trainer_from_disk,
    weights,
)
from torch._dynamo.utils import counters

from hpt_hf.data.collator import Collator
from hpt_hf.method.objectives import OBJECTIVES


def run(folder, paths, schedule, **changes) -> tuple[dict, list[dict]]:
    """Last weights, and what was logged of the training steps."""
    trainer = trainer_from_disk(folder, paths, schedule, **changes)
    trainer.train()
    return weights(trainer.model), [e for e in trainer.state.log_history if "loss" in e]


def schedule(name: str):
    if name == "gpd":
        return gpd_schedule(learning_rate=1e-3)
    # The attack takes signs: one gradient near 0 rounded the other way moves a pixel, above all by fare's large ones.
    return single_schedule(name, steps=3, learning_rate=1e-5 if name == "fare" else 1e-3)


@pytest.fixture(scope="module")
def usual(tmp_path_factory, paths):
    """Each schedule's run at batch 8, once."""
    return functools.cache(lambda name: run(tmp_path_factory.mktemp("usual"), paths, schedule(name)))


SMALL = {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 4}
LOOK = {"eval_strategy": "steps", "eval_steps": 1, "save_strategy": "steps", "save_steps": 5}
# Their terms are those of hpt_gpd, pmg_aft, ucat and distillation.
ALIKE = {"ga", "hpt", "tecoa", "anchor_clean", "agft"}
# (schedule, settings, by how much a weight may differ)
SAME = {
    "gradient checkpointing": ("gpd", {"activation_checkpointing": True}, 1e-6),
    "loader processes": ("gpd", {"dataloader_num_workers": 2}, 0),
    "evaluation after every step, and two saves": ("gpd", LOOK, 0),
}
for name in ("gpd", *sorted(OBJECTIVES.keys() - ALIKE)):
    SAME[f"{name}: 4 accumulated batches of 2"] = (name, SMALL, 1e-6)


@pytest.mark.parametrize("what", SAME)
def test_the_same_weights_by_another_road(what, tmp_path, paths, usual):
    name, settings, bound = SAME[what]
    end, log = usual(name)
    ours, our_log = run(tmp_path, paths, schedule(name), held_out=make_images(8, seed=3), **settings)
    assert largest_difference(end, weights(classifier(paths[0]))) > 1e-4
    assert largest_difference(end, ours) <= bound
    for key in ("loss", "robust_batch_accuracy"):
        assert [e[key] for e in our_log] == pytest.approx([e[key] for e in log], rel=1e-3 if bound else 1e-9)


def test_another_seed_ends_elsewhere(tmp_path, paths, usual):
    """The equalities would hold for a Trainer that ignores its data and noise; this one does not."""
    assert largest_difference(run(tmp_path, paths, schedule("gpd"), seed=1)[0], usual("gpd")[0]) > 1e-4


def test_without_labels_the_attack_aims_at_the_proxys_answer(tmp_path, paths, proxy):
    """Training on no labels is training on the labels that the proxy reads off the clean images, bit by bit."""
    bare, told = make_images(labelled=False), make_images()
    with torch.no_grad():
        read = proxy.classify(Collator(proxy.processor)(list(bare))["images"]).logits.argmax(1).tolist()
    assert read != told.labels
    ends = [run(tmp_path, paths, schedule("hpt"), data=data)[0] for data in (bare, relabelled(told, read))]
    assert largest_difference(*ends) == 0


def test_in_bfloat16_the_attack_is_that_of_float32(tmp_path, paths):
    """The first step's adversarial images are bit-equal; its loss, of products in bfloat16, is not."""
    found = []
    for half in (False, True):
        trainer = trainer_from_disk(tmp_path / str(half), paths, single_schedule("hpt", steps=1), bf16=half)
        attack, made, kinds = trainer.attack, [], []
        trainer.attack = lambda *a, attack=attack, made=made, **k: made.append(attack(*a, **k)) or made[-1]
        layer = trainer.proxy.model.vision_model.encoder.layers[0].mlp.fc1
        layer.register_forward_hook(lambda module, inputs, output, kinds=kinds: kinds.append(output.dtype))
        trainer.train()
        assert kinds == [torch.bfloat16 if half else torch.float32]
        assert {p.dtype for p in trainer.model.parameters()} == {torch.float32}
        found.append((made[0], trainer.state.log_history[0]["loss"]))
    (whole, loss), (half, half_loss) = found
    assert torch.equal(whole, half) and len(whole) == 8
    assert half_loss != loss and half_loss == pytest.approx(loss, rel=0.05)


def test_gradient_checkpointing_keeps_less(student):
    """What is held for the backward pass, in numbers: the layers' inner ones are computed again."""

    def kept() -> int:
        sizes = []
        with torch.autograd.graph.saved_tensors_hooks(lambda t: sizes.append(t.numel()) or t, lambda t: t):
            student.train()(torch.rand(8, 3, 32, 32)).logits.sum()
        return sum(sizes)

    usual = kept()
    student.activation_checkpointing_enable()
    assert kept() < usual / 2


@pytest.mark.filterwarnings("ignore")  # the compiler's own
@pytest.mark.parametrize("backend", ["eager", pytest.param("inductor", marks=pytest.mark.slow)])
def test_compiled_layers_end_at_the_same_weights_the_attacks_passes_included(backend, tmp_path, paths):
    """With dynamo's stand-in for a compiler, and the real one."""
    calls, ends = Counter(), []
    torch._dynamo.reset()
    counters.clear()
    for compiled in ({}, {"torch_compile": True, "torch_compile_backend": backend}):
        trainer = trainer_from_disk(tmp_path, paths, single_schedule("hpt"), **compiled)
        for model, name in ((trainer.model, "student"), (trainer.proxy, "proxy")):
            for number, layer in enumerate(model.model.vision_model.encoder.layers):

                def call(*args, run=layer._compiled_call_impl, at=f"{name} {number}", **kwargs):
                    calls[at] += 1
                    return run(*args, **kwargs)

                layer._compiled_call_impl = layer._compiled_call_impl and call
        trainer.train()
        assert trainer.model_wrapped is trainer.model, "compiled as a whole, too"
        ends.append(weights(trainer.model))
    assert largest_difference(*ends) < 1e-5
    assert not counters["graph_break"], "a layer that is compiled in pieces is no faster"
    assert counters["stats"]["unique_graphs"] <= 6, "compiled again and again"
    # Five steps: two of the attack and the loss for the student, one look for the proxy.
    assert calls == {"student 0": 15, "student 1": 15, "proxy 0": 5}
