"""Proves that the demo's answers are the evaluation's, that its page needs no network, and that nobody can make it do more than answer.

The core needs no gradio. What does is skipped where it is missing, and the browser where there is none.
"""

from __future__ import annotations

import ast
import asyncio
import base64
import html
import inspect
import io
import json
import os
import re
import shutil
import socket
import struct
import sys
import threading
import urllib.error
import urllib.request
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import CLASSES, make_images, save_tiny_clip, weights
from PIL import Image
from transformers import pipeline

from hpt_hf.attacks.losses import margin
from hpt_hf.attacks.suite import EvaluationAttack
from hpt_hf.attacks.threat_model import ThreatModel
from hpt_hf.commands import demo
from hpt_hf.commands.common import load_model
from hpt_hf.commands.demo import Guard, attack_picture, choose, examples, main, read_labels, read_picture, render
from hpt_hf.data.collator import Collator
from hpt_hf.lab.datasets import lab_images
from hpt_hf.models.zero_shot import ZeroShotClassifier

# gradio keeps count of its requests in pandas, with two options that pandas is about to drop.
pytestmark = [
    pytest.mark.filterwarnings("ignore:'future.no_silent_downcasting' is deprecated"),
    pytest.mark.filterwarnings("ignore:The copy keyword is deprecated"),
]

TEMPLATE = "This is a photo of a {}"


def ask(model, image=None, labels=CLASSES, template=TEMPLATE, eps=8, steps=5, **more):
    image = make_images()[0]["image"] if image is None else image
    return attack_picture(model, image, labels, template, eps, steps, **more)


def same(one, other) -> bool:
    arrays = all(np.array_equal(getattr(one, k), getattr(other, k)) for k in ("seen", "adversarial", "perturbation"))
    return arrays and (one.clean, one.attacked, one.truth, one.norm) == (
        other.clean,
        other.attacked,
        other.truth,
        other.norm,
    )


# --- the answers


@pytest.mark.parametrize("eps", [1, 2.5, 16])
def test_the_attacked_picture_lies_in_the_ball_to_the_last_bit(trained, eps):
    found = ask(trained, eps=eps)
    seen, adversarial = (torch.from_numpy(x).permute(2, 0, 1)[None] for x in (found.seen, found.adversarial))
    threat = ThreatModel("linf", f"{eps}/255")
    assert found.seen.shape == (32, 32, 3) and threat.contains(adversarial, seen).all()
    assert found.norm == float(threat.distance(adversarial, seen)) and 0.9 * eps / 255 < found.norm <= threat.radius
    assert np.array_equal(found.perturbation, found.adversarial - found.seen)


def test_the_answers_are_those_of_the_classifier_and_of_the_stock_pipeline(trained, tmp_path):
    image = make_images()[1]["image"]
    found = ask(trained, image)
    batch = Collator(trained.processor)([{"image": image, "label": None}])
    assert np.array_equal(found.seen, batch["images"][0].permute(1, 2, 0).numpy())
    for pixels, sure in ((found.seen, found.clean), (found.adversarial, found.attacked)):
        with torch.no_grad():
            logits = trained.classify(torch.from_numpy(pixels).permute(2, 0, 1)[None]).logits
        assert sure == pytest.approx(logits[0].softmax(0).tolist(), abs=1e-5) and sum(sure) == pytest.approx(1)
    trained.save_pretrained(tmp_path)
    stock = pipeline("zero-shot-image-classification", model=str(tmp_path), backend="pil")
    said = {a["label"]: a["score"] for a in stock(image, candidate_labels=list(CLASSES), hypothesis_template=TEMPLATE)}
    assert found.clean == pytest.approx([said[label] for label in CLASSES], abs=1e-4)


def test_a_picture_is_fooled_where_the_evaluation_says_it_breaks(trained):
    pictures = make_images(20)
    batch = Collator(trained.processor)([pictures[i] for i in range(20)])
    attack = EvaluationAttack(ThreatModel("linf", "14/255"), steps=5)
    with torch.no_grad():
        right = trained.classify(batch["images"]).logits.argmax(1) == batch["labels"]
    _, by = attack.run(trained, batch["images"], batch["image_ids"], batch["labels"])
    found = [ask(trained, pictures[i]["image"], eps=14, truth=CLASSES[pictures[i]["label"]]) for i in range(20)]
    expected = [
        "wrong" if not r else "holds" if b < 0 else "fooled" for r, b in zip(right.tolist(), by.tolist(), strict=True)
    ]
    assert [f.verdict for f in found] == expected
    assert {"holds", "fooled"} <= set(expected), "a test that tells nothing apart"


