"""`hpt-hf pretrain`: make the lab's small vanilla CLIPs."""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import torch
from transformers import AutoModel, CLIPTokenizer

from hpt_hf.commands.parser import exit_on_user_error, parse
from hpt_hf.lab.datasets import captioned_rows
from hpt_hf.lab.glyphs import GlyphWorld
from hpt_hf.lab.pretrain import (
    ARCHITECTURES,
    new_clip,
    new_processor,
    pretrain,
    row_batches,
    train_tokenizer,
    world_batches,
)
from hpt_hf.utils import read_json, write_json, written_whole


@dataclass
class PretrainArguments:
    """Which model, on what, how long."""

    architecture: Literal["student", "proxy", "convolution"]
    output_dir: str = field(metadata={"help": "folder for the model, its processor and pretrain.json"})
    data_dir: str | None = field(default=None, metadata={"help": "captioned parquet files; left out: the glyph world"})
    start: str | None = field(default=None, metadata={"help": "go on from this folder instead of random weights"})
    max_steps: int = 8000
    context: int | None = field(
        default=None, metadata={"help": "tokens the text tower reads; left out: as captions need"}
    )
    vocab_size: int = 640
    batch_size: int = 256
    learning_rate: float = 1e-3
    seed: int = 0
    jitter: float = field(default=1.0, metadata={"help": "with --data_dir: how far images are redrawn, 0 to 1"})
    bf16: bool = False
    threads: int = field(default=0, metadata={"help": "0: torch's own choice"})


def run(args: PretrainArguments) -> None:
    if args.threads:
        torch.set_num_threads(args.threads)
    torch.manual_seed(args.seed)
    if args.data_dir is None:
        world = GlyphWorld(args.seed)
        batches = world_batches(world, args.batch_size)
        captions = [world[i].caption for i in range(20_000)]
    else:
        rows = captioned_rows(args.data_dir)
        batches = row_batches(rows, args.batch_size, seed=args.seed, jitter=args.jitter)
        captions = [c for _, cs in rows for c in cs]
    if args.start is None:
        tokenizer = train_tokenizer(captions, vocab_size=args.vocab_size, max_length=args.context)
        model = new_clip(tokenizer, **ARCHITECTURES[args.architecture])
    else:
        model, tokenizer = AutoModel.from_pretrained(args.start), CLIPTokenizer.from_pretrained(args.start)
    processor, start = new_processor(tokenizer), time.time()
    options = {"steps": args.max_steps, "learning_rate": args.learning_rate, "seed": args.seed, "bf16": args.bf16}
    log = pretrain(model, processor, batches, **options)
    record = {
        "start": args.start and read_json(Path(args.start) / "pretrain.json"),
        "arguments": vars(args),
        "parameters": sum(p.numel() for p in model.parameters()),
        "seconds": round(time.time() - start),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "log": log[:: max(1, len(log) // 40)] + log[-1:],
    }
    with written_whole(args.output_dir, last="pretrain.json") as stage:
        model.save_pretrained(stage)
        processor.save_pretrained(stage)
        write_json(stage / "pretrain.json", record)


def main(argv: list[str] | None = None) -> None:
    with exit_on_user_error("hpt-hf pretrain"):
        (args,) = parse((PretrainArguments,), argv)
        run(args)
