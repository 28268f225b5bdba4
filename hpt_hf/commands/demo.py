"""`recipes/demo.py`: one picture, one or two CLIPs, an attack on each, and what every model says before and after. The seam to gradio.

`attack_picture` is the whole experiment and knows no page; `build` puts a page around it that needs no network, and `Guard` stands before it.
"""

from __future__ import annotations

import html
import json
import os
import tempfile
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageOps

from hpt_hf.attacks.engine import frozen, run_attack
from hpt_hf.attacks.losses import cross_entropy, margin
from hpt_hf.attacks.noise import Noise
from hpt_hf.attacks.pgd import PGD
from hpt_hf.attacks.threat_model import ThreatModel
from hpt_hf.commands.common import load_model, on_device
from hpt_hf.commands.parser import RecipeError, exit_on_user_error, parse
from hpt_hf.data.collator import Collator, to_png, to_rgb
from hpt_hf.lab.datasets import lab_images
from hpt_hf.models.zero_shot import ZeroShotClassifier
from hpt_hf.types import Images
from hpt_hf.utils import progress


@dataclass
class DemoArguments:
    """What `recipes/demo.py` shows, and to whom."""

    models: list[str] | None = field(
        default=None, metadata={"help": "robust models: folders or Hub ids; left out: outputs/quickstart/model"}
    )
    vanilla: str = field(default="lab:student", metadata={"help": "the undefended model they are compared with"})
    port: int | None = field(default=None, metadata={"help": "left out: the first free one from 7860 on"})
    host: str = field(default="127.0.0.1", metadata={"help": "0.0.0.0 shows the page to the whole network"})
    share: bool = field(
        default=False,
        metadata={"help": "a public link through gradio's servers: whoever has it computes on this machine"},
    )


# A visitor can send anything, whatever the page offers.
LABELS, LENGTH, EPS, STEPS = 100, 200, 16, 100  # labels; characters of a label or template; 255ths; gradient steps


FILE, PIXELS, RATIO = (
    5 * 2**20,
    25_000_000,
    10,
)  # bytes; before decoding; long side over short, which the resize would blow up


FORMATS = ("PNG", "JPEG", "WEBP")


TASKS = ("digits", "greek smalls", "roman numerals", "currency", "chess pieces", "card suits", "zodiac", "arrows")


ROBUST = "outputs/quickstart/model"


@dataclass(frozen=True)
class Outcome:
    """What one model says of a picture and of the same picture attacked. Arrays: float32 (height, width, 3), as the model reads them."""

    labels: tuple[str, ...]
    truth: int  # the label that the attack leads away from
    clean: tuple[float, ...]  # probabilities in the order of the labels
    attacked: tuple[float, ...]
    seen: np.ndarray
    adversarial: np.ndarray
    perturbation: np.ndarray
    norm: float  # the largest change of any pixel value

    @property
    def verdict(self) -> str:
        """`wrong` before any attack, else `fooled` or `holds`."""
        if np.argmax(self.clean) != self.truth:
            return "wrong"
        return "holds" if np.argmax(self.attacked) == self.truth else "fooled"

    @property
    def sentence(self) -> str:
        before, after = (f"“{self.labels[int(np.argmax(p))]}” {percent(max(p))}" for p in (self.clean, self.attacked))
        if self.verdict == "wrong":
            return f"wrong already on the clean picture: {before} instead of “{self.labels[self.truth]}”"
        return (
            f"fooled: {before} → {after}"
            if self.verdict == "fooled"
            else f"holds: {before} → {percent(max(self.attacked))}"
        )


def percent(share: float) -> str:
    return ">99%" if 0.99 < share < 1 else "<1%" if 0 < share < 0.01 else f"{100 * share:.0f}%"


# One attack at a time: a model holds one list of classes, and two attacks would only share the cores.
_turn = threading.Lock()


@contextmanager
def asked(model: ZeroShotClassifier, labels: Sequence[str], template: str) -> Iterator[None]:
    """`model` is asked about these labels inside, and about its own again afterwards."""
    with _turn:
        own = model.head, model.classes
        try:
            model.set_classes(labels, (template,))
            yield
        finally:
            model.head, model.classes = own