def test_what_is_shown_led_at_least_as_far_as_the_last_step(trained):
    for row in (make_images()[i] for i in range(6)):
        batch = Collator(trained.processor)([row])
        last = EvaluationAttack(ThreatModel("linf", "8/255"), steps=5).craft(
            trained, batch["images"], batch["image_ids"], batch["labels"]
        )
        shown = torch.from_numpy(ask(trained, row["image"], truth=CLASSES[row["label"]]).adversarial).permute(2, 0, 1)[
            None
        ]
        with torch.no_grad():
            led = [float(margin(trained.classify(x).logits, batch["labels"])) for x in (shown, last)]
        assert led[0] >= led[1] - 1e-4


def test_an_iterate_that_was_wrong_on_the_way_counts(trained, monkeypatch):
    row = make_images()[0]
    batch = Collator(trained.processor)([row])
    attack = EvaluationAttack(ThreatModel("linf", "16/255"), steps=10)
    fooling = attack.craft(trained, batch["images"], batch["image_ids"], batch["labels"])

    def comes_back(loss_fn, images, strategy, **_):
        loss_fn(fooling)
        return images, None

    monkeypatch.setattr(demo, "run_attack", comes_back)
    found = ask(trained, row["image"], truth=CLASSES[row["label"]], eps=16)
    assert found.verdict == "fooled" and np.array_equal(found.adversarial, fooling[0].permute(1, 2, 0).numpy())


def test_an_open_label_is_the_models_own_answer(trained):
    own = ask(trained)
    assert own.truth == int(np.argmax(own.clean)) and same(own, ask(trained, truth=CLASSES[own.truth]))
    other = CLASSES[(own.truth + 1) % len(CLASSES)]
    wrong = ask(trained, truth=other)
    assert wrong.verdict == "wrong" and wrong.sentence.startswith("wrong already on the clean picture: “")
    assert wrong.sentence.endswith(f"instead of “{other}”")


def test_the_same_question_has_the_same_answer(trained):
    first = ask(trained)
    torch.manual_seed(99)
    assert same(first, ask(trained)) and not same(first, ask(trained, make_images()[1]["image"]))


def test_every_step_is_told(trained):
    told = []
    ask(trained, steps=4.0, on_step=lambda step, of: told.append((step, of)))  # a slider's number
    assert told == [(1, 4), (2, 4), (3, 4), (4, 4)]


def test_models_of_two_input_sizes_each_see_their_own(student, tmp_path):
    larger = ZeroShotClassifier.from_pretrained(save_tiny_clip(tmp_path, image_size=48, seed=3))
    photo = make_images(1, size=100)[0]["image"].resize((100, 70))
    shapes = [ask(model, photo).adversarial.shape for model in (student, larger)]
    assert shapes == [(32, 32, 3), (48, 48, 3)]


# --- the model stays as it is


def test_weights_mode_gradients_random_state_and_classes_stay(student):
    student.train()
    before, state, own = weights(student), torch.get_rng_state(), student.head
    wanted = {n: p.requires_grad for n, p in student.named_parameters()}
    asking = []
    ask(
        student,
        labels=("tree", "house"),
        on_step=lambda *_: asking.append(any(p.requires_grad for p in student.parameters())),
    )
    assert not any(asking), "weight gradients cost time and memory, and nobody wants them"
    assert student.training and torch.equal(state, torch.get_rng_state())
    assert all(torch.equal(v, before[n]) for n, v in weights(student).items())
    assert {n: p.requires_grad for n, p in student.named_parameters()} == wanted
    assert all(p.grad is None for p in student.parameters())
    assert student.classes == CLASSES and student.head is own


def test_no_question_leaks_into_another_not_even_after_an_error(student, student_path):
    def fail(step, of):
        raise KeyError("stop")

    with pytest.raises(KeyError):
        ask(student, labels=("tree", "house"), on_step=fail)
    with pytest.raises(ValueError, match="both called 'tree'"):
        ask(student, labels=("tree", "tree"))
    assert student.classes == CLASSES
    fresh = ZeroShotClassifier.from_pretrained(student_path)
    ask(fresh)
    assert fresh.classes == () and fresh.head.numel() == 0


