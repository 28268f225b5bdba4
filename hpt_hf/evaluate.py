"""`recipes/evaluate.py`: clean and robust accuracy of any CLIP on any labelled pictures, as Scores and a table."""

from __future__ import annotations

import itertools
import re
import sys
from pathlib import Path

from hpt_hf.arguments import EvaluateArguments, RecipeError, parse
from hpt_hf.evaluation import EvaluationAttack, Score, evaluate
from hpt_hf.lab.suite import LAB_SUITE, open_pictures, real_suite
from hpt_hf.report import score_table, write_json
from hpt_hf.threat import ThreatModel
from hpt_hf.train import dataset_spec, load_clip


def run(args: EvaluateArguments) -> list[Score]:
    """Evaluate, writing each Score as soon as it stands."""
    if bool(args.data) == bool(args.suite):
        raise RecipeError("say what to evaluate on: --data PATH … or --suite lab, one of them")
    if args.limit is not None and args.limit < 1:
        raise RecipeError(f"--limit {args.limit}: expected at least 1 picture")
    threat = ThreatModel(args.norm, args.eps)
    attacks = [EvaluationAttack(threat, name, args.steps, args.resolution, args.seed) for name in dict.fromkeys(args.attacks)]
    paths = args.data or {"lab": LAB_SUITE, "real": real_suite()}[args.suite]
    model = load_clip(args.model)
    # All sets are opened before the first is attacked: a mistake in the last one should not cost the hours of the others.
    sets = [
        open_pictures(
            dataset_spec(args, p, args.split),
            training=False,
            limit=args.limit,
            data_dir=args.data_dir,
            on_corrupt=args.on_corrupt,
        )
        for p in paths
    ]
    scores: list[Score] = []
    for attack, pictures in itertools.product(attacks, sets):
        score = evaluate(model, pictures, attack, name=args.model, batch_size=args.batch_size, limit=args.limit)
        scores.append(score)
        write_json(
            Path(args.output) / "scores" / f"{_slug(pictures.name)}-{attack}-{_slug(score.eps)}.json",
            score.to_json() | {"skipped": [r for _, r in pictures.skipped]},
        )
        print(
            f"{pictures.name}: clean {score.clean:.1f}%, robust {score.robust:.1f}% ({score.interval[0]:.1f}–{score.interval[1]:.1f}) "
            f"under {attack}, n = {score.n}",
            file=sys.stderr,
            flush=True,
        )
    head = f"# {args.model}\n\n{threat}, {args.resolution} resolution, 95% intervals (Wilson).\n\n"
    table = tables(scores)
    skipped = sum(len(p.skipped) for p in sets)
    foot = f"\n{skipped} unreadable pictures were skipped; the Score files list them.\n" if skipped else ""
    (Path(args.output) / "report.md").write_text(head + table + "\n" + foot, encoding="utf-8")
    return scores


def tables(scores: list[Score]) -> str:
    """One table an attack: their numbers may not stand in one."""
    attacks = dict.fromkeys(s.attack for s in scores)
    return "\n\n".join(f"## {a}\n\n" + score_table([s.to_json() for s in scores if s.attack == a]) for a in attacks)


def _slug(name: str) -> str:
    return re.sub(r"[^A-Za-z0-9]+", "-", name).strip("-").lower()


def main(argv: list[str] | None = None) -> None:
    try:
        (args,) = parse((EvaluateArguments,), argv)
        scores = run(args)
    except (RecipeError, ValueError, OSError) as error:
        sys.exit(f"recipes/evaluate.py: {' '.join(str(error).split())}")
    print(tables(scores))