def attack_picture(
    model: ZeroShotClassifier,
    image: Image.Image,
    labels: Sequence[str],
    template: str,
    eps: float,
    steps: int,
    *,
    truth: str | None = None,
    on_step: Callable[[int, int], None] | None = None,
) -> Outcome:
    """PGD on the cross-entropy, as `recipes/evaluate.py` runs it: same ball, noise and steps, and fooled if any iterate is wrong.

    What is shown is the iterate that leads farthest away from the label. The same question has the same answer, and the model stays as it is.

    Args:
        eps: radius of the l-inf ball in 255ths, on the pixels that the model reads.
        truth: the label to lead away from; None: the model's own answer on the clean picture.
        on_step: called with (step, steps) before each step.

    Raises:
        ValueError: labels, template, eps or steps that cannot be asked or go beyond the bounds of the page.
    """
    check_question(labels, template, eps, steps, truth)
    steps, threat = int(steps), ThreatModel("linf", f"{eps:g}/255")
    batch = {k: v.to(model.device) for k, v in Collator(model.processor)([{"image": image, "label": None}]).items()}
    images, made, found = batch["images"], 0, []
    with asked(model, labels, template), frozen(model), torch.no_grad():
        clean = model.classify(images).logits
        label = clean.argmax(1) if truth is None else clean.new_tensor([labels.index(truth)], dtype=torch.int64)

        def keep(perturbed: Images) -> torch.Tensor:
            logits = model.classify(perturbed).logits
            led = margin(logits.detach(), label).item()
            if not found or led > found[0]:
                found[:] = led, perturbed.detach(), logits.detach()
            return logits

        def loss_fn(perturbed: Images) -> torch.Tensor:
            nonlocal made
            made += 1
            if on_step:
                on_step(made, steps)
            return cross_entropy(keep(perturbed), label)

        keep(run_attack(loss_fn, images, PGD(threat, steps), noise=Noise(batch["image_ids"]))[0])
    _, perturbed, attacked = found
    seen, adversarial = (x[0].permute(1, 2, 0).cpu().numpy() for x in (images, perturbed))
    sure = [tuple(logits[0].double().softmax(0).tolist()) for logits in (clean, attacked)]
    norm = float(threat.distance(perturbed, images))
    return Outcome(tuple(labels), int(label), *sure, seen, adversarial, adversarial - seen, norm)


def check_question(labels: Sequence[str], template: str, eps: float, steps: int, truth: str | None) -> None:
    """Raise ValueError for what the page does not ask; the model itself refuses duplicate labels and prompts too long for it."""
    if len(labels) > LABELS:
        raise ValueError(f"{len(labels)} labels: at most {LABELS} can be asked about")
    for what in (*labels, template):
        if not isinstance(what, str) or len(what) > LENGTH:
            raise ValueError(f"{str(what)[:40]!r} …: a label or a template is text of at most {LENGTH} characters")
    for name, value, top in (("eps", eps, EPS), ("steps", steps, STEPS)):
        if not isinstance(value, int | float) or not 1 <= value <= top:
            raise ValueError(f"{name} {str(value)[:20]}: expected a number from 1 to {top}")
    if int(steps) != steps:
        raise ValueError(f"steps {steps}: expected a whole number")
    if truth is not None and truth not in labels:
        raise ValueError(
            f"the true label {str(truth)[:LENGTH]!r} is none of the candidate labels: choose one of them, or leave it open"
        )


def read_labels(text: str) -> tuple[str, ...]:
    """One label a line; or all in one line, between commas."""
    parts = text.splitlines() if "\n" in text.strip() else text.split(",")
    return tuple(part.strip() for part in parts if part.strip())


def read_picture(file: str | Path) -> Image.Image:
    """An uploaded picture, RGB and upright. Its size is read from the header, before anything is decoded.

    Raises:
        ValueError: no picture, one of another format, a damaged one, or one too large to be opened safely.
    """
    try:
        with Image.open(file, formats=FORMATS) as picture:
            reason = unfit(*picture.size)
            if not reason:
                return to_rgb(ImageOps.exif_transpose(picture))
    except Exception as error:  # Pillow's decoders raise a zoo of types on damaged files
        reason = f"this picture cannot be read: expected {', '.join(FORMATS)} ({type(error).__name__})"
    raise ValueError(reason)


def unfit(width: int, height: int) -> str:
    """Why a picture of this size is not opened; empty if it is."""
    if width * height > PIXELS:
        return f"the picture is too large: {width} × {height}, and at most {PIXELS // 10**6} million pixels are opened"
    if max(width, height) > RATIO * min(width, height):
        return f"the picture is too narrow: {width} × {height}, and one side may be at most {RATIO} times the other"
    return ""


