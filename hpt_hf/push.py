"""`recipes/push.py`: a finished folder to the Hub, with the Scores that were measured on it."""

from __future__ import annotations

from pathlib import Path

from hpt_hf.arguments import PushArguments, RecipeError, mistakes_in_a_line, parse
from hpt_hf.card import own_scores, write_card
from hpt_hf.hub import push
from hpt_hf.report import write_json
from hpt_hf.scores import read_scores
from hpt_hf.zero_shot import ZeroShotCLIP, fingerprint


def run(args: PushArguments) -> str:
    folder = Path(args.model)
    if not folder.is_dir():
        raise RecipeError(f"no folder at {folder}: expected one that training or recipes/convert.py has written")
    if args.scores:
        adopt(folder, args.scores)
    return push(
        folder,
        args.repo_id,
        revision=args.revision,
        private=args.private,
        overwrite=args.overwrite,
        message=args.message,
    )


def adopt(folder: Path, scores: str | Path) -> int:
    """Copy the Scores that were measured on the folder's weights into its `scores/`, for its card. Returns how many.

    Raises:
        RecipeError: there are none.
    """
    source = Path(scores)
    source = source / "scores" if (source / "scores").is_dir() else source
    found = read_scores(source)
    weights = fingerprint(ZeroShotCLIP.load(folder))
    own = [s for s in found if s.fingerprint == weights]
    if not own:
        raise RecipeError(
            f"none of the {len(found)} Scores in {source} was measured on the weights in {folder} ({weights}): evaluate that folder first"
        )
    for score in own:
        write_json(folder / "scores" / score.file_name, score.to_json())
    write_card(folder)
    return len(own)


def main(argv: list[str] | None = None) -> None:
    with mistakes_in_a_line("recipes/push.py"):
        (args,) = parse((PushArguments,), argv, positional=("model", "repo_id"))
        address = run(args)
    print(f"{args.model} ({len(own_scores(args.model))} Scores in its card) -> {address}")
