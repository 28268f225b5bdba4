"""Proves that what saves time or memory, or only looks on, ends at the same weights, on one process without a stop."""

from __future__ import annotations

import ast
import subprocess
import sys

import pytest
import torch
from conftest import (
    gpd_schedule,
    largest_difference,
    make_images,
    relabelled,
    single_schedule,
    trainer_from_disk,
    weights,
    write_image_folder,
)

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
    return single_schedule(name, learning_rate=1e-5 if name == "fare" else 1e-3)


@pytest.fixture(scope="module")
def usual(tmp_path_factory, paths):
    """Each schedule's run at batch 8, once."""
    known = {}

    def get(name):
        if name not in known:
            known[name] = run(tmp_path_factory.mktemp("usual"), paths, schedule(name))
        return known[name]

    return get


# (schedule, settings, by how much a weight may differ)
SAME = {
    "the same seed": ("gpd", {"seed": 42}, 0),
    "gradient checkpointing": ("gpd", {"activation_checkpointing": True}, 1e-6),
    "loader processes": ("gpd", {"dataloader_num_workers": 2}, 0),
    "evaluation after every step": ("gpd", {"eval_strategy": "steps", "eval_steps": 1}, 0),
    "a save after every step": ("gpd", {"save_strategy": "steps", "save_steps": 1}, 0),
    **{
        f"{name}: 4 accumulated batches of 2": (
            name,
            {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 4},
            1e-6,
        )
        for name in ("gpd", *sorted(OBJECTIVES))
    },
}


@pytest.mark.parametrize("what", SAME)
def test_the_same_weights_by_another_road(what, tmp_path, paths, usual):
    name, settings, bound = SAME[what]
    end, log = usual(name)
    ours, our_log = run(tmp_path, paths, schedule(name), held_out=make_images(8, seed=3), **settings)
    assert largest_difference(end, weights(trainer_from_disk(tmp_path, paths).model)) > 1e-4
    assert largest_difference(end, ours) <= bound
    for key in ("loss", "robust_batch_accuracy"):
        assert [e[key] for e in our_log] == pytest.approx([e[key] for e in log], rel=1e-3 if bound else 1e-9)


def test_another_seed_ends_elsewhere(tmp_path, paths, usual):
    """The equalities would hold for a Trainer that ignores its data and noise; this one does not."""
    assert largest_difference(run(tmp_path, paths, schedule("hpt"), seed=1)[0], usual("hpt")[0]) > 1e-4


def test_without_labels_the_attack_aims_at_the_proxys_answer(tmp_path, paths, proxy):
    """Training on no labels is training on the labels that the proxy reads off the clean images, bit by bit."""
    bare, told = make_images(labelled=False), make_images()
    with torch.no_grad():
        read = proxy.classify(Collator(proxy.processor)(list(bare))["images"]).logits.argmax(1).tolist()
    assert read != told.labels
    ends = [run(tmp_path, paths, schedule("hpt"), data=data)[0] for data in (bare, relabelled(told, read))]
    assert largest_difference(*ends) == 0


def test_in_bfloat16_the_attack_is_that_of_float32(tmp_path, paths):
    """The first step's adversarial images are bit-equal; its loss, of bfloat16 products in student and proxy, is not."""
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


COMPILED = """
import sys, torch
from hpt_hf.commands.train import RECIPE, build
from hpt_hf.commands.parser import parse

def train(*more):
    trainer = build(*parse(RECIPE, [*sys.argv[2:], *more]))
    calls = {}
    for model, name in ((trainer.model, "student"), (trainer.proxy, "proxy")):
        for number, layer in enumerate(model.model.vision_model.encoder.layers):
            if layer._compiled_call_impl is not None:
                def call(*args, run=layer._compiled_call_impl, at=f"{name} {number}", **kwargs):
                    calls[at] = calls.get(at, 0) + 1
                    return run(*args, **kwargs)
                layer._compiled_call_impl = call
    trainer.train()
    assert trainer.model_wrapped is trainer.model, "compiled as a whole, too"
    return trainer.model.state_dict(), calls

usual, none = train()
compiled, calls = train("--torch_compile", "true", "--torch_compile_backend", sys.argv[1])
assert none == {} and usual.keys() == compiled.keys()
largest = max(float((usual[n] - compiled[n]).abs().max()) for n in usual)
print(largest, calls, dict(torch._dynamo.utils.counters["graph_break"]), sep="|")
"""


@pytest.mark.multiprocess
@pytest.mark.parametrize("backend", ["eager", pytest.param("inductor", marks=pytest.mark.slow)])
def test_compiled_layers_end_at_the_same_weights_the_attacks_passes_included(backend, tmp_path, paths):
    """With dynamo's stand-in for a compiler, and the real one; in a process without the checks of shapes."""
    data = write_image_folder(tmp_path / "data", make_images())
    flags = f"--method hpt --dataset {data} --model {paths[0]} --proxy {paths[1]} --use_cpu true --max_steps 10"
    flags += " --per_device_train_batch_size 8 --eps 8/255 --learning_rate 1e-2 --disable_tqdm true"
    command = [sys.executable, "-c", COMPILED, backend, *flags.split(), "--output_dir", str(tmp_path / "out")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=500)
    assert done.returncode == 0, done.stderr
    largest, calls, breaks = done.stdout.splitlines()[-1].split("|")
    assert float(largest) < 1e-5
    assert breaks == "{}", "a layer that is compiled in pieces is no faster"
    assert "recompile_limit" not in done.stderr
    # Ten steps: two of the attack and the loss for the student, one look for the proxy.
    assert ast.literal_eval(calls) == {"student 0": 30, "student 1": 30, "proxy 0": 10}