def test_two_visitors_at_once_get_the_answers_of_one_after_the_other(student):
    questions = [("tree", "house"), ("cat", "dog", "red car"), CLASSES, ("dog", "tree")]
    alone = [ask(student, labels=labels) for labels in questions]
    together = [None] * len(questions)

    def visit(i):
        together[i] = ask(student, labels=questions[i])

    visitors = [threading.Thread(target=visit, args=(i,)) for i in range(len(questions))]
    [v.start() for v in visitors]
    [v.join() for v in visitors]
    assert all(same(a, b) and a.labels == b.labels for a, b in zip(alone, together, strict=True))


# --- what is refused, and why


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"labels": ("cat",)}, "at least two class names, got 1"),
        ({"labels": ()}, "at least two class names, got 0"),
        ({"labels": ("cat", "dog", "cat")}, "classes 0 and 2 are both called 'cat'"),
        ({"labels": tuple(f"cat {i}" for i in range(101))}, "101 labels: at most 100"),
        ({"labels": ("cat", "x" * 201)}, "at most 200 characters"),
        ({"labels": ("cat", 7)}, "'7' …: a label or a template is text"),
        ({"labels": ("cat", "dog " * 45)}, "shorten the class name or the template"),
        ({"template": "a photo"}, "must hold '{}' exactly once"),
        ({"template": "{}" + "x" * 200}, "at most 200 characters"),
        ({"template": None}, "a label or a template is text"),
        ({"eps": 0}, "eps 0: expected a number from 1 to 16"),
        ({"eps": 17}, "eps 17: expected a number from 1 to 16"),
        ({"eps": float("nan")}, "eps nan: expected a number"),
        ({"eps": "6/255"}, "eps 6/255: expected a number"),
        ({"steps": 0}, "steps 0: expected a number from 1 to 100"),
        ({"steps": 10**9}, "steps 1000000000: expected a number"),
        ({"steps": 2.5}, "steps 2.5: expected a whole number"),
        ({"steps": None}, "steps None: expected a number"),
        ({"truth": "bird"}, "the true label 'bird' is none of the candidate labels"),
    ],
)
def test_what_cannot_be_asked_is_refused_with_its_reason(student, change, reason):
    with pytest.raises(ValueError, match=re.escape(reason)):
        ask(student, **change)
    assert student.classes == CLASSES


def test_labels_stand_one_a_line_or_between_commas():
    assert read_labels("cat, dog ,red car,") == ("cat", "dog", "red car")
    assert read_labels(" cat \n\n tench, Tinca tinca\r\ndog\n") == ("cat", "tench, Tinca tinca", "dog")
    assert read_labels("cat\n") == ("cat",) and read_labels(" \n ") == ()


def png_of(width: int, height: int) -> bytes:
    """A PNG whose header says a size and whose data is not there: what a decoder would allocate before it noticed."""

    def chunk(kind: bytes, body: bytes) -> bytes:
        return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"")) + chunk(b"IEND", b"")


def encoded(image: Image.Image, form: str, **more) -> bytes:
    file = io.BytesIO()
    image.save(file, form, **more)
    return file.getvalue()


GLYPH = Image.fromarray(np.random.default_rng(0).integers(0, 256, (20, 30, 3), np.uint8))


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"not a picture", "cannot be read: expected PNG, JPEG, WEBP (UnidentifiedImageError)"),
        (b"", "cannot be read"),
        (b"<svg xmlns='http://www.w3.org/2000/svg'/>", "cannot be read"),
        (encoded(GLYPH, "GIF"), "cannot be read: expected PNG, JPEG, WEBP"),
        (encoded(GLYPH, "TIFF"), "cannot be read: expected PNG, JPEG, WEBP"),
        (encoded(GLYPH, "PNG")[:-400], "cannot be read"),
        (png_of(6000, 6000), "the picture is too large: 6000 × 6000, and at most 25 million pixels are opened"),
        (png_of(50_000, 50_000), "(DecompressionBombError)"),
        (png_of(20_000, 3), "the picture is too narrow: 20000 × 3"),
    ],
)
def test_what_is_no_picture_to_open_is_refused_with_its_reason(tmp_path, content, reason):
    (tmp_path / "file").write_bytes(content)
    with pytest.raises(ValueError, match=re.escape(reason)):
        read_picture(tmp_path / "file")


