"""One training step against the plain step that most released code takes, on full-size CLIPs with random weights, in one run.

The plain step is written here as the field writes it (six of nine peers): every forward runs the text tower for all class prompts, padded to 77
tokens; the attack calls `backward()`, which also computes the gradients of all weights; float32. Both steps get the same images, weights, noise and
attack, and must reach the same adversarial images and loss. FLOPs are counted by torch, of both; the machine's peak is that of torch's float32 matrix
product, `a @ b`, and, beside it, of oneDNN's, which our step uses and which is the faster one on some processors.

    python benchmarks/step.py --output_dir outputs/bench
"""

from __future__ import annotations

import argparse
import functools
import json
import multiprocessing
import statistics
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import torch
import torch.nn.functional as F
from matplotlib.figure import Figure
from torch.utils.flop_counter import FlopCounterMode
from transformers import CLIPModel

from hpt_hf.attacks.noise import Noise
from hpt_hf.attacks.pgd import TrainingAttack
from hpt_hf.attacks.threat_model import ThreatModel
from hpt_hf.commands.compare import save
from hpt_hf.data.collator import Collator
from hpt_hf.lab.pretrain import new_clip, new_processor, train_tokenizer
from hpt_hf.method.objectives import OBJECTIVES
from hpt_hf.method.schedule import Schedule
from hpt_hf.models.fast_layers import product
from hpt_hf.models.zero_shot import TEMPLATE, ZeroShotClassifier
from hpt_hf.training.config import HPTConfig
from hpt_hf.training.trainer import HPTTrainer
from hpt_hf.utils import hardware, markdown, peak_memory, progress, read_json, versions, write_json, write_text

THREAT, STEPS, SEED, CONTEXT = ThreatModel("linf", "1/255"), 2, 0, 77
OPENAI = {"num_hidden_layers": 12, "hidden_act": "quick_gelu"}
TEXT = {**OPENAI, "hidden_size": 512, "intermediate_size": 2048, "num_attention_heads": 8}
VISION = {**OPENAI, "hidden_size": 768, "intermediate_size": 3072, "num_attention_heads": 12}


def names(count: int) -> list[str]:
    """Class names of the usual length."""
    letters = "abcdefghij"
    return [f"thing {letters[i % 10]} {letters[i // 10 % 10]} {letters[i // 100]}" for i in range(count)]


def make_models(folder: Path) -> None:
    """ViT-B/32 (student) and ViT-B/16 (proxy) at 224 px, of CLIP's own sizes, random weights."""
    words = [word for name in names(1000) for word in TEMPLATE.format(name).split()]
    tokenizer = train_tokenizer(words, vocab_size=600, max_length=CONTEXT)
    for name, patch, seed in (("student", 32, 1), ("proxy", 16, 2)):
        torch.manual_seed(seed)
        vision = {**VISION, "patch_size": patch}
        model = new_clip(tokenizer, vision=vision, text=TEXT, image_size=224, projection_dim=512)
        model.save_pretrained(folder / name)
        new_processor(tokenizer, 224).save_pretrained(folder / name)


def make_batch(size: int, classes: int = 10) -> dict[str, torch.Tensor]:
    images = torch.rand(size, 3, 224, 224, generator=torch.Generator().manual_seed(SEED))
    return {"images": images, "image_ids": torch.arange(size), "labels": torch.arange(size) % min(10, classes)}


class Ours:
    """The step as `HPTTrainer` takes it; with `bf16`, student and proxy of the loss in bfloat16, the attack in float32 as ever."""

    def __init__(self, folder: Path, classes: int, *, bf16: bool = False, objective: str = "hpt"):
        models = [ZeroShotClassifier.from_pretrained(folder / name) for name in ("student", "proxy")]
        student, proxy = (model.set_classes(names(classes)) for model in models)
        self.trainer = HPTTrainer(
            student,
            HPTConfig(output_dir=str(folder / "out"), use_cpu=True, bf16=bf16, seed=SEED, disable_tqdm=True),
            schedule=Schedule.single(OBJECTIVES[objective], steps=10, learning_rate=1e-5),
            attack=TrainingAttack(THREAT, STEPS),
            proxy=proxy,
            train_dataset=[{} for _ in range(64)],
            data_collator=Collator(student.processor),
        )
        self.trainer.create_optimizer_and_scheduler(10)
        self.trainer.current_gradient_accumulation_steps = 1  # what train() sets before its first step

    def __call__(self, batch: dict[str, torch.Tensor]) -> tuple[torch.Tensor, float]:
        trainer, kept = self.trainer, []
        attack = trainer.attack
        trainer.attack = lambda *a, **k: kept.append(attack(*a, **k)) or kept[0]
        try:
            loss = trainer.training_step(trainer.model, dict(batch))
        finally:
            trainer.attack = attack
        trainer.optimizer.step()
        trainer.optimizer.zero_grad()
        return kept[0], float(loss)