@dataclass(frozen=True)
class Example:
    """A picture to begin with, and what may be asked about it."""

    image: Image.Image
    labels: tuple[str, ...]
    truth: str
    template: str


def examples(model: ZeroShotClassifier, among: int = 12) -> list[Example]:
    """Of each task the first of the evaluation's pictures that `model` names right; of other models nothing is asked. None right: the first."""
    found = []
    for task in TASKS:
        pictures = lab_images(task, among, faces="test", seed=2)
        with asked(model, pictures.classes, pictures.templates[0]), torch.no_grad():
            row = next(
                (row for row in map(pictures.__getitem__, range(among)) if named_right(model, row)), pictures[0]
            )
        found.append(Example(row["image"], pictures.classes, pictures.classes[row["label"]], pictures.templates[0]))
    return found


def named_right(model: ZeroShotClassifier, row: dict) -> bool:
    images = Collator(model.processor)([row])["images"].to(model.device)
    return int(model.classify(images).logits.argmax()) == row["label"]


# --- the page -------------------------------------------------------------------------------------------------------------

CSS = """
.gradio-container { --font: system-ui, sans-serif; --good: #1a7f37; --bad: #b42318; max-width: 76rem !important; margin: 0 auto !important; overflow: clip !important; }
.dark { --good: #4ac26b !important; --bad: #ff8a7a !important; }
.tiles { display: grid !important; grid-template-columns: repeat(auto-fit, minmax(min(8rem, 22%), 1fr)); gap: .5rem; align-items: stretch !important; }
.tile { flex-direction: column; justify-content: start; min-width: 0 !important; padding: .4rem !important; font-size: .8rem !important; font-weight: 400 !important; white-space: normal; line-height: 1.25; }
.tile img { width: 3rem !important; height: 3rem !important; margin: 0 !important; } .tile img, .pixels img { image-rendering: pixelated; }
.pixels img { width: 100%; height: 100%; object-fit: contain !important; }
.html-container { padding: 0 !important; } #answer { min-height: 8rem; }
.soft, .card figcaption { color: var(--body-text-color-subdued); font-size: .85rem; line-height: 1.4; }
.fooled, .wrong { color: var(--bad); } .holds { color: var(--good); }
.said { margin: .6rem 0 1rem; font-size: 1.05rem; overflow-wrap: anywhere; } .said p { margin: .25rem 0; }
.cards { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(26rem, 100%), 1fr)); gap: 1rem; }
.card { background: var(--background-fill-secondary); border: 1px solid var(--border-color-primary); border-radius: 6px; padding: .8rem; overflow-wrap: anywhere; min-width: 0; }
.card h3 { margin: 0 0 .5rem; font-size: 1rem; } .card h4 { margin: .7rem 0 .2rem; font-size: .9rem; }
.three { display: grid; grid-template-columns: repeat(3, 1fr); gap: .5rem; } .three figure { margin: 0; } .three img { width: 100%; aspect-ratio: 1; object-fit: contain; display: block; margin: 0; }
.two { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(12rem, 100%), 1fr)); gap: 0 1.2rem; } .two ol { list-style: none; margin: 0; padding: 0; }
.two li { display: grid; grid-template-columns: 1fr auto; gap: .1rem .5rem; font-size: .88rem; margin: .25rem 0; }
.bar { grid-column: 1 / 3; height: .4rem; border-radius: 3px; background: var(--border-color-primary); } .bar i { display: block; height: 100%; border-radius: 3px; background: #7d8791; }
.bar.own i { background: var(--good); }
@media (max-width: 640px) { #attack { position: sticky; bottom: .6rem; z-index: 5; box-shadow: 0 1px 10px #0006; } }
"""


def render(outcomes: Mapping[str, Outcome]) -> str:
    """The answers as HTML: a sentence for each model, then its pictures and its probabilities."""
    said = "".join(
        f'<p><b>{html.escape(name)}</b>: <span class="{o.verdict}">{html.escape(o.sentence)}</span></p>'
        for name, o in outcomes.items()
    )
    cards = "".join(card(name, outcome) for name, outcome in outcomes.items())
    return f'<div class="said" role="status">{said}</div><div class="cards">{cards}</div>'