def test_a_file_that_is_not_there_is_refused(tmp_path):
    with pytest.raises(ValueError, match="FileNotFoundError"):
        read_picture(tmp_path / "gone.png")


def test_pictures_are_opened_upright_and_in_rgb(tmp_path):
    exif = Image.Exif()
    exif[274] = 6
    for name, content in (
        ("a.png", encoded(GLYPH, "PNG")),
        ("b.jpg", encoded(GLYPH, "JPEG", exif=exif)),
        ("c.webp", encoded(GLYPH.convert("RGBA"), "WEBP", lossless=True)),
        ("d.png", encoded(GLYPH.convert("P"), "PNG")),
    ):
        (tmp_path / name).write_bytes(content)
    opened = {f.name[0]: read_picture(f) for f in tmp_path.iterdir()}
    assert {k: p.size for k, p in opened.items()} == {"a": (30, 20), "b": (20, 30), "c": (30, 20), "d": (30, 20)}
    assert {p.mode for p in opened.values()} == {"RGB"} and all(np.array_equal(opened[k], GLYPH) for k in "ac")


# --- what is shown


def test_the_answer_is_told_in_words_and_names_are_never_markup(trained):
    evil = '<b onclick="x">&amp;'
    found = ask(trained)
    labels = tuple(f"{evil}{label}" for label in found.labels)
    outcomes = {
        f"{evil}model": demo.Outcome(labels, *(getattr(found, f) for f in list(found.__dataclass_fields__)[1:]))
    }
    page = render(outcomes)
    assert "<b onclick" not in page and page.count(html.escape(evil)) >= 8
    assert html.escape(outcomes[f"{evil}model"].sentence) in page
    assert f"difference × {0.5 / found.norm:.0f}" in page and "clean, 32 × 32 pixels" in page
    assert len(re.findall('<img alt="[^"]+" ', page)) == 3 and 'src="http' not in page


def test_the_sentence_says_what_happened(trained):
    found = {f.verdict: f for f in (ask(trained, make_images()[i]["image"], eps=e) for i in range(3) for e in (1, 16))}
    for verdict, outcome in found.items():
        before = f"{verdict}: “{CLASSES[outcome.truth]}” {demo.percent(max(outcome.clean))} → "
        assert outcome.sentence.startswith(before) and outcome.sentence.endswith(demo.percent(max(outcome.attacked)))
    assert found.keys() == {"holds", "fooled"}
    shares = (0, 0.001, 0.0099, 0.01, 0.97, 0.99, 0.9901, 1)
    assert [demo.percent(s) for s in shares] == ["0%", "<1%", "<1%", "1%", "97%", "99%", ">99%", "100%"]


def test_the_examples_are_the_first_that_the_vanilla_model_names_right():
    model = load_model("lab:student")
    shown = examples(model)
    assert len(shown) == len(demo.TASKS) >= 4 and model.classes == ()
    for task, example in zip(demo.TASKS, shown, strict=True):
        pictures = lab_images(task, 12, faces="test", seed=2)
        rows = [pictures[i] for i in range(12)]
        found = [ask(model, r["image"], pictures.classes, pictures.templates[0], 1, 1) for r in rows[:4]]
        right = [int(np.argmax(f.clean)) == r["label"] for f, r in zip(found, rows, strict=False)]
        assert any(right), task
        first = rows[right.index(True)]
        assert example.image is first["image"] or np.array_equal(example.image, first["image"])
        assert example.truth == pictures.classes[first["label"]] and example.labels == pictures.classes


# --- the command


