"""Recipes: a flat YAML file becomes a command line, the real command line is appended, and one parser checks it all.

Read as typed text every value is validated (YAML alone keeps `2e-5` a string and lets a typo in a choice through); an unknown key is an
error that names the nearest one. The seam to yaml and argparse.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import yaml
from transformers import HfArgumentParser, TrainingArguments

from hpt_hf.words import did_you_mean

METHODS = ("hpt", "hpt_gpd", "ga", "anchor_clean", "tecoa", "fare", "pmg_aft")
Method = Literal["hpt", "hpt_gpd", "ga", "anchor_clean", "tecoa", "fare", "pmg_aft"]


class RecipeError(ValueError):
    """A recipe or command line that cannot be run; the message says which key, what was given and what was expected."""


@dataclass
class DataArguments:
    """Which pictures, which classes."""

    dataset: str = field(metadata={"help": "Hub id, parquet file, image folder, lab:<task>, or real:<set> with --data_dir"})
    dataset_split: str = "train"
    dataset_revision: str | None = None
    data_dir: str | None = field(default=None, metadata={"help": "the folder that real:<set> lies in"})
    image_column: str | None = None
    label_column: str | None = None
    classes: list[str] | None = field(default=None, metadata={"help": "class names in label order"})
    classes_file: str | None = field(default=None, metadata={"help": "class names, one a line, or a JSON list"})
    templates: list[str] | None = field(
        default=None, metadata={"help": "prompts with {} for the class name; several make an ensemble"}
    )
    on_corrupt: Literal["error", "skip"] = "error"
    streaming: bool = field(
        default=False, metadata={"help": "read a Hub id or parquet files as they come, nothing is unpacked to disk"}
    )
    pictures: int | None = field(
        default=None, metadata={"help": "streaming: how many there are, where the data set does not say"}
    )


@dataclass
class MethodArguments:
    """The method: objective, attack, schedule. `learning_rate`, `num_train_epochs` and `warmup_steps` are the Trainer's own."""

    method: Method
    model_name_or_path: str = field(metadata={"help": "the student: a folder or a Hub id"})
    proxy_name_or_path: str | None = field(
        default=None, metadata={"help": "a vanilla CLIP of another architecture (hpt, hpt_gpd, ga)"}
    )
    model_revision: str | None = None
    proxy_revision: str | None = None
    norm: Literal["linf", "l2"] = "linf"
    eps: str = field(default="1/255", metadata={"help": "radius of the ball as a fraction of the pixel range"})
    attack_steps: int = 2
    attack_step_size: str | None = field(
        default=None,
        metadata={
            "help": "a fraction of the pixel range, 2/255, or of the radius, 1.25 eps; left out: the whole radius, as in the paper"
        },
    )
    attack_random_start: bool = field(default=True, metadata={"help": "begin at a random point of the ball; false: at the image"})
    attack_on: Literal["student", "proxy"] = "student"
    kl_direction: Literal["forward", "reverse"] = "forward"
    temperature: float = 1.0
    ga_epochs: float = field(default=1.0, metadata={"help": "hpt_gpd: epochs of the generalization-anchored warm-up"})
    ga_learning_rate: float | None = field(
        default=None, metadata={"help": "hpt_gpd: its rate; left out: learning_rate / 1000, the paper's ratio"}
    )
    ema: float = field(default=0.9, metadata={"help": "hpt_gpd: decay of the moving average that becomes the pivot"})
    pull: float = field(default=0.5, metadata={"help": "hpt_gpd: share of the student kept at each pull to the pivot"})
    interval: int | None = field(
        default=None, metadata={"help": "hpt_gpd: steps between averages and pulls; left out: one epoch"}
    )
    restart: bool = field(default=True, metadata={"help": "hpt_gpd: the second stage begins from the vanilla weights"})
    held_out: float = field(default=0.0, metadata={"help": "share of the training data kept aside to choose settings on"})
    resume: bool = field(
        default=False, metadata={"help": "go on from the last whole checkpoint in output_dir; if there is none, begin"}
    )
    license: str | None = field(
        default=None,
        metadata={"help": "of the weights that come out, for the model card, as the Hub writes it: mit, apache-2.0 …"},
    )