class Plain:
    """The step as the field writes it, on transformers' own classes."""

    def __init__(self, folder: Path, classes: int):
        models = [CLIPModel.from_pretrained(folder / name, dtype=torch.float32) for name in ("student", "proxy")]
        self.student, self.proxy = models
        processor = ZeroShotClassifier.from_pretrained(folder / "student").processor
        prompts = [TEMPLATE.format(n) for n in names(classes)]
        self.tokens = processor.tokenizer(prompts, padding="max_length", max_length=CONTEXT, return_tensors="pt")
        images = processor.image_processor
        self.mean, self.std = (torch.tensor(v).view(1, 3, 1, 1) for v in (images.image_mean, images.image_std))
        trained = [p for n, p in self.student.named_parameters() if n.startswith("vision")]
        self.optimizer = torch.optim.SGD(trained, lr=1e-5, momentum=0.9)

    def logits(self, model: CLIPModel, images: torch.Tensor) -> torch.Tensor:
        return model(**self.tokens, pixel_values=(images - self.mean) / self.std).logits_per_image

    def __call__(self, batch: dict[str, torch.Tensor]) -> tuple[torch.Tensor, float]:
        images, labels = batch["images"], batch["labels"]
        delta = (THREAT.random_start(images, Noise(batch["image_ids"], SEED, 0)) - images).requires_grad_(True)
        for _ in range(STEPS):
            F.cross_entropy(self.logits(self.student, images + delta), labels, reduction="sum").backward()
            moved = (delta.detach() + THREAT.radius * delta.grad.sign()).clamp(-THREAT.radius, THREAT.radius)
            delta = ((images + moved).clamp(0, 1) - images).requires_grad_(True)
            self.student.zero_grad()
        adversarial = (images + delta).detach()
        with torch.no_grad():
            teacher = self.logits(self.proxy, adversarial).log_softmax(1)
        answer = self.logits(self.student, adversarial).log_softmax(1)
        loss = F.kl_div(answer, teacher, reduction="batchmean", log_target=True)
        loss.backward()
        self.optimizer.step()
        self.optimizer.zero_grad()
        return adversarial, float(loss.detach())


STEPPERS = {"ours": Ours, "ours in bf16": functools.partial(Ours, bf16=True), "plain": Plain}


def _measure(kind: str, folder: Path, classes: int, batch: int, repeats: int, warm_up: int) -> dict:
    """Seconds of each step, peak memory of this process, what the first step made."""
    start = time.perf_counter()
    stepper = STEPPERS[kind](folder, classes)
    prepared = time.perf_counter() - start
    data = make_batch(batch)
    seconds, first = [], None
    for number in range(warm_up + repeats):
        start = time.perf_counter()
        made = stepper(data)
        if number >= warm_up:
            seconds.append(time.perf_counter() - start)
        first = first or made
    found = {"seconds": seconds, "prepared": prepared, "peak_gib": peak_memory(torch.device("cpu")) / 2**30}
    return found | {"adversarial": first[0].numpy(), "loss": first[1]}


def in_own_process(function, *args) -> dict:
    """What it returns, from a new process, so that its peak memory is its own."""
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
        return pool.submit(function, *args).result()


def measure(kind: str, folder: Path, *, classes: int, batch: int, repeats: int, warm_up: int = 2) -> dict:
    found = in_own_process(_measure, kind, folder, classes, batch, repeats, warm_up)
    seconds = ", ".join(f"{s:.1f}" for s in found["seconds"])
    progress(f"{kind}, batch {batch}, {classes} classes: {seconds} s, peak {found['peak_gib']:.1f} GiB")
    return found


