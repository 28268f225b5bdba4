"""What a training attack costs and what robustness it buys: one method, one budget of steps, cheaper and dearer attacks, several seeds.

    python benchmarks/attack_cost.py --output_dir outputs/attack_cost            # goes on where it was stopped; two may share the work
    python benchmarks/attack_cost.py --output_dir outputs/attack_cost --collect docs/results/attack_cost.json

The method is HPT-GPD with the quickstart's settings. Cost is counted, not timed: forward and backward passes of the student for each training image, the
training pass itself (3: forward, pixels and weights) and the proxy's forward apart. Robust accuracy is under `standard` (APGD-CE, APGD-T, Square), on
zero-shot tasks; the training attack's own success and PGD-20 stand beside it, since an attack whose victims only look robust to it (catastrophic
overfitting: Wong et al. 2020, arXiv 2001.03994) is found by comparing them.
"""

from __future__ import annotations

import argparse
import functools
import statistics
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import torch
from matplotlib.figure import Figure
from transformers.utils import logging

from hpt_hf.attacks.pgd import TrainingAttack
from hpt_hf.attacks.suite import EvaluationAttack
from hpt_hf.attacks.threat_model import ThreatModel
from hpt_hf.commands.compare import save
from hpt_hf.commands.parser import parse
from hpt_hf.commands.sweep import sole
from hpt_hf.commands.train import RECIPE, build
from hpt_hf.evaluation.evaluator import evaluate
from hpt_hf.evaluation.statistics import mean
from hpt_hf.lab.datasets import LAB_SUITE, lab_images
from hpt_hf.models.fast_layers import keep_memory
from hpt_hf.training.trainer import HPTTrainer
from hpt_hf.utils import hardware, markdown, progress, read_json, versions, write_json

RECIPE_FILE = "recipes/quickstart.yaml"
PIXEL = 1 / 255


@dataclass(frozen=True)
class CarriedStart(ThreatModel):
    """A ball whose "random" start is where the image's attack of the epoch before ended."""

    last: dict = field(default_factory=dict, compare=False)

    def random_start(self, images, noise):
        fresh = super().random_start(images, noise)
        ids = enumerate(noise.image_ids.tolist())
        start = [images[i] + self.last[k] if k in self.last else fresh[i] for i, k in ids]
        return self.project(torch.stack(start), images)


@dataclass(frozen=True)
class Carried(TrainingAttack):
    """Starts from where the image's attack of the epoch before ended."""

    def __post_init__(self):
        object.__setattr__(self, "threat", CarriedStart(self.threat.norm, self.threat.eps))

    def __call__(self, loss_fn, images, image_ids, *, seed, round):
        perturbed = super().__call__(loss_fn, images, image_ids, seed=seed, round=round)
        self.threat.last.update(zip(image_ids.tolist(), (perturbed - images).unbind(), strict=True))
        return perturbed


@dataclass(frozen=True)
class HalfPrecision(TrainingAttack):
    """Forward passes in bfloat16."""

    def __call__(self, loss_fn, images, image_ids, *, seed, round):
        def half(x):
            with torch.autocast(x.device.type, torch.bfloat16):
                return loss_fn(x)

        return super().__call__(half, images, image_ids, seed=seed, round=round)


