"""`hpt-hf sweep`: a recipe under several settings, one chosen by rule on classes that training never saw, then over seeds.

Every flag of `train` with several values is swept, all against all. The rule: the highest mean of clean and robust accuracy on the
classes left out of training and on `--choose_on`; of equals, the first named. The chosen setting is trained on all classes, once a seed, and
measured on `--measure_on`, which no choice has seen. A finished run is not run again, and several processes share the runs.
"""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, fields
from pathlib import Path
from typing import get_args, get_origin, get_type_hints

from filelock import FileLock, Timeout

from hpt_hf.attacks.suite import EvaluationAttack
from hpt_hf.commands import compare, train
from hpt_hf.commands.common import ImageArguments, ball, load_model, on_device, open_sets, suite_names
from hpt_hf.commands.parser import HfArg, RecipeError, exit_on_user_error, parse
from hpt_hf.data.dataset import LabelledImages
from hpt_hf.evaluation.comparison import compare as compared
from hpt_hf.evaluation.evaluator import evaluate
from hpt_hf.evaluation.result import EvalResult, Question, read_results_of
from hpt_hf.evaluation.statistics import mean
from hpt_hf.training.record import differences
from hpt_hf.utils import did_you_mean, processes, progress, write_json, write_text

Setting = dict[str, str]  # flag -> its value
FREE = ("data_dir", "license", "proxy_device")  # decide no weights


@dataclass
class SweepArguments:
    """Beside all flags of `train`, of which --seed takes several."""

    choose_on: list[str] = HfArg(default_factory=list, help="further sets to choose on, of other domains")
    measure_on: list[str] = HfArg(
        default_factory=list, help="a suite (lab, real, photographs) or sets, for the chosen setting alone"
    )
    measure_attack: str = HfArg(default="pgd", help="as evaluate --attack")
    measure_attack_steps: int | None = None
    measure_probe: int = HfArg(default=0, help="images that the last figures' sanity checks look at")
    limit: int | None = HfArg(default=None, help="images of each set")


@dataclass(frozen=True)
class Grid:
    """The command line taken apart: `fixed` is what all runs share."""

    args: SweepArguments
    fixed: list[str]
    settings: list[Setting]
    seeds: list[str]
    output: Path

    @classmethod
    def read(cls, argv: list[str]) -> Grid:
        """Raises RecipeError: an unknown flag, no output_dir, or a value that `train` would refuse."""
        given: list[tuple[str, list[str]]] = []
        for word in argv:
            if word.startswith("--"):
                name, _, value = word[2:].partition("=")
                given.append((name, [value] if value else []))
            elif given:
                given[-1][1].append(word)
            else:
                raise RecipeError(f"not understood: {word}")
        own = {f.name for f in fields(SweepArguments)}
        known = own | {f.name for kind in train.RECIPE for f in fields(kind)} | {"config"}
        if odd := [name for name, _ in given if name not in known]:
            raise RecipeError(f"unknown key --{odd[0]}{did_you_mean(odd[0], known, 'see --help')}")
        last = {"seed": ["0"], "output_dir": []} | dict(given)
        seeds, output = last.pop("seed"), last.pop("output_dir")
        if not output:
            raise RecipeError("output_dir: got none, expected the folder of the sweep. Fix: --output_dir")
        lists = {name for kind in train.RECIPE for name, hint in get_type_hints(kind).items() if _takes_many(hint)}
        swept = {name: values for name, values in last.items() if len(values) > 1 and name not in own | lists}
        mine, fixed = [], []
        for name, values in given:
            if name in last and name not in swept:
                (mine if name in own else fixed).extend([f"--{name}", *values])
        settings = [dict(zip(swept, values, strict=True)) for values in itertools.product(*swept.values())]
        grid = cls(*parse((SweepArguments,), mine), fixed, settings, seeds, Path(output[0]))
        for setting in settings:  # a mistake in the last one should not cost the hours of the others
            train.build_schedule(grid.recipe(setting, seeds[0], grid.output)[1])
        return grid

    def recipe(self, setting: Setting, seed: str, folder: str | Path, *more: str):
        chosen = [part for name, value in setting.items() for part in (f"--{name}", value)]
        flags = [*self.fixed, *chosen, "--seed", seed, "--output_dir", str(folder), *more]
        return parse(train.RECIPE, flags)


def _takes_many(hint) -> bool:
    """Is it a flag whose value is a list: --proxy, --classes?"""
    return any(get_origin(part) is list for part in (hint, *get_args(hint)))


def name_of(setting: Setting) -> str:
    return ",".join(f"{name}={value.replace('/', '-')}" for name, value in setting.items()) or "recipe"


