"""Our attacks against an independent implementation of them: pyautoattack, by AutoAttack's own authors (`pip install -e '.[attack]'`).

The same checkpoint, pictures and balls, one after the other in one run: robust accuracy and seconds of each attack, and of the three in turn
(`standard`). AutoAttack's own standard has FAB-T between APGD-T and Square; it is run too, and its time stands apart. Ours asks `ZeroShotClassifier`,
theirs what anybody has: the stock `CLIPModel`, class prompts embedded once, nothing that needs a gradient but the pixels.

    python benchmarks/independent.py --model outputs/quickstart/model --limit 100 --output_dir docs/results/independent.json
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path

import torch
import torch.nn.functional as F
from transformers import CLIPModel

from hpt_hf.attacks.engine import frozen
from hpt_hf.attacks.suite import STANDARD, EvaluationAttack
from hpt_hf.attacks.threat_model import ThreatModel
from hpt_hf.commands.common import load_model, on_device
from hpt_hf.data.collator import Collator
from hpt_hf.lab.datasets import LAB_SUITE, lab_images
from hpt_hf.models.zero_shot import ZeroShotClassifier
from hpt_hf.utils import hardware, markdown, progress, versions, write_json

PARTS = ("apgd-ce", "apgd-t", "fab-t", "square")
OURS = tuple(STANDARD)


class Stock(torch.nn.Module):
    """Pixels in [0, 1] at the model's size -> logits, by transformers' own class."""

    def __init__(self, folder, ours: ZeroShotClassifier):
        super().__init__()
        self.clip = CLIPModel.from_pretrained(folder, dtype=torch.float32).eval().requires_grad_(False)
        self.ours = [ours]  # in a list: no module of this one

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        ours = self.ours[0]
        embeds = self.clip.get_image_features(pixel_values=(images - ours.mean) / ours.std).pooler_output
        return self.clip.logit_scale.exp() * F.normalize(embeds, dim=-1) @ ours.head.T


def independent(stock: Stock, batch: dict, threat: ThreatModel, parts) -> dict[str, tuple[int, float]]:
    """part -> (pictures that still stand, seconds), each part on what those before it left."""
    from pyautoattack import AutoAttack

    classes = len(stock.ours[0].classes)
    images, labels, found = batch["images"], batch["labels"], {}
    for part in parts:
        how = {"eps": threat.radius, "norm": {"linf": "Linf", "l2": "L2"}[threat.norm], "attacks": [part]}
        attack = AutoAttack(stock, device="cpu", seed=0, version="custom", **how)
        attack.apgd.n_restarts = 1  # as in its version "standard"
        attack.apgd_targeted.n_restarts = attack.fab.n_restarts = 1
        attack.apgd_targeted.n_target_classes = attack.fab.n_target_classes = min(9, classes - 1)
        start = time.time()
        if len(images):
            adversarial = attack.run_standard_evaluation(images, labels, batch_size=len(images))[0]
        seconds = time.time() - start
        if len(images):
            with torch.no_grad():
                stands = stock(adversarial).argmax(1) == labels
            images, labels = images[stands], labels[stands]
        found[part] = (len(images), seconds)
    return found


def ours(model: ZeroShotClassifier, batch: dict, threat: ThreatModel, parts) -> dict[str, tuple[int, float]]:
    images, keys, labels, found = batch["images"], batch["image_ids"], batch["labels"], {}
    for part in parts:
        start = time.time()
        if len(images):
            with torch.no_grad():
                _, by = EvaluationAttack(threat, part, STANDARD[part]).run(model, images, keys, labels)
            images, keys, labels = images[by < 0], keys[by < 0], labels[by < 0]
        found[part] = (len(images), time.time() - start)
    return found


def compare(model: ZeroShotClassifier, stock: Stock, tasks, threat: ThreatModel, limit: int) -> dict:
    """Standing pictures and seconds over all tasks, part by part."""
    total = {"n": 0, "clean": 0, "ours": {}, "independent": {}}

    def add(who: str, found: dict[str, tuple[int, float]]) -> None:
        for part, (standing, seconds) in found.items():
            old = total[who].setdefault(part, [0, 0.0])
            total[who][part] = [old[0] + standing, round(old[1] + seconds, 2)]

    for task in tasks:
        pictures = lab_images(task.removeprefix("lab:"), limit, faces="test", seed=2)
        model.set_classes(pictures.classes, pictures.templates)
        batch = Collator(model.processor)([pictures[i] for i in range(len(pictures))])
        with torch.no_grad():
            right = model.classify(batch["images"]).logits.argmax(1) == batch["labels"]
        total["n"] += len(right)
        total["clean"] += int(right.sum())
        batch = {k: v[right] for k, v in batch.items()}
        with frozen(model):
            add("ours", ours(model, batch, threat, OURS))
            add("independent", independent(stock, batch, threat, PARTS))
        standing = {who: total[who]["square"][0] for who in ("ours", "independent")}
        progress(f"{threat} {task}: of {total['n']} pictures stand {standing}")
    return total


def table(result: dict) -> str:
    rows = []
    for eps, total in result["eps"].items():
        for part, name in zip(PARTS, ("APGD-CE", "… then APGD-T", "… then FAB-T", "… then Square"), strict=True):
            mine, theirs = (total[who].get(part) for who in ("ours", "independent"))
            shown = [f"{100 * one[0] / total['n']:.2f}" if one else "" for one in (mine, theirs)]
            rows.append((eps, name, *shown, *(f"{one[1]:.0f}" if one else "" for one in (mine, theirs))))
        asked = (("ours", OURS), ("independent", OURS), ("independent", PARTS))
        mine, theirs, whole = (f"{sum(total[who][p][1] for p in parts):.0f}" for who, parts in asked)
        rows.append((eps, "standard, seconds", "", "", mine, f"{theirs} ({whole} with FAB-T)"))
    figures = [f"{who}: {what}" for what in ("robust %", "s") for who in ("ours", "independent")]
    return markdown(("eps", f"attack, {result['n']} images", *figures), rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="outputs/quickstart/model")
    parser.add_argument("--tasks", nargs="+", default=list(LAB_SUITE))
    parser.add_argument("--limit", type=int, default=100)
    parser.add_argument("--norm", default="linf")
    parser.add_argument("--eps", nargs="+", default=["3/255", "6/255", "9/255"])
    parser.add_argument("--output_dir", type=Path, default=Path("outputs/independent.json"))
    args = parser.parse_args()
    model = on_device(load_model(args.model))
    stock = Stock(args.model, model)
    result = {"model": args.model, "norm": args.norm, "tasks": args.tasks, "limit": args.limit, "eps": {}}
    result |= {"versions": versions() | {"pyautoattack": "0.2.0"}, "hardware": hardware()}
    for eps in args.eps:
        result["eps"][eps] = compare(model, stock, args.tasks, ThreatModel(args.norm, eps), args.limit)
        result["n"] = result["eps"][eps]["n"]
        write_json(args.output_dir, result)
        print(table(result))


if __name__ == "__main__":
    main()
