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
import statistics
import tempfile
import time
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
from hpt_hf.utils import hardware, markdown, read_json, versions, write_json

ROOT = Path(__file__).parent.parent
METHODS = ("hpt", "hpt_gpd", "anchor_clean", "tecoa", "pmg_aft", "fare")
# FARE's loss is a squared distance, not a KL of hundredfold cosines: its rates live elsewhere.
RATES = {"fare": (0.0003, 0.001, 0.003, 0.01), "hpt_gpd": (0.03, 0.05, 0.1, 0.2)}
OTHER_RATES = (0.005, 0.01, 0.02, 0.03)
VALIDATION = 400  # pictures of each set a rate is chosen on, where there are so many


# World -> (what rates are tuned on, the sets that choose, the suite).
GROUPS = {
    "lab": ("lab:tuning letters", LAB_VALIDATION, LAB_SUITE),
    "real": ("real:noto tuning", REAL_VALIDATION, real_suite()),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--group", choices=GROUPS, required=True, help="folder of recipes/ with one recipe a method")
    parser.add_argument("--data_dir", help="the folder of real pictures")
    parser.add_argument("--methods", nargs="+", choices=("vanilla", *METHODS), default=("vanilla", *METHODS))
    parser.add_argument("--rates", nargs="+", type=float, help="instead of those in RATES")
    parser.add_argument("--seeds", nargs="+", type=int, default=(0, 1, 2))
    parser.add_argument("--limit", type=int, default=100, help="pictures of each test set")
    parser.add_argument("--output_dir", type=Path)
    parser.add_argument("--collect", metavar="FILE", help="write all there is to FILE, print its tables, and stop")
    args = parser.parse_args()
    output = args.output_dir or ROOT / "outputs" / f"compare-{args.group}"
    if args.collect:
        files = [f for m in ("vanilla", *METHODS) if (f := output / f"{m}.json").is_file()]
        write_json(args.collect, results := {f.stem: read_json(f) for f in files})
        print(table(results), rate_table(results), sep="\n\n")
        return
    logging.disable_progress_bar()
    for method in args.methods:
        compare(method, args, output / f"{method}.json")


def compare(method: str, args, file: Path) -> None:
    """All runs of one method that `file` does not hold yet."""
    tuning, choosing, suite = GROUPS[args.group]
    flags = ["--data_dir", args.data_dir] if args.data_dir else []
    # The vanilla models, the attack and the proxy are those that the HPT recipe names.
    _, settings, _ = recipe(args.group, "hpt" if method == "vanilla" else method, flags)
    attack = EvaluationAttack(ThreatModel(settings.norm, settings.eps), steps=20)
    record = read_json(file) if file.is_file() else {"rates": {}, "runs": []}
    record |= {"attack": f"{attack}, {attack.threat}", "limit": args.limit}
    record |= {"versions": versions(), "hardware": hardware()}

    def pictures(names, training, limit):
        return [open_images(DatasetSpec(n), training=training, limit=limit, data_dir=args.data_dir) for n in names]

    def measured(model: ZeroShotClassifier, sets, limit: int) -> dict:
        start = time.time()
        scores = [evaluate(model, s, attack, name=method, limit=limit, probe=0) for s in sets]
        per_set = {s.dataset: [s.clean, s.robust] for s in scores}
        return mean(scores) | {"per_set": per_set, "evaluation_seconds": round(time.time() - start, 1)}

    suite = pictures(suite, False, args.limit)
    if method == "vanilla":
        models = {"student": load_model(settings.model), "proxy": load_model(*settings.proxy)}
        record["runs"] = [measured(models["student"], suite, args.limit)]
        record["proxy"] = measured(models["proxy"], suite, args.limit)
        crossed = means(matrix(models, suite, attack, sources=["student"], limit=args.limit))["student", "proxy"]
        record["proxy_on_student_adversarial"] = {k: crossed[k] for k in ("clean", "adversarial", "kl")}
        write_json(file, record)
        return
    choosing = pictures(choosing, True, VALIDATION)
    for rate in [f"{rate:g}" for rate in args.rates or RATES.get(method, OTHER_RATES)]:
        if rate not in record["rates"]:
            model, facts = train(args.group, method, [*flags, "--dataset", tuning, "--learning_rate", rate])
            record["rates"][rate] = facts if model is None else facts | measured(model, choosing, VALIDATION)
            write_json(file, record)
            print(method, rate, record["rates"][rate], flush=True)
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
    return parse(RECIPE, ["--config", f"{group}/{method}", *flags, "--disable_tqdm", "true"])


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
            rows.append(("vanilla proxy under its own attack", "–", "1", proxy["clean"], proxy["robust"]))
            rows.append(("vanilla proxy on the student's", "–", "1", crossed["clean"], crossed["adversarial"]))
    attack = next(iter(results.values()))["attack"]
    return markdown(("method", "rate", "seeds", "clean %", f"robust % ({attack})"), rows)


def rate_table(results: dict) -> str:
    """What the rule saw: clean / robust on the held-out classes for every rate tried."""
    rows = []
    for method, record in results.items():
        for rate, r in sorted(record["rates"].items(), key=lambda item: float(item[0])):
            rows.append((method, rate, r.get("clean", "diverged"), r.get("robust", "")))
    return markdown(("method", "rate", "held-out classes clean %", "robust %"), rows)


def spread(values: list[float]) -> str:
    centre = f"{statistics.mean(values):.1f}"
    return f"{centre} ± {statistics.stdev(values):.1f}" if len(values) > 1 else centre


if __name__ == "__main__":
    main()
