"""`make quickstart`: the phenomenon, three methods at one budget, and a robust CLIP for `pipeline`, in minutes, with no network.

Everything it does a recipe can do; it only puts the pieces in a row, on the lab's pair of small CLIPs.
"""

from __future__ import annotations

import argparse
import shutil
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import torch
from transformers import pipeline
from transformers.utils import logging

from hpt_hf.attacks.suite import EvaluationAttack
from hpt_hf.attacks.threat_model import ThreatModel
from hpt_hf.commands.common import load_model
from hpt_hf.commands.parser import parse
from hpt_hf.commands.train import RECIPE, run
from hpt_hf.commands.transfer import matrix, means
from hpt_hf.data.collator import Collator
from hpt_hf.evaluation.evaluator import evaluate
from hpt_hf.evaluation.result import mean
from hpt_hf.lab.datasets import LAB_SUITE, lab_images
from hpt_hf.lab.glyphs import TEMPLATE
from hpt_hf.models.fast_layers import keep_memory
from hpt_hf.models.zero_shot import ZeroShotClassifier
from hpt_hf.publishing.model_card import write_model_card
from hpt_hf.utils import markdown, progress, write_json


def story(summary: Mapping, examples: Sequence, path: str | Path) -> Path:
    """The quickstart's picture: the phenomenon, clean against robust accuracy of every model, and attacked pictures with their predictions.

    Args:
        summary: what summary.json holds.
        examples: (clean, adversarial, truth, {model: prediction on the adversarial picture}); images are (height, width, 3) arrays in [0, 1].
    """
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    names = {
        "vanilla": "vanilla student",
        "proxy": "vanilla proxy",
        "hpt": "HPT",
        "hpt_gpd": "HPT-GPD",
        "tecoa": "TeCoA",
    }
    colours = {"vanilla": "#7f7f7f", "proxy": "#bcbd22", "hpt": "#d62728", "hpt_gpd": "#1f77b4", "tecoa": "#2ca02c"}
    figure = plt.figure(figsize=(13, 7.6), layout="constrained")
    top, bottom = figure.subfigures(2, 1, height_ratios=(1.15, 1))
    left, right = top.subplots(1, 2, width_ratios=(1, 1.4))
    phenomenon = summary["proxy_on_student_adversarial"]
    vanilla = summary["models"]["vanilla"]
    bars = [
        ("student,\nclean", vanilla["clean"]),
        ("student,\nattacked", vanilla["robust"]),
        ("proxy,\nclean", phenomenon["clean"]),
        ("proxy, on the\nstudent's attack", phenomenon["adversarial"]),
    ]
    drawn = left.bar([b[0] for b in bars], [b[1] for b in bars], color=["#7f7f7f", "#c7c7c7", "#bcbd22", "#dbdb8d"])
    left.bar_label(drawn, fmt="%.0f")
    left.set(
        ylim=(0, 109), ylabel="accuracy, %", title="Nobody is robust, but the proxy survives the student's attack"
    )
    for key, model in summary["models"].items():
        right.scatter(model["clean"], model["robust"], s=110, color=colours[key], zorder=3)
        # To the left, where there is always room: the best models stand at the right edge.
        place = {"textcoords": "offset points", "xytext": (-9, 0), "ha": "right", "va": "center", "zorder": 4}
        right.annotate(names[key], (model["clean"], model["robust"]), color=colours[key], weight="bold", **place)
    clean, robust = ([m[k] for m in summary["models"].values()] for k in ("clean", "robust"))
    right.set(xlim=(min(clean) - 18, max(clean) + 4), ylim=(-4, max(robust) * 1.15 + 4))
    right.set(xlabel="clean accuracy, %", ylabel="robust accuracy, %")
    right.set_title(f"Mean of {len(summary['tasks'])} zero-shot tasks, {summary['threat']}")
    right.grid(alpha=0.3)
    axes = bottom.subplots(2, len(examples), squeeze=False)
    bottom.suptitle("The same picture, clean and attacked for each model: what each then says", fontsize=11)
    for column, (clean, adversarial, truth, said) in enumerate(examples):
        for axis, image in zip(axes[:, column], (clean, adversarial), strict=True):
            axis.imshow(image, interpolation="nearest")
            axis.set_xticks([]), axis.set_yticks([])
        axes[0, column].set_title(truth, fontsize=8)
        for line, (key, prediction) in enumerate(said.items()):
            right_answer = prediction == truth
            axes[1, column].text(
                0.5,
                -0.08 - 0.13 * line,
                f"{names[key]}: {'✓' if right_answer else prediction}",
                transform=axes[1, column].transAxes,
                ha="center",
                va="top",
                fontsize=7,
                color=colours[key] if right_answer else "#444444",
            )
    axes[0, 0].set_ylabel("clean"), axes[1, 0].set_ylabel("attacked")
    path = Path(path)
    figure.savefig(path, dpi=110)
    plt.close(figure)
    return path


