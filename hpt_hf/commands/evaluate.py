"""`recipes/evaluate.py`: clean and robust accuracy of any CLIP on any labelled pictures, as Scores with verdicts, a table and a page."""

from __future__ import annotations

import itertools
from dataclasses import dataclass, field
from pathlib import Path

from hpt_hf.attacks.suite import EvaluationAttack
from hpt_hf.attacks.threat_model import ThreatModel
from hpt_hf.commands.common import ImageArguments, load_model, on_device, open_sets
from hpt_hf.commands.parser import RecipeError, exit_on_user_error, parse
from hpt_hf.evaluation.evaluator import evaluate
from hpt_hf.evaluation.html_report import write_html_report
from hpt_hf.evaluation.result import EvalResult, read_results
from hpt_hf.models.fast_layers import keep_memory
from hpt_hf.publishing.model_card import TRAINED, read_record
from hpt_hf.utils import processes, progress, shutdown_distributed, write_json


@dataclass
class EvaluateArguments(ImageArguments):
    """What `recipes/evaluate.py` measures."""

    model: str = field(default="", metadata={"help": "folder or Hub id"})
    model_revision: str | None = None
    attack: list[str] = field(
        default_factory=lambda: ["pgd"],
        metadata={"help": "pgd, cw, apgd-ce, apgd-t, square, or standard: the last three, worst case"},
    )
    attack_steps: int | None = field(
        default=None,
        metadata={"help": "of every attack; left out: PGD and CW 20, APGD 100, Square 5000, in standard 500"},
    )
    eps: list[str] = field(default_factory=lambda: ["1/255"], metadata={"help": "radii; several draw a curve"})
    target: str | None = field(
        default=None, metadata={"help": "the class every picture shall be taken for; left out: any wrong one"}
    )
    probe: int = field(default=24, metadata={"help": "pictures that the checks look at; 0: no checks"})
    baseline: str | None = field(
        default=None,
        metadata={
            "help": "an undefended model the attack must break; left out: what the model was trained from, if known"
        },
    )


def run(args: EvaluateArguments) -> list[EvalResult]:
    """Evaluate, writing each EvalResult as soon as it stands; then report.md and report.html of all Scores in the folder."""
    if not args.model:
        raise RecipeError("say what to evaluate: --model FOLDER or --model owner/name")
    if args.probe < 0:
        raise RecipeError(f"--probe {args.probe}: expected at least 0 pictures")
    read_results(Path(args.output_dir) / "scores")  # what the report cannot read should not cost the hours before it
    attacks = [
        EvaluationAttack(ThreatModel(args.norm, eps), name, args.attack_steps, args.protocol, args.seed, args.target)
        for name in dict.fromkeys(args.attack)
        for eps in dict.fromkeys(args.eps)
    ]
    model = on_device(load_model(args.model, args.model_revision))
    source = args.baseline or trained_from(args.model)
    baseline = on_device(load_model(source)) if source else None
    sets = open_sets(args)
    for pictures in sets:
        pictures.without_class(args.target)  # a target that the last one lacks should not cost the hours of the others
    scores: list[EvalResult] = []
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
            folder=args.output_dir,
        )
        scores.append(score)
        if processes().is_main_process:
            write_json(Path(args.output_dir) / "scores" / score.file_name, score.to_json())
            doubts = f": {', '.join(s['name'] for s in score.suspicions)}" if score.suspicions else ""
            progress(
                f"{score.dataset}: clean {score.clean:.1f}%, robust {score.robust:.1f}% ({score.interval[0]:.1f}–{score.interval[1]:.1f}) "
                f"under {attack} at {attack.threat}, n = {score.n}, {score.verdict}{doubts}"
            )
    if processes().is_main_process:
        write_html_report(args.output_dir)
    processes().wait_for_everyone()
    return scores


def trained_from(model: str) -> str | None:
    """What a model of ours was fine-tuned from, if its record says so and it can be found: the natural undefended baseline."""
    record = Path(model) / "train.json"
    if not record.is_file():
        return None
    source = read_record(model, TRAINED).get("recipe", {}).get("model", "")
    return source if source.startswith("lab:") or (source and Path(source).is_dir()) else None


def main(argv: list[str] | None = None) -> None:
    with exit_on_user_error("hpt-hf evaluate"):
        (args,) = parse((EvaluateArguments,), argv)
        keep_memory()
        run(args)
    if processes().is_main_process:
        print((Path(args.output_dir) / "report.md").read_text(encoding="utf-8"))
    shutdown_distributed()
