"""`recipes/evaluate.py`: clean and robust accuracy of any CLIP on any labelled pictures, as Scores with verdicts, a table and a page."""

from __future__ import annotations

import itertools
import json
from pathlib import Path

from hpt_hf.arguments import EvaluateArguments, PictureArguments, RecipeError, mistakes_in_a_line, parse
from hpt_hf.data import DatasetSpec, LabelledPictures
from hpt_hf.evaluation import EvaluationAttack, evaluate, finish, processes
from hpt_hf.kernels import keep_memory
from hpt_hf.lab.suite import LAB_SUITE, lab_pictures, open_pictures, real_suite
from hpt_hf.page import write_page
from hpt_hf.report import progress, write_json
from hpt_hf.scores import Score, read_scores
from hpt_hf.sets import SETS, open_set
from hpt_hf.threat import ThreatModel
from hpt_hf.train import dataset_spec, load_clip
from hpt_hf.words import did_you_mean
from hpt_hf.zero_shot import ZeroShotCLIP


def run(args: EvaluateArguments) -> list[Score]:
    """Evaluate, writing each Score as soon as it stands; then report.md and report.html of all Scores in the folder."""
    if not args.model:
        raise RecipeError("say what to evaluate: --model FOLDER or --model owner/name")
    if args.probe < 0:
        raise RecipeError(f"--probe {args.probe}: expected at least 0 pictures")
    read_scores(Path(args.output) / "scores")  # what the report cannot read should not cost the hours before it
    attacks = [
        EvaluationAttack(ThreatModel(args.norm, eps), name, args.steps, args.protocol, args.seed, args.target)
        for name in dict.fromkeys(args.attacks)
        for eps in dict.fromkeys(args.eps)
    ]
    model = on_device(load_clip(args.model, args.model_revision))
    source = args.baseline or trained_from(args.model)
    baseline = on_device(load_clip(source)) if source else None
    sets = open_sets(args)
    for pictures in sets:
        pictures.without_class(args.target)  # a target that the last one lacks should not cost the hours of the others
    scores: list[Score] = []
    for attack, pictures in itertools.product(attacks, sets):
        score = evaluate(
            model,
            pictures,
            attack,
            name=args.model,
            revision=model.revision,
            batch_size=args.batch_size,
            limit=args.limit,
            probe=args.probe,
            baseline=baseline,
            folder=args.output,
        )
        scores.append(score)
        if processes().is_main_process:
            write_json(Path(args.output) / "scores" / score.file_name, score.to_json())
            doubts = f": {', '.join(s['name'] for s in score.suspicions)}" if score.suspicions else ""
            progress(
                f"{score.dataset}: clean {score.clean:.1f}%, robust {score.robust:.1f}% ({score.interval[0]:.1f}–{score.interval[1]:.1f}) "
                f"under {attack} at {attack.threat}, n = {score.n}, {score.verdict}{doubts}"
            )
    if processes().is_main_process:
        write_page(args.output)
    processes().wait_for_everyone()
    return scores


def on_device(model: ZeroShotCLIP) -> ZeroShotCLIP:
    """The model where this process computes, with the attention that is fastest there: on CPU and for short sequences the plain one, by a tenth."""
    device = processes().device
    model.set_attn_implementation("eager" if device.type == "cpu" else "sdpa")
    return model.to(device)


def trained_from(model: str) -> str | None:
    """What a model of ours was fine-tuned from, if its record says so and it can be found: the natural undefended baseline."""
    record = Path(model) / "train.json"
    if not record.is_file():
        return None
    source = json.loads(record.read_text(encoding="utf-8")).get("recipe", {}).get("model_name_or_path", "")
    return source if source.startswith("lab:") or (source and Path(source).is_dir()) else None


def open_sets(args: PictureArguments) -> list[LabelledPictures]:
    """What --data or --suite names. All sets are opened before the first is attacked: a mistake in the last should not cost the hours of the others."""
    if bool(args.data) == bool(args.suite):
        raise RecipeError("say what to evaluate on: --data PATH … or --suite lab, one of them")
    if args.limit is not None and args.limit < 1:
        raise RecipeError(f"--limit {args.limit}: expected at least 1 picture")
    if args.batch_size < 1:
        raise RecipeError(f"--batch_size {args.batch_size}: expected at least 1 picture")
    suites = {"lab": LAB_SUITE, "real": real_suite(), "zero-shot-17": tuple(SETS)}
    paths = args.data or suites[args.suite]
    if args.suite and args.protocol == "native":
        without = [p for p in paths if p in SETS and SETS[p].native is None]
        paths = [p for p in paths if p not in without]
        if without:
            progress(f"left out, since the protocol 'native' has no known source for it: {', '.join(without)}")
    # One process after the other: what the first puts into the cache the others find there.
    with processes().main_process_first():
        return [_open(args, path) for path in paths]


def _open(args: PictureArguments, path: str) -> LabelledPictures:
    named = path in SETS and not Path(path).exists()
    if named or path.startswith(("lab:", "real:")):
        given = [k for k in ("classes", "classes_file", "templates", "image_column", "label_column") if getattr(args, k)]
        if given:
            raise RecipeError(f"{path} comes with its own classes and prompts: leave out {', '.join('--' + g for g in given)}")
    if named:
        return open_set(path, args.protocol, on_corrupt=args.on_corrupt)
    if not Path(path).exists() and "/" not in path and ":" not in path:
        known = (*SETS, *LAB_SUITE, *real_suite())
        raise RecipeError(
            f"no data at {path}: no file or folder, and no set of that name"
            + did_you_mean(path, known, f"there are {', '.join(SETS)}, and lab:<task>, real:<set>")
        )
    spec = dataset_spec(args, path, args.split)
    return open_pictures(spec, training=False, limit=args.limit, data_dir=args.data_dir, on_corrupt=args.on_corrupt)


def reopen(source: dict, *, data_dir: str | None = None, on_corrupt: str = "error") -> LabelledPictures:
    """The pictures of a Score again, from its `source`; what does not lie there any more is looked for by its name in `data_dir`.

    Raises:
        ValueError, OSError: they are not there any more.
    """
    source = {k: v for k, v in source.items() if k != "limit"}
    if "set" in source:
        return open_set(source["set"], source["protocol"], revision=source["revision"], on_corrupt=on_corrupt)
    if "path" not in source:
        raise ValueError(f"the Score does not say where its pictures came from ({source or 'no source'})")
    path, folder = source["path"], data_dir or source.get("data_dir")
    if path.startswith("lab:"):
        return lab_pictures(path[4:], source["count"], faces=source["faces"], seed=source["seed"])
    if path.startswith("real:"):
        return open_pictures(DatasetSpec(path), training=source.get("split") == "train", data_dir=folder)
    if data_dir and not Path(path).exists() and (moved := Path(data_dir) / Path(path).name).exists():
        source["path"] = str(moved)
    return open_pictures(DatasetSpec(**source), training=False, on_corrupt=on_corrupt)


def main(argv: list[str] | None = None) -> None:
    with mistakes_in_a_line("recipes/evaluate.py"):
        (args,) = parse((EvaluateArguments,), argv)
        keep_memory()
        run(args)
    if processes().is_main_process:
        print((Path(args.output) / "report.md").read_text(encoding="utf-8"))
    finish()
