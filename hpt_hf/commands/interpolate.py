"""`hpt-hf interpolate`: between the original and the robust weights, how much robustness for how much clean accuracy.

theta(w) = (1 - w) theta_original + w theta_robust (WiSE-FT, arXiv 2109.01903, section 3). A point is chosen by rule on training
data that the model has not seen; test sets may be measured beside it and have no say. With `--mask` the coordinates that clean
accuracy hangs on most stay the original's.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path

from hpt_hf.attacks.suite import EvaluationAttack
from hpt_hf.commands.common import ball, check_sizes, dataset_spec, load_model, on_device, open_images
from hpt_hf.commands.parser import HfArg, RecipeError, exit_on_user_error, parse
from hpt_hf.commands.train import DataArguments
from hpt_hf.data.dataset import DatasetSpec, LabelledImages
from hpt_hf.data.splits import held_out
from hpt_hf.evaluation.evaluator import evaluate
from hpt_hf.evaluation.masked_merge import masked
from hpt_hf.evaluation.result import EvalResult
from hpt_hf.evaluation.statistics import mean
from hpt_hf.models.zero_shot import ZeroShotClassifier, fingerprint
from hpt_hf.publishing.export import check_apart, export
from hpt_hf.publishing.hub import open_repo, push
from hpt_hf.publishing.model_card import MIXED, TRAINED, read_record, write_model_card
from hpt_hf.utils import markdown, progress, read_json, write_json


@dataclass
class InterpolateArguments:
    """What is measured between the original and the robust weights."""

    model: str = HfArg(help="the robust model: a folder or a Hub id")
    output_dir: str = HfArg(help="folder for front.json, front.svg and the chosen model")
    origin: str | None = HfArg(default=None, help="what it was trained from; default: train.json's")
    weights: list[float] = HfArg(
        default_factory=lambda: [i / 10 for i in range(11)],
        help="shares of the robust weights; 0 is the original, 1 the robust model",
    )
    max_drop: float = HfArg(default=5.0, help="points of clean accuracy that may be paid for robustness")
    mask: float = HfArg(default=0.0, help="share of coordinates kept, that clean accuracy hangs on")
    choose_on: list[str] | None = HfArg(default=None, help="unseen training data; default: the held-out")
    report_on: list[str] | None = HfArg(default=None, help="test sets, which have no say")
    save: list[float] | None = HfArg(default=None, help="points to export, beside the chosen one")
    push_to: str | None = HfArg(default=None, help="a repository: points become revisions, w0.50")
    private: bool | None = None
    overwrite: bool = False
    data_dir: str | None = None
    norm: str | None = HfArg(default=None, help="left out: as in training")
    eps: str | None = HfArg(default=None, help="left out: as in training")
    attack: str = "pgd"
    attack_steps: int | None = None
    limit: int | None = HfArg(default=None, help="a fixed random sample of so many images of each set")
    batch_size: int = 128


@dataclass(frozen=True)
class Point:
    """One weight: results on the data that the choice is made on, and on test sets."""

    weight: float
    chosen_on: tuple[EvalResult, ...]
    reported: tuple[EvalResult, ...] = ()

    def to_json(self) -> dict:
        reported = summarise(self.reported) if self.reported else None
        return {"weight": self.weight, "chosen_on": summarise(self.chosen_on), "reported": reported}


def summarise(results: Sequence[EvalResult]) -> dict:
    """Means over the sets; an interval where there is one set, which is where it is plain what it would mean."""
    sets, intervals = {}, {}
    for r in results:
        intervals = {"clean_interval": r.clean_interval, "robust_interval": r.interval}
        sets[r.dataset] = {"clean": r.clean, "robust": r.robust, "n": r.n} | intervals
    if len(results) > 1:
        intervals = dict.fromkeys(intervals)
    return mean(results) | intervals | {"n": sum(r.n for r in results), "sets": sets}


def check_line(original: ZeroShotClassifier, robust: ZeroShotClassifier) -> None:
    """Raise ValueError for two models that no line connects: other shapes, or other numbers of normalisation."""
    shapes = [{k: tuple(v.shape) for k, v in m.model.state_dict().items()} for m in (original, robust)]
    odd = sorted(k for k in shapes[0].keys() | shapes[1].keys() if shapes[0].get(k) != shapes[1].get(k))
    if odd:
        raise ValueError(f"the models differ in architecture ({len(odd)} tensors, such as {odd[0]}). Fix: --origin")
    if not all(getattr(original, n).equal(getattr(robust, n)) for n in ("mean", "std")):
        raise ValueError("the models normalise their images differently. Fix: --origin, what training started from")


def interpolate(original: ZeroShotClassifier, robust: ZeroShotClassifier, weight: float) -> ZeroShotClassifier:
    """A new model with theta = (1 - weight) theta_original + weight theta_robust, at 0 and 1 bit-equal to one of them."""
    check_line(original, robust)
    theta0, theta1 = original.model.state_dict(), robust.model.state_dict()
    if weight in (0, 1):
        return robust.with_weights((theta0, theta1)[int(weight)])
    return robust.with_weights({name: theta0[name].lerp(theta1[name], weight) for name in theta1})


def choose(points: Sequence[Point], max_drop: float) -> Point:
    """The most robust point whose clean accuracy is at most `max_drop` points below weight 0's; of equals the smallest weight."""
    original = next(p for p in points if p.weight == 0)
    least = mean(original.chosen_on)["clean"] - max_drop
    allowed = [p for p in points if mean(p.chosen_on)["clean"] >= least - 1e-9]
    return max(allowed, key=lambda p: (mean(p.chosen_on)["robust"], -p.weight))