def test_without_a_robust_model_the_page_says_how_to_make_one(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    parsed = {k: v.default for k, v in demo.DemoArguments.__dataclass_fields__.items()}
    assert (parsed["host"], parsed["share"], parsed["port"], parsed["vanilla"]) == (
        "127.0.0.1",
        False,
        None,
        "lab:student",
    )
    sources, note = choose(demo.DemoArguments())
    assert sources == ["lab:student", "lab:proxy"] and "`make quickstart` makes one" in note
    (tmp_path / demo.ROBUST).mkdir(parents=True)
    (tmp_path / demo.ROBUST / "config.json").touch()
    assert choose(demo.DemoArguments()) == (["lab:student", demo.ROBUST], "")
    assert choose(demo.DemoArguments(models=["a", "b"], vanilla="v")) == (["v", "a", "b"], "")


def test_the_page_is_served_to_this_machine_and_uploads_go_with_it(monkeypatch, capsys, tmp_path):
    told = {}

    class Page:
        def launch(self, **settings):
            told.update(settings, folder=Path(os.environ["GRADIO_TEMP_DIR"]))
            (told["folder"] / "upload.png").touch()
            return None, "http://127.0.0.1:1/", None

        def block_thread(self):
            told["served"] = told["folder"].is_dir()

    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("GRADIO_TEMP_DIR", "left behind")
    monkeypatch.setattr(demo, "build", lambda sources, note, *, share: (Page(), {"share": share}))
    main(["--port", "7999"])
    assert (told["server_name"], told["server_port"], told["share"]) == ("127.0.0.1", 7999, False)
    assert told["served"] and not told["folder"].exists()
    assert capsys.readouterr().err.endswith(
        "`make quickstart` makes one. Until then a second vanilla model, lab:proxy, stands in its place.\nhttp://127.0.0.1:1/ (Ctrl-C stops it)\n"
    )


def test_without_gradio_the_command_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "gradio", None)
    monkeypatch.setenv("GRADIO_TEMP_DIR", "put back afterwards")
    with pytest.raises(SystemExit, match=r"hpt-hf demo: the demo needs gradio .*: pip install 'hpt_hf\[demo\]'"):
        main([])


def test_gradio_is_imported_inside_one_function_only():
    tree = ast.parse(Path(demo.__file__).read_text(encoding="utf-8"))
    places = [
        f.name
        for f in ast.walk(tree)
        if isinstance(f, ast.FunctionDef)
        for n in ast.walk(f)
        if isinstance(n, ast.Import) and n.names[0].name == "gradio"
    ]
    assert places == ["build"] and inspect.getsource(demo).count("import gradio") == 1


def test_a_model_that_is_not_there_is_one_line(tmp_path, monkeypatch):
    pytest.importorskip("gradio")
    monkeypatch.setenv("GRADIO_TEMP_DIR", "put back afterwards")
    with pytest.raises(SystemExit, match=f"hpt-hf demo: no model at {tmp_path}/none"):
        main(["--models", f"{tmp_path}/none"])


# --- the guard


def guarded(method: str, path: str, *chunks: bytes, length: int | None = -1, policy: bytes | None = None):
    """(status, what the server behind it read, headers) of one request."""
    sent, read = [], []

    async def app(scope, receive, send):
        while True:
            message = await receive()
            read.append(message["body"])
            if not message["more_body"]:
                break
        await send({"type": "http.response.start", "status": 200, "headers": []})

    async def run():
        messages = [
            {"type": "http.request", "body": c, "more_body": i + 1 < len(chunks)} for i, c in enumerate(chunks)
        ]
        size = sum(map(len, chunks)) if length == -1 else length
        headers = [] if size is None else [(b"content-length", str(size).encode())]

        async def receive():
            return messages.pop(0)

        async def send(message):
            sent.append(message)

        await Guard(app, policy)({"type": "http", "method": method, "path": path, "headers": headers}, receive, send)

    asyncio.run(run())
    return sent[0]["status"], b"".join(read), sent[0]["headers"]


JOIN = "/gradio_api/queue/join"


def test_the_guard_lets_through_what_the_page_needs():
    body = json.dumps(
        {"data": [{"path": "/tmp/gradio/a.png", "url": "http://127.0.0.1/file"}, "http://a, b"]}
    ).encode()
    assert guarded("POST", JOIN, body[:9], body[9:]) == (200, body, [])
    assert guarded("POST", "/gradio_api/upload", b"x" * 5_000_000)[0] == 200
    status, _, headers = guarded("GET", "/", b"", policy=demo.POLICY)
    assert status == 200 and headers == [(b"content-security-policy", demo.POLICY)]


