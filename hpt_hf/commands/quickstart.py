"""`hpt-hf quickstart`: the phenomenon, four methods at one budget, and a robust CLIP for `pipeline`, in minutes, with no network.

Everything it does a recipe can do; it only puts the pieces in a row, on the lab's pair of small CLIPs.
"""

from __future__ import annotations

import shutil
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from transformers import pipeline
from transformers.utils import logging

from hpt_hf.attacks.suite import EvaluationAttack
from hpt_hf.attacks.threat_model import ThreatModel
from hpt_hf.commands.common import load_model
from hpt_hf.commands.parser import HfArg, exit_on_user_error, parse
from hpt_hf.commands.train import RECIPE, run
from hpt_hf.commands.transfer import matrix, means
from hpt_hf.data.collator import Collator
from hpt_hf.evaluation.evaluator import evaluate
from hpt_hf.evaluation.result import EvalResult
from hpt_hf.evaluation.statistics import mean
from hpt_hf.lab.datasets import LAB_SUITE, lab_images
from hpt_hf.models.fast_layers import keep_memory
from hpt_hf.models.zero_shot import ZeroShotClassifier
from hpt_hf.publishing.model_card import write_model_card
from hpt_hf.utils import markdown, progress, write_json, write_text

# Model -> (its name in the table, its short name and its colour in the picture).
NAMES = {
    "vanilla": ("vanilla student", "vanilla student", "#7f7f7f"),
    "proxy": ("vanilla proxy (under its own attack)", "vanilla proxy", "#bcbd22"),
    "hpt": ("plain HPT", "HPT", "#d62728"),
    "hpt_gpd": ("HPT-GPD", "HPT-GPD", "#1f77b4"),
    "tecoa": ("TeCoA", "TeCoA", "#2ca02c"),
    "anchor_clean": ("its own vanilla self as teacher", "own self", "#9467bd"),
}
SHOWN = ("digits", "chess pieces", "greek smalls", "zodiac", "arrows", "roman numerals")
LABELS = ("white chess king", "white chess queen", "white chess rook", "white chess bishop", "white chess knight")


@dataclass
class QuickstartArguments:
    """How much of it."""

    output_dir: str = "outputs/quickstart"
    limit: int = HfArg(default=60, help="images of each task")
    seed: int = 0
    smoke: bool = HfArg(default=False, help="a few steps and images: its numbers mean nothing")


def main(argv: list[str] | None = None) -> None:
    with exit_on_user_error("hpt-hf quickstart"):
        (args,) = parse((QuickstartArguments,), argv)
        tell(args)


def tell(args: QuickstartArguments) -> None:
    start, output = time.time(), Path(args.output_dir)
    output.mkdir(parents=True, exist_ok=True)
    logging.disable_progress_bar()
    keep_memory()
    limit = 8 if args.smoke else args.limit
    _, recipe, _ = parse(RECIPE, ["--config", "quickstart"])
    attack = EvaluationAttack(ThreatModel(recipe.norm, recipe.eps), steps=20)
    tasks = [lab_images(task.removeprefix("lab:"), limit, faces="test", seed=2) for task in LAB_SUITE]
    student, proxy = load_model("lab:student"), load_model("lab:proxy")
    progress(f"1. The phenomenon: {len(tasks)} tasks × {limit} images of unseen typefaces, {attack}, {attack.threat}")
    results = {"vanilla": measure(student, tasks, attack, "vanilla"), "proxy": measure(proxy, tasks, attack, "proxy")}
    crossed = means(matrix({"student": student, "proxy": proxy}, tasks, attack, sources=["student"]))
    phenomenon = {k: round(crossed["student", "proxy"][k], 2) for k in ("clean", "adversarial", "kl")}
    kept = "{adversarial:.1f} of its {clean:.1f}%".format(**phenomenon)
    progress(f"   The proxy keeps {kept} on images that fool the student.")
    progress("2. Training: plain HPT, HPT-GPD, TeCoA, and the student's own vanilla self on clean images as teacher")
    seconds = {"phenomenon": time.time() - start}
    models = {method: train(method, output, args, seconds) for method in ("hpt", "hpt_gpd", "tecoa", "anchor_clean")}
    progress("3. Evaluation of the four on the same tasks")
    for method, model in models.items():
        mark = time.time()
        # The checks cost more than the attack: they are run for the model that the reader takes along, on six tasks.
        checks = {"probe": 12, "baseline": student} if method == "hpt_gpd" else {}
        results[method] = measure(model, tasks, attack, method, **checks)
        seconds[f"evaluate {method}"] = time.time() - mark
    seconds["total"] = time.time() - start
    summary = summarise(results, phenomenon, args, limit, {k: round(v, 1) for k, v in seconds.items()})
    write(output, results, summary)
    story(summary, examples({"vanilla": student, **models}, attack), output / "story.png")
    print(result_table(summary))
    use(output)
    print(f"\n{time.time() - start:.0f} s in all. Look at {output / 'story.png'} and {output / 'report.md'}.")


