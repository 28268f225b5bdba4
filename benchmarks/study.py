"""Who should teach, and which objective: every row at the same data, attack and steps, in the glyphs' world or the photographs'.

    python benchmarks/study.py --world glyphs                                          # several processes share the runs
    python benchmarks/study.py --world photographs --data_dir FOLDER --models FOLDER   # student, proxy and convolution of docs/lab.md
    python benchmarks/study.py --world glyphs --collect docs/results/study-glyphs.json # what there is so far, as tables
    python benchmarks/study.py --world glyphs --strict --limit 20 --rows …             # under `standard`, with the sanity checks; --collect likewise

A row is a command line of `hpt-hf sweep` without a choice: its rate was chosen before, on classes left out (docs/experiments.md). Differences are
paired over the images of the suite, from the control, the student's own vanilla self on clean images.
"""

from __future__ import annotations

import argparse
from collections import Counter
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import mean

import torch
from transformers.utils import logging

from hpt_hf.attacks.suite import EvaluationAttack
from hpt_hf.attacks.threat_model import ThreatModel
from hpt_hf.commands import train
from hpt_hf.commands.common import ImageArguments, load_model, open_sets, suite_names
from hpt_hf.commands.compare import front
from hpt_hf.commands.parser import parse
from hpt_hf.commands.sweep import Grid, run
from hpt_hf.commands.transfer import matrix, means
from hpt_hf.data.dataset import LabelledImages
from hpt_hf.evaluation.comparison import Compared, compare
from hpt_hf.evaluation.result import Question, read_results_of
from hpt_hf.evaluation.sanity_checks import PROBE
from hpt_hf.method.objectives import Views
from hpt_hf.publishing.model_card import TRAINED
from hpt_hf.types import ZeroShotOutput
from hpt_hf.utils import hardware, markdown, read_json, slug, versions, write_json

REFERENCE = "anchor, clean"
STEPS = 10  # of PGD in every figure


@dataclass(frozen=True)
class World:
    """What all rows of a world share; `{models}` is the folder of its pre-trained models."""

    suite: str
    eps: str
    flags: str
    models: dict[str, str]  # student, proxies
    recipes: str  # folder of the recipes that rows begin with
    left_out: tuple[str, ...]  # what rates are chosen on
    winner: str  # its margins are counted against every row
    steps: int  # of the reference
    attack_steps: int

    def lengths(self) -> dict[str, int]:
        """Steps that cost as many passes of the student as the reference's, or `longest`: as PMG-AFT's."""
        usual, pmg = 2 * self.attack_steps + 2, 2 * self.attack_steps + 4
        shares = {"fewer": usual / pmg, "more": usual / 4, "most": usual / 6, "longest": pmg / 4}
        return {name: round(self.steps * share) for name, share in shares.items()}

    def attack(self, strict: bool = False) -> EvaluationAttack:
        name, steps = ("standard", None) if strict else ("pgd", STEPS)
        return EvaluationAttack(ThreatModel("linf", self.eps), name, steps)


WORLDS = {
    "glyphs": World(
        "lab",
        "6/255",
        "--config lab/anchor_clean --held_out 0",
        {"student": "lab:student", "proxy": "lab:proxy", "convolution": "lab:convolution"},
        "lab",
        ("--leave_out_classes", "0.25"),
        "anchor, clean, attacked by KL",
        495,
        3,
    ),
    "photographs": World(
        "photographs",
        "2/255",
        "--config photographs/anchor_clean",
        {name: f"{{models}}/{name}" for name in ("student", "proxy", "convolution")},
        "photographs",
        ("--choose_on", "photos:tiny_imagenet held out"),
        "UCAT, one attack step",
        300,
        2,
    ),
}
ROWS = {
    "TeCoA": "--config {recipes}/tecoa",
    REFERENCE: "--method anchor_clean",
    "anchor, clean, attacked by KL": "--method anchor_clean --attack_loss kl",
    "anchor, clean, mean of the last third": "--method anchor_clean --average_last 0.33",
    "anchor, clean, layer rates 0.7": "--method anchor_clean --layer_rate_decay 0.7",
    "AGFT": "--method agft",
    "UCAT": "--config {recipes}/ucat",
    "PMG-AFT": "--config {recipes}/pmg_aft",
    "PMG-AFT + anchor, clean": "--config {recipes}/pmg_anchor_clean",
    "TeCoA, one attack step": "--config {recipes}/tecoa {one} --max_steps {more}",
    "anchor, clean, attacked by KL, one step": "--method anchor_clean --attack_loss kl {one} --max_steps {more}",
    "UCAT, one attack step": "--config {recipes}/ucat {one} --max_steps {more}",
    "UCAT, one attack step, longer": "--config {recipes}/ucat {one} --max_steps {longest}",
    "PMG-AFT + anchor, clean, one attack step": "--config {recipes}/pmg_anchor_clean {one} --max_steps {most}",
    "PMG-AFT, fewer steps": "--config {recipes}/pmg_aft --max_steps {fewer}",
    "FARE": "--config {recipes}/fare",
    "LORE": "--config {recipes}/fare --method lore",
    "HPT-GPD": "--config {recipes}/hpt_gpd --proxy {proxy}",
    "ViT proxy, clean": "--method ga --proxy {proxy}",
    "ViT proxy, clean, attacked by KL": "--method ga --proxy {proxy} --attack_loss kl",
    "ViT proxy, adversarial (HPT)": "--method hpt --proxy {proxy}",
    "convolution, clean": "--method ga --proxy {convolution}",
    "convolution, adversarial": "--method hpt --proxy {convolution}",
    "both proxies, clean": "--method ga --proxy {proxy} {convolution}",
    "both proxies, adversarial": "--method hpt --proxy {proxy} {convolution}",
    "anchor + ViT proxy, clean": "--method distillation --teachers anchor_clean proxy_clean --proxy {proxy}",
    "anchor + ViT proxy, clean, attacked by KL": "--method distillation --teachers anchor_clean proxy_clean "
    "--proxy {proxy} --attack_loss kl",
    "anchor + convolution, clean": "--method distillation --teachers anchor_clean proxy_clean --proxy {convolution}",
    "anchor + both, clean": "--method distillation --teachers anchor_clean proxy_clean --proxy {proxy} {convolution}",
    "anchor + ViT proxy, where they agree": "--method distillation --teachers anchor_clean proxy_clean --proxy {proxy} "
    "--teachers_agreeing true",
    "anchor, clean + ViT proxy, adversarial": "--method distillation --teachers anchor_clean proxy_adversarial "
    "--proxy {proxy}",
}

