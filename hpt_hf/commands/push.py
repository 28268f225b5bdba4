"""`recipes/push.py`: a finished folder to the Hub, with the Scores that were measured on it."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

from hpt_hf.commands.parser import RecipeError, exit_on_user_error, parse
from hpt_hf.evaluation.result import read_results
from hpt_hf.models.zero_shot import ZeroShotClassifier, fingerprint
from hpt_hf.publishing.hub import push
from hpt_hf.publishing.model_card import own_results, write_model_card
from hpt_hf.utils import write_json


@dataclass
class PushArguments:
    """What `recipes/push.py` sends, and where to."""

    model: str = field(metadata={"help": "the folder"})
    repo_id: str = field(metadata={"help": "owner/name on the Hub, or name of one's own"})
    revision: str | None = field(default=None, metadata={"help": "a branch, made if there is none; left out: main"})
    private: bool | None = field(
        default=None, metadata={"help": "of a new repository; left out: what the account says"}
    )
    overwrite: bool = field(default=False, metadata={"help": "replace another model that stands there"})
    scores: str | None = field(
        default=None, metadata={"help": "folder of Scores measured on this model, to go along and into the card"}
    )
    message: str = "Robust CLIP, exported by hpt_hf"


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
    found = read_results(source)
    weights = fingerprint(ZeroShotClassifier.from_pretrained(folder))
    own = [s for s in found if s.fingerprint == weights]
    if not own:
        raise RecipeError(
            f"none of the {len(found)} Scores in {source} was measured on the weights in {folder} ({weights}): evaluate that folder first"
        )
    for score in own:
        write_json(folder / "scores" / score.file_name, score.to_json())
    write_model_card(folder)
    return len(own)


def main(argv: list[str] | None = None) -> None:
    with exit_on_user_error("recipes/push.py"):
        (args,) = parse((PushArguments,), argv, positional=("model", "repo_id"))
        address = run(args)
    print(f"{args.model} ({len(own_results(args.model))} Scores in its card) -> {address}")