@pytest.mark.parametrize(
    ("status", "method", "path", "body"),
    [
        (403, "GET", "/gradio_api/file=https://example.org/a.png", b""),
        (403, "HEAD", "/gradio_api/proxy=http://example.org/", b""),
        (
            403,
            "POST",
            JOIN,
            b'{"data": [{"path": "https://example.org/a.png", "meta": {"_type": "gradio.FileData"}}]}',
        ),
        (403, "POST", JOIN, b'{"data": [[{"x": {"path": "\\u0068ttp://example.org"}}]]}'),
        (403, "POST", JOIN, b"not json"),
        (403, "POST", JOIN, b"[" * 60_000),
        (413, "POST", JOIN, b'"' + b"x" * 70_000 + b'"'),
        (413, "POST", "/gradio_api/upload", b"x" * 6_000_000),
        (404, "POST", "/gradio_api/process_recording", b"x"),
        (404, "POST", "/gradio_api/run/predict", b"{}"),
        (404, "POST", "/login", b""),
    ],
)
def test_the_guard_refuses_what_it_does_not(status, method, path, body):
    assert guarded(method, path, body)[:2] == (status, b"")


def test_the_guard_refuses_a_body_of_no_stated_size():
    assert guarded("POST", JOIN, b"{}", length=None)[0] == 413
    assert guarded("POST", JOIN, b"{}", length=-5)[0] == 413


# --- the page, over HTTP


@pytest.fixture(scope="module")
def served(tmp_path_factory):
    """The page on a free port of this machine, and every host that was looked for meanwhile."""
    pytest.importorskip("gradio", reason="gradio is not installed: pip install 'hpt_hf[demo]'")
    sought, loops, folder = [], [], pytest.MonkeyPatch()
    folder.setenv("GRADIO_TEMP_DIR", str(tmp_path_factory.mktemp("uploads")))
    connect, lookup, new_loop = socket.socket.connect, socket.getaddrinfo, asyncio.new_event_loop

    def watched(self, address):
        if self.family in (socket.AF_INET, socket.AF_INET6):
            sought.append(address[0])
        return connect(self, address)

    def looked_up(host, *args, **more):
        sought.append(host)
        return lookup(host, *args, **more)

    def kept():
        loops.append(new_loop())
        return loops[-1]

    # gradio makes an event loop for each of its locks and closes none of them, which Python warns of whenever it next tidies up.
    socket.socket.connect, socket.getaddrinfo, asyncio.new_event_loop = watched, looked_up, kept
    try:
        page, settings = demo.build(["lab:student", "lab:proxy"], "A note: `make quickstart`")
        _, url, shared = page.launch(**settings, prevent_thread_lock=True)
        assert shared is None and url.startswith("http://127.0.0.1:")
        yield url, sought
        page.close()
    finally:
        folder.undo()
        socket.socket.connect, socket.getaddrinfo, asyncio.new_event_loop = connect, lookup, new_loop
        [loop.close() for loop in loops if not loop.is_running()]


@pytest.fixture(scope="module")
def client(served):
    from gradio_client import Client

    client = Client(served[0], verbose=False)
    yield client
    client.close()


def question(path, **changes) -> dict:
    """A question to the page's API, about a picture of digits."""
    from gradio_client import handle_file

    asked = {
        "file": handle_file(str(path)),
        "labels": "\n".join(lab_images("digits", 1, faces="test", seed=2).classes),
        "truth": None,
        "eps": 6,
        "left": "lab:student",
        "right": "lab:proxy",
        "template": "This is a photo of {}.",
        "steps": 5,
    }
    return asked | changes


@pytest.fixture(scope="module")
def digit(tmp_path_factory):
    file = tmp_path_factory.mktemp("digit") / "zero.png"
    lab_images("digits", 1, faces="test", seed=2)[0]["image"].save(file)
    return file


def test_the_page_answers_as_the_function_does(client, digit):
    said = client.predict(**question(digit, truth="digit zero"), api_name="/attack")
    asked = question(digit)
    for name in ("lab:student", "lab:proxy"):
        own = attack_picture(
            load_model(name),
            Image.open(digit),
            asked["labels"].split("\n"),
            asked["template"],
            6,
            5,
            truth="digit zero",
        )
        assert f"<b>{name}</b>" in said and html.escape(own.sentence) in said
    alone = client.predict(**question(digit, right=""), api_name="/attack")
    assert "lab:student" in alone and "lab:proxy" not in alone


