"""`recipes/dial.py`: between the original and the robust weights, how much robustness for how much clean accuracy, and a point chosen by rule.

theta(w) = (1 - w) theta_original + w theta_robust (WiSE-FT, arXiv 2109.01903, section 3). The choice is made on training data that the model has
not seen; test sets may be measured beside it and have no say.
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Literal

from hpt_hf.attacks.suite import EvaluationAttack
from hpt_hf.attacks.threat_model import ThreatModel
from hpt_hf.commands.common import dataset_spec, load_model, on_device, open_images
from hpt_hf.commands.parser import RecipeError, exit_on_user_error, parse
from hpt_hf.commands.train import DataArguments
from hpt_hf.data.dataset import DatasetSpec, LabelledImages, held_out
from hpt_hf.evaluation.evaluator import evaluate
from hpt_hf.evaluation.result import EvalResult, mean
from hpt_hf.models.zero_shot import ZeroShotClassifier, fingerprint
from hpt_hf.publishing.export import export
from hpt_hf.publishing.hub import open_repo, push
from hpt_hf.publishing.model_card import MIXED, TRAINED, read_record, write_model_card
from hpt_hf.utils import markdown, progress, write_json


def front(points: Sequence[tuple], path: str | Path, *, titles: Sequence[str], attack: str) -> Path:
    """Clean against robust accuracy along the dial, one panel for each kind of data that was measured; the chosen point is marked in all.

    Args:
        points: (weight, summary on the first kind, summary on the second or None, chosen); a summary holds clean, robust and their intervals or None.
    """
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    shown = [i for i in range(len(titles)) if points[0][1 + i]]
    figure, axes = plt.subplots(1, len(shown), figsize=(5.6 * len(shown), 4.6), layout="constrained", squeeze=False)
    for axis, which in zip(axes[0], shown, strict=True):
        parts = [p[1 + which] for p in points]
        x, y = [p["clean"] for p in parts], [p["robust"] for p in parts]
        axis.plot(x, y, color="#7f9fbf", zorder=1)
        if parts[0]["clean_interval"]:
            bars = {}
            for key, centre, name in (("xerr", x, "clean_interval"), ("yerr", y, "robust_interval")):
                bars[key] = [
                    [max(0, c - p[name][0]) for c, p in zip(centre, parts, strict=True)],
                    [max(0, p[name][1] - c) for c, p in zip(centre, parts, strict=True)],
                ]
            axis.errorbar(x, y, **bars, fmt="none", ecolor="#c9d3dd", elinewidth=1, zorder=0)
        for (weight, *_, chosen), a, b in zip(points, x, y, strict=True):
            axis.scatter(a, b, s=110 if chosen else 36, color="#d62728" if chosen else "#1f77b4", zorder=3)
            label = f"{weight:g}" + " chosen" * chosen
            axis.annotate(
                label,
                (a, b),
                xytext=(6, 6),
                textcoords="offset points",
                color="#d62728" if chosen else "#444444",
                fontsize=8,
            )
        axis.set(xlabel="clean accuracy, %", ylabel="robust accuracy, %")
        axis.set_title(titles[which], fontsize=10)
        axis.grid(alpha=0.3)
    figure.suptitle(f"share of the robust weights; {attack}", fontsize=10)
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path)
    plt.close(figure)
    return path


@dataclass
class InterpolateArguments:
    """What `recipes/dial.py` measures between the original and the robust weights."""

    model: str = field(metadata={"help": "the robust model: a folder or a Hub id"})
    output_dir: str = field(metadata={"help": "folder for front.json, front.svg and the chosen model"})
    origin: str | None = field(
        default=None, metadata={"help": "what it was fine-tuned from; left out: what its train.json says"}
    )
    weights: list[float] = field(
        default_factory=lambda: [round(0.1 * i, 1) for i in range(11)],
        metadata={"help": "shares of the robust weights; 0 is the original, 1 the robust model"},
    )
    max_drop: float = field(
        default=5.0, metadata={"help": "points of clean accuracy below the original's that may be paid for robustness"}
    )
    choose_on: list[str] | None = field(
        default=None,
        metadata={"help": "training data the model has not seen; left out: the slice that its training held out"},
    )
    report_on: list[str] | None = field(
        default=None, metadata={"help": "test sets, measured for the picture, never for the choice"}
    )
    save: list[float] | None = field(
        default=None, metadata={"help": "points of the grid to export, beside the chosen one"}
    )
    push_to: str | None = field(
        default=None, metadata={"help": "a repository on the Hub: every exported point becomes a revision, as w0.50"}
    )
    private: bool | None = None
    overwrite: bool = False
    data_dir: str | None = None
    norm: Literal["linf", "l2"] | None = field(default=None, metadata={"help": "left out: as in training"})
    eps: str | None = field(default=None, metadata={"help": "left out: as in training"})
    attack: str = "pgd"
    attack_steps: int | None = None
    limit: int | None = field(default=None, metadata={"help": "a fixed random sample of so many pictures of each set"})
    batch_size: int = 128


@dataclass(frozen=True)
class Point:
    """One weight of the dial: Scores on the data that the choice is made on, and on test sets."""

    weight: float
    chosen_on: tuple[EvalResult, ...]
    reported: tuple[EvalResult, ...] = ()


def check_line(original: ZeroShotClassifier, robust: ZeroShotClassifier) -> None:
    """Raise ValueError for two models that no line connects: other shapes, or other numbers of normalisation."""
    shapes = [{k: tuple(v.shape) for k, v in m.model.state_dict().items()} for m in (original, robust)]
    if shapes[0] != shapes[1]:
        odd = sorted(k for k in shapes[0].keys() | shapes[1].keys() if shapes[0].get(k) != shapes[1].get(k))
        raise ValueError(
            f"the two models differ in architecture ({len(odd)} tensors, such as {odd[0]}): --origin must be what the robust model was fine-tuned from"
        )
    if not all(getattr(original, n).equal(getattr(robust, n)) for n in ("mean", "std")):
        raise ValueError(
            "the two models normalise their pictures differently: --origin must be what the robust model was fine-tuned from"
        )


def interpolate(original: ZeroShotClassifier, robust: ZeroShotClassifier, weight: float) -> ZeroShotClassifier:
    """A new model with theta = (1 - weight) theta_original + weight theta_robust, at 0 and 1 bit-equal to one of them.

    Raises:
        ValueError: two models that no line connects (`check_line`).
    """
    check_line(original, robust)
    theta0, theta1 = original.model.state_dict(), robust.model.state_dict()
    if weight in (0, 1):
        return robust.with_weights((theta0, theta1)[int(weight)])
    return robust.with_weights({name: theta0[name].lerp(theta1[name], weight) for name in theta1})


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


def run(args: InterpolateArguments) -> tuple[list[Point], Point]:
    """Measure the grid, choose, write the front, export and push the points that were asked for."""
    grid = _grid(args)
    trained = read_record(args.model, TRAINED)
    recipe = trained.get("recipe", {})
    attack = EvaluationAttack(_threat(args, recipe), args.attack, args.attack_steps)
    source, original, robust = _ends(args, trained)
    choosing = [_training(path, args) for path in args.choose_on] if args.choose_on else [_slice(args, recipe)]
    reporting = [
        open_images(DatasetSpec(p, split="test"), training=False, data_dir=args.data_dir) for p in args.report_on or ()
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
    rule = f"chosen: the most robust point whose clean accuracy on {names} is at most {args.max_drop:g} points below the original's"
    output = Path(args.output_dir)
    write_json(output / "front.json", _front(points, chosen, rule, attack, source, args))
    front(
        [
            (p.weight, *(None if not part else _summary(part) for part in (p.chosen_on, p.reported)), p is chosen)
            for p in points
        ],
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
                write_json(folder / "results" / score.file_name, score.to_json())
            write_model_card(folder)
            if args.push_to:
                address = push(
                    folder, args.push_to, revision=folder.name, private=args.private, overwrite=args.overwrite
                )
                progress(f"{folder} -> {address}")
    return points, chosen


def _grid(args: InterpolateArguments) -> list[float]:
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
        raise RecipeError(
            "--weights holds the original alone: expected shares up to 1 (the robust model), two at least"
        )
    return grid


def _threat(args: InterpolateArguments, recipe: dict) -> ThreatModel:
    """As in training, where nothing else is said."""
    norm = recipe.get("norm", "linf")
    if args.norm and args.norm != norm and not args.eps:
        raise RecipeError(f"--norm {args.norm}: say its radius with --eps, that of training is for {norm}")
    return ThreatModel(args.norm or norm, args.eps or recipe.get("eps", "1/255"))


def _ends(args: InterpolateArguments, trained: dict) -> tuple[str, ZeroShotClassifier, ZeroShotClassifier]:
    """(what the original is called, the original, the robust model). Raises where no line between them means anything."""
    recipe = trained.get("recipe", {})
    source = args.origin or recipe.get("model")
    if source is None:
        raise RecipeError(
            f"{args.model} has no {TRAINED} that says what it was fine-tuned from: name it with --origin"
        )
    original, robust = (
        load_model(source, None if args.origin else recipe.get("model_revision")),
        load_model(args.model),
    )
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


def _slice(args: InterpolateArguments, recipe: dict) -> LabelledImages:
    """The pictures that the model's own training held out."""
    if not recipe.get("held_out"):
        raise RecipeError(
            f"{args.model} held nothing out of its training data (held_out), or its {TRAINED} does not say: choosing on what it has seen would prefer what it "
            "has learned by heart; name other training pictures with --choose_on"
        )
    spec = dataset_spec(
        DataArguments(**{f.name: recipe[f.name] for f in fields(DataArguments) if f.name in recipe}),
        recipe["dataset"],
        recipe["split"],
        revision=recipe["dataset_revision"],
    )
    folder = args.data_dir or recipe["data_dir"]
    pictures = open_images(spec, training=True, data_dir=folder, on_corrupt=recipe["on_corrupt"])
    return held_out(pictures, recipe["held_out"], seed=0)[1]