def card(name: str, outcome: Outcome) -> str:
    height, width = outcome.seen.shape[:2]
    factor = 0.5 / max(float(np.abs(outcome.perturbation).max()), 1e-12)
    shown = (
        (outcome.seen, f"clean, {width} × {height} pixels"),
        (outcome.adversarial, "attacked"),
        (0.5 + factor * outcome.perturbation, f"difference × {factor:.0f}, grey: none"),
    )
    crisp = ";image-rendering:pixelated" * (width < 128)
    pictures = "".join(
        f'<figure><img alt="{caption}" style="{crisp[1:]}" src="{data_url(pixels)}"><figcaption>{caption}</figcaption></figure>'
        for pixels, caption in shown
    )
    answers = bars(outcome, outcome.clean, "Says of the clean picture") + bars(
        outcome, outcome.attacked, "Says of the attacked one"
    )
    heading = f'<h3>{html.escape(name)} <span class="{outcome.verdict}">{outcome.verdict}</span></h3>'
    return (
        f'<section class="card">{heading}<div class="three">{pictures}</div><div class="two">{answers}</div></section>'
    )


def data_url(pixels: np.ndarray) -> str:
    return f"data:image/png;base64,{to_png(torch.from_numpy(pixels).permute(2, 0, 1))}"


def bars(outcome: Outcome, sure: Sequence[float], heading: str) -> str:
    """The four likeliest labels; the one that the attack leads away from is always among them, and bold."""
    top = sorted(range(len(sure)), key=lambda i: -sure[i])[:4]
    if outcome.truth not in top:
        top[-1] = outcome.truth
    rows = ""
    for i in top:
        label, own = html.escape(outcome.labels[i]), i == outcome.truth
        rows += (
            f"<li><span>{f'<b>{label}</b>' if own else label}</span><span>{html.escape(percent(sure[i]))}</span>"
            f'<span class="bar{" own" * own}"><i style="width:{100 * sure[i]:.1f}%"></i></span></li>'
        )
    return f"<div><h4>{heading}</h4><ol>{rows}</ol></div>"


INTRO = """# Attack a CLIP
The attack looks for a change of the picture that makes the model give another answer. It may move each colour value that the model reads by at most *eps*: 6/255 is 6 of
the 255 steps from black to white. Each model is attacked **on its own**, by an attack that knows its weights (white box), so each has its own attacked picture.

Click on an example or upload a picture, then press **Attack**."""


NOTES = """<p class="soft">Bold and green: the label that the attack leads away from. “Holds” means that this attack found nothing in so many steps, and one picture proves
little: <code>recipes/evaluate.py</code> measures whole sets, with stronger attacks. The examples are, of each task, the first of the evaluation's pictures that {vanilla}
names right when clean; what any other model says of them was not looked at. Pictures stay on the machine that serves this page, and uploads are deleted after about an hour, or when it stops.</p>"""


