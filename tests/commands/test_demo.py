"""Proves that the demo's answers are the evaluation's, and that its page refuses what cannot be asked.

The core needs no gradio. What does is skipped where it is missing, and the browser where there is none.
"""

from __future__ import annotations

import asyncio
import contextlib
import http.client
import os
import socket
import subprocess
import sys
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import CLASSES, make_images
from PIL import Image

from hpt_hf.attacks.suite import EvaluationAttack
from hpt_hf.attacks.threat_model import ThreatModel
from hpt_hf.commands import demo
from hpt_hf.commands.demo import attack_image, choose, examples, main, read_labels
from hpt_hf.data.collator import Collator
from hpt_hf.lab.datasets import lab_images

pytestmark = [
    pytest.mark.filterwarnings("ignore:'future.no_silent_downcasting' is deprecated"),
    pytest.mark.filterwarnings("ignore:The copy keyword is deprecated"),
]
TEMPLATE = "This is a photo of a {}"


def ask(model, image=None, labels=CLASSES, template=TEMPLATE, eps=8, steps=5, truth=None):
    return attack_image(model, image or make_images()[0]["image"], labels, template, eps, steps, truth)


def test_an_image_is_fooled_where_the_evaluation_says_it_breaks(trained):
    images = make_images(20)
    batch = Collator(trained.processor)([images[i] for i in range(20)])
    attack = EvaluationAttack(ThreatModel("linf", "14/255"), steps=5)
    with torch.no_grad():
        right = trained.classify(batch["images"]).logits.argmax(1) == batch["labels"]
    _, broken_by = attack.run(trained, batch["images"], batch["image_ids"], batch["labels"])
    expected = ["wrong" if not r else "holds" if b < 0 else "fooled" for r, b in zip(right, broken_by, strict=True)]
    found = [ask(trained, images[i]["image"], eps=14, truth=CLASSES[images[i]["label"]]).verdict for i in range(20)]
    assert found == expected and {"holds", "fooled"} <= set(expected), "a test that tells nothing apart"


@pytest.mark.parametrize("eps", [1, 2.5, 16])
def test_what_is_shown_lies_in_the_ball_and_the_same_question_has_the_same_answer(trained, eps):
    one, two = ask(trained, eps=eps), ask(trained, eps=eps)
    clean, attacked, difference = (image.astype(int) for image in one.images)
    assert clean.shape == (32, 32, 3) and 0 < abs(attacked - clean).max() <= round(eps + 0.5)
    assert (difference.min() == 0 or difference.max() == 255) and np.array_equal(one.images[1], two.images[1])
    assert (one.clean, one.attacked) == (two.clean, two.attacked)
    assert sum(one.clean.values()) == pytest.approx(1) and list(one.clean) == list(CLASSES)
    assert one.truth == max(one.clean, key=one.clean.get) and one.verdict != "wrong", "the model's own answer"


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"labels": ("cat",)}, "labels: got 1"),
        ({"labels": tuple(f"label {i}" for i in range(101))}, "labels: got 101"),
        ({"labels": ("cat", "d" * 201)}, "at most 200 characters"),
        ({"eps": 17}, "eps: got 17, expected 1 to 16"),
        ({"steps": 0}, "steps: got 0"),
        ({"truth": "horse"}, "none of the candidate labels"),
    ],
)
def test_what_cannot_be_asked_is_refused_with_its_reason(student, change, reason):
    with pytest.raises(ValueError, match=reason):
        ask(student, **change)


def test_labels_stand_one_a_line_or_between_commas_and_the_examples_can_be_asked():
    assert read_labels("a cat, a dog ,, ") == read_labels("a cat\n\n a dog \n") == ("a cat", "a dog")
    assert read_labels("a, b\nc") == ("a, b", "c") and read_labels(" ") == ()
    rows = examples()
    assert len(rows) == len(demo.TASKS)
    assert all(truth in read_labels(labels) and template.count("{}") == 1 for _, labels, truth, template in rows)