NAMES = {
    "vanilla": "vanilla student",
    "proxy": "vanilla proxy (under its own attack)",
    "hpt": "plain HPT",
    "hpt_gpd": "HPT-GPD",
    "tecoa": "TeCoA",
}


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="make quickstart", description=__doc__.splitlines()[0])
    parser.add_argument(
        "--config", default="recipes/quickstart.yaml", help="the HPT-GPD recipe; the other methods get the same steps"
    )
    parser.add_argument("--output", type=Path, default=Path("outputs/quickstart"))
    parser.add_argument("--limit", type=int, default=60, help="pictures of each task")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--smoke", action="store_true", help="a few steps and pictures: does it run? Its numbers mean nothing"
    )
    args = parser.parse_args(argv)
    start = time.time()
    logging.disable_progress_bar()
    keep_memory()
    limit, extra = (8, ["--max_steps", "4"]) if args.smoke else (args.limit, [])
    extra += ["--seed", str(args.seed)]

    _, recipe, _ = parse(RECIPE, ["--config", args.config])
    attack = EvaluationAttack(ThreatModel(recipe.norm, recipe.eps), steps=20)
    tasks = [lab_images(task.removeprefix("lab:"), limit, faces="test", seed=2) for task in LAB_SUITE]
    student, proxy = load_model("lab:student"), load_model("lab:proxy")
    seconds: dict[str, float] = {}

    progress(
        f"1. The phenomenon: {len(tasks)} zero-shot tasks × {limit} pictures in unseen typefaces, {attack} at {attack.threat}"
    )
    mark = time.time()
    scores = {"vanilla": measure(student, tasks, attack, "vanilla"), "proxy": measure(proxy, tasks, attack, "proxy")}
    crossed = matrix({"student": student, "proxy": proxy}, tasks, attack, sources=["student"])
    phenomenon = {k: round(means(crossed)["student", "proxy"][k], 2) for k in ("clean", "adversarial", "kl")}
    kept = 100 * phenomenon["adversarial"] / phenomenon["clean"]
    progress(
        f"   The proxy keeps {phenomenon['adversarial']:.1f} of its {phenomenon['clean']:.1f}% ({kept:.0f}%) on pictures that fool the student."
    )
    seconds["phenomenon"] = time.time() - mark

    progress("2. Training: plain HPT, HPT-GPD and TeCoA, the same pictures, attack and number of steps")
    models: dict[str, ZeroShotClassifier] = {}
    for method in ("hpt", "hpt_gpd", "tecoa"):
        mark = time.time()
        folder = args.output / ("model" if method == "hpt_gpd" else f"model-{method}")
        shutil.rmtree(folder, ignore_errors=True)
        record = run(
            *parse(
                RECIPE, ["--config", args.config, *overrides(args.config, method), "--output_dir", str(folder), *extra]
            )
        )
        models[method] = ZeroShotClassifier.from_pretrained(folder)
        seconds[f"train {method}"] = time.time() - mark
        progress(
            f"   {NAMES[method]}: {record['steps']} steps in {record['seconds']:.0f} s; held-out slice of the training letters: clean {record['held_out']['eval_clean_accuracy']:.1f}%, robust {record['held_out']['eval_robust_accuracy']:.1f}%"
        )

    progress("3. Evaluation of the three on the same tasks")
    for method, model in models.items():
        mark = time.time()
        # The checks cost more than the attack: they are run for the model that the reader takes along.
        checks = {"probe": 12, "baseline": student} if method == "hpt_gpd" else {}
        scores[method] = measure(model, tasks, attack, method, **checks)
        seconds[f"evaluate {method}"] = time.time() - mark

    summary = {
        "threat": str(attack.threat),
        "attack": str(attack),
        "tasks": [s.dataset.removeprefix("lab:") for s in scores["vanilla"]],
        "pictures_per_task": limit,
        "models": {
            key: {
                **{k: round(v, 2) for k, v in mean(part).items()},
                "per_task": {
                    s.dataset.removeprefix("lab:"): {
                        "clean": s.clean,
                        "robust": s.robust,
                        "interval": s.interval,
                        "verdict": s.verdict,
                        "suspicions": [d["name"] for d in s.suspicions],
                    }
                    for s in part
                },
            }
            for key, part in scores.items()
        },
        "proxy_on_student_adversarial": phenomenon,
        "seed": args.seed,
        "smoke": args.smoke,
        "versions": scores["vanilla"][0].versions,
        "hardware": scores["vanilla"][0].hardware,
    }
    for part in scores.values():
        for score in part:
            write_json(
                args.output / "scores" / f"{score.model}-{score.dataset.removeprefix('lab:').replace(' ', '-')}.json",
                score.to_json(),
            )
    # The model that the reader takes along has its Scores beside it and in its card.
    for score in scores["hpt_gpd"]:
        write_json(args.output / "model" / "scores" / score.file_name, score.to_json())
    write_model_card(args.output / "model")
    story(summary, examples({"vanilla": student, **models}, attack), args.output / "story.png")
    seconds["total"] = time.time() - start
    summary["seconds"] = {k: round(v, 1) for k, v in seconds.items()}
    write_json(args.output / "summary.json", summary)
    table = result_table(summary)
    (args.output / "report.md").write_text(report(summary, table), encoding="utf-8")
    print(table)

    picture = lab_images("chess pieces", 8, faces="test", seed=3)[4]["image"]
    picture.resize((256, 256), 0).save(args.output / "picture.png")
    labels = ["white chess king", "white chess queen", "white chess rook", "white chess bishop", "white chess knight"]
    said = pipeline("zero-shot-image-classification", model=str(args.output / "model"))(
        str(args.output / "picture.png"), candidate_labels=labels
    )
    print(
        f'\npipeline("zero-shot-image-classification", model="{args.output / "model"}") on {args.output / "picture.png"} says:'
    )
    for answer in said[:3]:
        print(f"  {answer['score']:6.1%}  {answer['label']}")
    print(
        f"\n{args.output / 'model' / 'README.md'} is its model card; `recipes/push.py {args.output / 'model'} owner/name` publishes it."
    )
    print(
        f"\n{time.time() - start:.0f} s in all. Look at {args.output / 'story.png'} and {args.output / 'report.md'}."
    )


