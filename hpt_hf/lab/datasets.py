"""The lab's data sets by name: `lab:<task>` of glyphs, and `real:<set>` from a folder of real pictures (Fashion-MNIST, digits, emoji).

Training and test faces, and training and test rows, never mix; one emoji vendor is kept out of pre-training as an unseen style.
"""

from __future__ import annotations

import functools
from pathlib import Path

from hpt_hf.data.collator import to_rgb
from hpt_hf.data.dataset import DatasetSpec, LabelledImages, load_images
from hpt_hf.lab.glyphs import TASKS, TEMPLATE, UNATTACKABLE, task_classes, task_rows
from hpt_hf.models.zero_shot import check_classes

# What the lab fine-tunes on, `lab:letters`: 176 letters of four alphabets, as broad as Tiny-ImageNet's 200 classes; all else is unseen.
LAB_TRAINING = (
    "latin capitals",
    "latin smalls",
    "cyrillic capitals",
    "cyrillic smalls",
    "hebrew letters",
    "armenian capitals",
)


LAB_TRAINING_SIZE = 5_280


# Settings are chosen zero-shot, on classes that a tuning run (`lab:tuning letters`, `real:noto tuning`) leaves out of the training data: what
# fine-tuning costs on classes it never saw is invisible on more pictures of the classes it did see.
LAB_VALIDATION = ("lab:hebrew letters", "lab:armenian capitals")


REAL_VALIDATION = ("real:noto Animals & Nature", "real:noto Food & Drink")


# Names of some shapes and notes ("white square containing black small square") are longer than the shipped pair's 24 tokens; cutting
# them would ask about classes that nobody named, so these two tasks stay out.
TOO_LONG = ("shapes", "music")


LAB_SUITE: tuple[str, ...] = tuple(f"lab:{t}" for t in TASKS if t not in (*LAB_TRAINING, *UNATTACKABLE, *TOO_LONG))


WEIGHTS = Path(__file__).parent / "weights"


EMOJI_CATEGORIES = (
    "Activities",
    "Animals & Nature",
    "Flags",
    "Food & Drink",
    "Objects",
    "People & Body",
    "Smileys & Emotion",
    "Symbols",
    "Travel & Places",
)


class _Rows:
    """(image, label) pairs as rows."""

    def __init__(self, pairs):
        self.images = [image for image, _ in pairs]
        self.labels = [label for _, label in pairs]

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> dict:
        return {"image": self.images[index], "label": self.labels[index]}


@functools.cache
def _drawn(task: str, count: int, seed: int, faces: str) -> list:
    """Drawn once in a process: the methods that are compared train on the same pictures."""
    return task_rows(task, count, seed=seed, faces=faces)


