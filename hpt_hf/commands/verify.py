"""`hpt-hf verify`: measure again what a model's results claim, and say of each figure whether it holds."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path

from huggingface_hub import snapshot_download

from hpt_hf.attacks.suite import EvaluationAttack
from hpt_hf.attacks.threat_model import ThreatModel
from hpt_hf.commands.common import load_model, on_device, reopen
from hpt_hf.commands.parser import HfArg, RecipeError, exit_on_user_error, parse
from hpt_hf.evaluation.evaluator import evaluate
from hpt_hf.evaluation.result import EvalResult, read_results, read_results_of
from hpt_hf.models.zero_shot import fingerprint
from hpt_hf.utils import markdown, processes, progress

FIGURES = {"clean": "clean_interval", "robust": "interval"}  # of a result
SAID = {True: "inside", False: "OUTSIDE", None: "not measured"}


@dataclass
class VerifyArguments:
    model: str = HfArg(help="folder or Hub id, with its results in results/")
    model_revision: str | None = None
    results: str | None = HfArg(default=None, help="folder of results; default: those of the model")
    data_dir: str | None = HfArg(default=None, help="the folder that the results' data lie in now")
    limit: int | None = HfArg(default=None, help="only so many of the results' images, at random")
    seed: int | None = HfArg(default=None, help="other random starts than the results'")
    batch_size: int = 128


@dataclass(frozen=True)
class Finding:
    """One claimed figure beside the measured one. `inside`: it holds; None: it could not be measured."""

    result: EvalResult
    figure: str  # of `FIGURES`
    measured: float | None = None
    inside: bool | None = None
    why: str = ""


def verify(classifier, result: EvalResult, *, data_dir=None, limit=None, seed=None, batch_size=128) -> list[Finding]:
    """Clean and robust accuracy, measured again.

    On the same images a new figure holds if it lies in the claimed interval; on others (a smaller `limit`) the claim
    holds if it lies in the interval of the new figure.
    """
    name = "standard" if len(result.n_after) > 1 else next(iter(result.n_after))
    seed = result.seed if seed is None else seed
    own = result.source.get("limit")
    sizes = {"limit": own if limit is None else min(limit, own or limit), "batch_size": batch_size, "probe": 0}
    try:
        threat = ThreatModel(result.norm, result.eps)
        attack = EvaluationAttack(threat, name, result.steps, result.protocol, seed, result.target)
        images = reopen(result.source, data_dir=data_dir, on_corrupt="skip" if result.skipped else "error")
        again = evaluate(classifier, images, attack, name=result.model, **sizes)
    except (ValueError, OSError) as error:  # the other results can still be measured
        return [Finding(result, figure, why=str(error)) for figure in FIGURES]
    same, why = again.images_digest == result.images_digest, []
    if not same:
        why.append(f"on {again.n} other images than the result's {result.n}")
    if again.fingerprint != result.fingerprint:
        why.append("the weights are not those of the result")
    found = []
    for figure, interval in FIGURES.items():
        low, high = getattr(result if same else again, interval)
        measured = getattr(again, figure)
        inside = low <= (measured if same else getattr(result, figure)) <= high
        found.append(Finding(result, figure, measured, inside, "; ".join(why)))
    return found


def table(found: list[Finding]) -> str:
    rows = []
    for f in found:
        attack = f"{f.result.attack} {f.result.norm} {f.result.eps}"
        claim = getattr(f.result, f.figure), "{:.1f}–{:.1f}".format(*getattr(f.result, FIGURES[f.figure]))
        said = SAID[f.inside] + (f" ({f.why})" if f.why else "")
        rows.append((f.result.dataset, attack, f.figure, *claim, "" if f.measured is None else f.measured, said))
    return markdown(("data set", "attack", "figure", "claimed %", "95%", "measured %", "verdict"), rows)


def run(args: VerifyArguments) -> list[Finding]:
    folder = Path(args.results or args.model)
    if not (args.results or folder.is_dir()):
        files = ["results/*.json", "scores/*.json"]
        folder = Path(snapshot_download(args.model, revision=args.model_revision, allow_patterns=files))
    claims = read_results_of(folder) or (read_results(folder) if args.results else [])
    if not claims:
        raise RecipeError(f"no results in {folder}: nothing is claimed. Fix: name their folder with --results.")
    classifier = on_device(load_model(args.model, args.model_revision))
    own = [claim for claim in claims if claim.fingerprint == fingerprint(classifier)]
    if 0 < len(own) < len(claims):
        progress(f"{len(claims) - len(own)} results of other weights are left out")
    settings = {name: getattr(args, name) for name in ("data_dir", "limit", "seed", "batch_size")}
    return [finding for claim in own or claims for finding in verify(classifier, claim, **settings)]


def main(argv: list[str] | None = None) -> None:
    """Exit 0 if every figure was measured and lies inside, else 1."""
    with exit_on_user_error("hpt-hf verify"):
        (args,) = parse((VerifyArguments,), argv, positional=("model",))
        found = run(args)
    if processes().is_main_process:
        print(table(found))
        held, outside, unknown = (sum(f.inside is value for f in found) for value in (True, False, None))
        print(f"\n{held} of {len(found)} figures inside, {outside} outside, {unknown} not measured.")
    sys.exit(0 if all(f.inside for f in found) else 1)
