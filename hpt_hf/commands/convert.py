"""`hpt-hf convert`: any CLIP checkpoint in any form that others can open, shown to be the same or not written."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from huggingface_hub import snapshot_download

from hpt_hf.commands.common import load_model
from hpt_hf.commands.parser import HfArg, RecipeError, exit_on_user_error, parse
from hpt_hf.models.zero_shot import ZeroShotClassifier
from hpt_hf.publishing.convert_checkpoint import read_checkpoint, write_open_clip
from hpt_hf.publishing.export import DTYPES, SEAL, check_apart, export
from hpt_hf.publishing.model_card import CONVERTED, MIXED, TRAINED, read_record
from hpt_hf.publishing.vision_tower import export_tower
from hpt_hf.utils import progress, read_json


@dataclass
class ConvertArguments:
    model: str = HfArg(help="folder or Hub id; with --base also a file of weights, in others' names")
    output_dir: str = HfArg(help="the folder to write")
    to: Literal["transformers", "open_clip", "vision_tower"] = "transformers"
    base: str | None = HfArg(default=None, help="the CLIP that gives what the checkpoint lacks")
    model_revision: str | None = None
    dtype: Literal["float32", "bfloat16", "float16"] = HfArg(default="float32", help="of stored weights")
    max_shard_size: str = HfArg(default="5GB", help="larger weights are split into several files")
    image_size: int | None = HfArg(default=None, help="vision_tower: pixels, as 336; default: its own")
    license: str | None = HfArg(default=None, help="for the model card: mit, apache-2.0 …")


def run(args: ConvertArguments) -> str:
    """Read, write, check; returns what was compared, in words."""
    source, output = Path(args.model), Path(args.output_dir)
    if args.image_size is not None and args.to != "vision_tower":
        raise RecipeError(f"--image_size is for --to vision_tower, this is --to {args.to}")
    if args.dtype != "float32" and args.to == "open_clip":
        raise RecipeError("--to open_clip writes float32: open_clip casts on loading (precision=...)")
    check_apart(output, model=source, base=args.base)
    if args.base is None and source.is_file():
        raise RecipeError(f"{source} is a file of weights: name the CLIP that gives all else with --base")
    classifier, records = _complete(args) if args.base is None else _with_base(args)
    kind = classifier.config.model_type
    if args.to != "transformers" and kind not in ("clip", "open_clip") or args.to == "vision_tower" and kind != "clip":
        raise RecipeError(f"--to {args.to}: got a model of the family {kind!r}, expected 'clip'")
    if args.to == "transformers" and kind == "open_clip":
        fix = "Fix: --base, a CLIPModel of the same architecture, if it is a ViT with CLIP's text tower; or --to open_clip"
        raise RecipeError(f"--to transformers: no class of transformers is known to hold {args.model}. {fix}")
    if kind == "open_clip":
        export(classifier, output, records=records)
        return "weights and answers read back"
    if args.to == "vision_tower":
        count = export_tower(classifier, output, image_size=args.image_size, dtype=DTYPES[args.dtype], records=records)
        return f"{count} hidden states compared"
    if args.to == "open_clip":
        return f"{write_open_clip(classifier, output, records)} tensors written and read back"
    folder = export(classifier, output, records=records, dtype=args.dtype, max_shard_size=args.max_shard_size)
    return f"logits as the pipeline's within {read_json(folder / SEAL)['difference']:.1g}"


def _complete(args: ConvertArguments) -> tuple[ZeroShotClassifier, dict[str, dict]]:
    records = {name: record for name in (TRAINED, CONVERTED, MIXED) if (record := read_record(args.model, name))}
    as_it_is = {"source": args.model, "base": None, "license": None}
    records = records or {CONVERTED: as_it_is}
    if args.license and TRAINED in records:
        records[TRAINED].setdefault("recipe", {})["license"] = args.license
    elif args.license:
        records.setdefault(CONVERTED, as_it_is)["license"] = args.license
    return load_model(args.model, args.model_revision), records


def _with_base(args: ConvertArguments) -> tuple[ZeroShotClassifier, dict[str, dict]]:
    source, is_folder = Path(args.model), Path(args.base).exists()  # a folder can be called as a repository is
    if not source.exists():
        if args.model.count("/") != 1 or args.model.startswith((".", "/", "~")):
            raise RecipeError(f"no checkpoint at {source}: neither a file, a folder, nor owner/name on the Hub")
        patterns = ["*.json", "*.safetensors", "*.bin", "*.pt", "*.pth", "*.tar", "*.ckpt"]
        source = Path(snapshot_download(args.model, revision=args.model_revision, allow_patterns=patterns))
    classifier, reading = read_checkpoint(source, load_model(args.base))
    progress(str(reading))
    record = {"source": args.model, "base": str(Path(args.base).absolute()) if is_folder else args.base}
    record |= {"license": args.license, "form": reading.form, "read": reading.read}
    return classifier, {CONVERTED: record | {"from_base": len(reading.from_base), "notes": reading.notes}}


def main(argv: list[str] | None = None) -> None:
    with exit_on_user_error("hpt-hf convert"):
        (args,) = parse((ConvertArguments,), argv, positional=("model", "output_dir"))
        compared = run(args)
    print(f"{args.model} -> {args.output_dir} ({args.to}; {compared})")