def build(sources: Sequence[str], note: str = "", *, share: bool = False):
    """(the page as gradio Blocks, what its `launch` is to be called with). `sources`: the vanilla model, then others, as folders or Hub ids.

    Raises:
        RecipeError: gradio is not installed.
        OSError, ValueError: a model that cannot be opened.
    """
    try:
        import gradio as gr
        from starlette.middleware import Middleware
    except ModuleNotFoundError as error:
        raise RecipeError(f"the demo needs gradio ({error}): pip install 'hpt_hf[demo]'") from None
    models = {source: on_device(load_model(source)) for source in dict.fromkeys(sources)}
    vanilla, *others = models
    shown = examples(models[vanilla])

    def attack(file, labels, truth, eps, left, right, template, steps, watch=gr.Progress()):  # noqa: B008 (gradio finds it there)
        try:
            if not isinstance(file, dict) or not isinstance(file.get("path"), str):
                raise ValueError("there is no picture: upload one, or click on an example")
            # gradio asks where a file lies only if the client calls it one.
            if not Path(file["path"]).resolve().is_relative_to(Path(picture.GRADIO_CACHE).resolve()):
                raise ValueError("this picture was not uploaded to this page")
            chosen = [name for name in dict.fromkeys((left, right)) if name]
            if not chosen or not set(chosen) <= set(models):
                raise ValueError(f"choose one or two of the models: {', '.join(models)}")
            image, names, outcomes = read_picture(file["path"]), read_labels(str(labels)), {}
            for name in chosen:
                outcomes[name] = attack_picture(
                    models[name],
                    image,
                    names,
                    template,
                    eps,
                    steps,
                    truth=truth or None,
                    on_step=lambda step, of, name=name: watch(step / of, desc=f"{name}, step {step} of {of}"),
                )
        except (ValueError, TypeError) as error:
            raise gr.Error(
                html.escape(str(error)), title="Not attacked", duration=None, print_exception=False
            ) from None
        return render(outcomes)

    def offer(text, chosen):
        names = [*read_labels(str(text))][:LABELS]
        return gr.Dropdown(choices=names, value=chosen if chosen in names else None)

    def take(example: Example):
        choices = gr.Dropdown(choices=list(example.labels), value=example.truth)
        return gr.Image(example.image, elem_classes="pixels"), "\n".join(example.labels), choices, example.template

    with gr.Blocks(title="Attack a CLIP", analytics_enabled=False, delete_cache=(600, 3600)) as page:
        gr.Markdown(INTRO)
        if note:
            gr.Markdown(f"**{note}**")
        with gr.Row(elem_classes="tiles"):
            icons = [{"url": data_url(np.asarray(e.image) / 255)} for e in shown]
            tiles = [
                gr.Button(e.truth, icon=i, elem_classes="tile", size="sm") for e, i in zip(shown, icons, strict=True)
            ]
        first = shown[0]
        with gr.Row():
            with gr.Column(min_width=300):
                about = {
                    "label": "Picture",
                    "alt_text": "the picture to attack",
                    "buttons": [],
                    "height": 260,
                    "format": "png",
                }
                picture = gr.Image(
                    first.image, type="filepath", image_mode=None, sources=["upload"], elem_classes="pixels", **about
                )
                with gr.Row():
                    left = gr.Dropdown([*models], value=vanilla, label="Left model", info="vanilla", min_width=220)
                    right = gr.Dropdown(
                        [*models, ("none", "")],
                        value=others[0] if others else "",
                        label="Right model",
                        info="robust, or any other",
                        min_width=220,
                    )
            with gr.Column(min_width=300):
                info = "one a line, or in one line between commas"
                labels = gr.Textbox("\n".join(first.labels), label="Candidate labels", info=info, lines=4, max_lines=4)
                info = "empty: the attack leads away from each model's own answer on the clean picture"
                truth = gr.Dropdown(
                    [*first.labels], value=first.truth, label="True label", info=info, allow_custom_value=True
                )
                info = "the lab's models are trained at 6; for a real CLIP choose 1 to 4"
                eps = gr.Slider(
                    1, EPS, 6 if vanilla.startswith("lab:") else 2, step=1, label="eps, in 255ths", info=info
                )
                with gr.Accordion("Prompt and steps", open=False):
                    template = gr.Textbox(
                        first.template, label="Prompt", info="{} is where the label goes", max_lines=2
                    )
                    steps = gr.Slider(1, STEPS, 20, step=1, label="Steps of the attack (PGD)")
        button = gr.Button("Attack", variant="primary", elem_id="attack")
        answer = gr.HTML("<p>&nbsp;</p>", elem_id="answer")
        gr.HTML(NOTES.format(vanilla=html.escape(vanilla)))
        quick = {"show_progress": "hidden", "api_visibility": "private"}
        for tile, example in zip(tiles, shown, strict=True):
            tile.click(lambda example=example: take(example), outputs=[picture, labels, truth, template], **quick)
        # Whoever brings a picture of their own has not said yet what it shows.
        picture.upload(lambda: (gr.Image(elem_classes=""), None), outputs=[picture, truth], **quick)
        labels.blur(offer, [labels, truth], truth, **quick)
        # Not preprocessed: gradio would decode what it was sent before its size is known.
        asks = [picture, labels, truth, eps, left, right, template, steps]
        button.click(attack, asks, answer, api_name="attack", preprocess=False, scroll_to_output=True)
    look = {"body_text_color": "#1c2024", "body_text_color_subdued": "#5b6570", "block_info_text_color": "#5b6570"}
    dark = {"body_text_color": "#e6e8ea", "body_text_color_subdued": "#9aa4ae", "block_info_text_color": "#9aa4ae"}
    theme = gr.themes.Base(font=["system-ui", "sans-serif"], font_mono=["ui-monospace", "monospace"], radius_size="sm")
    settings = {
        "theme": theme.set(**look, **{f"{k}_dark": v for k, v in dark.items()}),  # as report.html
        "css": CSS,
        "app_kwargs": {"middleware": [Middleware(Guard, policy=None if share else POLICY)]},
        "share": share,
        "max_file_size": FILE,
        "state_session_capacity": 200,
        "footer_links": [],
        "quiet": True,
        **dict.fromkeys(("run_history", "enable_monitoring", "ssr_mode", "mcp_server", "pwa", "show_error"), False),
    }
    return page.queue(max_size=16, default_concurrency_limit=1, api_open=False), settings


