"""The paper's regime: fine-tuned on a few classes, for long and at a high rate, does HPT overfit, and does GPD repair it better than averaging?

    python benchmarks/narrow.py --world glyphs --output_dir outputs/narrow            # several processes share the runs
    python benchmarks/narrow.py --world glyphs --output_dir outputs/narrow --collect docs/results/narrow-glyphs.json

Each run is trained on 26 letters (or 50 of Tiny-ImageNet's classes) for 1, 3, 10 or 30 epochs and measured on the whole suite. Beside HPT and HPT-GPD stand
HPT's own remedies: a point between it and the vanilla student, and the mean of all its weights. `--collect` also draws the curves.
"""

from __future__ import annotations

import argparse
import json
from dataclasses import dataclass
from pathlib import Path

from matplotlib.figure import Figure
from study import suite
from transformers.utils import logging

from hpt_hf.attacks.suite import EvaluationAttack
from hpt_hf.attacks.threat_model import ThreatModel
from hpt_hf.commands.common import load_model
from hpt_hf.commands.compare import save
from hpt_hf.commands.interpolate import interpolate
from hpt_hf.commands.parser import parse
from hpt_hf.commands.sweep import sole
from hpt_hf.commands.train import RECIPE, run
from hpt_hf.evaluation.evaluator import evaluate
from hpt_hf.evaluation.statistics import mean
from hpt_hf.utils import hardware, markdown, slug, versions, write_json

EPOCHS = (1, 3, 10, 30)
STEPS = 10  # of PGD in every figure
POINTS = (0.25, 0.5, 0.75)  # between vanilla (0) and HPT (1)


@dataclass(frozen=True)
class World:
    suite: str
    eps: str
    student: str
    narrow: str  # what is trained on
    flags: str


GLYPHS, PHOTOGRAPHS = "--config lab/hpt --held_out 0 --warmup_steps 10", "--config photographs/hpt --warmup_steps 30"
STUDENT = "outputs/photographs/student"
WORLDS = {
    "glyphs": World("lab", "6/255", "lab:student", "lab:latin capitals", GLYPHS),
    "photographs": World("photographs", "2/255", STUDENT, "photos:tiny_imagenet narrow", PHOTOGRAPHS),
}
METHODS = {
    "HPT": "--method hpt --num_train_epochs {epochs}",
    "HPT, mean of all weights": "--method hpt --num_train_epochs {epochs} --average_last 1.0",
    "HPT-GPD": "--method hpt_gpd --ga_epochs {third} --num_train_epochs {rest} --ga_learning_rate {low} --pull 0.5",
    "TeCoA": "--method tecoa --num_train_epochs {epochs}",
    "own vanilla self, clean": "--method anchor_clean --num_train_epochs {epochs}",
}


def measured(world: World, method: str, epochs: int, rate: float, args, folder: Path) -> list[dict]:
    """Trained once, measured on the suite; plain HPT at the points on the way from vanilla, too."""
    method_flags = METHODS[method].format(epochs=epochs, third=epochs / 3, rest=2 * epochs / 3, low=rate / 3)
    argv = f"{world.flags} {method_flags} --learning_rate {rate:g} --disable_tqdm true --logging_strategy no".split()
    argv += ["--dataset", world.narrow, "--output_dir", str(folder), "--seed", str(args.seed)]
    argv += ["--data_dir", args.data_dir] if args.data_dir else []
    run(*parse(RECIPE, argv))
    sets = suite(world, args)
    attack = EvaluationAttack(ThreatModel("linf", world.eps), steps=STEPS)
    robust, found = load_model(str(folder)), []
    models = {method: robust}
    if method == "HPT":
        original = load_model(world.student)
        models |= {f"HPT, {w:g} of the way": interpolate(original, robust, w) for w in POINTS}
    for name, model in models.items():
        results = [evaluate(model, s, attack, name=name, limit=args.limit, probe=0) for s in sets]
        found.append({"row": name, "epochs": epochs, "rate": rate, "seed": args.seed, **mean(results)})
    return found


def table(found: dict) -> str:
    """Clean / robust of each row after each number of epochs."""
    cells, epochs = [], sorted({r["epochs"] for r in found["runs"]})
    for rate in sorted({r["rate"] for r in found["runs"]}):
        for row in dict.fromkeys(r["row"] for r in found["runs"]):
            own = {r["epochs"]: r for r in found["runs"] if (r["row"], r["rate"]) == (row, rate)}
            if not own:
                continue
            said = ["{clean:.1f} / {robust:.1f}".format(**own[e]) if e in own else "–" for e in epochs]
            cells.append((row, f"{rate:g}", *said))
    return markdown(("trained by", "rate", *(f"{e} epochs" if e > 1 else "1 epoch" for e in epochs)), cells)


def draw(found: dict, file: Path) -> None:
    rates = sorted({r["rate"] for r in found["runs"]})
    figure = Figure(figsize=(5.5 * len(rates), 4.4), layout="constrained")
    for axes, rate in zip(figure.subplots(1, len(rates), squeeze=False)[0], rates, strict=True):
        for number, row in enumerate(dict.fromkeys(r["row"] for r in found["runs"])):
            own = sorted((r for r in found["runs"] if (r["row"], r["rate"]) == (row, rate)), key=lambda r: r["epochs"])
            style = {"ls": ":" if "way" in row else "-", "marker": "o", "ms": 4, "color": f"C{number}"}
            if own:
                axes.plot([r["clean"] for r in own], [r["robust"] for r in own], label=row, **style)
            for r in own:
                axes.annotate(str(r["epochs"]), (r["clean"], r["robust"]), fontsize=7)
        axes.set(xlabel="clean accuracy %", ylabel="robust accuracy %", title=f"rate {rate:g}; numbers: epochs")
        axes.grid(alpha=0.3)
        axes.legend(fontsize=7)
    save(figure, file)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--world", choices=WORLDS, required=True)
    parser.add_argument("--data_dir")
    parser.add_argument("--limit", type=int, default=100)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=list(METHODS))
    parser.add_argument("--rates", type=float, nargs="+", default=[0.03])
    parser.add_argument("--epochs", type=int, nargs="+", default=EPOCHS)
    parser.add_argument("--output_dir", type=Path, default=Path("outputs/narrow"))
    parser.add_argument("--collect", type=Path, metavar="FILE")
    args = parser.parse_args()
    logging.disable_progress_bar()
    world = WORLDS[args.world]
    if args.collect:
        files = sorted(args.output_dir.glob(f"{args.world}-*.json"))
        runs = [one for file in files for one in json.loads(file.read_text())]
        order = [*METHODS, *(f"HPT, {w:g} of the way" for w in POINTS)]
        runs.sort(key=lambda r: (r["rate"], order.index(r["row"]), r["epochs"], r["seed"]))
        found = {"runs": runs, "limit": args.limit, "attack": f"pgd-{STEPS}, linf {world.eps}"}
        write_json(args.collect, found | {"versions": versions(), "hardware": hardware()})
        draw(found, args.collect.with_suffix(".svg"))
        print(table(found))
        return
    for epochs in args.epochs:
        for method in args.methods:
            for rate in args.rates:
                name = f"{args.world}-{slug(method)}-{epochs}-{rate:g}-{args.seed}"
                file = args.output_dir / f"{name}.json"
                with sole(file) as mine:
                    if mine and not file.is_file():
                        write_json(file, measured(world, method, epochs, rate, args, args.output_dir / name))
                        print(file, flush=True)


if __name__ == "__main__":
    main()