def count_flops(kind: str, folder: Path, classes: int, batch: int) -> float:
    """Floating-point operations of one step, as torch counts them: two a multiply-add, of products, convolutions and attention."""
    stepper, data = STEPPERS[kind](folder, classes), make_batch(batch, classes)
    # The kernel that is fastest here is one that torch's counter does not know; the plain one does the same products.
    if kind == "ours":
        models = (stepper.trainer.model.model, stepper.trainer.proxy.model)
    else:
        models = (stepper.student, stepper.proxy)
    for model in models:
        model.set_attn_implementation("eager")
    with FlopCounterMode(display=False) as counter:
        stepper(data)
    return float(counter.get_total_flops())


def count_plain_flops(folder: Path, classes: int, batch: int) -> float:
    """Of a plain step, from four small ones: the count is a + b classes + c images + d classes images, exactly."""
    at = {(c, i): count_flops("plain", folder, c, i) for c in (2, 3) for i in (2, 3)}
    both = at[3, 3] - at[2, 3] - at[3, 2] + at[2, 2]
    per_class, per_image = at[3, 2] - at[2, 2], at[2, 3] - at[2, 2]
    more = (classes - 2, batch - 2)
    return at[2, 2] + more[0] * per_class + more[1] * per_image + more[0] * more[1] * both


def peak(multiply, size: int = 4096, repeats: int = 5) -> list[float]:
    """FLOP/s of a float32 matrix product, each repeat."""
    a, b = torch.rand(size, size), torch.rand(size, size)
    multiply(a, b)
    rates = []
    for _ in range(repeats):
        start = time.perf_counter()
        multiply(a, b)
        rates.append(2 * size**3 / (time.perf_counter() - start))
    return rates


def spread(values: list[float]) -> dict:
    return {"value": statistics.median(values), "low": min(values), "high": max(values)}


def ratio(top: list[float], bottom: list[float]) -> dict:
    """Of the medians; low and high are the extremes over all pairs."""
    value = statistics.median(top) / statistics.median(bottom)
    return {"value": value, "low": min(top) / max(bottom), "high": max(top) / min(bottom)}


def table(summary: dict) -> str:
    """What the summary says, in the figures that matter."""
    named = {
        "plain step / ours, 200 classes": summary["step_ratio_200"],
        "the same, ours in bf16 (attack in float32)": summary["bf16"]["step_ratio_200"],
        "ours, 1,000 classes / 10 classes": summary["class_growth_10_to_1000"],
        "plain step / ours, in floating-point operations": summary["flop_ratio_200"],
        "ours: share of torch's float32 matmul peak": summary["matmul_share"],
        "ours: share of oneDNN's float32 matmul peak": summary["onednn_share"],
        "peak memory, ours / plain, 200 classes": summary["memory_ratio_200"],
    }
    rows = [(n, *(f"{v.get(k, v['value']):.2f}" for k in ("value", "low", "high"))) for n, v in named.items()]
    return markdown(("figure", "value", "low", "high"), rows)