@dataclass(frozen=True)
class HalfTheTokens(TrainingAttack):
    """Each batch's attack sees a random half of the patches; `embeddings` is set to the student's."""

    embeddings: list = field(default_factory=list)

    def __call__(self, loss_fn, images, image_ids, *, seed, round):
        def drop(module, inputs, tokens):
            generator = torch.Generator().manual_seed(hash((seed, round)) % 2**31)
            patches = 1 + torch.randperm(tokens.shape[1] - 1, generator=generator)
            return tokens[:, [0, *patches[: len(patches) // 2].sort().values.tolist()]]

        hook = self.embeddings[0].register_forward_hook(drop)
        try:
            return super().__call__(loss_fn, images, image_ids, seed=seed, round=round)
        finally:
            hook.remove()


PAPER = "2 steps of eps (paper)"
# name -> (class, steps, step size in 255ths, cost of the attack in passes)
OPTIONS = {
    "1 step, no random start": (functools.partial(TrainingAttack, random_start=False), 1, 6, 2.0),
    "1 step of 1.25 eps": (TrainingAttack, 1, 7.5, 2.0),
    "1 step, carried over": (Carried, 1, 6, 2.0),
    PAPER: (TrainingAttack, 2, 6, 4.0),
    "3 steps": (TrainingAttack, 3, 3, 6.0),
    "5 steps": (TrainingAttack, 5, 2, 10.0),
    "10 steps": (TrainingAttack, 10, 1, 20.0),
    "3 steps, half the tokens": (HalfTheTokens, 3, 3, 3.2),  # 9 of 17
    "3 steps in bfloat16": (HalfPrecision, 3, 3, 6.0),
}
WATCHED = ("1 step, no random start", "1 step of 1.25 eps", PAPER)


@contextmanager
def trained(name: str, seed: int, *flags: str) -> Iterator[HPTTrainer]:
    kind, steps, size, _ = OPTIONS[name]
    with tempfile.TemporaryDirectory() as place:
        said = ["--config", RECIPE_FILE, "--seed", str(seed), "--output_dir", place, "--disable_tqdm", "true", *flags]
        trainer = build(*parse(RECIPE, said))
        trainer.attack = kind(trainer.attack.threat, steps, size * PIXEL)
        if kind is HalfTheTokens:
            trainer.attack.embeddings.append(trainer.model.model.vision_model.embeddings)
        trainer.train()
        yield trainer


def measure(name: str, seed: int, limit: int, tasks: list) -> dict:
    with trained(name, seed) as trainer:
        own = [e["robust_batch_accuracy"] for e in trainer.state.log_history if "robust_batch_accuracy" in e][-3:]
        found = {"passes": OPTIONS[name][-1], "seed": seed, "seconds": trainer.stopwatch.seconds(1)}
        found["own_attack"] = 100 * statistics.mean(own)
        model = trainer.model
    for attack in ("pgd", "standard"):
        asked = EvaluationAttack(ThreatModel("linf", "6/255"), attack)
        scores = [evaluate(model, pictures, asked, name=name, limit=limit) for pictures in tasks]
        found[attack] = mean(scores)
        found["pictures"] = sum(s.n for s in scores)
    return found


def watch(name: str, epochs: int) -> dict:
    """A long run, then the held-out slice under the attack it was trained with and under PGD-20: does it only look robust to its own?"""
    found: dict = {"epochs": epochs}
    with trained(name, 0, "--num_train_epochs", str(epochs)) as trainer:
        for attack, made in (("own", trainer.attack), ("pgd", TrainingAttack(trainer.attack.threat, 20, PIXEL))):
            trainer.attack = made
            found[attack] = {n: v for n, v in trainer.evaluate().items() if n.endswith("accuracy")}
    return found


def over_seeds(values: list[float]) -> str:
    """The mean; in brackets the lowest and the highest."""
    return f"{statistics.mean(values):.1f} ({min(values):.1f}–{max(values):.1f})"


def table(results: dict) -> str:
    rows = []
    for name, runs in results["options"].items():
        figures = [(r["pgd"]["clean"], r["pgd"]["robust"], r["standard"]["robust"], r["own_attack"]) for r in runs]
        rows.append((name, runs[0]["passes"], *(over_seeds(values) for values in zip(*figures, strict=True))))
    accuracies = ("clean %", "robust %, PGD-20", "robust %, standard", "robust to its own, in training %")
    return markdown(("training attack", "passes an image", *accuracies), rows)


def watch_table(watched: dict) -> str:
    rows = []
    for name, run in watched.items():
        own, pgd = run["own"], run["pgd"]["eval_robust_accuracy"]
        rows.append((name, run["epochs"], own["eval_clean_accuracy"], own["eval_robust_accuracy"], pgd))
    return markdown(("training attack", "epochs", "clean %", "robust to its own %", "robust %, PGD-20"), rows)


def holds(results: dict, points: float = 1.0) -> list[str]:
    """The attacks no dearer than the paper's whose clean and strictly robust accuracy, means over the seeds, are at most `points` below its."""
    options = results["options"]

    def falls_behind(name: str) -> float:
        """By how many points at most, clean or robust."""
        means = [
            [statistics.mean(r["standard"][k] for r in options[n]) for n in (PAPER, name)] for k in ("clean", "robust")
        ]
        return max(paper - own for paper, own in means)

    no_dearer = [n for n in options if n != PAPER and options[n][0]["passes"] <= options[PAPER][0]["passes"]]
    return [n for n in no_dearer if falls_behind(n) <= points]


def plot(results: dict, path: Path) -> None:
    """Means over the seeds with their extremes, cheapest attack first."""
    options = sorted(results["options"].items(), key=lambda option: option[1][0]["passes"])
    figure = Figure(figsize=(9, 3.6), layout="constrained")
    for axis, key in zip(figure.subplots(1, 2, sharey=True), ("clean", "robust"), strict=True):
        for row, (_, runs) in enumerate(reversed(options)):
            values = [r["standard"][key] for r in runs]
            axis.plot([min(values), max(values)], [row, row], color="#c9d3dd", linewidth=3, zorder=1)
            axis.plot(statistics.mean(values), row, "o", color="#1f77b4", zorder=2)
        axis.set(title=f"{key}, %" + " (standard)" * (key == "robust"), yticks=range(len(options)))
        axis.set_yticklabels([f"{name} · {runs[0]['passes']:g}" for name, runs in reversed(options)])
        axis.grid(alpha=0.3)
    figure.suptitle("training attack · passes of the student an image", fontsize=10)
    save(figure, path)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output_dir", type=Path, default=Path("outputs/attack_cost"))
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--limit", type=int, default=30, help="pictures of each of the tasks")
    parser.add_argument(
        "--watch", type=int, help="instead: is the robustness of single-step attacks real after so many epochs?"
    )
    parser.add_argument(
        "--collect", type=Path, help="write what --output_dir holds to this file and a picture, and print it"
    )
    args = parser.parse_args()
    files = {(n, s): args.output_dir / f"{number}-{s}.json" for s in args.seeds for number, n in enumerate(OPTIONS)}
    watched = args.output_dir / "watch.json"
    if args.collect:
        found = {n: [read_json(files[n, s]) for s in args.seeds if files[n, s].is_file()] for n in OPTIONS}
        results = {"watch": read_json(watched) if watched.is_file() else {}}
        results |= {"options": {n: runs for n, runs in found.items() if runs}, "limit": args.limit}
        write_json(args.collect, results | {"tasks": len(LAB_SUITE), "versions": versions(), "hardware": hardware()})
        plot(results, args.collect.with_suffix(".svg"))
        print(table(results), watch_table(results["watch"]), f"held: {', '.join(holds(results))}", sep="\n\n")
        return
    logging.disable_progress_bar()
    keep_memory()
    if args.watch:
        found = {name: watch(name, args.watch) for name in WATCHED}
        write_json(watched, found)
        print(watch_table(found))
        return
    tasks = [lab_images(t.removeprefix("lab:"), args.limit, faces="test", seed=2) for t in LAB_SUITE]
    for (name, seed), file in files.items():
        with sole(file) as mine:
            if mine and not file.is_file():
                write_json(file, found := measure(name, seed, args.limit, tasks))
                progress(f"{name}, seed {seed}: {found}")


if __name__ == "__main__":
    main()
