"""Which rate is safe for a small set of own images: HPT-GPD on six sets of 320 images as folders, one rate after the other.

    python benchmarks/own_images.py --output outputs/own_images

The rule: of the rates with which no set loses more than ten points of the vanilla student's clean accuracy on its held-out
quarter, the one with the highest mean robust accuracy. Goes on where it stopped; writes `OUTPUT/own_images.json`.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from transformers.utils import logging

from hpt_hf.commands.parser import parse
from hpt_hf.commands.train import RECIPE, run
from hpt_hf.lab.datasets import lab_images
from hpt_hf.utils import hardware, markdown, versions, write_json

SETS = ("digits", "chess pieces", "zodiac", "arrows", "card suits", "dice")
RATES = (0.001, 0.003, 0.01, 0.03)
IMAGES, HELD_OUT, MAX_DROP = 320, 0.25, 10.0


def folder_of(name: str, place: Path) -> Path:
    """A set as a user has it: one sub-folder of PNG files a class."""
    folder = place / name.replace(" ", "_")
    images = lab_images(name, IMAGES, faces="train", seed=5)
    for number, row in enumerate(images):
        file = folder / images.classes[row["label"]] / f"{number:03d}.png"
        file.parent.mkdir(parents=True, exist_ok=True)
        row["image"].save(file)
    return folder


def measure(name: str, rate: float, place: Path) -> dict:
    """Clean and robust accuracy on the held-out quarter: of the vanilla student, and after training."""
    flags = ["--config", "own_images", "--dataset", str(folder_of(name, place)), "--held_out", str(HELD_OUT)]
    flags += [
        "--learning_rate",
        str(rate),
        "--ga_learning_rate",
        str(0.3 * rate),
        "--output_dir",
        str(place / "model"),
    ]
    record = run(*parse(RECIPE, [*flags, "--overwrite", "true", "--use_cpu", "true"]))
    kept = ("steps", "seconds", "classes", "held_out", "held_out_vanilla", "held_out_images")
    return {"set": name, "rate": rate} | {k: record[k] for k in kept}


def choose(rows: list[dict]) -> tuple[float, str]:
    """(the rate by the rule, the table)."""
    safe, lines = {}, []
    for rate in RATES:
        part = [r for r in rows if r["rate"] == rate]
        clean, robust = ([r["held_out"][f"eval_{k}_accuracy"] for r in part] for k in ("clean", "robust"))
        vanilla = [r["held_out_vanilla"]["vanilla_clean_accuracy"] for r in part]
        worst = max(before - after for before, after in zip(vanilla, clean, strict=True))
        mean = sum(robust) / len(robust)
        lines.append((str(rate), sum(clean) / len(clean), mean, worst))
        if worst <= MAX_DROP:
            safe[rate] = mean
    before = [[r["held_out_vanilla"][f"vanilla_{k}_accuracy"] for r in part] for k in ("clean", "robust")]
    lines.append(("vanilla student", *(sum(values) / len(values) for values in before), 0.0))
    return max(safe, key=safe.get), markdown(("rate", "clean %", "robust %", "largest loss of clean accuracy"), lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", default="outputs/own_images")
    place = Path(parser.parse_args().output)
    logging.disable_progress_bar()
    file = place / "own_images.json"
    rows = json.loads(file.read_text())["rows"] if file.is_file() else []
    for rate in RATES:
        for name in SETS:
            if not any(r["set"] == name and r["rate"] == rate for r in rows):
                rows.append(measure(name, rate, place))
                write_json(file, {"rows": rows, "versions": versions(), "hardware": hardware()})
    chosen, table = choose(rows)
    write_json(file, {"chosen": chosen, "rows": rows, "versions": versions(), "hardware": hardware()})
    print(table, f"chosen: {chosen}", sep="\n\n")


if __name__ == "__main__":
    main()
