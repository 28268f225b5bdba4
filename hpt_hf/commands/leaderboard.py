"""`hpt-hf leaderboard RESULTS …`: results and the zoo as one static page, a row a model and question, to sort and filter."""

from __future__ import annotations

import hashlib
import json
import re
import shlex
from collections.abc import Iterable, Sequence
from dataclasses import MISSING, dataclass, field, fields
from pathlib import Path

from hpt_hf.attacks.threat_model import parse_eps
from hpt_hf.commands.parser import HfArg, RecipeError, exit_on_user_error, parse
from hpt_hf.evaluation.html_report import VERDICTS, rendered, short_names, summary
from hpt_hf.evaluation.result import EvalResult, read_results_of
from hpt_hf.evaluation.statistics import grouped
from hpt_hf.utils import did_you_mean, read_json, write_text

TEMPLATE = Path(__file__).with_name("leaderboard.html.j2")


@dataclass
class LeaderboardArguments:
    results: list[str] = HfArg(default_factory=list, help="folders of evaluations or models")
    zoo: str | None = HfArg(default=None, help="a folder of model files, whose results are shown, too")
    output_dir: str = HfArg(default="outputs/leaderboard", help="for index.html")


def _text(pattern: str, expected: str, **default):
    """A field whose text must look like the pattern; `expected` says so in words."""
    return field(metadata={"form": (pattern, expected)}, **default)


@dataclass(frozen=True)
class ZooModel:
    """One file of the zoo: what a model is, and how it was or would be measured. `paper` and `model` become links."""

    name: str = _text(r"\S.*", "a name")
    model: str = _text(r"lab:\w+|[\w.-]+/[\w.-]+", "a Hub id, owner/name, or lab:NAME")
    method: str = _text(r"\S.*", "a name")
    architecture: str = _text(r"\S.*", "a name")
    command: str = _text(r"(.* && )?hpt-hf evaluate .*--model [\w.].*", "`… && hpt-hf evaluate … --model …`")
    # That published these weights; what they were trained for, as its authors state it; None: not measured here.
    paper: str | None = _text(r"\d{4}\.\d{4,5}", "an arXiv id, as '2402.12336'", default=None)
    trained_for: str | None = _text(r"(linf|l2) [\d.]+(/\d+)?", "norm and eps, as 'linf 4/255'", default=None)
    results: str | None = _text(r"results/\w[\w.-]*", "a folder of the zoo, as 'results/NAME'", default=None)

    @property
    def measured_as(self) -> str:
        """What the results of its command call it."""
        words = shlex.split(self.command)
        return words[words.index("--model") + 1]

    @classmethod
    def read(cls, file: Path) -> ZooModel:
        """From its JSON. Raises RecipeError for a field that is unknown, missing or says what cannot be."""
        content, known = read_json(file), {f.name: f for f in fields(cls)}
        if odd := [name for name in content if name not in known]:
            expected = f"{', '.join(known)}. Fix: delete it{did_you_mean(odd[0], known) or '.'}"
            raise RecipeError(f"{file}: unknown field: got {odd[0]!r}, expected one of {expected}")
        for name, one in known.items():
            (pattern, expected), value = one.metadata["form"], content.get(name, one.default)
            if value is MISSING:
                raise RecipeError(f"{file}: {name}: got no such field, expected {expected}. Fix: add it.")
            if value is not one.default and not (isinstance(value, str) and re.fullmatch(pattern, value)):
                raise RecipeError(f"{file}: {name}: got {value!r}, expected {expected}. Fix: write it so.")
        return cls(**content)


def read_zoo(folder: str | Path) -> tuple[list[ZooModel], list[EvalResult]]:
    """All models of a zoo, and the results that lie in it."""
    files = sorted(Path(folder).glob("*.json"))
    if not files:
        raise RecipeError(f"--zoo: got {folder}, expected a folder with a JSON file a model. Fix: --zoo zoo.")
    models = [ZooModel.read(file) for file in files]
    return models, read_all(Path(folder, model.results) for model in models if model.results)


def read_all(folders: Iterable[str | Path]) -> list[EvalResult]:
    found = []
    for folder in folders:
        found += (results := read_results_of(folder))
        if not results:
            raise RecipeError(f"results: got {folder}, expected a folder with results/*.json. Fix: evaluate first.")
    return found


def images_key(part: Sequence[EvalResult]) -> str:
    """Sets × images, and a digest of sets, splits, prompts and images a class: rows may be compared where it is the same."""
    classes = [[[name, counts[0]] for name, counts in r.per_class.items()] for r in part]
    asked = [[r.dataset, r.source.get("split"), r.templates, c] for r, c in zip(part, classes, strict=True)]
    sizes = {r.n for r in part}
    size = f"{len(part)} × {sizes.pop()}" if len(sizes) == 1 else f"{len(part)} sets, {sum(r.n for r in part)}"
    return f"{size} · {_digest(map(json.dumps, asked))[:6]}"


def _digest(parts: Iterable[str]) -> str:
    return hashlib.sha256("\n".join(sorted(parts)).encode()).hexdigest()


def rows(results: Iterable[EvalResult], zoo: Sequence[ZooModel]) -> list[dict]:
    """One row a model and question; of one measurement that lies in several folders, the last."""
    results = list({r.file_name: r for r in results}.values())
    names, known = short_names(results), {model.measured_as: model for model in zoo}
    groups = grouped(results, lambda r: (r.question, r.target, r.model, r.fingerprint))
    made = []
    for (question, target, model, weights), part in groups.items():
        (row,) = summary(part)
        seed = f", seed {question.seed}" if question.seed else ""
        row |= {"model": names[model, weights], "zoo": known.get(model), "protocol": question.protocol}
        row |= {"attack": question.attack + (f", for {target!r}" if target else "") + seed}
        row |= {"eps": f"{question.norm} {question.eps}", "radius": parse_eps(question.eps)}
        row |= {"images": images_key(part), "weights": weights[:8], "sets": len(part)}
        made.append(row | {"digest": _digest(r.images_digest for r in part)[:8]})
    question = ("protocol", "attack", "radius", "eps", "images")
    return sorted(made, key=lambda row: (*(row[name] for name in question), -row["robust"]))


def run(args: LeaderboardArguments) -> Path:
    """Write the page; nothing is written if a result or a file of the zoo cannot be read."""
    zoo, results = read_zoo(args.zoo) if args.zoo else ([], [])
    results += read_all(args.results)
    if not (zoo or results):
        raise RecipeError("results: got none, expected folders with results/*.json. Fix: name them, or --zoo zoo.")
    found = rows(results, zoo)
    by_eps = sorted(found, key=lambda row: row["radius"])
    choices = {n: dict.fromkeys(r[n] for r in by_eps) for n in ("eps", "protocol", "attack", "verdict", "images")}
    waiting = [m for m in zoo if m.measured_as not in {r.model for r in results}]
    page = {"rows": found, "choices": choices, "waiting": waiting, "verdicts": VERDICTS}
    return write_text(Path(args.output_dir, "index.html"), rendered(TEMPLATE, page))


def main(argv: list[str] | None = None) -> None:
    with exit_on_user_error("hpt-hf leaderboard"):
        (args,) = parse((LeaderboardArguments,), argv, positional=("results",))
        print(run(args))