def train(method: str, output: Path, args: QuickstartArguments, seconds: dict[str, float]) -> ZeroShotClassifier:
    mark = time.time()
    folder = output / ("model" if method == "hpt_gpd" else f"model-{method}")
    shutil.rmtree(folder, ignore_errors=True)
    flags = [*overrides(method), "--output_dir", str(folder), "--seed", str(args.seed)]
    flags += ["--max_steps", "4"] if args.smoke else []
    record = run(*parse(RECIPE, ["--config", "quickstart", *flags]))
    seconds[f"train {method}"] = time.time() - mark
    held = ", ".join(f"{k.removeprefix('eval_').replace('_', ' ')} {v:.1f}%" for k, v in record["held_out"].items())
    progress(f"   {NAMES[method][0]}: {record['steps']} steps in {record['seconds']:.0f} s; held-out slice: {held}")
    return ZeroShotClassifier.from_pretrained(folder)


def write(output: Path, results: dict[str, list[EvalResult]], summary: dict) -> None:
    for result in (result for part in results.values() for result in part):
        write_json(output / "results" / result.file_name, result.to_json())
    # The model that the reader takes along has its results beside it and in its card.
    for result in results["hpt_gpd"]:
        write_json(output / "model" / "results" / result.file_name, result.to_json())
    write_model_card(output / "model")
    write_json(output / "summary.json", summary)
    write_text(output / "report.md", report(summary, result_table(summary)))


def use(output: Path) -> None:
    """What the reader takes along, as anybody would use it."""
    images = lab_images("chess pieces", 8, faces="test", seed=3)
    image, template = images[4]["image"], images.templates[0]
    image.resize((256, 256), 0).save(output / "image.png")
    classify = pipeline("zero-shot-image-classification", model=str(output / "model"))
    print(f'\npipeline("zero-shot-image-classification", model="{output / "model"}") on {output / "image.png"} says:')
    for answer in classify(str(output / "image.png"), candidate_labels=list(LABELS), hypothesis_template=template)[:3]:
        print(f"  {answer['score']:6.1%}  {answer['label']}")
    print(
        f"\nIts model card is {output / 'model' / 'README.md'}; `hpt-hf push {output / 'model'} owner/name` publishes it."
    )


def overrides(method: str) -> list[str]:
    """What turns the HPT-GPD recipe into another method's at the same number of steps: one stage as long as both.

    Its rate is the one that the held-out slice of the training data chose for it (recipe `lab/<method>`, docs/results.md).
    """
    if method == "hpt_gpd":
        return []
    _, own, training = parse(RECIPE, ["--config", "quickstart"])
    _, _, tuned = parse(RECIPE, ["--config", f"lab/{method}"])
    epochs = own.ga_epochs + training.num_train_epochs
    return ["--method", method, "--num_train_epochs", str(epochs), "--learning_rate", str(tuned.learning_rate)]


def measure(model, tasks, attack: EvaluationAttack, name: str, *, probe: int = 0, **checks) -> list[EvalResult]:
    probes = [probe * (images.name.removeprefix("lab:") in SHOWN) for images in tasks]
    results = [evaluate(model, s, attack, name=name, probe=p, **checks) for s, p in zip(tasks, probes, strict=True)]
    raised = [f"{r.dataset} ({', '.join(c['name'] for c in r.raised)})" for r in results if r.raised]
    verdict = f"; checks raised on {len(raised)} of {len(results)} tasks: {', '.join(raised)}" if raised else ""
    progress("   {}: clean {clean:.1f}%, robust {robust:.1f}%".format(NAMES[name][0], **mean(results)) + verdict)
    return results


def summarise(results: dict[str, list[EvalResult]], phenomenon: dict, args, limit: int, seconds: dict) -> dict:
    """What summary.json holds."""

    def told(result: EvalResult) -> dict:
        found = {key: getattr(result, key) for key in ("clean", "robust", "interval", "verdict")}
        return found | {"raised": [check["name"] for check in result.raised]}

    one = results["vanilla"][0]
    return {
        "threat": f"{one.norm} {one.eps}",
        "attack": one.attack,
        "tasks": [r.dataset.removeprefix("lab:") for r in results["vanilla"]],
        "images_per_task": limit,
        "models": {
            key: {k: round(v, 2) for k, v in mean(part).items()}
            | {"per_task": {r.dataset.removeprefix("lab:"): told(r) for r in part}}
            for key, part in results.items()
        },
        "proxy_on_student_adversarial": phenomenon,
        "seed": args.seed,
        "smoke": args.smoke,
        "seconds": seconds,
        "versions": one.versions,
        "hardware": one.hardware,
    }


@torch.no_grad()
def examples(models: dict[str, ZeroShotClassifier], attack: EvaluationAttack) -> list[tuple]:
    """(clean, attacked for the vanilla student, truth, {model: what it says under its own attack}) of an image of some tasks."""
    shown = []
    for task in SHOWN:
        images = lab_images(task, 5, faces="test", seed=4)
        batch = Collator(models["vanilla"].processor)([images[2]])
        said, attacked = {}, {}
        for key, model in models.items():
            model.set_classes(images.classes, images.templates)
            attacked[key] = attack.craft(model, batch["images"], batch["image_ids"], batch["labels"])
            said[key] = images.classes[int(model.classify(attacked[key]).logits.argmax())]
        arrays = [np.asarray(t[0].permute(1, 2, 0)) for t in (batch["images"], attacked["vanilla"])]
        shown.append((*arrays, images.classes[images[2]["label"]], said))
    return shown