def lab_images(name: str, count: int, *, faces: str, seed: int = 0) -> LabelledImages:
    """`count` pictures of a task, or of `letters`, the fine-tuning set: an equal number of every letter of `LAB_TRAINING`.

    `tuning letters` is the same without `LAB_VALIDATION`.
    """
    if name in ("letters", "tuning letters"):
        tasks = [t for t in LAB_TRAINING if name == "letters" or f"lab:{t}" not in LAB_VALIDATION]
        classes, pairs = (), []
        total = sum(len(task_classes(t)) for t in tasks)
        for task in tasks:
            rows = _drawn(task, count * len(task_classes(task)) // total, seed, faces)
            pairs += [(image, label + len(classes)) for image, label in rows]
            classes += task_classes(task)
    else:
        classes, pairs = task_classes(name), _drawn(name, count, seed, faces)
    source = {"path": f"lab:{name}", "count": count, "faces": faces, "seed": seed}
    return LabelledImages(_Rows(pairs), classes, (TEMPLATE,), f"lab:{name}", source)


# --- real pictures ----------------------------------------------------------------------------------------------------


def _file(folder: str, name: str) -> Path:
    path = Path(folder) / name
    if not path.is_file():
        raise FileNotFoundError(
            f"no {path}: --data_dir must hold fashion_mnist-*.parquet, digits-*.parquet and emoji_*.parquet"
        )
    return path


@functools.cache
def _emoji(folder: str, vendor: str):
    import datasets

    path = _file(folder, f"emoji_{vendor}.parquet")
    return datasets.load_dataset("parquet", data_files=str(path), split="train")


def real_suite() -> tuple[str, ...]:
    """Zero-shot sets never seen in fine-tuning: two held-out splits, and an emoji vendor unseen even in pre-training."""
    return (
        "real:fashion_mnist",
        "real:digits",
        "real:twemoji categories",
        *(f"real:twemoji {c}" for c in EMOJI_CATEGORIES),
    )


def real_images(name: str, folder: str, *, training: bool) -> LabelledImages:
    """`fashion_mnist`, `digits`, `noto` or `twemoji` (by name), `<vendor> categories`, `<vendor> <category>` (names within it).

    `<vendor> tuning` is all names but those of the categories in `REAL_VALIDATION`.
    """
    if name in ("fashion_mnist", "digits"):
        split = "train" if training else "test"
        path = _file(folder, f"{name}-{split}.parquet")
        pictures = load_images(DatasetSpec(str(path), templates=(TEMPLATE,)))
        pictures.name = f"real:{name}"
        pictures.source = {"path": f"real:{name}", "split": split, "data_dir": str(folder)}
        pictures.classes = tuple(_spoken(name, c) for c in pictures.classes)
        return pictures
    vendor, _, subset = name.partition(" ")
    if vendor not in ("noto", "twemoji"):
        raise ValueError(
            f"no real set is called {name!r}; there are fashion_mnist, digits, noto, twemoji, '<vendor> categories' and '<vendor> <category>'"
        )
    table = _emoji(str(folder), vendor)
    categories = table.features["category"].names
    if subset == "categories":
        classes, pairs = tuple(c.lower() for c in categories), [(r["image"], r["category"]) for r in table]
    else:
        if subset == "tuning":
            wanted = {c for c in categories if f"real:noto {c}" not in REAL_VALIDATION}
        elif subset and subset not in categories:
            raise ValueError(f"no category {subset!r} among the emoji; there are {', '.join(categories)}")
        else:
            wanted = {subset} if subset else set(categories)
        rows = [(r["image"], r["caption"]) for r in table if categories[r["category"]] in wanted]
        classes = tuple(dict.fromkeys(caption for _, caption in rows))
        index = {c: i for i, c in enumerate(classes)}
        pairs = [(image, index[caption]) for image, caption in rows]
    check_classes(classes)
    source = {"path": f"real:{name}", "data_dir": str(folder)}
    return LabelledImages(
        _Rows([(to_rgb(i), label) for i, label in pairs]), classes, (TEMPLATE,), f"real:{name}", source
    )


def captioned_rows(folder: str | Path):
    """(picture, its captions) to pre-train on: Fashion-MNIST and digits of the training splits, and Noto's emoji. Twemoji stays unseen."""
    templates = ("{}", TEMPLATE, "a picture of {}")
    rows = []
    for name in ("fashion_mnist", "digits"):
        pictures = real_images(name, str(folder), training=True)
        rows += [
            (r["image"], tuple(t.format(pictures.classes[r["label"]]) for t in templates))
            for r in (pictures[i] for i in range(len(pictures)))
        ]
    table = _emoji(str(folder), "noto")
    categories, kinds = (table.features[c].names for c in ("category", "subcategory"))
    for r in table:
        names = tuple(t.format(r["caption"]) for t in templates)
        groups = (categories[r["category"]], kinds[r["subcategory"]].replace("-", " "))
        rows += [(to_rgb(r["image"]), (*names, *names, *(TEMPLATE.format(g.lower()) for g in groups)))] * 12
    return rows


def _spoken(name: str, label: str) -> str:
    return f"the handwritten digit {label}" if name == "digits" else label.lower()
