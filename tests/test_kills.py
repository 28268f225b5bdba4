"""SIGKILL at random moments of every command that writes: the same command goes on and ends as if left alone.

A killed process is a fork of this one, so that the moments fall into the work and not into imports.
"""

from __future__ import annotations

import os
import random
import re
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from conftest import make_images, write_image_folder
from loopback_hub import FakeHub

from hpt_hf.commands import convert, evaluate, interpolate, push, train
from hpt_hf.publishing.export import check

pytestmark = pytest.mark.multiprocess
TRAIN = "--method hpt_gpd --max_steps 60 --use_cpu true --eps 8/255 --per_device_train_batch_size 8 --interval 7"
TRAIN += " --learning_rate 0.01 --ga_learning_rate 0.001 --save_strategy steps --save_steps 4 --held_out 0.2"
TRAIN += " --disable_tqdm true --resume_from_checkpoint true"
FILES = "--dataset {data} --model {student} --proxy {proxy} --output_dir {out}"
EVALUATE = "--batch_size 8 --attack apgd-ce square --attack_steps 20 --probe 10 --eps 16/255"


def killed_after(seconds: float, command: Callable[[list[str]], None], argv: list[str]) -> bool:
    """Was it killed, and not done before?"""
    child = os.fork()
    if not child:
        try:
            with open(os.devnull, "w") as sys.stdout:
                sys.stderr = sys.stdout
                command(argv)
        finally:
            os._exit(0)
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        if os.waitpid(child, os.WNOHANG)[0]:
            return False
        time.sleep(0.001)
    os.kill(child, signal.SIGKILL)
    return os.WIFSIGNALED(os.waitpid(child, 0)[1])


def left_by(folder: Path) -> dict[str, bytes]:
    """What a command leaves for its user: all but times, journals, and what only goes on from them."""
    files = {f.relative_to(folder).as_posix(): f for f in folder.rglob("*") if f.is_file()}
    assert not [name for name in files if ".part" in name or name == ".lock"]
    passing = r"checkpoint-|progress/|trainer_log|trainer_state|training\.png|log\."
    text = rb'"seconds": [\d.]+|[\d.]+ s on |"commit": "[^"]*"|\| time \|[^\n]*|<!-- written by hpt_hf[^>]*>'
    return {n: re.sub(text, b"", f.read_bytes()) for n, f in files.items() if not re.match(passing, n)}


@pytest.fixture(scope="module")
def world(tmp_path_factory, paths, trained) -> dict[str, str]:
    folder = tmp_path_factory.mktemp("kills")
    trained.save_pretrained(folder / "trained")
    names = {"student": paths[0], "proxy": paths[1]} | {n: str(folder / n) for n in ("data", "trained", "robust")}
    write_image_folder(folder / "data", make_images())
    train.main(f"{TRAIN} {FILES}".format(out=names["robust"], **names).split())
    return names


WRITERS = {  # command, its flags, and how many kills when all fifty fall
    "train": (train.main, f"{TRAIN} {FILES}", 18),
    "evaluate": (evaluate.main, EVALUATE + " --model {trained} --dataset {data} --output_dir {out}", 10),
    "interpolate": (interpolate.main, "{robust} --output_dir {out} --weights 0.3 0.7 --limit 16", 6),
    "push": (push.main, "{robust} alice/robust", 4),
    **{to: (convert.main, "{robust} {out} --to " + to, 4) for to in ("transformers", "open_clip", "vision_tower")},
}


@pytest.mark.parametrize("share", [0.3, pytest.param(1, marks=pytest.mark.slow)], ids=["some", "fifty"])
@pytest.mark.parametrize("name", WRITERS)
def test_killed_at_random_moments_it_ends_as_if_left_alone(name, share, world, tmp_path, monkeypatch):
    hub = FakeHub(monkeypatch)
    command, flags, kills = WRITERS[name]
    rng = random.Random(f"{name} {share} {os.environ.get('KILL_SEED', 0)}")

    def argv(folder: str) -> list[str]:
        return flags.format(out=tmp_path / folder / "out", **world).split()

    began = time.monotonic()
    command(argv("alone"))
    usual, struck, whole = time.monotonic() - began, 0, left_by(Path(world["robust"]))

    def ended(folder: str) -> dict[str, bytes]:
        return hub.files("alice/robust") if name == "push" else left_by(tmp_path / folder / "out")

    expected = ended("alone")
    left = round(kills * share) or 1
    for _ in range(20 * left):
        moment = rng.uniform(0, usual)
        if name in ("train", "evaluate"):  # these go on, others begin anew: so do the moments
            moment = rng.uniform(0.1, 0.5) * usual / left + 0.1
        struck += killed_after(moment, command, argv("killed"))
        if struck == left:
            break
    assert struck == left, "killed too late to prove anything"
    hub.repos.clear()
    command(argv("killed"))
    assert ended("killed") == expected and expected
    assert not list(tmp_path.glob("*/.*")), "nothing half-written stands beside"
    assert left_by(Path(world["robust"])) == whole and check(world["robust"]), "what was read is as it was"