def test_two_requests_at_once_keep_their_own_labels(client, digit):
    asked = ["digit zero, digit one", "black spade suit, white heart suit, black club suit"]
    jobs = [client.submit(**question(digit, labels=labels), api_name="/attack") for labels in asked * 2]
    for job, labels in zip(jobs, asked * 2, strict=True):
        said = job.result(timeout=120)
        assert all((label in said) == (label in labels) for text in asked for label in read_labels(text))


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"labels": "digit zero"}, "at least two class names"),
        ({"labels": "<img src=x>, <img src=x>"}, "are both called &#x27;&lt;img src=x&gt;&#x27;"),
        ({"labels": "digit zero, " + "black spade suit " * 9}, "shorten the class name or the template"),
        ({"labels": {"a": 1}}, "at least two class names"),
        ({"file": None}, "there is no picture"),
        ({"eps": 255}, "eps 255: expected a number from 1 to 16"),
        ({"steps": 100_000}, "steps 100000: expected a number from 1 to 100"),
        ({"left": "openai/clip-vit-large-patch14"}, "choose one or two of the models: lab:student, lab:proxy"),
        ({"left": None, "right": ""}, "choose one or two of the models"),
        ({"left": ["lab:student"]}, "unhashable"),
        ({"truth": "digit ten"}, "is none of the candidate labels"),
    ],
)
def test_a_mistake_is_a_message_and_no_traceback(client, digit, change, reason, capfd):
    from gradio_client.exceptions import AppError

    with pytest.raises(AppError, match=re.escape(reason)):
        client.predict(**question(digit, **change), api_name="/attack")
    assert "Traceback" not in "".join(capfd.readouterr())


def test_what_is_no_picture_is_a_message_too(client, tmp_path, capfd):
    from gradio_client.exceptions import AppError

    for name, content, reason in (
        ("text.png", b"not a picture", "this picture cannot be read: expected PNG, JPEG, WEBP"),
        ("bomb.png", png_of(6000, 6000), "the picture is too large: 6000 × 6000"),
        ("drawing.svg", b"<svg xmlns='http://www.w3.org/2000/svg'/>", "this picture cannot be read"),
    ):
        (tmp_path / name).write_bytes(content)
        with pytest.raises(AppError, match=reason):
            client.predict(**question(tmp_path / name), api_name="/attack")
    assert "Traceback" not in "".join(capfd.readouterr())


def fetch(url: str, body: bytes | None = None, kind: str = "") -> tuple[int, bytes, dict]:
    """Status, body up to the end of the first finished event, headers. Nothing is left open."""
    request = urllib.request.Request(url, body, {"Content-Type": kind} if kind else {})
    try:
        with urllib.request.urlopen(request) as answer:
            lines = []
            for line in answer:
                lines.append(line)
                if b"process_completed" in line:
                    break
            return answer.status, b"".join(lines), dict(answer.headers)
    except urllib.error.HTTPError as error:
        with error:
            return error.code, b"", {}
    except urllib.error.URLError:  # it closed the door while we were still sending
        return 413, b"", {}


def test_uploads_are_bounded(served):
    def upload(size: int) -> int:
        head = b'--b\r\nContent-Disposition: form-data; name="files"; filename="a.png"\r\n\r\n'
        return fetch(
            f"{served[0]}gradio_api/upload", head + b"x" * size + b"\r\n--b--\r\n", "multipart/form-data; boundary=b"
        )[0]

    assert upload(1000) == 200
    assert upload(demo.FILE + 1000) == 413
    assert upload(demo.FILE + 2**17) == 413


def raw_answer(url: str, data: list) -> str:
    """What the server says to a client that sends whatever it likes; gradio's own would upload a file that is named."""
    page = json.loads(fetch(f"{url}config")[1])
    number = next(d["id"] for d in page["dependencies"] if d["api_name"] == "attack")
    body = json.dumps({"data": data, "fn_index": number, "session_hash": "raw"}).encode()
    status = fetch(f"{url}gradio_api/queue/join", body, "application/json")[0]
    return (
        f"refused with {status}"
        if status != 200
        else fetch(f"{url}gradio_api/queue/data?session_hash=raw")[1].decode()
    )


