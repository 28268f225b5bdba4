"""What LoRA adapters of a ViT-B/32 at 224 px save: time and memory of a step beside full fine-tuning, in one run.

    python benchmarks/lora.py --output docs/results

Random weights and images: neither changes what a step costs. Each row is a process of its own, whose peak memory is read.
TeCoA and FARE, which holds an anchor: a copy of the model, or the model without its adapters.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from step import in_own_process
from transformers import CLIPConfig, CLIPModel, CLIPProcessor, CLIPTokenizer
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

from hpt_hf.attacks.pgd import TrainingAttack
from hpt_hf.attacks.threat_model import ThreatModel
from hpt_hf.data.collator import Collator
from hpt_hf.data.dataset import LabelledImages
from hpt_hf.lab.datasets import WEIGHTS
from hpt_hf.method.objectives import OBJECTIVES
from hpt_hf.method.schedule import Schedule
from hpt_hf.models.lora import add_lora
from hpt_hf.models.zero_shot import ZeroShotClassifier
from hpt_hf.training.config import HPTConfig
from hpt_hf.training.trainer import HPTTrainer
from hpt_hf.utils import hardware, markdown, peak_memory, versions, write_json

ROWS = [(method, rank) for method in ("tecoa", "fare") for rank in (0, 16)]
BATCH, STEPS, CLASSES = 16, 6, tuple(f"thing {i}" for i in range(20))


def measure(method: str, rank: int) -> dict:
    """Seconds of a step (the median) and peak memory of this process."""
    torch.manual_seed(0)
    tokenizer = CLIPTokenizer.from_pretrained(WEIGHTS / "student")
    tokenizer.model_max_length, config = 77, CLIPConfig()
    config.text_config.eos_token_id = tokenizer.eos_token_id
    processor = CLIPProcessor(CLIPImageProcessorPil(), tokenizer)
    student = ZeroShotClassifier(CLIPModel(config), processor).eval().set_classes(CLASSES)
    if rank:
        add_lora(student, rank)
    pixels = np.random.default_rng(0).integers(0, 256, (BATCH * STEPS, 224, 224, 3), np.uint8)
    labels = [i % len(CLASSES) for i in range(len(pixels))]
    images = LabelledImages.from_images([Image.fromarray(p) for p in pixels], labels, CLASSES, name="noise")
    with tempfile.TemporaryDirectory() as folder:
        quiet = {"disable_tqdm": True, "report_to": "none", "use_cpu": not torch.cuda.is_available()}
        sizes = {"per_device_train_batch_size": BATCH, "max_steps": STEPS, "learning_rate": 1e-6}
        trainer = HPTTrainer(
            student,
            HPTConfig(output_dir=folder, **sizes, **quiet),
            schedule=Schedule.single(OBJECTIVES[method]),
            attack=TrainingAttack(ThreatModel("linf", "1/255"), 2),
            train_dataset=images,
            data_collator=Collator(processor),
        )
        trainer.train()
        trained = sum(p.numel() for p in student.parameters() if p.requires_grad)
        memory = peak_memory(trainer.args.device)
    seconds = statistics.median(trainer.stopwatch.steps[0][1:])
    return {"method": method, "rank": rank, "seconds": seconds, "gigabytes": memory / 2**30, "trained": trained}


def table(found: dict) -> str:
    rows = []
    for r in found["rows"]:
        name = f"{r['method']}, LoRA {r['rank']}" if r["rank"] else f"{r['method']}, all weights"
        rows.append((name, f"{r['trained'] / 1e6:.1f}", f"{r['seconds']:.2f}", f"{r['gigabytes']:.2f}"))
    return markdown(("ViT-B/32, 224 px", "trained, millions", "seconds a step", "peak memory, GiB"), rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", default="outputs/lora")
    args = parser.parse_args()
    rows = [in_own_process(measure, *row) for row in ROWS]
    found = {"rows": rows, "batch": BATCH, "threads": torch.get_num_threads()}
    write_json(Path(args.output, "lora.json"), found | {"versions": versions(), "hardware": hardware()})
    print(table(found))


if __name__ == "__main__":
    main()