def plot(summary: dict, path: Path) -> None:
    """Seconds, memory, and seconds over the number of classes, of a summary read from its file; lines are the extremes."""
    seconds, memory, half = summary["seconds"], summary["peak_gib"], summary["bf16"]
    times = (seconds["plain_200"], seconds["ours"]["200"], half["seconds"])
    peaks = ([memory["plain_200"]], [memory["ours"]["200"]], [half["peak_gib"]])
    steps = ("plain", "ours", "ours, bf16")
    panels = {
        "seconds a step, 200 classes": dict(zip(steps, times, strict=True)),
        "peak memory, GiB, 200 classes": dict(zip(steps, peaks, strict=True)),
        "seconds of ours a step": {f"{int(c):,} classes": s for c, s in seconds["ours"].items()},
    }
    figure = Figure(figsize=(9, 2.4), layout="constrained")
    for axis, (title, bars) in zip(figure.subplots(1, 3), panels.items(), strict=True):
        for row, (name, values) in enumerate(bars.items()):
            axis.barh(-row, statistics.median(values), color="#7f7f7f" if name == "plain" else "#1f77b4")
            axis.plot([min(values), max(values)], [-row, -row], color="black", linewidth=1)
        axis.set_title(title, fontsize=9)
        axis.set_yticks([-row for row in range(len(bars))], bars)
    figure.suptitle(f"{summary['what']}, batch {summary['batch']}; {summary['machine']}", fontsize=8)
    save(figure, path)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output_dir", type=Path, default=Path("outputs/bench"))
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--repeats", type=int, default=3, help="steps of ours, taken twice; of the plain step one")
    parser.add_argument("--large", action="store_true", help="the ratio at batch 64, too (a quarter of an hour more)")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        make_models(folder)
        peaks = {"matmul": peak(torch.matmul), "onednn": peak(product)}
        # In turn, so that a machine that slows down in between favours nobody.
        runs: dict[int, list[dict]] = {c: [] for c in (10, 200, 1000)}
        for _ in range(2):
            for classes, done in runs.items():
                done.append(measure("ours", folder, classes=classes, batch=args.batch, repeats=args.repeats))
        ours = {c: {**done[0], "seconds": [s for r in done for s in r["seconds"]]} for c, done in runs.items()}
        half = measure("ours in bf16", folder, classes=200, batch=args.batch, repeats=args.repeats)
        plain = [measure("plain", folder, classes=200, batch=args.batch, repeats=1, warm_up=0) for _ in range(2)]
        peaks = {"matmul": peaks["matmul"] + peak(torch.matmul), "onednn": peaks["onednn"] + peak(product)}
        flops = count_flops("ours", folder, 200, args.batch)
        plain_flops = count_plain_flops(folder, 200, args.batch)
        large = None
        if args.large:
            large = {k: measure(k, folder, classes=200, batch=64, repeats=1, warm_up=0) for k in ("ours", "plain")}
    difference = abs(plain[0]["adversarial"] - ours[200]["adversarial"])
    plain_seconds = [s for p in plain for s in p["seconds"]]
    summary = {
        "what": "ViT-B/32 student, ViT-B/16 proxy, 224 px, random weights, PGD-2, float32",
        "batch": args.batch,
        "step_ratio_200": ratio(plain_seconds, ours[200]["seconds"]),
        "class_growth_10_to_1000": ratio(ours[1000]["seconds"], ours[10]["seconds"]),
        "matmul_share": spread([flops / s / statistics.median(peaks["matmul"]) for s in ours[200]["seconds"]]),
        "onednn_share": spread([flops / s / statistics.median(peaks["onednn"]) for s in ours[200]["seconds"]]),
        "memory_ratio_200": ratio([p["peak_gib"] for p in runs[200]], [p["peak_gib"] for p in plain]),
        "flop_ratio_200": {"value": plain_flops / flops},
        "matmul_peak_gflops": spread([p / 1e9 for p in peaks["matmul"]]),
        "onednn_peak_gflops": spread([p / 1e9 for p in peaks["onednn"]]),
        "tflop_of_a_step": {"ours": flops / 1e12, "plain": plain_flops / 1e12},
        "seconds": {"ours": {c: o["seconds"] for c, o in ours.items()}, "plain_200": plain_seconds},
        "seconds_of_embedding_classes": {c: o["prepared"] for c, o in ours.items()},
        "peak_gib": {"ours": {c: o["peak_gib"] for c, o in ours.items()}, "plain_200": plain[0]["peak_gib"]},
        "same": {
            "largest_pixel_difference": float(difference.max()),
            "share_of_pixels_that_differ": float((difference > 1e-6).mean()),
            "loss": [ours[200]["loss"], plain[0]["loss"]],
        },
        "bf16": {"step_ratio_200": ratio(plain_seconds, half["seconds"])}
        | {k: half[k] for k in ("seconds", "loss", "peak_gib")},
        "step_ratio_200_batch_64": large and ratio(large["plain"]["seconds"], large["ours"]["seconds"]),
        "machine": hardware(),
        "threads": torch.get_num_threads(),
        "versions": versions(),
    }
    file = write_json(args.output_dir / "summary.json", summary)
    write_text(args.output_dir / "table.md", table(summary))
    plot(read_json(file), args.output_dir / "step.svg")
    print(table(summary))
    print(json.dumps(summary["same"]))


if __name__ == "__main__":
    main()
