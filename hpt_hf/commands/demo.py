"""`hpt-hf demo`: an image, one or two classifiers, an attack on each, and what each says before and after. The seam to gradio."""

from __future__ import annotations

import os
import signal
import sys
import tempfile
import threading
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from hpt_hf.attacks.suite import EvaluationAttack
from hpt_hf.attacks.threat_model import ThreatModel
from hpt_hf.commands.common import load_model, on_device
from hpt_hf.commands.parser import HfArg, RecipeError, exit_on_user_error, parse
from hpt_hf.data.collator import Collator, to_rgb
from hpt_hf.lab.datasets import lab_images
from hpt_hf.models.zero_shot import ZeroShotClassifier
from hpt_hf.utils import progress

# A visitor can send anything, whatever the page offers: labels; characters of a label or template; 255ths; steps; bytes; pixels.
LABELS, LENGTH, EPS, STEPS, FILE, PIXELS = 100, 200, 16, 100, 5 * 2**20, 25_000_000
TASKS = ("digits", "greek smalls", "roman numerals", "currency", "chess pieces", "card suits", "zodiac", "arrows")
ROBUST = "outputs/quickstart/model"
INTRO = """# Attack a CLIP
The attack looks for a change of the image that makes the model give another answer.
It may move each colour value that the model reads by at most *eps*: 6/255 is 6 of the 255 steps from black to white.
Each model is attacked **on its own**, by an attack that knows its weights, so each has its own attacked image.
One image proves little: `hpt-hf evaluate` measures whole sets, with stronger attacks.
Images stay on the machine that serves this page."""


@dataclass
class DemoArguments:
    """What is shown, and to whom."""

    models: list[str] | None = HfArg(
        default=None, help="robust models: folders or Hub ids; left out: outputs/quickstart/model"
    )
    vanilla: str = HfArg(default="lab:student", help="the undefended model they are compared with")
    port: int | None = HfArg(default=None, help="left out: the first free one from 7860 on")
    host: str = HfArg(default="127.0.0.1", help="0.0.0.0 shows the page to the whole network")
    share: bool = HfArg(default=False, help="a public link through gradio's servers")


@dataclass(frozen=True)
class Outcome:
    """What one model says of an image and of the same image attacked. Arrays: uint8 (height, width, 3), as the model reads them."""

    truth: str  # the label that the attack leads away from
    clean: dict[str, float]
    attacked: dict[str, float]
    images: tuple[np.ndarray, np.ndarray, np.ndarray]  # clean, attacked, difference amplified around grey

    @property
    def verdict(self) -> str:
        """`wrong` before any attack, else `fooled` or `holds`."""
        if max(self.clean, key=self.clean.get) != self.truth:
            return "wrong"
        return "holds" if max(self.attacked, key=self.attacked.get) == self.truth else "fooled"


# One attack at a time: a classifier holds one list of classes, and two attacks would only share the cores.
_turn = threading.Lock()


@torch.no_grad()
def attack_image(
    model: ZeroShotClassifier,
    image: Image.Image,
    labels: Sequence[str],
    template: str,
    eps: float,
    steps: int,
    truth: str | None = None,
) -> Outcome:
    """PGD on the cross-entropy, as `hpt-hf evaluate` runs it. The same question has the same answer.

    Args:
        eps: radius of the l-inf ball in 255ths, on the pixels that the model reads.
        truth: the label to lead away from; None: the model's own answer on the clean image.

    Raises:
        ValueError: labels, template, eps or steps that cannot be asked or go beyond the bounds of the page.
    """
    if not 2 <= len(labels) <= LABELS:
        raise ValueError(f"labels: got {len(labels)}, expected 2 to {LABELS}")
    if long := next((text for text in (*labels, template) if len(text) > LENGTH), None):
        raise ValueError(f"{long[:40]!r} …: expected at most {LENGTH} characters")
    for name, value, top in (("eps", eps, EPS), ("steps", steps, STEPS)):
        if not 1 <= value <= top:
            raise ValueError(f"{name}: got {value}, expected 1 to {top}")
    if truth is not None and truth not in labels:
        raise ValueError(f"the true label {truth!r} is none of the candidate labels")
    attack = EvaluationAttack(ThreatModel("linf", f"{eps:g}/255"), steps=int(steps))
    batch = {k: v.to(model.device) for k, v in Collator(model.processor)([{"image": image, "label": None}]).items()}
    with _turn:
        model.set_classes(labels, (template,))
        clean = model.classify(batch["images"]).logits
        label = clean.argmax(1) if truth is None else torch.tensor([list(labels).index(truth)], device=model.device)
        perturbed, _ = attack.run(model, batch["images"], batch["image_ids"], label)
        attacked = model.classify(perturbed).logits
    delta = perturbed - batch["images"]
    amplified = 0.5 + 0.5 * delta / delta.abs().max().clamp_min(1e-12)
    images = (x[0].permute(1, 2, 0) * 255 for x in (batch["images"], perturbed, amplified))
    shown = [image.round().byte().cpu().numpy() for image in images]
    sure = [dict(zip(labels, logits[0].softmax(0).tolist(), strict=True)) for logits in (clean, attacked)]
    return Outcome(labels[int(label)], *sure, tuple(shown))


def read_labels(text: str) -> tuple[str, ...]:
    """One label a line; or all in one line, between commas."""
    parts = text.splitlines() if "\n" in text.strip() else text.split(",")
    return tuple(part.strip() for part in parts if part.strip())


