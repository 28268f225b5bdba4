"""`hpt-hf pretrain`: make the lab's vanilla models."""

from __future__ import annotations

import argparse
import json
import sys
import time
from pathlib import Path

import torch
from transformers import CLIPModel, CLIPTokenizer

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


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m hpt_hf.lab.pretrain", description=__doc__.splitlines()[0])
    parser.add_argument("--architecture", choices=sorted(ARCHITECTURES), required=True)
    parser.add_argument(
        "--output", type=Path, required=True, help="folder for the model, its processor and pretrain.json"
    )
    parser.add_argument(
        "--data", type=Path, help="a folder of captioned parquet files (shared/data); without it, the glyph world"
    )
    parser.add_argument("--start", type=Path, help="go on from the model in this folder instead of random weights")
    parser.add_argument("--steps", type=int, default=8000)
    parser.add_argument(
        "--context", type=int, help="tokens the text tower reads; left out: as the longest caption needs, at most 77"
    )
    parser.add_argument("--vocab_size", type=int, default=640)
    parser.add_argument("--batch_size", type=int, default=256)
    parser.add_argument("--learning_rate", type=float, default=1e-3)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--jitter", type=float, default=1.0, help="with --data: how far the pictures are redrawn, 0 to 1"
    )
    parser.add_argument("--bf16", action="store_true")
    parser.add_argument("--threads", type=int, default=0, help="0: torch's own choice")
    args = parser.parse_args(argv)
    if args.threads:
        torch.set_num_threads(args.threads)
    torch.manual_seed(args.seed)
    if args.data is None:
        world = GlyphWorld(args.seed)
        batches = world_batches(world, args.batch_size)
        captions = [world[i].caption for i in range(20_000)]
    else:
        from hpt_hf.lab.datasets import captioned_rows

        rows = captioned_rows(args.data)
        batches = row_batches(rows, args.batch_size, seed=args.seed, jitter=args.jitter)
        captions = [c for _, cs in rows for c in cs]
    if args.start is None:
        tokenizer = train_tokenizer(captions, vocab_size=args.vocab_size, max_length=args.context)
        model = new_clip(tokenizer, **ARCHITECTURES[args.architecture])
    else:
        model, tokenizer = CLIPModel.from_pretrained(args.start), CLIPTokenizer.from_pretrained(args.start)
    processor = new_processor(tokenizer)
    start = time.time()
    log = pretrain(
        model, processor, batches, steps=args.steps, learning_rate=args.learning_rate, seed=args.seed, bf16=args.bf16
    )
    model.save_pretrained(args.output)
    processor.save_pretrained(args.output)
    record = {
        "start": None if args.start is None else json.loads((args.start / "pretrain.json").read_text()),
        "command": "python -m hpt_hf.lab.pretrain " + " ".join(argv if argv is not None else sys.argv[1:]),
        "parameters": sum(p.numel() for p in model.parameters()),
        "seconds": round(time.time() - start),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "log": log[:: max(1, len(log) // 40)] + log[-1:],
    }
    (args.output / "pretrain.json").write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    main()