@dataclass
class RecipeTrainingArguments(TrainingArguments):
    """transformers' TrainingArguments with the authors' optimizer as default: SGD with momentum 0.9, no clipping."""

    optim: str = "sgd"
    optim_args: str | None = "momentum=0.9"
    max_grad_norm: float = 0.0  # the authors do not clip, and transformers' default of 1 would change what a rate means
    learning_rate: float = 6e-5
    per_device_train_batch_size: int = 64
    per_device_eval_batch_size: int = 64
    logging_steps: float = 20
    save_strategy: str = "no"
    dataloader_drop_last: bool = True
    tf32: bool | None = False  # torch_compile would turn it on, for the attack as well
    ddp_find_unused_parameters: bool | None = False  # all trained weights have gradients; a search costs a walk through the graph
    hub_strategy: str = "end"  # the finished model; every_save: each checkpoint on its way, too
    hub_overwrite: bool = field(default=False, metadata={"help": "with --push_to_hub: replace a model that the repository holds"})


@dataclass
class EstimateArguments:
    """What `recipes/estimate.py` asks beside a recipe."""

    probe_steps: int = field(default=40, metadata={"help": "steps of each phase that are run and timed"})


@dataclass
class PictureArguments:
    """Which labelled pictures, how many, under which attack's ball and protocol: what all that measures asks."""

    output: str = field(metadata={"help": "folder for scores/*.json, report.md and report.html"})
    data: list[str] | None = field(
        default=None,
        metadata={"help": "names of hpt_hf.sets, parquet files, image folders, shards, Hub ids, lab:<task> or real:<set>"},
    )
    suite: Literal["lab", "real", "zero-shot-17"] | None = field(
        default=None, metadata={"help": "a named list of zero-shot sets"}
    )
    data_dir: str | None = field(default=None, metadata={"help": "the folder of the real suite"})
    split: str = "test"
    image_column: str | None = None
    label_column: str | None = None
    classes: list[str] | None = None
    classes_file: str | None = None
    templates: list[str] | None = None
    on_corrupt: Literal["error", "skip"] = "error"
    norm: Literal["linf", "l2"] = "linf"
    protocol: Literal["input", "native"] = field(
        default="input", metadata={"help": "eps counts on the model's pixels, or on the picture's own"}
    )
    limit: int | None = field(default=None, metadata={"help": "a fixed random sample of so many pictures of each set"})
    batch_size: int = 128
    seed: int = 0


@dataclass
class EvaluateArguments(PictureArguments):
    """What `recipes/evaluate.py` measures."""

    model: str = field(default="", metadata={"help": "folder or Hub id"})
    model_revision: str | None = None
    attacks: list[str] = field(
        default_factory=lambda: ["pgd"],
        metadata={"help": "pgd, cw, apgd-ce, apgd-t, square, or standard: the last three, worst case"},
    )
    steps: int | None = field(
        default=None, metadata={"help": "of every attack; left out: PGD and CW 20, APGD 100, Square 5000, in standard 500"}
    )
    eps: list[str] = field(default_factory=lambda: ["1/255"], metadata={"help": "radii; several draw a curve"})
    target: str | None = field(
        default=None, metadata={"help": "the class every picture shall be taken for; left out: any wrong one"}
    )
    probe: int = field(default=24, metadata={"help": "pictures that the checks look at; 0: no checks"})
    baseline: str | None = field(
        default=None,
        metadata={"help": "an undefended model the attack must break; left out: what the model was trained from, if known"},
    )


