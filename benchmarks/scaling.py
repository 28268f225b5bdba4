"""What our training step costs as its parts grow: attack steps, images, reference models; and whether pictures can be decoded as fast as it eats them.

    python benchmarks/scaling.py --output_dir outputs/scaling

Same models and machine as `step.py` (ViT-B/32 student, ViT-B/16 proxy, 224 px, random weights); every figure is the median of the steps after the second, its
low and high beside it. Writes scaling.json and scaling.svg.
"""

from __future__ import annotations

import argparse
import os
import statistics
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
from matplotlib.figure import Figure
from PIL import Image
from step import THREAT, Ours, make_batch, make_models, spread
from torch.utils.data import DataLoader, Dataset

from hpt_hf.attacks.pgd import TrainingAttack
from hpt_hf.commands.compare import save
from hpt_hf.data.collator import Collator, to_rgb
from hpt_hf.models.zero_shot import ZeroShotClassifier
from hpt_hf.utils import hardware, markdown, progress, read_json, versions, write_json, write_text

ATTACK_STEPS = (1, 2, 3, 5, 10)
IMAGES = (4, 8, 16, 32)
# What stands beside the student: nothing, its own vanilla copy (B/32), the proxy (B/16).
REFERENCES = {"none (tecoa)": "tecoa", "anchor, B/32 (anchor_clean)": "anchor_clean", "proxy, B/16 (hpt)": "hpt"}


def timed(stepper, batch, repeats: int) -> dict:
    seconds = []
    for number in range(2 + repeats):
        start = time.perf_counter()
        stepper(batch)
        if number >= 2:
            seconds.append(time.perf_counter() - start)
    progress(f"{len(batch['images'])} images: {seconds}")
    return spread(seconds)


class Photographs(Dataset):
    """JPEG files of ImageNet's usual size, with as much detail as photographs: about 100 kB each."""

    def __init__(self, folder: Path, count: int):
        rng = np.random.default_rng(0)
        self.files = []
        for number in range(count):
            coarse = Image.fromarray(rng.integers(0, 256, (94, 125, 3), dtype=np.uint8))
            smooth = np.asarray(coarse.resize((500, 375), Image.Resampling.BICUBIC), dtype=np.int16)
            pixels = smooth + rng.integers(-12, 13, smooth.shape)
            file = folder / f"{number}.jpg"
            Image.fromarray(np.clip(pixels, 0, 255).astype(np.uint8)).save(file, quality=90)
            self.files.append(file)
        self.kilobytes = statistics.mean(f.stat().st_size for f in self.files) / 1000

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, index: int) -> dict:
        return {"image": to_rgb(self.files[index].read_bytes()), "label": 0}


def loading(folder: Path, count: int = 512) -> dict:
    """Images a second, decoded, resized to 224 px and collated, by the number of loader processes."""
    (folder / "photographs").mkdir()
    pictures = Photographs(folder / "photographs", count)
    collate = Collator(ZeroShotClassifier.from_pretrained(folder / "student").processor)
    rates = {}
    for workers in (0, 1, 2):
        loader, runs = DataLoader(pictures, batch_size=32, collate_fn=collate, num_workers=workers), []
        for _ in range(3):
            batches = iter(loader)
            next(batches)  # the workers have started
            start = time.perf_counter()
            done = sum(len(b["images"]) for b in batches)
            runs.append(done / (time.perf_counter() - start))
        rates[workers] = spread(runs)
    return {"kilobytes": pictures.kilobytes, "images_a_second": rates}


def table(found: dict) -> str:
    what = {"attack steps": "attack_steps", "images": "images", "reference": "references"}
    rows = [(name, n, s) for name, key in what.items() for n, s in found[key].items()]
    cells = [(name, n, *(f"{s[k]:.2f}" for k in ("value", "low", "high"))) for name, n, s in rows]
    return markdown(("what varies", "at", "seconds a step", "low", "high"), cells)


def loading_table(found: dict) -> str:
    need = 16 / found["attack_steps"]["2"]["value"]
    rows = []
    for workers, s in found["loading"]["images_a_second"].items():
        rows.append((workers, *(f"{s[k]:.0f}" for k in ("value", "low", "high")), f"{s['value'] / need:.0f} times"))
    eaten = f"of what a step eats ({need:.1f} a second)"
    return markdown(("loader processes", "images a second", "low", "high", eaten), rows)


def plot(found: dict, path: Path) -> None:
    figure = Figure(figsize=(9, 3.2), layout="constrained")
    axes = figure.subplots(1, 3)
    titles = {"attack_steps": "attack steps, 16 images", "images": "images, 2 attack steps"}
    for ax, (key, title) in zip(axes, titles.items(), strict=False):
        x, values = [int(n) for n in found[key]], list(found[key].values())
        spans = [[v["value"] - v["low"] for v in values], [v["high"] - v["value"] for v in values]]
        ax.errorbar(x, [v["value"] for v in values], yerr=spans, marker="o", capsize=3)
        ax.set(title=title, ylabel="seconds a step", xlim=(0, None), ylim=(0, None), xticks=x)
    bars = found["references"]
    axes[2].barh([n.replace(" (", "\n(") for n in bars], [v["value"] for v in bars.values()], color="tab:blue")
    axes[2].set(title="reference model", xlabel="seconds a step")
    save(figure, path)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output_dir", type=Path, default=Path("outputs/scaling"))
    parser.add_argument("--repeats", type=int, default=3)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        make_models(folder)
        found: dict = {"loading": loading(folder)}
        stepper, batch = Ours(folder, 200), make_batch(16)
        found |= {"attack_steps": {}, "images": {}, "references": {}}
        for steps in ATTACK_STEPS:
            stepper.trainer.attack = TrainingAttack(THREAT, steps)
            found["attack_steps"][steps] = timed(stepper, batch, args.repeats)
        stepper.trainer.attack = TrainingAttack(THREAT, 2)
        for images in IMAGES:
            found["images"][images] = timed(stepper, make_batch(images), args.repeats)
        for label, name in REFERENCES.items():
            del stepper
            stepper = Ours(folder, 200, objective=name)
            found["references"][label] = timed(stepper, batch, args.repeats)
    found |= {"machine": hardware(), "threads": torch.get_num_threads(), "cores": os.cpu_count()}
    file = write_json(args.output_dir / "scaling.json", found | {"versions": versions()})
    found = read_json(file)  # whose keys are text
    plot(found, args.output_dir / "scaling.svg")
    tables = f"{table(found)}\n\n{loading_table(found)}\n"
    write_text(args.output_dir / "scaling.md", tables)
    print(tables)


if __name__ == "__main__":
    main()