def run(args: InterpolateArguments) -> tuple[list[Point], Point]:
    """Measure the grid, choose, write the front, export and push the points that were asked for."""
    grid = _grid(args)
    trained = read_record(args.model, TRAINED)
    recipe = trained.get("recipe", {})
    norm = recipe.get("norm", "linf")
    if args.norm and not args.eps and args.norm != norm:
        raise RecipeError(f"--norm {args.norm}: the radius of training is for {norm}. Fix: --eps")
    threat = ball(args.norm or norm, args.eps or recipe.get("eps", "1/255"))
    attack = EvaluationAttack(threat, args.attack, args.attack_steps)
    source, original, robust = _ends(args, trained)
    check_apart(args.output_dir, model=args.model, origin=source)
    choosing = [_open(p, args, training=True) for p in args.choose_on or ()] or [_held_out(args, trained)]
    reporting = [_open(p, args, training=False) for p in args.report_on or ()]
    if args.mask:
        robust = masked(original, robust, choosing[0], args.mask)
    if args.push_to:
        open_repo(args.push_to, private=args.private)  # what cannot be pushed should not cost the hours before it
    options = {"name": args.model, "limit": args.limit, "batch_size": args.batch_size, "probe": 0}
    points = []
    for weight in grid:
        model = on_device(interpolate(original, robust, weight))
        parts = [tuple(evaluate(model, s, attack, **options) for s in sets) for sets in (choosing, reporting)]
        points.append(Point(weight, *parts))
        named = zip(("chosen on", "reported"), parts, strict=True)
        said = ["{}: clean {clean:.1f}%, robust {robust:.1f}%".format(name, **mean(r)) for name, r in named if r]
        progress("; ".join((f"w = {weight:.2f}", *said)))
    chosen = choose(points, args.max_drop)
    names = ", ".join(s.name for s in choosing)
    rule = f"the most robust point whose clean accuracy on {names} is at most {args.max_drop:g} points below the original's"
    front = {
        "what": "clean and robust accuracy, %, of (1 - weight) original + weight robust",
        "mask": args.mask,
        **{"origin": source, "robust": args.model, "attack": asdict(attack), "rule": f"chosen: {rule}"},
        **{"chosen": chosen.weight, "points": [p.to_json() for p in points]},
    }
    write_json(Path(args.output_dir) / "front.json", front)
    draw(front, Path(args.output_dir) / "front.svg", f"{attack}, {threat}")
    for point in points:
        if point is chosen or point.weight in (args.save or ()):
            told = {"weight": point.weight, "origin": source, "robust": args.model, "mask": args.mask}
            told["rule"] = f"This point was chosen: {rule}." if point is chosen else ""
            records = {MIXED: told} | ({TRAINED: trained} if trained else {})
            _publish(args, point, interpolate(original, robust, point.weight), records)
    return points, chosen


def _publish(args: InterpolateArguments, point: Point, model: ZeroShotClassifier, records: dict) -> None:
    folder = export(model, place(args.output_dir, point.weight), records=records)
    for result in point.reported:
        write_json(folder / "results" / result.file_name, result.to_json())
    write_model_card(folder)
    if args.push_to:
        address = push(folder, args.push_to, revision=folder.name, private=args.private, overwrite=args.overwrite)
        progress(f"{folder} -> {address}")


def _grid(args: InterpolateArguments) -> list[float]:
    check_sizes(args)
    if not 0 <= args.max_drop < float("inf"):
        raise RecipeError(f"--max_drop: got {args.max_drop}, expected points of clean accuracy, at least 0")
    if not 0 <= args.mask < 1:
        raise RecipeError(f"--mask: got {args.mask}, expected a share of at least 0 and below 1")
    grid = sorted({0.0, *args.weights, *(args.save or ())})
    if not all(0 <= w <= 1 for w in grid) or len(grid) < 2:
        raise RecipeError(f"--weights and --save: got {grid}, expected shares from 0 to 1, two at least")
    return grid


