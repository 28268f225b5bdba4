"""Fronts, not points: methods at several rates, each at points on its way from the vanilla weights.

    python benchmarks/fronts.py --world photographs --data_dir FOLDER                 # several processes share the runs
    python benchmarks/fronts.py --world photographs --data_dir FOLDER --collect docs/results/fronts-photographs.json

Each method is a sweep over rates, chosen on what training never saw; every model of it is then measured on the suite, too, which no choice sees.
"""

from __future__ import annotations

from pathlib import Path

from matplotlib.figure import Figure
from study import STEPS, WORLDS, World, parser_of, row_flags, suite
from transformers.utils import logging

from hpt_hf.commands.common import load_model
from hpt_hf.commands.compare import save
from hpt_hf.commands.interpolate import interpolate
from hpt_hf.commands.parser import RecipeError
from hpt_hf.commands.sweep import Grid, choose, name_of, sole
from hpt_hf.data.dataset import LabelledImages
from hpt_hf.evaluation.evaluator import evaluate
from hpt_hf.evaluation.statistics import mean
from hpt_hf.models.zero_shot import ZeroShotClassifier
from hpt_hf.utils import hardware, markdown, read_json, slug, versions, write_json

WEIGHTS = (0.25, 0.5, 0.75, 1.0)  # 0 is the vanilla student
PROBABLE, SQUARED = ("0.003", "0.01", "0.03"), ("0.001", "0.003", "0.01")  # rates of a divergence and of a distance
RATES = {
    "TeCoA": PROBABLE,
    "anchor, clean": PROBABLE,
    "anchor, clean, attacked by KL": (*PROBABLE, "0.1"),
    "AGFT": PROBABLE,
    "PMG-AFT": PROBABLE,
    "PMG-AFT + anchor, clean": PROBABLE,
    "FARE": SQUARED,
    "LORE": ("0.0003", "0.001", "0.003"),
    "UCAT": PROBABLE,
    "ViT proxy, adversarial (HPT)": PROBABLE,
    "HPT-GPD": ("0.01", "0.03", "0.1"),
}


def student(world: World, args) -> ZeroShotClassifier:
    return load_model(world.models["student"].format(models=args.models))


def accuracy(model: ZeroShotClassifier, name: str, world: World, sets: list[LabelledImages], limit: int) -> dict:
    return mean([evaluate(model, images, world.attack(), name=name, limit=limit, probe=0) for images in sets])


def run(world: World, row: str, output: Path, args) -> None:
    """The sweep, and each rate's model at each weight on the suite, in `front.json` beside it."""
    flags = [*row_flags(world, row, args.models, args.data_dir), "--learning_rate", *RATES[row], *world.left_out]
    measured = ["--measure_attack_steps", str(STEPS), "--limit", "400", "--output_dir", str(output / slug(row))]
    grid, original = Grid.read([*flags, *measured]), student(world, args)
    try:
        chosen, seen = choose(grid)
    except RecipeError as error:  # other runs are under way in another process
        print(error)
        return
    write_json(grid.output / "sweep.json", {"settings": seen, "chosen": chosen})
    sets = suite(world, args)
    for setting in grid.settings:
        folder = grid.output / "choice" / name_of(setting)
        with sole(folder / "front.json") as mine:
            if mine and not (folder / "front.json").is_file():
                robust = load_model(str(folder))
                models = {weight: interpolate(original, robust, weight) for weight in WEIGHTS}
                points = [
                    {"weight": w, **accuracy(m, str(folder), world, sets, args.limit)} for w, m in models.items()
                ]
                write_json(folder / "front.json", {"points": points})


def collect(output: Path) -> list[dict]:
    """Of each method and rate: what the choice saw, whether it was chosen, and the points on the suite."""
    rows = []
    for row, rates in RATES.items():
        folder = output / slug(row)
        if not (folder / "sweep.json").is_file():
            continue
        record = read_json(folder / "sweep.json")
        for rate in rates:
            name = name_of({"learning_rate": rate})
            seen = {k: record["settings"][name][k] for k in ("clean", "robust")}
            found = {"row": row, "rate": rate, "chosen": record["chosen"]["learning_rate"] == rate, "seen": seen}
            rows.append(found | read_json(folder / "choice" / name / "front.json"))
    return rows


def table(found: dict) -> str:
    """What the choice saw, and the suite's clean / robust at each weight; the chosen rate is marked."""
    cells = []
    for row in found["rows"]:
        points = ["{clean:.1f} / {robust:.1f}".format(**p) for p in row["points"]]
        rate = row["rate"] + (" ←" if row["chosen"] else "")
        cells.append((row["row"], rate, "{clean:.1f} / {robust:.1f}".format(**row["seen"]), *points))
    return markdown(("method", "rate", "left out", *(f"weight {w:g}" for w in WEIGHTS)), cells)


def draw(found: dict, file: Path) -> None:
    figure = Figure(figsize=(9, 4.8), layout="constrained")
    axes, names = figure.subplots(), list(dict.fromkeys(r["row"] for r in found["rows"]))
    for row in found["rows"]:
        number = names.index(row["row"])
        style = {
            "color": f"C{number % 10}",
            "marker": "os"[number // 10],
            "ms": 4,
            "alpha": 1.0 if row["chosen"] else 0.2,
        }
        line = [found["vanilla"], *row["points"]]
        label = row["row"] if row["chosen"] else None
        axes.plot([p["clean"] for p in line], [p["robust"] for p in line], label=label, **style)
    axes.set(
        xlabel="clean accuracy %", ylabel="robust accuracy %", title="from the vanilla student; pale: rates not chosen"
    )
    axes.set_xlim(left=0.7 * found["vanilla"]["clean"])  # what has collapsed is out of sight
    axes.grid(alpha=0.3)
    axes.legend(fontsize=8, frameon=False, loc="upper left", bbox_to_anchor=(1, 1))
    save(figure, file)


def main() -> None:
    args = parser_of(__doc__, RATES, limit=300).parse_args()
    logging.disable_progress_bar()
    world, output = WORLDS[args.world], args.output_dir or Path("outputs/fronts", args.world)
    if not args.collect:
        for row in args.rows:
            run(world, row, output, args)
        return
    vanilla = accuracy(student(world, args), "vanilla", world, suite(world, args), args.limit)
    found = {"vanilla": vanilla, "rows": collect(output), "attack": str(world.attack()), "eps": world.eps}
    write_json(args.collect, found | {"limit": args.limit, "versions": versions(), "hardware": hardware()})
    draw(found, Path(args.collect).with_suffix(".svg"))
    print(table(found))


if __name__ == "__main__":
    main()