def test_only_what_was_uploaded_is_read(served, client, digit, tmp_path):
    """A client can name any path, of this machine or of another."""
    url, _ = served
    secret = tmp_path / "secret.png"
    shutil.copy(digit, secret)
    rest = list(question(digit).values())[1:]
    meta = {"meta": {"_type": "gradio.FileData"}}
    uploaded = str(client.predict(**question(digit), api_name="/attack"))
    assert "cards" in uploaded
    for file in (
        {"path": str(secret)} | meta,
        {"path": str(secret)},
        {"path": "/etc/passwd"} | meta,
        {"path": str(secret), "is_stream": True} | meta,
        {"path": "https://example.org/a.png"} | meta,
        {"path": None, "url": f"data:image/png;base64,{base64.b64encode(png_of(9000, 9000)).decode()}"} | meta,
        str(secret),
    ):
        said = raw_answer(url, [file, *rest])
        assert "cards" not in said and ('"success":false' in said or said == "refused with 403"), (file, said)


def test_nothing_else_is_served(served):
    url, _ = served
    for path in (
        "gradio_api/file=/etc/passwd",
        "gradio_api/file=https://example.org/",
        "monitoring",
        "gradio_api/runs",
    ):
        assert fetch(url + path)[0] in (403, 404), path
    status, _, headers = fetch(url)
    assert status == 200 and headers["content-security-policy"] == demo.POLICY.decode()


def test_the_server_looked_for_no_other_machine(served, client):
    assert set(served[1]) <= {"127.0.0.1", "localhost", "::1"} and served[1]


# --- the page, in a browser


@pytest.fixture(scope="module")
def browser():
    api = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
    chromium = shutil.which("chromium") or shutil.which("chromium-browser")
    if chromium is None:
        pytest.skip("there is no chromium")
    with api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=chromium, args=["--no-sandbox"])
        yield browser
        browser.close()


@pytest.mark.parametrize(("width", "height"), [(1280, 900), (390, 844)])
def test_a_stranger_sees_a_model_fooled(served, browser, tmp_path, width, height):
    tab = browser.new_page(viewport={"width": width, "height": height})
    wrong, hosts = [], set()
    tab.on("request", lambda r: hosts.add(r.url.split("/")[2]) if r.url.startswith(("http", "ws")) else None)
    tab.on("console", lambda m: wrong.append(m.text) if m.type == "error" else None)
    tab.on("pageerror", lambda e: wrong.append(str(e)))
    tab.goto(served[0])
    tab.get_by_role("button", name="white chess king").click()
    tab.wait_for_function("document.querySelector('textarea').value.includes('black chess pawn')")
    tab.get_by_role("button", name="Attack", exact=True).click()
    tab.wait_for_selector("#answer .card")
    said = tab.inner_text("#answer [role=status]")
    assert "lab:student: fooled: “white chess king” >99% → “" in said and "lab:proxy: " in said
    assert tab.locator("#answer img").count() == 6 and tab.locator("img:not([alt])").count() == 0
    cards = [c.bounding_box() for c in tab.locator("#answer .card").all()]
    side_by_side = abs(cards[0]["y"] - cards[1]["y"]) < 2
    assert side_by_side == (width == 1280) and all(c["x"] >= 0 and c["x"] + c["width"] <= width for c in cards)
    assert tab.evaluate("document.documentElement.scrollWidth <= innerWidth")
    tab.screenshot(path=tmp_path / f"demo-{width}.png", full_page=True)
    assert (tmp_path / f"demo-{width}.png").stat().st_size > 10_000
    assert wrong == [] and hosts == {served[0].split("/")[2]}
    tab.close()


def test_a_stranger_brings_a_picture_and_makes_a_mistake(served, browser, tmp_path):
    GLYPH.resize((300, 200)).save(tmp_path / "own.jpg")
    tab = browser.new_page()
    tab.goto(served[0])
    tab.get_by_label("Remove Image").click()
    tab.locator("input[type=file]").set_input_files(tmp_path / "own.jpg")
    truth = tab.get_by_label("True label")
    tab.wait_for_function("document.querySelector('input[aria-label=\"True label\"]').value === ''")
    tab.get_by_label("Candidate labels").fill("<b>digit</b>, digit one")
    tab.get_by_role("button", name="Attack", exact=True).click()
    tab.wait_for_selector("#answer .card")
    assert "<b>digit</b>" in tab.inner_text("#answer") and truth.input_value() == ""
    tab.get_by_label("Candidate labels").fill("<b>one</b>")
    tab.get_by_role("button", name="Attack", exact=True).click()
    tab.get_by_text("a classifier needs at least two class names").wait_for()
    assert tab.locator(".toast-body b").count() == 0
    tab.close()