@contextmanager
def sole(folder: Path) -> Iterator[bool]:
    """True for the one process that may work in the folder now."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    try:
        held = FileLock(folder.with_name(f".{folder.name}.lock")).acquire(timeout=0)
    except Timeout:
        yield False
        return
    with held:
        yield True


def run_one(grid: Grid, folder: Path, recipe, sets: list[LabelledImages], probe: int = 0) -> list[EvalResult] | None:
    """Train, unless it stands there, and measure on the sets; None: another process is at it."""
    data, method, training = recipe
    args, names = grid.args, {images.name for images in sets}
    attack = EvaluationAttack(ball(method.norm, method.eps), args.measure_attack, args.measure_attack_steps)
    asked = Question.of(attack, args.limit)

    def found() -> list[EvalResult]:
        """What stands there already, of this question and of no other."""
        results = [r for r in read_results_of(folder) if r.question == asked and r.dataset in names]
        return [r for r in results if not probe or r.verdict != "unchecked"]

    if (folder / train.TRAINED).is_file():
        now = {name: value for name, value in train.settings(*recipe).items() if name not in FREE}
        if odd := differences(folder, json.loads(json.dumps(now)), "recipe"):
            raise RecipeError(f"{folder} holds a run of another recipe: {'; '.join(odd)}. Fix: another --output_dir")
        if len(done := found()) >= len(sets):
            return done
    with sole(folder) as mine:
        if not mine:
            return None
        if not (folder / train.TRAINED).is_file():
            progress(f"training {folder}")
            train.run(data, method, training)
        model = on_device(load_model(str(folder)))
        baseline = on_device(load_model(method.model)) if probe else None
        results: list[EvalResult] = []
        for images in sets:
            settings = {"name": str(folder), "limit": args.limit, "probe": probe, "baseline": baseline}
            results.append(result := evaluate(model, images, attack, folder=folder, **settings))
            write_json(folder / "results" / result.file_name, result.to_json())
        progress(f"{folder}: " + ", ".join(f"{kind} {value:.1f}%" for kind, value in mean(results).items()))
        return found()


def choose(grid: Grid) -> tuple[Setting, dict]:
    """The best setting by the rule, and what the rule saw of each."""
    if len(grid.settings) == 1:
        return grid.settings[0], {}
    seen: dict[str, list[EvalResult]] = {}
    diverged: list[str] = []
    for setting in grid.settings:
        folder = grid.output / "choice" / name_of(setting)
        recipe = grid.recipe(setting, grid.seeds[0], folder)
        if not recipe[0].leave_out_classes and not grid.args.choose_on:
            raise RecipeError("choose: got nothing to choose on. Fix: --leave_out_classes 0.25, or --choose_on SETS")
        _, aside = train.open_training_images(recipe[0])
        sets = ([aside] if aside else []) + _opened(grid.args.choose_on, recipe[0].data_dir, grid.args.limit)
        try:
            found = run_one(grid, folder, recipe, sets)
        except FloatingPointError as error:
            progress(f"{folder}: {error}")
            diverged.append(name_of(setting))
            continue
        if found is not None:
            seen[name_of(setting)] = found
    if len(diverged) == len(grid.settings):
        raise RecipeError(f"every setting diverged: {'; '.join(diverged)}. Fix: lower rates")
    if len(seen) + len(diverged) < len(grid.settings):
        raise RecipeError("the other runs are under way in another process. Fix: the same command, once they are done")
    best = max(seen, key=lambda name: sum(mean(seen[name]).values()))  # of equals the first
    told = {name: mean(part) | {"sets": {r.dataset: [r.clean, r.robust] for r in part}} for name, part in seen.items()}
    text = f"Chosen: {best}, by the highest mean of clean and robust accuracy on what training never saw.\n\n"
    text += "".join(f"{name} diverged.\n\n" for name in diverged)
    if len(seen) > 1:
        rows = compared([result for results in seen.values() for result in results])
        text += compare.table(rows) + "\n"
        compare.front({"on classes and sets left out": rows}, grid.output / "choice.svg")
    write_text(grid.output / "choice.md", text)
    return grid.settings[list(map(name_of, grid.settings)).index(best)], told


def _opened(names: list[str], data_dir: str | None, limit: int | None) -> list[LabelledImages]:
    paths = [name for given in names for name in suite_names(given)]
    return open_sets(ImageArguments("", dataset=paths, data_dir=data_dir, limit=limit)) if paths else []


def run(grid: Grid) -> dict:
    """Choose, train the chosen setting once a seed, measure; returns what sweep.json holds."""
    if processes().num_processes > 1:
        raise RecipeError("sweep: got several processes. Fix: start it once for each device; they share the runs")
    setting, told = choose(grid)
    rule = "highest mean of clean and robust accuracy on classes and sets that training never saw"
    record: dict = {"rule": rule, "settings": told, "chosen": setting, "runs": {}}
    write_json(grid.output / "sweep.json", record)
    for seed in grid.seeds:
        folder = grid.output / name_of(setting) / f"seed{seed}"
        recipe = grid.recipe(setting, seed, folder, "--leave_out_classes", "0")
        sets = _opened(grid.args.measure_on, recipe[0].data_dir, grid.args.limit)
        found = run_one(grid, folder, recipe, sets, grid.args.measure_probe)
        if found:
            record["runs"][seed] = mean(found)
    write_json(grid.output / "sweep.json", record)
    return record


def main(argv: list[str] | None = None) -> None:
    with exit_on_user_error("hpt-hf sweep"):
        grid = Grid.read(argv or [])
        record = run(grid)
    if (grid.output / "choice.md").is_file():
        print((grid.output / "choice.md").read_text(encoding="utf-8"))
    for seed, found in record["runs"].items():
        print(f"seed {seed}: clean {found['clean']:.1f}%, robust {found['robust']:.1f}%")