def overrides(config: str, method: str) -> list[str]:
    """What turns the HPT-GPD recipe into another method's at the same number of steps: one stage as long as both.

    Its rate is the one that the held-out slice of the training data chose for it (`recipes/lab/<method>.yaml`, docs/results.md).
    """
    if method == "hpt_gpd":
        return []
    _, own, training = parse(RECIPE, ["--config", config])
    _, _, tuned = parse(RECIPE, ["--config", str(Path(config).parent / "lab" / f"{method}.yaml")])
    epochs = own.ga_epochs + training.num_train_epochs
    return ["--method", method, "--num_train_epochs", str(epochs), "--learning_rate", str(tuned.learning_rate)]


def measure(
    model: ZeroShotClassifier,
    tasks,
    attack: EvaluationAttack,
    name: str,
    *,
    probe: int = 0,
    baseline: ZeroShotClassifier | None = None,
):
    scores = []
    for number, pictures in enumerate(tasks):
        scores.append(evaluate(model, pictures, attack, name=name, probe=probe, baseline=baseline))
        if sys.stderr.isatty():
            print(f"\r   {NAMES[name]}: {number + 1} of {len(tasks)} tasks", end="", file=sys.stderr, flush=True)
    summary = mean(scores)
    doubts = [f"{s.dataset} ({', '.join(d['name'] for d in s.suspicions)})" for s in scores if s.suspicions]
    verdict = (
        f"; checks raised on {len(doubts)} of {len(scores)} tasks: {', '.join(doubts)}"
        if doubts
        else "; all checks clear" * bool(probe)
    )
    progress(f"\r   {NAMES[name]}: clean {summary['clean']:.1f}%, robust {summary['robust']:.1f}%{verdict}      ")
    return scores