@dataclass
class TransferArguments(PictureArguments):
    """What `recipes/transfer.py` measures: every model on pictures attacked for others."""

    models: list[str] = field(default_factory=list, metadata={"help": "folders or Hub ids"})
    student: str | None = field(
        default=None, metadata={"help": "pre-flight: attack only for this one, and rank the models as its proxies"}
    )
    steps: int | None = field(default=None, metadata={"help": "of PGD; left out: 20"})
    eps: str = "1/255"


@dataclass
class PushArguments:
    """What `recipes/push.py` sends, and where to."""

    model: str = field(metadata={"help": "the folder"})
    repo_id: str = field(metadata={"help": "owner/name on the Hub, or name of one's own"})
    revision: str | None = field(default=None, metadata={"help": "a branch, made if there is none; left out: main"})
    private: bool | None = field(default=None, metadata={"help": "of a new repository; left out: what the account says"})
    overwrite: bool = field(default=False, metadata={"help": "replace another model that stands there"})
    scores: str | None = field(
        default=None, metadata={"help": "folder of Scores measured on this model, to go along and into the card"}
    )
    message: str = "Robust CLIP, exported by hpt_hf"


@dataclass
class ConvertArguments:
    """What `recipes/convert.py` reads and writes."""

    model: str = field(metadata={"help": "folder or Hub id; with --base also a file of weights, in others' names"})
    output: str = field(metadata={"help": "the folder to write"})
    to: Literal["transformers", "open_clip", "vision_tower"] = "transformers"
    base: str | None = field(
        default=None,
        metadata={"help": "the CLIP whose text tower, processor and tokenizer are taken where the checkpoint has none"},
    )
    model_revision: str | None = None
    dtype: Literal["float32", "bfloat16", "float16"] = field(default="float32", metadata={"help": "of the stored weights"})
    max_shard_size: str = field(default="5GB", metadata={"help": "larger weights are split into several files"})
    image_size: int | None = field(default=None, metadata={"help": "vision_tower: in pixels, as 336; left out: its own"})
    license: str | None = field(default=None, metadata={"help": "of the weights, for the model card: mit, apache-2.0 …"})


@dataclass
class DialArguments:
    """What `recipes/dial.py` measures between the original and the robust weights."""

    model: str = field(metadata={"help": "the robust model: a folder or a Hub id"})
    output: str = field(metadata={"help": "folder for front.json, front.svg and the chosen model"})
    origin: str | None = field(default=None, metadata={"help": "what it was fine-tuned from; left out: what its train.json says"})
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
    save: list[float] | None = field(default=None, metadata={"help": "points of the grid to export, beside the chosen one"})
    push_to: str | None = field(
        default=None, metadata={"help": "a repository on the Hub: every exported point becomes a revision, as w0.50"}
    )
    private: bool | None = None
    overwrite: bool = False
    data_dir: str | None = None
    norm: Literal["linf", "l2"] | None = field(default=None, metadata={"help": "left out: as in training"})
    eps: str | None = field(default=None, metadata={"help": "left out: as in training"})
    attack: str = "pgd"
    steps: int | None = None
    limit: int | None = field(default=None, metadata={"help": "a fixed random sample of so many pictures of each set"})
    batch_size: int = 128


@dataclass
class VerifyArguments:
    """What `recipes/verify.py` measures again."""

    model: str = field(metadata={"help": "folder or Hub id, with its Scores in scores/"})
    model_revision: str | None = None
    scores: str | None = field(default=None, metadata={"help": "folder of Score files; left out: scores/ beside the model"})
    data_dir: str | None = field(default=None, metadata={"help": "the folder that the Scores' files and folders lie in now"})
    limit: int | None = field(default=None, metadata={"help": "only so many of the Scores' pictures, at random"})
    seed: int | None = field(default=None, metadata={"help": "other random starts than the Scores'"})
    batch_size: int = 128


