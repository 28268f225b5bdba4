"""Proves that the options that save time or memory change neither attack nor weights: compiled layers, gradient checkpointing, loader processes; and that bfloat16 leaves the attack alone."""

from __future__ import annotations

import ast
import subprocess
import sys

import pytest
import torch
from conftest import CLASSES, gpd_schedule, make_images, make_trainer, single_schedule, weights, write_image_folder

from hpt_hf.models.zero_shot import ZeroShotClassifier


def train(folder, student_path, proxy_path, schedule=None, **changes):
    student, proxy = (ZeroShotClassifier.from_pretrained(p).set_classes(CLASSES) for p in (student_path, proxy_path))
    trainer = make_trainer(folder, student, schedule or gpd_schedule(), proxy=proxy, **changes)
    trainer.train()
    return trainer


@pytest.fixture(scope="module")
def usual(tmp_path_factory, student_path, proxy_path):
    return weights(train(tmp_path_factory.mktemp("usual"), student_path, proxy_path).model)


def difference(a, b) -> float:
    assert a.keys() == b.keys() and len(a) > 20
    return max(float((a[n] - b[n]).abs().max()) for n in a)


def test_gradient_checkpointing_ends_at_the_same_weights(tmp_path, student_path, proxy_path, usual):
    trainer = train(tmp_path, student_path, proxy_path, activation_checkpointing=True)
    assert trainer.model.model.is_activation_checkpointing
    assert difference(weights(trainer.model), usual) < 1e-6


def test_gradient_checkpointing_keeps_less(student):
    """What is held for the backward pass, in tensors: the layers' inner ones are computed again."""

    def kept(checkpointing: bool) -> int:
        student.train()
        if checkpointing:
            student.activation_checkpointing_enable()
        total = []
        with torch.autograd.graph.saved_tensors_hooks(lambda t: total.append(t.numel()) or t, lambda t: t):
            student(torch.rand(8, 3, 32, 32)).logits.sum()
        return sum(total)

    usual = kept(False)
    assert kept(True) < usual / 2


def test_loader_processes_end_at_the_same_weights(tmp_path, student_path, proxy_path, usual):
    trainer = train(tmp_path, student_path, proxy_path, dataloader_num_workers=2)
    assert difference(weights(trainer.model), usual) == 0


COMPILED = """
import sys, torch
from hpt_hf.commands.train import RECIPE
from hpt_hf.commands.parser import parse
from hpt_hf.commands.train import build

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
print(max(float((usual[n] - compiled[n]).abs().max()) for n in usual), calls, dict(torch._dynamo.utils.counters["graph_break"]), sep="|")
"""


@pytest.mark.multiprocess
@pytest.mark.parametrize("backend", ["eager", pytest.param("inductor", marks=pytest.mark.slow)])
def test_compiled_layers_end_at_the_same_weights_the_attacks_passes_included(
    backend, tmp_path, student_path, proxy_path
):
    """With dynamo's own stand-in for a compiler, and with the real one. In a process of its own: dynamo and the checks of shapes do not bear each other."""
    data = write_image_folder(tmp_path / "data", make_images())
    flags = f"--method hpt --dataset {data} --model {student_path} --proxy {proxy_path} --use_cpu true --max_steps 10"
    flags += f" --per_device_train_batch_size 8 --eps 8/255 --learning_rate 1e-2 --disable_tqdm true --output_dir {tmp_path / 'out'}"
    done = subprocess.run(
        [sys.executable, "-c", COMPILED, backend, *flags.split()], capture_output=True, text=True, timeout=500
    )
    assert done.returncode == 0, done.stderr
    largest, calls, breaks = done.stdout.splitlines()[-1].split("|")
    assert float(largest) < 1e-5
    assert breaks == "{}", "a layer that is compiled in pieces is no faster"
    assert "recompile_limit" not in done.stderr
    # Ten steps: two of the attack and the loss for the student, one look for the proxy.
    assert ast.literal_eval(calls) == {"student 0": 30, "student 1": 30, "proxy 0": 10}


def test_in_bfloat16_the_attack_is_that_of_float32(tmp_path, student_path, proxy_path):
    """The first step's adversarial images are bit-equal; its loss is not."""
    found = []
    for half in (False, True):
        student, proxy = (
            ZeroShotClassifier.from_pretrained(p).set_classes(CLASSES) for p in (student_path, proxy_path)
        )
        trainer = make_trainer(tmp_path / str(half), student, single_schedule("hpt", steps=1), proxy=proxy, bf16=half)
        attack, kept = trainer.attack, []
        trainer.attack = lambda *a, attack=attack, kept=kept, **k: kept.append(attack(*a, **k)) or kept[-1]
        trainer.train()
        found.append((kept[0], trainer.state.log_history[0]["loss"]))
    assert torch.equal(found[0][0], found[1][0]) and len(found[0][0]) == 8
    assert found[0][1] != found[1][1] and found[0][1] == pytest.approx(found[1][1], rel=0.05)


def test_pictures_of_the_towers_size_are_not_resized_again(student):
    """The processor would give them back as they are; where it would not, it is asked."""
    from hpt_hf.data.collator import Collator

    pictures = make_images(6)
    rows = [pictures[i] for i in range(6)]
    quick, asked = Collator(student.processor), Collator(student.processor)
    asked.__dict__["_side"] = None
    assert quick._side == 32
    for name, tensor in quick(rows).items():
        assert torch.equal(tensor, asked(rows)[name]), name
    student.processor.image_processor.size = {"shortest_edge": 40}
    assert Collator(student.processor)._side is None, "a processor that enlarges before it crops"