def _ends(args: InterpolateArguments, trained: dict) -> tuple[str, ZeroShotClassifier, ZeroShotClassifier]:
    """(what the original is called, the original, the robust model). Raises where no line between them means anything."""
    recipe = trained.get("recipe", {})
    source = args.origin or recipe.get("model")
    if source is None:
        raise RecipeError(f"{args.model} has no {TRAINED} that says what it was fine-tuned from. Fix: --origin")
    original = load_model(source, None if args.origin else recipe.get("model_revision"))
    robust = load_model(args.model)
    weights = fingerprint(original)
    if weights == fingerprint(robust):
        raise RecipeError(f"{args.model} and {source} are the same weights: there is nothing between them")
    check_line(original, robust)
    known = trained.get("student", {}).get("fingerprint")
    if known not in (None, weights):
        raise RecipeError(f"{source} holds other weights ({weights}) than {args.model} was fine-tuned from ({known})")
    return source, original, robust


def place(output: str | Path, weight: float) -> Path:
    """Where a point is exported: `w0.50`, with more digits where it has them."""
    return Path(output) / (f"w{weight:.2f}" if round(weight, 2) == weight else f"w{weight}")


def _held_out(args: InterpolateArguments, trained: dict) -> LabelledImages:
    """The images that the model's own training held out."""
    recipe = trained.get("recipe", {})
    if not recipe.get("held_out"):
        raise RecipeError(
            f"{args.model} held nothing out of its training data. Fix: --choose_on other training images"
        )
    data = DataArguments(**{f.name: recipe[f.name] for f in fields(DataArguments) if f.name in recipe})
    spec = dataset_spec(data, data.dataset, data.split, revision=data.dataset_revision)
    images = open_images(spec, training=True, data_dir=args.data_dir or data.data_dir, on_corrupt=data.on_corrupt)
    seen, aside = held_out(images, recipe["held_out"], seed=0)
    if (digest := trained.get("decided_by", {}).get("data")) and seen.digest != digest:
        fix = "Fix: the data as they were, or --choose_on other training images"
        raise RecipeError(f"{data.dataset} is not what {args.model} was trained on. {fix}")
    return aside


def _open(path: str, args: InterpolateArguments, *, training: bool) -> LabelledImages:
    spec = DatasetSpec(path, split="train" if training else "test")
    return open_images(spec, training=training, limit=args.limit if training else None, data_dir=args.data_dir)


def draw(front: dict, path: Path, attack: str) -> None:
    """Clean against robust accuracy, one panel for each kind of data that was measured; the chosen point is marked in all."""
    import matplotlib
    from matplotlib.figure import Figure  # not pyplot, which would change the caller's backend

    titles = {"chosen_on": "training data held out, where the point is chosen", "reported": "test sets, with no say"}
    shown = [key for key in titles if front["points"][0][key]]
    figure = Figure(figsize=(5.6 * len(shown), 4.6), layout="constrained")
    axes = figure.subplots(1, len(shown), squeeze=False)
    for axis, key in zip(axes[0], shown, strict=True):
        for point in front["points"]:
            part, chosen, label = point[key], point["weight"] == front["chosen"], f"{point['weight']:g}"
            x, y = part["clean"], part["robust"]
            if part["clean_interval"]:
                axis.hlines(y, *part["clean_interval"], color="#c9d3dd", linewidth=1, zorder=0)
                axis.vlines(x, *part["robust_interval"], color="#c9d3dd", linewidth=1, zorder=0)
            axis.scatter(x, y, s=110 if chosen else 36, color="#d62728" if chosen else "#1f77b4", zorder=3)
            style = {"xytext": (6, 6), "textcoords": "offset points", "fontsize": 8}
            axis.annotate(f"{label} chosen" if chosen else label, (x, y), **style)
        line = [[point[key][name] for point in front["points"]] for name in ("clean", "robust")]
        axis.plot(*line, color="#7f9fbf", zorder=1)
        axis.set(xlabel="clean accuracy, %", ylabel="robust accuracy, %")
        axis.set_title(titles[key], fontsize=10)
        axis.grid(alpha=0.3)
    figure.suptitle(f"share of the robust weights; {attack}", fontsize=10)
    with matplotlib.rc_context({"svg.hashsalt": "hpt_hf"}):  # the same front, the same file
        figure.savefig(path, metadata={"Date": None})


def table(front: dict) -> str:
    """front.json as a table."""
    rows = []
    for point in front["points"]:
        parts = [part for part in (point["chosen_on"], point["reported"]) if part]
        mark = " ← chosen" if point["weight"] == front["chosen"] else ""
        rows.append((f"{point['weight']:.2f}{mark}", *(part[k] for part in parts for k in ("clean", "robust"))))
    test = ["test: clean %", "robust %"] if front["points"][0]["reported"] else []
    return markdown(["weight", "held out: clean %", "robust %", *test], rows)


def main(argv: list[str] | None = None) -> None:
    with exit_on_user_error("hpt-hf interpolate"):
        (args,) = parse((InterpolateArguments,), argv, positional=("model",))
        _, chosen = run(args)
    print(table(read_json(Path(args.output_dir) / "front.json")))
    front = Path(args.output_dir) / "front.svg"
    print(f"\n{place(args.output_dir, chosen.weight)} is the chosen model; {front} shows the front.")
