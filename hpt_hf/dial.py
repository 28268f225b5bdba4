"""`recipes/dial.py`: between the original and the robust weights, how much robustness for how much clean accuracy, and a point chosen by rule.

theta(w) = (1 - w) theta_original + w theta_robust (WiSE-FT, arXiv 2109.01903, section 3). The choice is made on training data that the model has
not seen; test sets may be measured beside it and have no say.
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path

from hpt_hf.arguments import DataArguments, DialArguments, RecipeError, mistakes_in_a_line, parse
from hpt_hf.card import MIXED, TRAINED, read_record, write_card
from hpt_hf.data import DatasetSpec, LabelledPictures, held_out
from hpt_hf.evaluate import on_device
from hpt_hf.evaluation import EvaluationAttack, evaluate
from hpt_hf.export import export
from hpt_hf.hub import open_repo, push
from hpt_hf.lab.suite import open_pictures
from hpt_hf.report import front, markdown, progress, write_json
from hpt_hf.scores import Score, mean
from hpt_hf.threat import ThreatModel
from hpt_hf.train import dataset_spec, load_clip
from hpt_hf.zero_shot import ZeroShotCLIP, fingerprint


@dataclass(frozen=True)
class Point:
    """One weight of the dial: Scores on the data that the choice is made on, and on test sets."""

    weight: float
    chosen_on: tuple[Score, ...]
    reported: tuple[Score, ...] = ()


def check_line(original: ZeroShotCLIP, robust: ZeroShotCLIP) -> None:
    """Raise ValueError for two models that no line connects: other shapes, or other numbers of normalisation."""
    shapes = [{k: tuple(v.shape) for k, v in m.state_dict().items()} for m in (original, robust)]
    if shapes[0] != shapes[1]:
        odd = sorted(k for k in shapes[0].keys() | shapes[1].keys() if shapes[0].get(k) != shapes[1].get(k))
        raise ValueError(
            f"the two models differ in architecture ({len(odd)} tensors, such as {odd[0]}): --origin must be what the robust model was fine-tuned from"
        )
    if not all(getattr(original, n).equal(getattr(robust, n)) for n in ("mean", "std")):
        raise ValueError(
            "the two models normalise their pictures differently: --origin must be what the robust model was fine-tuned from"
        )


def interpolate(original: ZeroShotCLIP, robust: ZeroShotCLIP, weight: float) -> ZeroShotCLIP:
    """A new model with theta = (1 - weight) theta_original + weight theta_robust, at 0 and 1 bit-equal to one of them.

    Raises:
        ValueError: two models that no line connects (`check_line`).
    """
    check_line(original, robust)
    theta0, theta1 = original.state_dict(), robust.state_dict()
    mixed = ZeroShotCLIP(robust.config)
    mixed.load_state_dict(
        {
            k: theta0[k] if weight == 0 else theta1[k] if weight == 1 else (1 - weight) * theta0[k] + weight * theta1[k]
            for k in theta1
        }
    )
    return mixed.attach(robust.processor).eval()


def choose(points: Sequence[Point], max_drop: float) -> Point:
    """The most robust point whose clean accuracy is at most `max_drop` points below the original's (weight 0); of equals the smallest weight.

    Raises:
        ValueError: the grid lacks the original, which the rule compares with.
    """
    original = next((p for p in points if p.weight == 0), None)
    if original is None:
        raise ValueError("the grid needs weight 0, the original: the rule compares with it")
    least = mean(original.chosen_on)["clean"] - max_drop
    allowed = [p for p in points if mean(p.chosen_on)["clean"] >= least - 1e-9]
    return max(allowed, key=lambda p: (mean(p.chosen_on)["robust"], -p.weight))


def run(args: DialArguments) -> tuple[list[Point], Point]:
    """Measure the grid, choose, write the front, export and push the points that were asked for."""
    grid = _grid(args)
    trained = read_record(args.model, TRAINED)
    recipe = trained.get("recipe", {})
    attack = EvaluationAttack(_threat(args, recipe), args.attack, args.steps)
    source, original, robust = _ends(args, trained)
    choosing = [_training(path, args) for path in args.choose_on] if args.choose_on else [_slice(args, recipe)]
    reporting = [
        open_pictures(DatasetSpec(p, split="test"), training=False, data_dir=args.data_dir) for p in args.report_on or ()
    ]
    if args.push_to:
        open_repo(args.push_to, private=args.private)  # what cannot be pushed should not cost the hours before it
    points = []
    for weight in grid:
        model = on_device(interpolate(original, robust, weight))
        first, second = (tuple(_measure(model, p, attack, args) for p in sets) for sets in (choosing, reporting))
        points.append(Point(weight, first, second))
        progress(_said(points[-1]))
    chosen = choose(points, args.max_drop)
    names = ", ".join(p.name for p in choosing)
    rule = (
        f"chosen: the most robust point whose clean accuracy on {names} is at most {args.max_drop:g} points below the original's"
    )
    output = Path(args.output)
    write_json(output / "front.json", _front(points, chosen, rule, attack, source, args))
    front(
        [(p.weight, *(None if not part else _summary(part) for part in (p.chosen_on, p.reported)), p is chosen) for p in points],
        output / "front.svg",
        titles=("training data held out, where the point is chosen", "test sets, which have no say"),
        attack=f"{attack}, {attack.threat}",
    )
    for point in points:
        if point is chosen or point.weight in (args.save or ()):
            told = {"weight": point.weight, "origin": source, "robust": args.model}
            told["rule"] = f"This point was {rule}." if point is chosen else ""
            folder = place(output, point.weight)
            export(
                interpolate(original, robust, point.weight),
                folder,
                records={MIXED: told} | ({TRAINED: trained} if trained else {}),
            )
            for score in point.reported:
                write_json(folder / "scores" / score.file_name, score.to_json())
            write_card(folder)
            if args.push_to:
                address = push(folder, args.push_to, revision=folder.name, private=args.private, overwrite=args.overwrite)
                progress(f"{folder} -> {address}")
    return points, chosen


def _grid(args: DialArguments) -> list[float]:
    for flag in ("limit", "batch_size"):
        if (value := getattr(args, flag)) is not None and value < 1:
            raise RecipeError(f"--{flag} {value}: expected at least 1")
    if not (math.isfinite(args.max_drop) and args.max_drop >= 0):
        raise RecipeError(f"--max_drop {args.max_drop}: expected points of clean accuracy, at least 0")
    for flag in ("weights", "save"):
        given = getattr(args, flag) or ()
        if not all(0 <= w <= 1 for w in given):
            raise RecipeError(
                f"--{flag} {' '.join(map(str, given))}: expected shares from 0 (the original) to 1 (the robust model)"
            )
    grid = sorted({0.0, *args.weights, *(args.save or ())})
    if len(grid) < 2:
        raise RecipeError("--weights holds the original alone: expected shares up to 1 (the robust model), two at least")
    return grid


def _threat(args: DialArguments, recipe: dict) -> ThreatModel:
    """As in training, where nothing else is said."""
    norm = recipe.get("norm", "linf")
    if args.norm and args.norm != norm and not args.eps:
        raise RecipeError(f"--norm {args.norm}: say its radius with --eps, that of training is for {norm}")
    return ThreatModel(args.norm or norm, args.eps or recipe.get("eps", "1/255"))


def _ends(args: DialArguments, trained: dict) -> tuple[str, ZeroShotCLIP, ZeroShotCLIP]:
    """(what the original is called, the original, the robust model). Raises where no line between them means anything."""
    recipe = trained.get("recipe", {})
    source = args.origin or recipe.get("model_name_or_path")
    if source is None:
        raise RecipeError(f"{args.model} has no {TRAINED} that says what it was fine-tuned from: name it with --origin")
    original, robust = load_clip(source, None if args.origin else recipe.get("model_revision")), load_clip(args.model)
    weights = fingerprint(original)
    if weights == fingerprint(robust):
        raise RecipeError(f"{args.model} and {source} are the same weights: there is nothing between them")
    check_line(original, robust)
    known = trained.get("student", {}).get("fingerprint")
    if known not in (None, weights):
        raise RecipeError(
            f"{source} holds other weights than {args.model} was fine-tuned from ({known}): between unrelated models there is nothing to find"
        )
    return source, original, robust


def place(output: str | Path, weight: float) -> Path:
    """Where a point is exported: `w0.50`, with more digits where it has them."""
    return Path(output) / (f"w{weight:.2f}" if round(weight, 2) == weight else f"w{weight}")


def _slice(args: DialArguments, recipe: dict) -> LabelledPictures:
    """The pictures that the model's own training held out."""
    if not recipe.get("held_out"):
        raise RecipeError(
            f"{args.model} held nothing out of its training data (held_out), or its {TRAINED} does not say: choosing on what it has seen would prefer what it "
            "has learned by heart; name other training pictures with --choose_on"
        )
    spec = dataset_spec(
        DataArguments(**{f.name: recipe[f.name] for f in fields(DataArguments)}),
        recipe["dataset"],
        recipe["dataset_split"],
        revision=recipe["dataset_revision"],
    )
    folder = args.data_dir or recipe["data_dir"]
    pictures = open_pictures(spec, training=True, data_dir=folder, on_corrupt=recipe["on_corrupt"])
    return held_out(pictures, recipe["held_out"], seed=0)[1]