def examples() -> list[list]:
    """(image, labels, true label, template) of an image of each of some tasks, in typefaces that no model was trained on."""
    found = []
    for images in (lab_images(task, 12, faces="test", seed=2) for task in TASKS):
        row = images[0]
        found.append([row["image"], "\n".join(images.classes), images.classes[row["label"]], images.templates[0]])
    return found


def _answers(gr, models: list[str]):
    """Side by side, for two models: which one, and what it says."""
    chosen, outputs = [], []
    with gr.Row():
        for name in models[:2]:
            with gr.Column():
                chosen.append(gr.Dropdown(models, value=name, label="Model"))
                outputs += [gr.Markdown(elem_id=f"said-{len(chosen)}")]
                outputs += [gr.Gallery(columns=3, height=200, label="images")]
                outputs += [gr.Label(num_top_classes=4, label="says of the clean image")]
                outputs += [gr.Label(num_top_classes=4, label="says of the attacked one")]
    return chosen, outputs


def build(sources: Sequence[str], note: str = ""):
    """The page as gradio Blocks. `sources`: the vanilla model, then others, as folders or Hub ids.

    Raises:
        RecipeError: gradio is not installed.
        OSError, ValueError: a model that cannot be opened.
    """
    try:
        import gradio as gr
    except ModuleNotFoundError as error:
        raise RecipeError(f"the demo needs gradio ({error}). Fix: pip install 'hpt_hf[demo]'") from None
    models = {source: on_device(load_model(source)) for source in dict.fromkeys(sources)}
    Image.MAX_IMAGE_PIXELS = PIXELS // 2  # Pillow refuses twice as many before it decodes

    def attack(image, labels, truth, template, eps, steps, *names):
        shown = []
        try:
            if image is None:
                raise ValueError("there is no image: upload one, or click on an example")
            for name in names:
                args = (models[name], to_rgb(image), read_labels(labels), template, eps, steps, truth or None)
                outcome = attack_image(*args)
                pictures = list(zip(outcome.images, ("clean", "attacked", "difference, grey: none"), strict=True))
                shown += [f"### {name}: {outcome.verdict}", pictures, outcome.clean, outcome.attacked]
        except ValueError as error:
            raise gr.Error(str(error), title="Not attacked", print_exception=False) from None
        return shown

    with gr.Blocks(title="Attack a CLIP", analytics_enabled=False, delete_cache=(600, 3600)) as page:
        gr.Markdown(f"{INTRO}\n\n**{note}**" if note else INTRO)
        with gr.Row():
            image = gr.Image(type="pil", image_mode=None, sources=["upload"], label="Image", height=260)
            with gr.Column():
                labels = gr.Textbox(label="Candidate labels", info="one a line, or between commas", lines=4)
                truth = gr.Textbox(label="True label", info="empty: each model's own answer on the clean image")
            with gr.Column():
                eps = gr.Slider(1, EPS, 6 if sources[0].startswith("lab:") else 2, step=1, label="eps, in 255ths")
                steps = gr.Slider(1, STEPS, 20, step=1, label="steps of the attack (PGD)")
                template = gr.Textbox("This is a photo of a {}", label="Prompt")
        rows = examples()
        gr.Examples(rows, [image, labels, truth, template], example_labels=[row[2] for row in rows])
        button = gr.Button("Attack", variant="primary")
        chosen, outputs = _answers(gr, list(models))
        asked = [image, labels, truth, template, eps, steps, *chosen]
        attacked = button.click(attack, asked, outputs, api_name="attack")
        # On a phone the answer lies below the window (scroll_to_output leaves it there).
        attacked.success(None, js="() => document.getElementById('said-1').scrollIntoView({block: 'center'})")
        # Whatever the question changes, its answer goes; that of a running attack would come too late.
        blank, quiet = [None] * len(outputs), {"queue": False, "show_progress": "hidden", "api_visibility": "private"}
        gr.on([part.change for part in asked], lambda: blank, None, outputs, cancels=[attacked], **quiet)
    return page.queue(max_size=16, default_concurrency_limit=1)


def choose(args: DemoArguments) -> tuple[list[str], str]:
    """(the models to open, what to say about the choice)."""
    if args.models:
        return [args.vanilla, *args.models], ""
    if (Path(ROBUST) / "config.json").is_file():
        return [args.vanilla, ROBUST], ""
    return [args.vanilla, "lab:proxy"], f"There is no robust model in {ROBUST} yet: `hpt-hf quickstart` makes one."


def only_hosts(args: DemoArguments) -> dict:
    """Any page that a visitor has open could ask for this one under a name of its own (DNS rebinding): no."""
    from starlette.middleware import Middleware
    from starlette.middleware.trustedhost import TrustedHostMiddleware

    hosts = ["*"] if args.host == "0.0.0.0" else ["localhost", "127.0.0.1", args.host]
    hosts += ["*.gradio.live"] if args.share else []
    return {"middleware": [Middleware(TrustedHostMiddleware, allowed_hosts=hosts, www_redirect=False)]}


def main(argv: list[str] | None = None) -> None:
    """Serve the page until it is interrupted. Whatever was uploaded goes with it."""
    with exit_on_user_error("hpt-hf demo"), tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:
        (args,) = parse((DemoArguments,), argv)
        os.environ["GRADIO_TEMP_DIR"] = folder  # left out, all pages of this machine share one that outlives them
        sources, note = choose(args)
        options = {"share": args.share, "max_file_size": FILE, "quiet": True, "prevent_thread_lock": True}
        signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # which ends the with statement, too
        page = build(sources, note)
        options |= {"server_name": args.host, "server_port": args.port, "app_kwargs": only_hosts(args)}
        _, local, public = page.launch(**options)
        progress(f"{note}\n{public or local} (Ctrl-C stops it)".strip())
        page.block_thread()