def _training(path: str, args: InterpolateArguments) -> LabelledImages:
    return open_images(DatasetSpec(path), training=True, limit=args.limit, data_dir=args.data_dir)


def _measure(
    model: ZeroShotClassifier, pictures: LabelledImages, attack: EvaluationAttack, args: InterpolateArguments
) -> EvalResult:
    return evaluate(model, pictures, attack, name=args.model, limit=args.limit, batch_size=args.batch_size, probe=0)


def _summary(scores: Sequence[EvalResult]) -> dict:
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


def _front(
    points: Sequence[Point],
    chosen: Point,
    rule: str,
    attack: EvaluationAttack,
    source: str,
    args: InterpolateArguments,
) -> dict:
    return {
        "what": "clean and robust accuracy, %, of (1 - weight) original + weight robust",
        "origin": source,
        "robust": args.model,
        "attack": asdict(attack),
        "rule": rule,
        "chosen": chosen.weight,
        "points": [
            {
                "weight": p.weight,
                "chosen_on": _summary(p.chosen_on),
                "reported": _summary(p.reported) if p.reported else None,
            }
            for p in points
        ],
    }


def table(front: dict) -> str:
    """front.json as a table."""
    rows = []
    for point in front["points"]:
        parts = [part for part in (point["chosen_on"], point["reported"]) if part]
        chosen = " ← chosen" * (point["weight"] == front["chosen"])
        rows.append(
            (f"{point['weight']:.2f}{chosen}", *(f"{part[k]:.1f}" for part in parts for k in ("clean", "robust")))
        )
    test = ["test: clean %", "robust %"] if front["points"][0]["reported"] else []
    return markdown(["weight", "held out: clean %", "robust %", *test], rows)


def main(argv: list[str] | None = None) -> None:
    with exit_on_user_error("hpt-hf interpolate"):
        (args,) = parse((InterpolateArguments,), argv, positional=("model",))
        _, chosen = run(args)
    print(table(json.loads((Path(args.output_dir) / "front.json").read_text(encoding="utf-8"))))
    print(
        f"\n{place(args.output_dir, chosen.weight)} is the chosen model; {Path(args.output_dir) / 'front.svg'} shows the front."
    )
