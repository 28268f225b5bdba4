"""`hpt-hf push`: a finished folder to the Hub, with the results that were measured on it."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from hpt_hf.commands.parser import HfArg, RecipeError, exit_on_user_error, parse
from hpt_hf.evaluation.result import read_results, read_results_of
from hpt_hf.publishing.export import check
from hpt_hf.publishing.hub import push
from hpt_hf.publishing.model_card import own_results, vanilla, write_model_card
from hpt_hf.utils import write_json


@dataclass
class PushArguments:
    model: str = HfArg(help="the folder")
    repo_id: str = HfArg(help="owner/name on the Hub, or name of one's own")
    revision: str | None = HfArg(default=None, help="a branch, made if there is none; default: main")
    private: bool | None = HfArg(default=None, help="of a new repository; default: the account's")
    overwrite: bool = HfArg(default=False, help="replace another model that stands there")
    results: str | None = HfArg(default=None, help="an evaluation of this model, to go along")
    message: str = "Robust CLIP, exported by hpt_hf"


def main(argv: list[str] | None = None) -> None:
    with exit_on_user_error("hpt-hf push"):
        (args,) = parse((PushArguments,), argv, positional=("model", "repo_id"))
        if not Path(args.model).is_dir():
            raise RecipeError(f"no folder at {args.model}: expected one that training or hpt-hf convert has written")
        settings = {k: v for k, v in vars(args).items() if k not in ("model", "results", "repo_id")}
        if args.results:
            adopt(Path(args.model), Path(args.results))
        address = push(args.model, args.repo_id, **settings)
    print(f"{args.model} ({len(own_results(args.model))} results in its card) -> {address}")


def adopt(folder: Path, source: Path) -> None:
    """Copy the results of an evaluation that were measured on the folder's weights into it, for its card."""
    weights = check(folder)["fingerprint"]
    results = read_results_of(source) or read_results(source)
    if not any(r.fingerprint == weights for r in results):
        raise RecipeError(f"no result in {source} was measured on these weights. Fix: hpt-hf evaluate {folder}")
    # Those of what it was trained from stand in the card beside its own.
    for result in (r for r in results if r.fingerprint in (weights, vanilla(folder))):
        write_json(folder / "results" / result.file_name, result.to_json())
    write_model_card(folder)