@dataclass
class DemoArguments:
    """What `recipes/demo.py` shows, and to whom."""

    models: list[str] | None = field(
        default=None, metadata={"help": "robust models: folders or Hub ids; left out: outputs/quickstart/model"}
    )
    vanilla: str = field(default="lab:student", metadata={"help": "the undefended model they are compared with"})
    port: int | None = field(default=None, metadata={"help": "left out: the first free one from 7860 on"})
    host: str = field(default="127.0.0.1", metadata={"help": "0.0.0.0 shows the page to the whole network"})
    share: bool = field(
        default=False, metadata={"help": "a public link through gradio's servers: whoever has it computes on this machine"}
    )


# What a recipe is parsed into.
RECIPE = (DataArguments, MethodArguments, RecipeTrainingArguments)


@contextmanager
def mistakes_in_a_line(script: str) -> Iterator[None]:
    """Exit 1 with one line for a mistake in recipe, data or model (OSError: also what the Hub's client raises); everything else is a traceback."""
    try:
        yield
    except (ValueError, OSError, FloatingPointError) as error:
        sys.exit(f"{script}: {' '.join(str(error).split())}")


def parse(types: tuple[type, ...], argv: list[str] | None = None, *, positional: tuple[str, ...] = ()):
    """`--config recipe.yaml` and flags -> one instance of each type; flags win over the recipe.

    Args:
        positional: keys whose values may also stand first, without their names.

    Raises:
        RecipeError: missing file, unknown key, a value that does not fit.
    """
    argv = list(sys.argv[1:] if argv is None else argv)
    for place, name in enumerate(positional):
        if len(argv) > 2 * place and not argv[2 * place].startswith("-"):
            argv.insert(2 * place, f"--{name}")
        else:
            break
    argv = [part for flag in argv for part in (flag.split("=", 1) if flag.startswith("--config=") else [flag])]
    # Abbreviations are off: with them, a mistyped key is taken for a longer one that begins the same way.
    parser = HfArgumentParser(types, allow_abbrev=False, prog=Path(sys.argv[0]).name)
    known = {name.lstrip("-") for name in parser._option_string_actions}
    recipe: list[str] = []
    while "--config" in argv:
        at = argv.index("--config")
        if at + 1 == len(argv):
            raise RecipeError("--config needs the path of a recipe")
        recipe += _recipe_to_argv(Path(argv[at + 1]), known)
        del argv[at : at + 2]
    for flag in argv:
        if flag.startswith("--") and (name := flag[2:].split("=")[0]) not in known:
            raise RecipeError(_unknown(f"--{name}", name, known))
    if "-h" in argv or "--help" in argv:
        parser.parse_args(["--help"])
    parser.error = _fail  # type: ignore[method-assign]
    parsed = parser.parse_args_into_dataclasses(recipe + argv, return_remaining_strings=True, look_for_args_file=False)
    if parsed[-1]:
        raise RecipeError(f"not understood: {' '.join(parsed[-1])}")
    return parsed[:-1]


def _fail(message: str):
    raise RecipeError(message)


def _unknown(shown: str, name: str, known: set[str]) -> str:
    return f"unknown key {shown}{did_you_mean(name, known, 'see --help for the keys there are')}"


def _recipe_to_argv(path: Path, known: set[str]) -> list[str]:
    if not path.is_file():
        raise RecipeError(f"no recipe at {path}")
    try:
        recipe = yaml.safe_load(path.read_text(encoding="utf-8"))
    except yaml.YAMLError as error:
        raise RecipeError(f"{path} is not YAML: {error}") from None
    if not isinstance(recipe, dict):
        raise RecipeError(f"{path} must be a flat list of `key: value` lines, it is a {type(recipe).__name__}")
    argv: list[str] = []
    for key, value in recipe.items():
        if key not in known:
            raise RecipeError(_unknown(f"{key!r} in {path}", str(key), known))
        if value is None:
            continue
        if isinstance(value, dict):
            raise RecipeError(f"{key!r} in {path} is nested: recipes are flat")
        argv += [f"--{key}", *(str(v) for v in (value if isinstance(value, list) else [value]))]
    return argv
