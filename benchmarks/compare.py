"""The comparison: every method at one budget, its rate chosen on classes held out of the training data, several seeds, all zero-shot sets.

    python benchmarks/compare.py --group lab
    python benchmarks/compare.py --group real --data_dir FOLDER

The rule for a rate: train without two groups of classes (`lab:tuning letters`, `real:noto tuning`), measure zero-shot on exactly those, take the rate
with the highest mean of clean and robust accuracy; of equals, the lower. Then train on everything and measure on the suite, which no choice has seen.

Writes `OUTPUT/<method>.json` after every run and goes on from there when started again, so two processes may share the methods;
`--collect FILE` puts them together and prints the tables of docs/results.md.
"""

from __future__ import annotations

import argparse
import json
import math
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

import torch
from transformers.utils import logging

from hpt_hf.attacks.suite import EvaluationAttack
from hpt_hf.attacks.threat_model import ThreatModel
from hpt_hf.commands.common import load_model, open_images
from hpt_hf.commands.parser import parse
from hpt_hf.commands.train import RECIPE, run
from hpt_hf.commands.transfer import matrix, means
from hpt_hf.data.dataset import DatasetSpec
from hpt_hf.evaluation.evaluator import evaluate
from hpt_hf.evaluation.statistics import mean
from hpt_hf.lab.datasets import LAB_SUITE, LAB_VALIDATION, REAL_VALIDATION, real_suite
from hpt_hf.models.zero_shot import ZeroShotClassifier
from hpt_hf.utils import hardware, markdown, versions, write_json

ROOT = Path(__file__).parent.parent
METHODS = ("hpt", "hpt_gpd", "anchor_clean", "tecoa", "pmg_aft", "fare")
# FARE's loss is a squared distance, not a KL of hundredfold cosines: its rates live elsewhere.
RATES = {"fare": (0.0003, 0.001, 0.003, 0.01), "hpt_gpd": (0.03, 0.05, 0.1, 0.2)}
OTHER_RATES = (0.005, 0.01, 0.02, 0.03)
VALIDATION = 400  # pictures of each set a rate is chosen on, where there are so many


@dataclass(frozen=True)
class Group:
    """Where one world's recipes, tuning data and test sets are."""

    tuning: str
    validation: tuple[str, ...]
    suite: tuple[str, ...]


GROUPS = {
    "lab": Group("lab:tuning letters", LAB_VALIDATION, LAB_SUITE),
    "real": Group("real:noto tuning", REAL_VALIDATION, real_suite()),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--group", choices=sorted(GROUPS), required=True, help="folder of recipes/ with one recipe a method"
    )
    parser.add_argument("--data_dir", help="the folder of real pictures")
    parser.add_argument("--methods", nargs="+", choices=("vanilla", *METHODS), default=("vanilla", *METHODS))
    parser.add_argument("--rates", nargs="+", type=float, help="instead of those in RATES")
    parser.add_argument("--seeds", nargs="+", type=int, default=(0, 1, 2))
    parser.add_argument("--limit", type=int, default=100, help="pictures of each test set")
    parser.add_argument("--output_dir", type=Path)
    parser.add_argument(
        "--collect", type=Path, metavar="FILE", help="write all there is to FILE, print its tables, and stop"
    )
    args = parser.parse_args()
    output = args.output_dir or ROOT / "outputs" / f"compare-{args.group}"
    if args.collect:
        files = [f for m in ("vanilla", *METHODS) if (f := output / f"{m}.json").is_file()]
        write_json(args.collect, results := {f.stem: json.loads(f.read_text()) for f in files})
        print(table(results), rate_table(results), sep="\n\n")
        return
    logging.disable_progress_bar()
    for method in args.methods:
        compare(method, args, output / f"{method}.json")