def _training(path: str, args: DialArguments) -> LabelledPictures:
    return open_pictures(DatasetSpec(path), training=True, limit=args.limit, data_dir=args.data_dir)


def _measure(model: ZeroShotCLIP, pictures: LabelledPictures, attack: EvaluationAttack, args: DialArguments) -> Score:
    return evaluate(model, pictures, attack, name=args.model, limit=args.limit, batch_size=args.batch_size, probe=0)


def _summary(scores: Sequence[Score]) -> dict:
    """Means over the sets; an interval where there is one set, which is where it is plain what it would mean."""
    one = scores[0] if len(scores) == 1 else None
    return {
        **mean(scores),
        "clean_interval": one and one.clean_interval,
        "robust_interval": one and one.interval,
        "n": sum(s.n for s in scores),
        "sets": {
            s.dataset: {
                "clean": s.clean,
                "robust": s.robust,
                "clean_interval": s.clean_interval,
                "robust_interval": s.interval,
                "n": s.n,
            }
            for s in scores
        },
    }


def _said(point: Point) -> str:
    said = [f"w = {point.weight:.2f}"]
    for name, scores in (("chosen on", point.chosen_on), ("reported", point.reported)):
        if scores:
            said.append(f"{name}: clean {mean(scores)['clean']:.1f}%, robust {mean(scores)['robust']:.1f}%")
    return "; ".join(said)