def test_without_a_robust_model_the_page_says_how_to_make_one(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    given = SimpleNamespace(models=None, vanilla="lab:student")
    assert choose(given)[0] == ["lab:student", "lab:proxy"] and "hpt-hf quickstart" in choose(given)[1]
    (tmp_path / demo.ROBUST).mkdir(parents=True)
    (tmp_path / demo.ROBUST / "config.json").touch()
    assert choose(given) == (["lab:student", demo.ROBUST], "")


@pytest.mark.parametrize(("missing", "flags", "says"), [(True, [], "gradio"), (False, ["--models", "./no"], "./no")])
def test_a_mistake_is_one_line(monkeypatch, missing, flags, says):
    monkeypatch.setitem(sys.modules, "gradio", None if missing else SimpleNamespace())
    with pytest.raises(SystemExit, match=f"hpt-hf demo: .*{says}"):
        main(flags)


@pytest.fixture(scope="module")
def served(tmp_path_factory):
    pytest.importorskip("gradio", reason="gradio is not installed: pip install 'hpt_hf[demo]'")
    loops, patch, new_loop = [], pytest.MonkeyPatch(), asyncio.new_event_loop
    patch.setenv("GRADIO_TEMP_DIR", str(tmp_path_factory.mktemp("uploads")))
    # gradio makes an event loop for each of its locks and closes none of them, which Python warns of later.
    patch.setattr(asyncio, "new_event_loop", lambda: loops.append(new_loop()) or loops[-1])
    page = demo.build(["lab:student", "lab:proxy"], "a note")
    yield page.launch(prevent_thread_lock=True, quiet=True, max_file_size=demo.FILE)[1]
    page.close()
    patch.undo()
    [loop.close() for loop in loops if not loop.is_running()]


def test_the_page_answers_as_the_function_does_and_a_mistake_is_a_message(served, tmp_path):
    from gradio_client import Client, handle_file

    image = lab_images("digits", 1, faces="test", seed=2)
    image[0]["image"].save(tmp_path / "zero.png")
    Image.new("RGB", (6000, 6000)).save(tmp_path / "large.png")
    labels = "\n".join(image.classes)
    client = Client(served, verbose=False)
    rest = (labels, "", "This is a photo of {}.", 6, 5, "lab:student", "lab:proxy")
    said = client.predict(handle_file(str(tmp_path / "zero.png")), *rest, api_name="/attack")
    expected = attack_image(demo.load_model("lab:student"), image[0]["image"], image.classes, rest[2], 6, 5)
    assert said[0] == f"### lab:student: {expected.verdict}" and said[4].startswith("### lab:proxy: ")
    assert said[2]["label"] == max(expected.clean, key=expected.clean.get) and len(said[1]) == 3
    for file, changed in (("zero.png", ("one", *rest[1:])), ("large.png", rest)):
        with pytest.raises(Exception, match="labels: got 1|upstream|pixels|error"):
            client.predict(handle_file(str(tmp_path / file)), *changed, api_name="/attack")
    client.close()


def test_other_names_of_this_machine_are_not_answered_and_the_end_takes_the_uploads_along(tmp_path):
    pytest.importorskip("gradio", reason="gradio is not installed: pip install 'hpt_hf[demo]'")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "hpt_hf", "demo", "--models", "lab:student", "--port", str(port)]
    with subprocess.Popen(
        command, env=os.environ | {"TMPDIR": str(tmp_path)}, stderr=subprocess.PIPE, text=True
    ) as page:
        assert next(line for line in page.stderr if "Ctrl-C stops it" in line)

        def status(host: str) -> int:
            with contextlib.closing(http.client.HTTPConnection("127.0.0.1", port, timeout=30)) as connection:
                connection.request("GET", "/", headers={"Host": host})
                return connection.getresponse().status

        assert (status(f"127.0.0.1:{port}"), status(f"localhost:{port}"), status("evil.example")) == (200, 200, 400)
        (folder,) = (f for f in tmp_path.iterdir() if f.is_dir())
        (folder / "upload.png").touch()
        page.terminate()
        assert page.wait(60) == 143 and not folder.exists()


def test_a_stranger_on_a_phone_sees_a_model_fooled_until_the_question_changes(served, browser):
    tab = browser.new_page(viewport={"width": 390, "height": 844})
    tab.goto(served)
    tab.get_by_text("white chess king", exact=True).first.click()
    tab.wait_for_function("document.querySelector('textarea').value.includes('black chess pawn')")
    tab.get_by_role("button", name="Attack", exact=True).click()
    said = tab.get_by_text("lab:student: fooled")
    said.wait_for()
    tab.wait_for_function("() => document.getElementById('said-1').getBoundingClientRect().top < innerHeight")
    assert said.bounding_box()["y"] >= 0
    tab.locator("textarea").first.fill("a cat\na dog")
    said.wait_for(state="detached")
    tab.close()