def compare(method: str, args, file: Path) -> None:
    """All runs of one method that `file` does not hold yet."""
    group = GROUPS[args.group]
    flags = ["--data_dir", args.data_dir] if args.data_dir else []
    # The vanilla models, the attack and the proxy are those that the HPT recipe names.
    _, settings, _ = recipe(args.group, "hpt" if method == "vanilla" else method, flags)
    attack = EvaluationAttack(ThreatModel(settings.norm, settings.eps), steps=20)
    record = json.loads(file.read_text()) if file.is_file() else {"rates": {}, "runs": []}
    record |= {
        "attack": f"{attack}, {attack.threat}",
        "limit": args.limit,
        "versions": versions(),
        "hardware": hardware(),
    }

    def pictures(names, training, limit):
        return [open_images(DatasetSpec(n), training=training, limit=limit, data_dir=args.data_dir) for n in names]

    def measured(model: ZeroShotClassifier, sets, limit: int) -> dict:
        start = time.time()
        scores = [evaluate(model, s, attack, name=method, limit=limit, probe=0) for s in sets]
        per_set = {s.dataset: [s.clean, s.robust] for s in scores}
        return mean(scores) | {"per_set": per_set, "evaluation_seconds": round(time.time() - start, 1)}

    suite = pictures(group.suite, False, args.limit)
    if method == "vanilla":
        student, proxy = load_model(settings.model), load_model(settings.proxy)
        record["runs"] = [measured(student, suite, args.limit)]
        record["proxy"] = measured(proxy, suite, args.limit)
        crossed = matrix({"student": student, "proxy": proxy}, suite, attack, sources=["student"], limit=args.limit)
        record["proxy_on_student_adversarial"] = {
            k: means(crossed)["student", "proxy"][k] for k in ("clean", "adversarial", "kl")
        }
        write_json(file, record)
        return
    validation = pictures(group.validation, True, VALIDATION)
    for rate in args.rates or RATES.get(method, OTHER_RATES):
        if f"{rate:g}" not in record["rates"]:
            model, facts = train(
                args.group, method, [*flags, "--dataset", group.tuning, "--learning_rate", f"{rate:g}"]
            )
            record["rates"][f"{rate:g}"] = facts if model is None else facts | measured(model, validation, VALIDATION)
            write_json(file, record)
            print(method, rate, record["rates"][f"{rate:g}"], flush=True)
    best = choose(record["rates"])
    record["runs"] = [r for r in record["runs"] if r["learning_rate"] == float(best)]  # a rate tried later may win
    for seed in args.seeds:
        if seed not in [r["seed"] for r in record["runs"]]:
            model, facts = train(args.group, method, [*flags, "--learning_rate", best, "--seed", str(seed)])
            facts |= {"seed": seed, "learning_rate": float(best)}
            record["runs"].append(facts if model is None else facts | measured(model, suite, args.limit))
            write_json(file, record)
            print(method, seed, best, record["runs"][-1], flush=True)


def choose(rates: dict[str, dict]) -> str:
    """The rule: the highest mean of clean and robust accuracy on held-out classes; of equals, the lower rate. A run that diverged has none."""
    return max(rates, key=lambda r: (rates[r].get("clean", -1) + rates[r].get("robust", -1), -float(r)))


def recipe(group: str, method: str, flags: list[str]):
    return parse(
        RECIPE, ["--config", str(ROOT / "recipes" / group / f"{method}.yaml"), *flags, "--disable_tqdm", "true"]
    )


def train(group: str, method: str, flags: list[str]) -> tuple[ZeroShotClassifier | None, dict]:
    """The trained model and what is known of the run; no model if its loss diverged."""
    with tempfile.TemporaryDirectory() as folder:
        try:
            record = run(*recipe(group, method, [*flags, "--output_dir", folder, "--logging_strategy", "no"]))
        except FloatingPointError as error:
            return None, {"diverged": str(error)}
        return record["trainer"].model, {"seconds": record["seconds"], "threads": torch.get_num_threads()}


def table(results: dict) -> str:
    """Means over the suite; over seeds, mean and standard deviation."""
    rows = []
    for method, record in results.items():
        runs = [r for r in record["runs"] if "diverged" not in r]
        cells = [spread([r[k] for r in runs]) for k in ("clean", "robust")]
        rates = {f"{r['learning_rate']:g}" for r in runs if "learning_rate" in r}
        rows.append((method, ", ".join(sorted(rates)) or "–", str(len(runs)), *cells))
        if method == "vanilla":
            proxy, crossed = record["proxy"], record["proxy_on_student_adversarial"]
            rows.append(
                ("vanilla proxy under its own attack", "–", "1", f"{proxy['clean']:.1f}", f"{proxy['robust']:.1f}")
            )
            rows.append(
                (
                    "vanilla proxy on the student's",
                    "–",
                    "1",
                    f"{crossed['clean']:.1f}",
                    f"{crossed['adversarial']:.1f}",
                )
            )
    attack = next(iter(results.values()))["attack"]
    return markdown(("method", "rate", "seeds", "clean %", f"robust % ({attack})"), rows)


def rate_table(results: dict) -> str:
    """What the rule saw: clean / robust on the held-out classes for every rate tried."""
    rows = [
        (method, rate, *((f"{r['clean']:.1f}", f"{r['robust']:.1f}") if "clean" in r else ("diverged", "")))
        for method, record in results.items()
        for rate, r in sorted(record["rates"].items(), key=lambda item: float(item[0]))
    ]
    return markdown(("method", "rate", "held-out classes clean %", "robust %"), rows)


def spread(values: list[float]) -> str:
    centre = sum(values) / len(values)
    if len(values) == 1:
        return f"{centre:.1f}"
    return f"{centre:.1f} ± {math.sqrt(sum((v - centre) ** 2 for v in values) / (len(values) - 1)):.1f}"


if __name__ == "__main__":
    main()