def _front(points: Sequence[Point], chosen: Point, rule: str, attack: EvaluationAttack, source: str, args: DialArguments) -> dict:
    return {
        "what": "clean and robust accuracy, %, of (1 - weight) original + weight robust",
        "origin": source,
        "robust": args.model,
        "attack": asdict(attack),
        "rule": rule,
        "chosen": chosen.weight,
        "points": [
            {"weight": p.weight, "chosen_on": _summary(p.chosen_on), "reported": _summary(p.reported) if p.reported else None}
            for p in points
        ],
    }


def table(front: dict) -> str:
    """front.json as a table."""
    rows = []
    for point in front["points"]:
        parts = [part for part in (point["chosen_on"], point["reported"]) if part]
        chosen = " ← chosen" * (point["weight"] == front["chosen"])
        rows.append((f"{point['weight']:.2f}{chosen}", *(f"{part[k]:.1f}" for part in parts for k in ("clean", "robust"))))
    test = ["test: clean %", "robust %"] if front["points"][0]["reported"] else []
    return markdown(["weight", "held out: clean %", "robust %", *test], rows)


def main(argv: list[str] | None = None) -> None:
    with mistakes_in_a_line("recipes/dial.py"):
        (args,) = parse((DialArguments,), argv, positional=("model",))
        _, chosen = run(args)
    print(table(json.loads((Path(args.output) / "front.json").read_text(encoding="utf-8"))))
    print(f"\n{place(args.output, chosen.weight)} is the chosen model; {Path(args.output) / 'front.svg'} shows the front.")
