"""The photographs' models: what each reads of every set, and what it keeps on images that were attacked for the student.

python benchmarks/photographs.py --data_dir FOLDER --models outputs/photographs --output docs/results/photographs.json
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from transformers.utils import logging

from hpt_hf.attacks.suite import EvaluationAttack
from hpt_hf.attacks.threat_model import ThreatModel
from hpt_hf.commands.common import ImageArguments, load_model, on_device, open_sets
from hpt_hf.commands.transfer import matrix, means
from hpt_hf.data.collator import Collator
from hpt_hf.evaluation.evaluator import batches
from hpt_hf.lab.photographs import DOMAINS, SETS
from hpt_hf.utils import hardware, markdown, read_json, versions, write_json

# Names of cars are longer than the context of 32 tokens.
READ = [f"photos:{name}" for name in SETS if name != "stanford_cars"]
ATTACKED = ["photos:tiny_imagenet unseen", "photos:tiny_imagenet groups"]
ALL = [*ATTACKED, "photos:tiny_imagenet", *READ, *(f"photos:pacs {d}" for d in DOMAINS)]
TIMES_CHANCE = 3.0


@torch.no_grad()
def reading(model, images) -> float:
    """Clean accuracy over a set, at most 2,000 images of it, in percent."""
    model.set_classes(images.classes, images.templates)
    right = []
    for batch in batches(images, Collator(model.processor), 128, 2000):
        right.append((model.classify(batch["images"]).logits.argmax(1) == batch["labels"]).float())
    return 100 * torch.cat(right).mean().item()


def table(found: dict) -> str:
    """Accuracy of each model on each set, and how many times chance the student's is."""
    models, rows = list(found["models"]), []
    for name, one in found["sets"].items():
        times = one["clean"]["student"] * one["classes"] / 100
        kept = "yes" if times >= TIMES_CHANCE else ""
        cells = [one["clean"][m] for m in models]
        rows.append((name.removeprefix("photos:"), one["n"], one["classes"], *cells, times, kept))
    header = ("set", "n", "classes", *(f"{m} %" for m in models), "student, times chance", "in the suite")
    return markdown(header, rows)


def kept_table(found: dict) -> str:
    rows = []
    for eps, by_model in found["kept"].items():
        for name, one in by_model.items():
            rows.append((eps, name, one["clean"], one["adversarial"], 100 * one["adversarial"] / one["clean"]))
    return markdown(("eps", "model", "clean %", "on the student's adversarial images %", "kept %"), rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data_dir", required=True)
    parser.add_argument("--models", type=Path, default=Path("outputs/photographs"))
    parser.add_argument("--limit", type=int, default=200, help="images of each set that are attacked")
    parser.add_argument("--output", type=Path, required=True)
    args = parser.parse_args()
    logging.disable_progress_bar()
    names = [n for n in ("student", "proxy", "convolution") if (args.models / n).is_dir()]
    models = {name: on_device(load_model(str(args.models / name))) for name in names}
    found: dict = {"models": {}, "sets": {}, "kept": {}}
    for name in names:
        record = read_json(args.models / name / "pretrain.json")
        losses = [entry["loss"] for entry in record["log"] if "loss" in entry]
        told = {"parameters": record["parameters"], "seconds": record["seconds"], "loss": losses[-1], "losses": losses}
        found["models"][name] = told | {"steps": record["arguments"]["max_steps"]}
    for images in open_sets(ImageArguments("", dataset=ALL, data_dir=args.data_dir)):
        clean = {name: reading(model, images) for name, model in models.items()}
        found["sets"][images.name] = {"n": min(len(images), 2000), "classes": len(images.classes), "clean": clean}
    sets = open_sets(ImageArguments("", dataset=ATTACKED, data_dir=args.data_dir))
    for eps in ("1/255", "2/255"):
        attack = EvaluationAttack(ThreatModel("linf", eps), steps=10)
        cells = means(matrix(models, sets, attack, sources=["student"], limit=args.limit))
        found["kept"][eps] = {n: {k: cells["student", n][k] for k in ("clean", "adversarial")} for n in names}
    write_json(args.output, found | {"limit": args.limit, "versions": versions(), "hardware": hardware()})
    print(table(found), kept_table(found), sep="\n\n")


if __name__ == "__main__":
    main()
