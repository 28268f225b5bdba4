"""What several commands need: models and data sets by name, on this machine's device."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from hpt_hf.attacks.threat_model import ThreatModel
from hpt_hf.commands.parser import HfArg, RecipeError
from hpt_hf.data.class_names import read_classes
from hpt_hf.data.dataset import DatasetSpec, LabelledImages, load_images
from hpt_hf.data.zero_shot_sets import SETS, open_set
from hpt_hf.lab.datasets import LAB_SUITE, LAB_TRAINING_SIZE, WEIGHTS, lab_images, real_images, real_suite
from hpt_hf.lab.photographs import PHOTO_SUITE, photo_images
from hpt_hf.models.families import FAMILIES, Family
from hpt_hf.models.zero_shot import ZeroShotClassifier
from hpt_hf.utils import did_you_mean, load_object, processes, progress


@dataclass
class ImageArguments:
    """Which labelled images, how many, under which attack's ball and protocol: what all that measures asks."""

    output_dir: str = HfArg(help="folder for results/*.json, report.md and report.html")
    dataset: list[str] | None = HfArg(
        default=None,
        help="names of the 17 zero-shot sets, parquet files, image folders, shards, Hub ids, lab:<task>, real:<set> or photos:<set>",
    )
    suite: Literal["lab", "real", "photographs", "zero-shot-17"] | None = HfArg(
        default=None, help="a named list of zero-shot sets"
    )
    data_dir: str | None = HfArg(default=None, help="the folder of real:<set> and photos:<set>")
    split: str = "test"
    image_column: str | None = None
    label_column: str | None = None
    classes: list[str] | None = None
    classes_file: str | None = None
    templates: list[str] | None = None
    on_corrupt: Literal["error", "skip"] = "error"
    norm: Literal["linf", "l2"] = "linf"
    protocol: Literal["input", "native"] = HfArg(
        default="input", help="eps counts on the model's pixels, or on the image's own"
    )
    limit: int | None = HfArg(default=None, help="a fixed random sample of so many images of each set")
    batch_size: int = 128
    seed: int = 0


def load_model(source: str, revision: str | None = None) -> ZeroShotClassifier:
    """`lab:student`, `lab:proxy`: shipped; `my_file.py:my_family:FOLDER`: of a family of one's own; a folder or Hub id."""
    place: str | Path = source
    if source.count(":") == 2:
        path, _, place = source.rpartition(":")
        own = load_object(path, Family)
        FAMILIES[own.model_class.config_class.model_type] = own
    elif source.startswith("lab:"):
        place = WEIGHTS / source[4:]
    return ZeroShotClassifier.from_pretrained(place, revision=revision)


def dataset_spec(args, path: str, split: str, *, revision: str | None = None) -> DatasetSpec:
    """What the data flags say of one path."""
    if args.classes and args.classes_file:
        raise RecipeError("both --classes and --classes_file name the classes: give one of them")
    classes = read_classes(args.classes_file) if args.classes_file else tuple(args.classes) if args.classes else None
    columns = {"image": args.image_column, "label": args.label_column}
    templates = tuple(args.templates) if args.templates else None
    return DatasetSpec(path, split, revision, classes=classes, templates=templates, **columns)


def on_device(model: ZeroShotClassifier) -> ZeroShotClassifier:
    """The model where this process computes, with the attention that is fastest there: on a CPU the plain one."""
    device = processes().device
    if model.family.attention == "sdpa":
        model.model.set_attn_implementation("eager" if device.type == "cpu" else "sdpa")
    return model.to(device)


def ball(norm: str, eps: str) -> ThreatModel:
    """What a recipe attacks within. Raises RecipeError for a radius of 0, in which nothing is attacked."""
    threat = ThreatModel(norm, eps)
    if threat.radius == 0:
        raise RecipeError(f"--eps: got {eps}, expected more than 0: without a ball there is no attack")
    return threat


def check_sizes(args) -> None:
    """Raise RecipeError for a number of images that cannot be."""
    for flag in ("limit", "batch_size"):
        if (value := getattr(args, flag)) is not None and value < 1:
            raise RecipeError(f"--{flag}: got {value}, expected at least 1 image")


