"""Is a convolution the better proxy, and what do adapters cost? HPT-GPD on the lab's letters, three seeds each.

    python benchmarks/proxies.py --output outputs/proxies                # several processes may share the runs
    python benchmarks/proxies.py --output outputs/proxies --collect docs/results/proxies.json

Rows: the quickstart's recipe with the ViT proxy, with the convolution, with both (mean of probabilities), and with the ViT and LoRA
adapters of rank 16 at three rates. Clean and robust accuracy (PGD-10) are means over the 15 zero-shot tasks, which no setting
was chosen on.
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path

from attack_cost import over_seeds
from transformers.utils import logging

from hpt_hf.attacks.suite import EvaluationAttack
from hpt_hf.attacks.threat_model import ThreatModel
from hpt_hf.commands.common import ImageArguments, load_model, open_sets
from hpt_hf.commands.parser import parse
from hpt_hf.commands.sweep import sole
from hpt_hf.commands.train import RECIPE, run
from hpt_hf.evaluation.evaluator import evaluate
from hpt_hf.evaluation.statistics import mean
from hpt_hf.lab.datasets import LAB_SUITE
from hpt_hf.utils import hardware, markdown, read_json, versions, write_json

PROXIES = {"ViT": ["lab:proxy"], "convolution": ["lab:convolution"], "both": ["lab:proxy", "lab:convolution"]}
LORA = {f"LoRA 16, rate {rate}": rate for rate in (0.03, 0.1, 0.2)}
SEEDS = (0, 1, 2)
ATTACK = EvaluationAttack(ThreatModel("linf", "6/255"), "pgd", 10)


def measure(row: str, seed: int, limit: int) -> dict:
    proxies, more = PROXIES.get(row, PROXIES["ViT"]), []
    if row in LORA:
        rate = LORA[row]
        more = ["--lora_r", "16", "--learning_rate", str(rate), "--ga_learning_rate", str(rate / 3)]
    with tempfile.TemporaryDirectory() as folder:
        flags = ["--config", "quickstart", "--proxy", *proxies, "--seed", str(seed), "--output_dir", folder, *more]
        record = run(*parse(RECIPE, [*flags, "--disable_tqdm", "true"]))
        model = load_model(folder)
        sets = open_sets(ImageArguments("", dataset=list(LAB_SUITE), limit=limit))
        results = [evaluate(model, images, ATTACK, name=row, limit=limit, probe=0) for images in sets]
    student = record["trainer"].model
    trained = sum(p.numel() for p in student.parameters() if p.requires_grad)
    return {"row": row, "seed": seed, **mean(results), "seconds": record["seconds"], "trained_parameters": trained}


def table(found: dict) -> str:
    rows = []
    for row in dict.fromkeys(r["row"] for r in found["runs"]):
        part = [r for r in found["runs"] if r["row"] == row]
        cells = [over_seeds([r[key] for r in part]) for key in ("clean", "robust")]
        trained = f"{part[0]['trained_parameters'] / 1e6:.2f}"
        rows.append((row, *cells, trained, sum(r["seconds"] for r in part) / len(part)))
    return markdown(("HPT-GPD with", "clean %", "robust %", "trained, millions", "seconds"), rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=Path("outputs/proxies"))
    parser.add_argument("--limit", type=int, default=100)
    parser.add_argument("--collect", metavar="FILE")
    args = parser.parse_args()
    logging.disable_progress_bar()
    if args.collect:
        runs = [read_json(f) for f in args.output.glob("*.json")]
        order = [*PROXIES, *LORA]
        runs.sort(key=lambda r: (order.index(r["row"]), r["seed"]))
        found = {"runs": runs, "limit": args.limit, "attack": str(ATTACK)}
        write_json(args.collect, found | {"versions": versions(), "hardware": hardware()})
        print(table(found))
        return
    for row, seeds in [*((row, SEEDS) for row in PROXIES), *((row, SEEDS[:1]) for row in LORA)]:
        for seed in seeds:
            file = args.output / f"{row.replace(' ', '_')}-{seed}.json"
            with sole(file) as mine:
                if mine and not file.is_file():
                    write_json(file, measure(row, seed, args.limit))


if __name__ == "__main__":
    main()