BRIEF = (
    "TeCoA",
    "TeCoA, one attack step",
    REFERENCE,
    "anchor, clean, attacked by KL",
    "PMG-AFT",
    "UCAT, one attack step",
    "HPT-GPD",
    "ViT proxy, clean",
    "ViT proxy, adversarial (HPT)",
)


def row_flags(world: World, row: str, models: str, data_dir: str | None) -> list[str]:
    paths = {name: path.format(models=models) for name, path in world.models.items()}
    flags = f"{world.flags} {ROWS[row]} --model {{student}} --disable_tqdm true --logging_strategy no"
    one = f"--attack_steps 1 --attack_step_size {world.eps}"
    flags = flags.format(recipes=world.recipes, one=one, **world.lengths(), **paths).split()
    return [*flags, *(["--data_dir", data_dir] if data_dir else [])]


def passes(flags: list[str]) -> int:
    """Forwards and backwards of the student for one image of a training step, those of the attack among them, counted."""
    _, method, _ = parse(train.RECIPE, [*flags, "--output_dir", "unused"])
    asked = []

    def says(images: torch.Tensor) -> ZeroShotOutput:
        return ZeroShotOutput(*(torch.zeros(len(images), 2, requires_grad=True) for _ in range(3)))

    def student(images: torch.Tensor) -> ZeroShotOutput:
        asked.append(images)
        return says(images)

    images = torch.zeros(1, 3, 1, 1)
    views = Views(images, student=student, proxy=says, anchor=says, labels=torch.zeros(1, dtype=torch.long))
    train.build_schedule(method).phases[-1].objective(views.attacked(images))
    return 2 * (train.build_attack(method).steps + len(asked))


def suite(world, args) -> list[LabelledImages]:
    """The sets that figures are measured on."""
    return open_sets(ImageArguments("", dataset=[*suite_names(world.suite)], data_dir=args.data_dir, limit=args.limit))


def phenomenon(world: World, args) -> dict:
    """What each model answers rightly, clean and on the student's adversarial images, in percent."""
    opened = {name: load_model(path.format(models=args.models)) for name, path in world.models.items()}
    sets, limit = suite(world, args), args.limit
    crossed = means(matrix(opened, sets, world.attack(), sources=["student"], limit=limit))
    return {name: {k: crossed["student", name][k] for k in ("clean", "adversarial", "kl")} for name in opened}


def collect(world: World, output: Path, picture: Path | None, asked: Question, args) -> list[dict]:
    """Every row that has a run: means, spread over seeds, cost, and paired differences from the reference."""
    results = []
    for row in ROWS:
        for folder in sorted((output / slug(row) / "recipe").glob("seed*")):
            found = [r for r in read_results_of(folder) if r.question == asked]
            results += [replace(r, model=f"{row}/{folder.name}") for r in found]
    verdicts = {row: dict(Counter(r.verdict for r in results if r.model.startswith(f"{row}/"))) for row in ROWS}
    rows, compared = [], compare(results, REFERENCE)
    if picture:
        front({str(results[0].question): compared}, picture)
    for c in compared:
        found = {"row": c.model, "seeds": c.seeds, "sets": c.sets, "n": c.n, "clean": c.clean, "robust": c.robust}
        found |= {"spread": c.spread, "dominated_by": c.dominated_by, "verdicts": verdicts[c.model]}
        runs = [read_json(run) for run in (output / slug(c.model) / "recipe").glob(f"seed*/{TRAINED}")]
        counted = passes(row_flags(world, c.model, args.models, args.data_dir)) * runs[0]["steps"] * runs[0]["batch"]
        found |= {"passes": counted, "minutes": round(mean([run["seconds"] for run in runs]) / 60, 1)}
        rows.append(found | {"difference": told(c)})
    behind = {c.model: told(c) for c in compare(results, world.winner)}
    rows = [row | {"from_winner": behind[row["row"]]} for row in rows]
    return sorted(rows, key=lambda r: list(ROWS).index(r["row"]))