def suite_names(name: str) -> tuple[str, ...]:
    """The sets of a suite, or the one set that is named."""
    suites = {"lab": LAB_SUITE, "real": real_suite(), "photographs": PHOTO_SUITE, "zero-shot-17": tuple(SETS)}
    return suites.get(name, (name,))


def open_sets(args: ImageArguments) -> list[LabelledImages]:
    """What --dataset or --suite names, all opened before the first is attacked: a mistake should not cost hours."""
    if bool(args.dataset) == bool(args.suite):
        raise RecipeError("say what to evaluate on: --dataset PATH … or --suite lab, one of them")
    check_sizes(args)
    paths = args.dataset or suite_names(args.suite)
    if args.suite and args.protocol == "native":
        without = [p for p in paths if p in SETS and SETS[p].native is None]
        paths = [p for p in paths if p not in without]
        if without:
            progress(f"left out, since the protocol 'native' has no known source for it: {', '.join(without)}")
    # One process after the other: what the first puts into the cache the others find there.
    with processes().main_process_first():
        return [_open(args, path) for path in paths]


def _open(args: ImageArguments, path: str) -> LabelledImages:
    named = path in SETS and not Path(path).exists()
    asked = ("classes", "classes_file", "templates", "image_column", "label_column")
    given = ", ".join(f"--{name}" for name in asked if getattr(args, name))
    if given and (named or path.startswith(("lab:", "real:", "photos:"))):
        raise RecipeError(f"{path} comes with its own classes and prompts: leave out {given}")
    if named:
        return open_set(path, args.protocol, on_corrupt=args.on_corrupt)
    if not Path(path).exists() and "/" not in path and ":" not in path:
        there = f"there are {', '.join(SETS)}, and lab:<task>, real:<set>, photos:<set>"
        near = did_you_mean(path, (*SETS, *LAB_SUITE, *real_suite(), *PHOTO_SUITE), there)
        raise RecipeError(f"no data at {path}: no file or folder, and no set of that name{near}")
    spec = dataset_spec(args, path, args.split)
    return open_images(spec, training=False, limit=args.limit, data_dir=args.data_dir, on_corrupt=args.on_corrupt)


def reopen(source: dict, *, data_dir: str | None = None, on_corrupt: str = "error") -> LabelledImages:
    """The images of a result again, from its `source`; what lies there no more is looked for by name in `data_dir`.

    Raises:
        ValueError, OSError: they are not there any more.
    """
    try:
        if "set" in source:
            return open_set(source["set"], source["protocol"], revision=source["revision"], on_corrupt=on_corrupt)
        path, folder = source["path"], data_dir or source.get("data_dir")
        if path.startswith("lab:"):
            return lab_images(path[4:], source["count"], faces=source["faces"], seed=source["seed"])
        if path.startswith(("real:", "photos:")):
            return open_images(DatasetSpec(path), training=source.get("split") == "train", data_dir=folder)
        if data_dir and not Path(path).exists() and (moved := Path(data_dir) / Path(path).name).exists():
            path = str(moved)
        spec = {k: v for k, v in source.items() if k != "limit"} | {"path": path}
        return open_images(DatasetSpec(**spec), training=False, on_corrupt=on_corrupt)
    except (KeyError, TypeError, AttributeError) as error:  # a file can say anything
        raise ValueError(f"the result does not say where its images came from ({error!r} in {source})") from error


def open_images(
    spec: DatasetSpec,
    *,
    training: bool,
    limit: int | None = None,
    data_dir: str | None = None,
    on_corrupt: str = "error",
) -> LabelledImages:
    """Any data set a recipe can name: `lab:…`, `real:…`, `photos:…`, or whatever `hpt_hf.data.dataset.load_images` takes."""
    kind, _, name = spec.path.partition(":")
    if kind == "lab" and name:
        if training:
            return lab_images(name, limit or LAB_TRAINING_SIZE, faces="train", seed=1)
        return lab_images(name, limit or 500, faces="test", seed=2)
    if kind in ("real", "photos") and name:
        if data_dir is None:
            raise ValueError(f"{spec.path} lies in a folder of real images: give it with --data_dir")
        opened = real_images if kind == "real" else photo_images
        return opened(name, data_dir, training=training)
    return load_images(spec, on_corrupt=on_corrupt)
