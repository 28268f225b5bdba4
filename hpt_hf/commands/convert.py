"""`recipes/convert.py`: any CLIP checkpoint, in any form that others can open; what cannot be shown to be the same is not written."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from huggingface_hub import snapshot_download

from hpt_hf.commands.common import load_model
from hpt_hf.commands.parser import RecipeError, exit_on_user_error, parse
from hpt_hf.models.zero_shot import ZeroShotClassifier
from hpt_hf.publishing.convert_checkpoint import read_checkpoint, write_open_clip
from hpt_hf.publishing.export import DTYPES, SEAL, export
from hpt_hf.publishing.model_card import CONVERTED, MIXED, TRAINED, read_record
from hpt_hf.publishing.vision_tower import export_tower
from hpt_hf.utils import progress


@dataclass
class ConvertArguments:
    """What `recipes/convert.py` reads and writes."""

    model: str = field(metadata={"help": "folder or Hub id; with --base also a file of weights, in others' names"})
    output_dir: str = field(metadata={"help": "the folder to write"})
    to: Literal["transformers", "open_clip", "vision_tower"] = "transformers"
    base: str | None = field(
        default=None,
        metadata={
            "help": "the CLIP whose text tower, processor and tokenizer are taken where the checkpoint has none"
        },
    )
    model_revision: str | None = None
    dtype: Literal["float32", "bfloat16", "float16"] = field(
        default="float32", metadata={"help": "of the stored weights"}
    )
    max_shard_size: str = field(default="5GB", metadata={"help": "larger weights are split into several files"})
    image_size: int | None = field(
        default=None, metadata={"help": "vision_tower: in pixels, as 336; left out: its own"}
    )
    license: str | None = field(
        default=None, metadata={"help": "of the weights, for the model card: mit, apache-2.0 …"}
    )


def run(args: ConvertArguments) -> str:
    """Read, write, check; returns what was compared, in words."""
    if args.image_size is not None and args.to != "vision_tower":
        raise RecipeError(
            f"--image_size is for --to vision_tower, this is --to {args.to}: a CLIP keeps the size it was trained at"
        )
    for what, path in (("the checkpoint itself", args.model), ("the base", args.base)):
        if path and Path(args.output_dir).exists() and Path(args.output_dir).resolve() == Path(path).resolve():
            raise RecipeError(f"--output_dir {args.output_dir} is {what}: name another folder")
    if args.base is None and Path(args.model).is_file():
        raise RecipeError(
            f"{args.model} is a file of weights: say with --base which CLIP has its text tower, processor and tokenizer"
        )
    model, records = read(args)
    if args.to == "vision_tower":
        count = export_tower(model, args.output_dir, image_size=args.image_size, dtype=DTYPES[args.dtype])
        return f"{count} tensors of hidden states compared"
    if args.to == "open_clip":
        if args.dtype != "float32":
            raise RecipeError("--to open_clip writes float32: open_clip casts on loading (precision=...)")
        return f"{write_open_clip(model, args.output_dir)} tensors written and read back"
    folder = export(model, args.output_dir, records=records, dtype=args.dtype, max_shard_size=args.max_shard_size)
    return f"logits as the pipeline's within {json.loads((folder / SEAL).read_text())['difference']:.1g}"


def read(args: ConvertArguments) -> tuple[ZeroShotClassifier, dict[str, dict]]:
    """The model, and the records of how it was made."""
    if args.base is None:
        model, folder = load_model(args.model, args.model_revision), Path(args.model)
        names = [n for n in (TRAINED, CONVERTED, MIXED) if (folder / n).is_file()]
        records = {n: read_record(folder, n) for n in names}
        if not records:
            records[CONVERTED] = {"source": args.model, "base": None, "license": None}
        if args.license and TRAINED in records:
            records[TRAINED].setdefault("recipe", {})["license"] = args.license
        elif args.license:
            records[CONVERTED]["license"] = args.license
        return model, records
    source = Path(args.model)
    if not source.exists():
        if args.model.count("/") != 1 or args.model.startswith((".", "/", "~")):
            raise RecipeError(
                f"no checkpoint at {args.model}: neither a file nor a folder, and not a Hub id of the form owner/name"
            )
        patterns = ["*.json", "*.safetensors", "*.bin", "*.pt", "*.pth", "*.tar", "*.ckpt"]
        source = Path(snapshot_download(args.model, revision=args.model_revision, allow_patterns=patterns))
    base = load_model(args.base)
    model, reading = read_checkpoint(source, base)
    progress(str(reading))
    record = {
        "source": args.model,
        "base": str(Path(args.base).absolute())
        if Path(args.base).exists()
        else args.base,  # a folder can be called as a repository is
        "license": args.license,
        "form": reading.form,
        "read": reading.read,
    }
    return model, {CONVERTED: record | {"from_base": len(reading.from_base), "notes": reading.notes}}


def main(argv: list[str] | None = None) -> None:
    with exit_on_user_error("recipes/convert.py"):
        (args,) = parse((ConvertArguments,), argv, positional=("model", "output_dir"))
        compared = run(args)
    print(f"{args.model} -> {args.output_dir} ({args.to}; {compared})")