@torch.no_grad()
def examples(
    models: dict[str, ZeroShotClassifier],
    attack: EvaluationAttack,
    tasks=("digits", "chess pieces", "greek smalls", "zodiac", "arrows", "roman numerals"),
):
    """For the picture: the second picture of each task, attacked for the vanilla student; every model is attacked on its own for its answer."""
    shown = []
    for task in tasks:
        pictures = lab_images(task, 5, faces="test", seed=4)
        batch = Collator(models["vanilla"].processor)([pictures[2]])
        said, seen = {}, None
        for key, model in models.items():
            model.set_classes(pictures.classes, pictures.templates)
            perturbed = attack.craft(model, batch["images"], batch["image_ids"], batch["labels"])
            seen = perturbed if seen is None else seen
            said[key] = pictures.classes[int(model.classify(perturbed).logits.argmax())]
        arrays = [np.asarray(t[0].permute(1, 2, 0)) for t in (batch["images"], seen)]
        shown.append((*arrays, pictures.classes[pictures[2]["label"]], said))
    return shown


def result_table(summary: dict) -> str:
    rows = [(NAMES[key], model["clean"], model["robust"]) for key, model in summary["models"].items()]
    return markdown(
        (f"mean of {len(summary['tasks'])} tasks", "clean %", f"robust % ({summary['attack']}, {summary['threat']})"),
        rows,
    )


def report(summary: dict, table: str) -> str:
    phenomenon, models = summary["proxy_on_student_adversarial"], summary["models"]
    per_task = markdown(
        ("task", *(f"{key} clean / robust" for key in models)),
        [
            (task, *("{clean:.0f} / {robust:.0f}".format(**model["per_task"][task]) for model in models.values()))
            for task in summary["tasks"]
        ],
    )
    note = "**A smoke run: these numbers mean nothing.**\n\n" if summary["smoke"] else ""
    return f"""# Quickstart

{note}![the story](story.png)

{table}

The vanilla proxy is right on {phenomenon["clean"]:.1f}% of the clean pictures, and on {phenomenon["adversarial"]:.1f}% of the same pictures attacked for the
*student*; KL(proxy attacked ‖ proxy clean) = {phenomenon["kl"]:.2f} nats. That is what HPT learns from.

All accuracies in percent, {summary["pictures_per_task"]} pictures a task, seed {summary["seed"]}; a picture counts as robust if it is right clean and on every iterate
of the attack. Intervals (Wilson, 95%) stand in `summary.json` and `scores/`. One seed: differences of a point or two are noise.

{per_task}

Time: {summary["seconds"]["total"]:.0f} s on {summary["hardware"]}. Prompt: "{TEMPLATE}".
"""


if __name__ == "__main__":
    main()
