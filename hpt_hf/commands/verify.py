"""`recipes/verify.py`: measure again what a model's Scores claim, and say of each figure whether it holds."""

from __future__ import annotations

import sys
from dataclasses import dataclass, field
from pathlib import Path

from huggingface_hub import snapshot_download

from hpt_hf.attacks.suite import EvaluationAttack
from hpt_hf.attacks.threat_model import ThreatModel
from hpt_hf.commands.common import load_model, on_device, reopen
from hpt_hf.commands.parser import RecipeError, exit_on_user_error, parse
from hpt_hf.evaluation.evaluator import evaluate
from hpt_hf.evaluation.result import EvalResult, read_results
from hpt_hf.evaluation.statistics import wilson
from hpt_hf.models.zero_shot import ZeroShotClassifier
from hpt_hf.utils import markdown, processes


@dataclass
class VerifyArguments:
    """What `recipes/verify.py` measures again."""

    model: str = field(metadata={"help": "folder or Hub id, with its Scores in scores/"})
    model_revision: str | None = None
    scores: str | None = field(
        default=None, metadata={"help": "folder of EvalResult files; left out: scores/ beside the model"}
    )
    data_dir: str | None = field(
        default=None, metadata={"help": "the folder that the Scores' files and folders lie in now"}
    )
    limit: int | None = field(default=None, metadata={"help": "only so many of the Scores' pictures, at random"})
    seed: int | None = field(default=None, metadata={"help": "other random starts than the Scores'"})
    batch_size: int = 128


@dataclass(frozen=True)
class Finding:
    """One claimed figure beside the measured one. `inside`: it holds; None: it could not be measured, `why` says what was missing."""

    score: EvalResult
    figure: str
    claimed: float
    interval: tuple[float, float]
    measured: float | None
    inside: bool | None
    why: str = ""


def verify(
    model: ZeroShotClassifier,
    score: EvalResult,
    *,
    data_dir: str | None = None,
    limit: int | None = None,
    seed: int | None = None,
    batch_size: int = 128,
) -> list[Finding]:
    """Clean and robust accuracy of one EvalResult, measured again.

    On the same pictures a new figure holds if it lies in the claimed interval; on other pictures (a smaller `limit`) the claim holds if it lies in
    the interval of the new figure. Weights or pictures that are not the claimed ones are said.
    """
    attack = EvaluationAttack(
        ThreatModel(score.norm, score.eps),
        "standard" if len(score.parts) > 1 else next(iter(score.parts)),
        score.steps,
        score.protocol,
        score.seed if seed is None else seed,
        score.target,
    )
    own = score.source.get("limit")
    limit = own if limit is None else min(limit, own or limit)
    try:
        pictures = reopen(score.source, data_dir=data_dir, on_corrupt="skip" if score.skipped else "error")
        again = evaluate(model, pictures, attack, name=score.model, batch_size=batch_size, limit=limit, probe=0)
    except (ValueError, OSError) as error:  # the other Scores can still be measured
        return [
            Finding(score, *claim, measured=None, inside=None, why=f"it could not be measured: {error}")
            for claim in _figures(score)
        ]
    same = again.rows == score.rows
    why = "" if same else f"on {again.n} other pictures than the EvalResult's {score.n}"
    if again.fingerprint != score.fingerprint:
        why = "; ".join(filter(None, (why, "the weights are not those of the EvalResult")))
    found = []
    for (figure, claimed, interval), (_, measured, new) in zip(_figures(score), _figures(again), strict=True):
        if same:  # from the figure itself: an interval that was edited must not save one that was
            interval = wilson(round(claimed * again.n / 100), again.n)
        low, high = interval if same else new
        found.append(
            Finding(score, figure, claimed, interval, measured, low <= (measured if same else claimed) <= high, why)
        )
    return found


def _figures(score: EvalResult) -> tuple[tuple[str, float, tuple[float, float]], ...]:
    return ("clean", score.clean, score.clean_interval), ("robust", score.robust, score.interval)


def table(found: list[Finding]) -> str:
    said = {True: "inside", False: "OUTSIDE", None: "not measured"}
    rows = [
        (
            f.score.dataset,
            f"{f.score.attack} {f.score.norm} {f.score.eps}",
            f.figure,
            f.claimed,
            "{:.1f}–{:.1f}".format(*f.interval),
            "" if f.measured is None else f.measured,
            said[f.inside] + (f" ({f.why})" if f.why else ""),
        )
        for f in found
    ]
    return markdown(("data set", "attack", "figure", "claimed %", "95%", "measured %", "verdict"), rows)


def run(args: VerifyArguments) -> list[Finding]:
    folder = Path(args.model)
    if args.scores:
        scores = Path(args.scores)
    elif folder.is_dir():
        scores = folder / "scores"
    else:
        scores = (
            Path(snapshot_download(args.model, revision=args.model_revision, allow_patterns=["scores/*.json"]))
            / "scores"
        )
    claims = read_results(scores)
    if not claims:
        raise RecipeError(
            f"no Scores in {scores}: nothing is claimed, so nothing can be verified; name their folder with --scores"
        )
    model = on_device(load_model(args.model, args.model_revision))
    found = []
    for score in claims:
        found += verify(
            model, score, data_dir=args.data_dir, limit=args.limit, seed=args.seed, batch_size=args.batch_size
        )
    return found


def main(argv: list[str] | None = None) -> None:
    """Exit 0 if every figure was measured and lies inside, else 1."""
    with exit_on_user_error("hpt-hf verify"):
        (args,) = parse((VerifyArguments,), argv, positional=("model",))
        found = run(args)
    if processes().is_main_process:
        print(table(found))
        held, outside = (sum(f.inside is value for f in found) for value in (True, False))
        print(
            f"\n{held} of {len(found)} figures inside, {outside} outside, {len(found) - held - outside} not measured."
        )
    sys.exit(0 if all(f.inside for f in found) else 1)
