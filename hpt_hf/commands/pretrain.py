"""`hpt-hf pretrain`: make the lab's small vanilla CLIPs."""

from __future__ import annotations

import shutil
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from transformers import AutoModel, CLIPTokenizer

from hpt_hf.commands.parser import HfArg, RecipeError, exit_on_user_error, parse
from hpt_hf.lab.datasets import captioned_rows
from hpt_hf.lab.glyphs import GlyphWorld
from hpt_hf.lab.photographs import captioned_photographs
from hpt_hf.lab.pretrain import (
    ARCHITECTURES,
    PHOTOGRAPH_ARCHITECTURES,
    Batches,
    last_checkpoint,
    new_clip,
    new_processor,
    photograph_batches,
    pretrain,
    pretraining_arguments,
    row_batches,
    train_tokenizer,
    world_batches,
)
from hpt_hf.utils import read_json, write_json, written_whole


@dataclass
class PretrainArguments:
    """Which model, on what, how long."""

    architecture: Literal["student", "proxy", "convolution"]
    output_dir: str = HfArg(help="folder for the model, its processor and pretrain.json")
    world: Literal["glyphs", "real", "photographs"] = HfArg(
        default="glyphs", help="glyphs are drawn; the others lie in --data_dir (docs/lab.md)"
    )
    data_dir: str | None = HfArg(default=None, help="the folder of the world's parquet files")
    start: str | None = HfArg(default=None, help="go on from this folder instead of random weights")
    max_steps: int = 8000
    save_steps: int = HfArg(default=500, help="a killed run, given again, goes on from the last of these")
    context: int | None = HfArg(default=None, help="tokens the text tower reads; left out: as captions need")
    vocab_size: int = 640
    batch_size: int = 256
    learning_rate: float = 1e-3
    seed: int = 0
    jitter: float = HfArg(default=1.0, help="of the world `real`: how far images are redrawn, 0 to 1")
    bf16: bool = False
    threads: int = HfArg(default=0, help="0: torch's own choice")


def _batches(args: PretrainArguments) -> tuple[Batches, list[str]]:
    """The batches of a world, and its captions."""
    if args.world == "glyphs":
        world = GlyphWorld(args.seed)
        return world_batches(world, args.batch_size), [world[i].caption for i in range(20_000)]
    if args.data_dir is None:
        raise RecipeError(f"--world {args.world}: got no --data_dir, expected the folder of its parquet files")
    if args.world == "real":
        rows = captioned_rows(args.data_dir)
        batches = row_batches(rows, args.batch_size, seed=args.seed, jitter=args.jitter)
    else:
        rows = captioned_photographs(args.data_dir)
        batches = photograph_batches(rows, args.batch_size, seed=args.seed)
    return batches, [c for _, captions in rows for c in captions]


def run(args: PretrainArguments) -> None:
    if args.threads:
        torch.set_num_threads(args.threads)
    torch.manual_seed(args.seed)
    batches, captions = _batches(args)
    photographs = args.world == "photographs"
    size = {"image_size": 48} if photographs else {}
    checkpoints = args.output_dir.rstrip("/") + ".checkpoints"
    start_from = last_checkpoint(checkpoints) or args.start  # a tokenizer is not the same twice
    if start_from is None:
        tokenizer = train_tokenizer(captions, vocab_size=args.vocab_size, max_length=args.context)
        towers = (PHOTOGRAPH_ARCHITECTURES if photographs else ARCHITECTURES)[args.architecture]
        model = new_clip(tokenizer, **towers, **size, **({"projection_dim": 128} if photographs else {}))
    else:
        model, tokenizer = AutoModel.from_pretrained(start_from), CLIPTokenizer.from_pretrained(start_from)
    processor, start = new_processor(tokenizer, **size), time.time()
    options = {k: getattr(args, k) for k in ("max_steps", "save_steps", "learning_rate", "seed", "bf16")}
    log = pretrain(model, processor, batches, pretraining_arguments(checkpoints, **options))
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
    shutil.rmtree(checkpoints, ignore_errors=True)


def main(argv: list[str] | None = None) -> None:
    with exit_on_user_error("hpt-hf pretrain"):
        (args,) = parse((PretrainArguments,), argv)
        run(args)