def told(c: Compared) -> dict | None:
    return c.against and {k: vars(d) for k, d in c.against.items()}


def margins(found: dict) -> str:
    """By how much the winner is above each other row, image by image, over the seeds that each has."""
    cells = []
    for row in found["rows"]:
        if gap := row["from_winner"]:
            said = [f"{-g['value']:+.1f} ({-g['high']:+.1f} to {-g['low']:+.1f})" for g in gap.values()]
            cells.append((row["row"], row["seeds"], *said))
    return markdown((f"{found['winner']}, above", "its seeds", "clean, paired", "robust, paired"), cells)


def brief(found: dict) -> str:
    """The README's table: both accuracies of a few rows."""
    cells = [(r["row"], r["clean"], r["robust"]) for r in found["rows"] if r["row"] in BRIEF]
    return markdown(
        (f"photographs: mean of {found['rows'][0]['sets']} sets", "clean %", f"robust % ({found['attack']})"), cells
    )


def table(found: dict) -> str:
    cells = []
    for row in found["rows"]:
        values = [
            f"{row[kind]:.1f}" + (f" ± {spread:.1f}" if row["seeds"] > 1 else "")
            for kind, spread in zip(("clean", "robust"), row["spread"], strict=True)
        ]
        gaps = [
            "{value:+.1f} ({low:+.1f} to {high:+.1f})".format(**row["difference"][k]) if row["difference"] else "–"
            for k in ("clean", "robust")
        ]
        verdicts = ", ".join(f"{count} {verdict}" for verdict, count in row["verdicts"].items())
        cost = str(round(row["passes"] / 1000))
        cells.append((row["row"], row["seeds"], cost, *values, *gaps, *([verdicts] if found["checked"] else [])))
    header = ("taught by", "seeds", "passes, thousands", "clean %", "robust %", "clean, paired", "robust, paired")
    return markdown((*header, *(["verdicts"] if found["checked"] else [])), cells)


def kept(found: dict) -> str:
    rows = [
        (name, part["clean"], part["adversarial"], 100 * part["adversarial"] / part["clean"])
        for name, part in found["phenomenon"].items()
    ]
    return markdown(("model", "clean %", "on the student's adversarial images %", "kept %"), rows)


def parser_of(what: str, rows, limit: int) -> argparse.ArgumentParser:
    """The flags of everything that runs rows of a world."""
    parser = argparse.ArgumentParser(description=what, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--world", choices=WORLDS, required=True)
    parser.add_argument("--data_dir")
    parser.add_argument("--models", default="outputs/photographs", help="folder of the photographs' models")
    parser.add_argument("--rows", nargs="+", choices=rows, default=list(rows))
    parser.add_argument("--limit", type=int, default=limit)
    parser.add_argument("--output_dir", type=Path)
    parser.add_argument("--collect", metavar="FILE")
    return parser


def main() -> None:
    parser = parser_of(__doc__, ROWS, limit=100)
    parser.add_argument("--seeds", nargs="+", default=["0"])
    parser.add_argument("--strict", action="store_true", help="under `standard`, with the sanity checks")
    args = parser.parse_args()
    logging.disable_progress_bar()
    world, output = WORLDS[args.world], args.output_dir or Path("outputs/study", args.world)
    attack = world.attack(args.strict)
    if args.collect:
        found = {} if args.strict else {"phenomenon": phenomenon(world, args)}
        picture = None if args.strict else Path(args.collect).with_suffix(".svg")
        asked = Question.of(attack, args.limit)
        found |= {"winner": world.winner, "rows": collect(world, output, picture, asked, args)}
        found |= {"attack": f"{attack}, linf {world.eps}", "limit": args.limit, "checked": args.strict}
        write_json(args.collect, found | {"versions": versions(), "hardware": hardware()})
        print(table(found), margins(found), sep="\n\n")
        return
    measured = ["--measure_on", world.suite, "--measure_attack", attack.name, "--limit", str(args.limit)]
    measured += ["--measure_probe", str(PROBE)] if args.strict else ["--measure_attack_steps", str(STEPS)]
    for row in args.rows:
        flags = [*row_flags(world, row, args.models, args.data_dir), *measured, "--seed", *args.seeds]
        run(Grid.read([*flags, "--output_dir", str(output / slug(row))]))


if __name__ == "__main__":
    main()
