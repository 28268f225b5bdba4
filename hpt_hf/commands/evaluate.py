"""`hpt-hf evaluate`: clean and robust accuracy of models on labelled images: results with verdicts, a table, a page."""

from __future__ import annotations

import itertools
import time
from dataclasses import dataclass
from pathlib import Path

from hpt_hf.attacks.suite import EvaluationAttack
from hpt_hf.commands.common import ImageArguments, ball, load_model, on_device, open_sets
from hpt_hf.commands.parser import HfArg, RecipeError, exit_on_user_error, parse
from hpt_hf.evaluation.evaluator import evaluate
from hpt_hf.evaluation.forecast import forecast
from hpt_hf.evaluation.html_report import write_html_report
from hpt_hf.evaluation.result import EvalResult, read_results_of
from hpt_hf.models.fast_layers import keep_memory
from hpt_hf.publishing.model_card import TRAINED, read_record
from hpt_hf.utils import duration, processes, progress, shutdown_distributed, write_json


@dataclass
class EvaluateArguments(ImageArguments):
    output_dir: str = HfArg(default="outputs/evaluation", help="for results/*.json and report.html")
    model: list[str] = HfArg(default_factory=list, help="folders or Hub ids; several are compared, image by image")
    model_revision: str | None = None
    attack: list[str] = HfArg(
        default_factory=lambda: ["pgd"],
        help="pgd, cw, apgd-ce, apgd-t, square; standard: worst of the last three; my_file.py:my_attack",
    )
    attack_steps: int | None = HfArg(
        default=None, help="default: PGD and CW 20, APGD 100, Square 5000 (500 in standard)"
    )
    eps: list[str] = HfArg(default_factory=lambda: ["1/255"], help="radii; several draw a curve")
    target: str | None = HfArg(default=None, help="the class every image shall be taken for; default: any wrong one")
    probe: int = HfArg(default=24, help="images that the sanity checks look at; 0: no checks")
    save_images: bool = HfArg(default=False, help="keep all adversarial images in output_dir/images, as parquet")
    estimate: bool = HfArg(default=False, help="only say how long it would take")
    baseline: str | None = HfArg(
        default=None, help="an undefended model, to be broken; default: what the model was trained from"
    )


def run(args: EvaluateArguments) -> list[EvalResult]:
    """Evaluate, writing each result as soon as it stands, then the report of all results in the folder."""
    if not args.model:
        raise RecipeError("nothing to evaluate. Fix: --model FOLDER or --model owner/name.")
    if args.model_revision and len(args.model) > 1:
        raise RecipeError(f"--model_revision: got it for {len(args.model)} models, expected one. Fix: one at a time")
    if args.probe < 0:
        raise RecipeError(f"--probe: got {args.probe}, expected at least 0 images")
    # What fails after the first attack would cost its hours: an old result, a target that the last set lacks.
    read_results_of(args.output_dir)
    attacks = [
        EvaluationAttack(ball(args.norm, eps), name, args.attack_steps, args.protocol, args.seed, args.target)
        for name in dict.fromkeys(args.attack)
        for eps in dict.fromkeys(args.eps)
    ]
    models = {name: on_device(load_model(name, args.model_revision)) for name in args.model}
    sources = {name: args.baseline or trained_from(name) for name in models}
    baselines = {source: on_device(load_model(source)) for source in {*sources.values()} - {None}}
    sets = open_sets(args)
    for images in sets:
        images.without_class(args.target)
    asked = list(itertools.product(models, attacks, sets))
    sizes = {"limit": args.limit, "probe": args.probe, "batch_size": args.batch_size}
    ahead = [forecast(models[name], images, attack, **sizes) for name, attack, images in asked]
    whole = f"{len(asked)} evaluations" if len(asked) > 1 else f"{sets[0].name}, {attacks[0]}"
    progress(f"{whole}: about {duration(sum(ahead))}")
    if args.estimate:
        return []
    settings = {name: getattr(args, name) for name in ("batch_size", "limit", "probe", "save_images")}
    results: list[EvalResult] = []
    start = time.time()
    for name, attack, images in asked:
        of_model = {"name": name, "revision": models[name].revision, "baseline": baselines.get(sources[name])}
        result = evaluate(models[name], images, attack, folder=args.output_dir, **of_model, **settings)
        results.append(result)
        if processes().is_main_process:
            write_json(Path(args.output_dir) / "results" / result.file_name, result.to_json())
            doubts = ": " + ", ".join(check["name"] for check in result.raised) if result.raised else ""
            low, high = result.interval
            of = f"{name}, {result.dataset}" if len(models) > 1 else result.dataset
            found = f"clean {result.clean:.1f}%, robust {result.robust:.1f}% ({low:.1f}–{high:.1f})"
            progress(f"{of}: {found} under {attack} at {attack.threat}, n = {result.n}, {result.verdict}{doubts}")
            if left := len(asked) - len(results):
                pace = (time.time() - start) / sum(ahead[: len(results)])
                progress(f"{len(results)} of {len(asked)} done, about {duration(pace * sum(ahead[-left:]))} to go")
    if processes().is_main_process:
        write_html_report(args.output_dir)
    processes().wait_for_everyone()
    return results


def trained_from(model: str) -> str | None:
    """What a model was fine-tuned from, if its record says so and it can be found: its natural baseline."""
    source = read_record(Path(model), TRAINED).get("recipe", {}).get("model") or ""
    return source if source.startswith("lab:") or (source and Path(source).is_dir()) else None


def main(argv: list[str] | None = None) -> None:
    with exit_on_user_error("hpt-hf evaluate"):
        (args,) = parse((EvaluateArguments,), argv)
        keep_memory()
        run(args)
    if processes().is_main_process and not args.estimate:
        print((Path(args.output_dir) / "report.md").read_text(encoding="utf-8"))
    shutdown_distributed()