# Nothing but this server. A shared page cannot keep to it: gradio then loads its scripts from its own host.
POLICY = b"default-src 'self' data: blob: 'unsafe-inline' 'unsafe-eval'"


class Guard:
    """What a visitor reaches of gradio's server, which would also fetch any public address for whoever asks, and take bodies of any size.

    And by `policy`, what the visitor's browser reaches of the world from this page.
    """

    POSTS = {
        "/gradio_api/upload": FILE + 2**16,
        "/gradio_api/queue/join": 2**16,
        "/gradio_api/cancel": 2**16,
    }  # path -> bytes

    def __init__(self, app, policy: bytes | None = None):
        self.app, self.headers = app, [(b"content-security-policy", policy)] if policy else []

    async def __call__(self, scope, receive, send):
        read = []

        async def again():
            return read.pop(0) if read else await receive()

        async def answer(message):
            if message["type"] == "http.response.start":
                message["headers"] = [*message["headers"], *self.headers]
            await send(message)

        status = 200 if scope["type"] != "http" else await self.judge(scope, receive, read)
        if status == 200:
            return await self.app(scope, again, answer)
        await send({"type": "http.response.start", "status": status, "headers": [(b"content-length", b"0")]})
        await send({"type": "http.response.body"})

    async def judge(self, scope, receive, read: list[dict]) -> int:
        """What a request is refused with; 200: it is not. What had to be taken of its body is put into `read`."""
        path = scope["path"]
        if scope["method"] != "POST":
            return 403 if "http:/" in path or "https:/" in path else 200
        if path not in self.POSTS:
            return 404
        length = dict(scope["headers"]).get(b"content-length", b"")
        if not length.isdigit() or int(length) > self.POSTS[path]:
            return 413
        if path.endswith("join"):
            while not read or read[-1].get("more_body"):
                read.append(await receive())
            if fetches(b"".join(message.get("body", b"") for message in read)):
                return 403
        return 200


def fetches(body: bytes) -> bool:
    """Does what was sent name a file on another server, or is it nothing that can be read?"""

    def named(value) -> bool:
        if isinstance(value, dict):
            return str(value.get("path")).startswith(("http:", "https:")) or any(map(named, value.values()))
        return isinstance(value, list) and any(map(named, value))

    try:
        return named(json.loads(body))
    except (ValueError, RecursionError):
        return True


# --- the main -------------------------------------------------------------------------------------------------------------


def choose(args: DemoArguments) -> tuple[list[str], str]:
    """(the models to open, what to say about the choice)."""
    if args.models:
        return [args.vanilla, *args.models], ""
    if (Path(ROBUST) / "config.json").is_file():
        return [args.vanilla, ROBUST], ""
    note = f"There is no robust model in {ROBUST} yet: `make quickstart` makes one. Until then a second vanilla model, lab:proxy, stands in its place."
    return [args.vanilla, "lab:proxy"], note


def run(args: DemoArguments) -> None:
    """Open the page and serve it until it is interrupted. Whatever was uploaded goes with it."""
    sources, note = choose(args)
    with tempfile.TemporaryDirectory(prefix="hpt_hf-demo-", ignore_cleanup_errors=True) as folder:
        os.environ["GRADIO_TEMP_DIR"] = folder  # left out, all pages of this machine share one that outlives them
        page, settings = build(sources, note, share=args.share)
        _, local, public = page.launch(
            **settings, server_name=args.host, server_port=args.port, prevent_thread_lock=True
        )
        progress(f"{note}\n{public or local} (Ctrl-C stops it)".strip())
        page.block_thread()


def main(argv: list[str] | None = None) -> None:
    """Exit 1 with one line for a mistake in the arguments or models; everything else is a traceback."""
    with exit_on_user_error("hpt-hf demo"):
        (args,) = parse((DemoArguments,), argv)
        run(args)