def result_table(summary: dict) -> str:
    rows = [(NAMES[key][0], model["clean"], model["robust"]) for key, model in summary["models"].items()]
    robust = f"robust % ({summary['attack']}, {summary['threat']})"
    return markdown((f"mean of {len(summary['tasks'])} tasks", "clean %", robust), rows)


def report(summary: dict, table: str) -> str:
    phenomenon, models = summary["proxy_on_student_adversarial"], summary["models"]
    rows = [
        (task, *("{clean:.0f} / {robust:.0f}".format(**model["per_task"][task]) for model in models.values()))
        for task in summary["tasks"]
    ]
    note = "**A smoke run: these numbers mean nothing.**\n\n" if summary["smoke"] else ""
    return f"""# Quickstart

{note}![the story](story.png)

{table}

The vanilla proxy is right on {phenomenon["clean"]:.1f}% of the clean images, and on {phenomenon["adversarial"]:.1f}% of the same
images attacked for the *student*; KL(proxy attacked ‖ proxy clean) = {phenomenon["kl"]:.2f} nats. That is what HPT learns from.

All accuracies in percent, {summary["images_per_task"]} images a task, seed {summary["seed"]}; an image counts as robust if it is right
clean and on every iterate of the attack. Intervals (Wilson, 95%) stand in `summary.json` and `results/`.
One seed: differences of a point or two are noise.

{markdown(("task", *(f"{key} clean / robust" for key in models)), rows)}

Time: {summary["seconds"]["total"]:.0f} s on {summary["hardware"]}.
"""


def story(summary: dict, shown: Sequence[tuple], path: str | Path) -> Path:
    """The picture: the phenomenon, clean against robust accuracy of every model, and attacked images with what models say.

    Args:
        summary: what summary.json holds.
        shown: what `examples` gives; images are (height, width, 3) arrays in [0, 1].
    """
    from matplotlib.figure import Figure  # not pyplot, which would change the caller's backend

    figure = Figure(figsize=(13, 7.6), layout="constrained")
    top, bottom = figure.subfigures(2, 1, height_ratios=(1.15, 1))
    left, right = top.subplots(1, 2, width_ratios=(1, 1.4))
    vanilla, proxy = summary["models"]["vanilla"], summary["proxy_on_student_adversarial"]
    heights = (vanilla["clean"], vanilla["robust"], proxy["clean"], proxy["adversarial"])
    ticks = ("student,\nclean", "student,\nattacked", "proxy,\nclean", "proxy, on the\nstudent's attack")
    left.bar_label(left.bar(ticks, heights, color=["#7f7f7f", "#c7c7c7", "#bcbd22", "#dbdb8d"]), fmt="%.0f")
    left.set(ylim=(0, 109), ylabel="accuracy, %")
    left.set_title("Nobody is robust, but the proxy survives the student's attack")
    points = {key: (model["clean"], model["robust"]) for key, model in summary["models"].items()}
    for key, point in points.items():
        _, name, colour = NAMES[key]
        right.scatter(*point, s=110, color=colour, zorder=3)
        # To the left, where there is always room: the best models stand at the right edge.
        place = {"textcoords": "offset points", "xytext": (-9, 0), "ha": "right", "va": "center", "zorder": 4}
        right.annotate(name, point, color=colour, weight="bold", **place)
    clean, robust = zip(*points.values(), strict=True)
    right.set(xlim=(min(clean) - 18, max(clean) + 4), ylim=(-4, max(robust) * 1.15 + 4))
    right.set(xlabel="clean accuracy, %", ylabel="robust accuracy, %")
    right.set_title(f"Mean of {len(summary['tasks'])} zero-shot tasks, {summary['threat']}")
    right.grid(alpha=0.3)
    axes = bottom.subplots(2, len(shown), squeeze=False)
    bottom.suptitle("The same image, clean and attacked for each model: what each then says", fontsize=11)
    for (upper, lower), (clean, adversarial, truth, said) in zip(axes.T, shown, strict=True):
        for axis, image in ((upper, clean), (lower, adversarial)):
            axis.imshow(image, interpolation="nearest")
            axis.set(xticks=[], yticks=[])
        upper.set_title(truth, fontsize=8)
        for line, (key, answer) in enumerate(said.items()):
            text, colour = ("✓", NAMES[key][2]) if answer == truth else (answer, "#444444")
            place = {"transform": lower.transAxes, "ha": "center", "va": "top", "fontsize": 7, "color": colour}
            lower.text(0.5, -0.08 - 0.13 * line, f"{NAMES[key][1]}: {text}", **place)
    axes[0, 0].set_ylabel("clean"), axes[1, 0].set_ylabel("attacked")
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110)
    return Path(path)
