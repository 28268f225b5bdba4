"""The lab's data sets by name: `lab:<task>` of glyphs, and `real:<set>` from a folder of real images (Fashion-MNIST, digits, emoji).

Training and test faces, and training and test rows, never mix; one emoji vendor is kept out of pre-training as an unseen style.
"""

from __future__ import annotations

import functools
from dataclasses import replace
from pathlib import Path

import datasets
from PIL import Image

from hpt_hf.data.collator import to_rgb
from hpt_hf.data.dataset import DatasetSpec, LabelledImages, load_images, read_files
from hpt_hf.lab.glyphs import TASKS, TEMPLATE, UNATTACKABLE, task_classes, task_rows
from hpt_hf.models.zero_shot import check_classes

# What the lab fine-tunes on, `lab:letters`: 176 letters of four alphabets, as broad as Tiny-ImageNet's 200 classes; all else is unseen.
LAB_TRAINING = ("latin capitals", "latin smalls", "cyrillic capitals", "cyrillic smalls")
LAB_TRAINING += ("hebrew letters", "armenian capitals")
LAB_TRAINING_SIZE = 5_280
# Settings are chosen zero-shot, on classes that a tuning run (`lab:tuning letters`, `real:noto tuning`) leaves out of the training data: what
# fine-tuning costs on classes it never saw is invisible on more images of the classes it did see.
LAB_VALIDATION = ("lab:hebrew letters", "lab:armenian capitals")
REAL_VALIDATION = ("real:noto Animals & Nature", "real:noto Food & Drink")
# Names of some shapes and notes ("white square containing black small square") are longer than the shipped pair's 24 tokens; cutting
# them would ask about classes that nobody named, so these two tasks stay out.
TOO_LONG = ("shapes", "music")
LAB_SUITE: tuple[str, ...] = tuple(f"lab:{t}" for t in TASKS if t not in (*LAB_TRAINING, *UNATTACKABLE, *TOO_LONG))
WEIGHTS = Path(__file__).parent / "weights"
EMOJI_CATEGORIES = ("Activities", "Animals & Nature", "Flags", "Food & Drink", "Objects", "People & Body")
EMOJI_CATEGORIES += ("Smileys & Emotion", "Symbols", "Travel & Places")


@functools.cache
def lab_images(name: str, count: int, *, faces: str, seed: int = 0) -> LabelledImages:
    """`count` images of a task, or of `letters`, the fine-tuning set: an equal number of every letter of `LAB_TRAINING`.

    `tuning letters` is the same without `LAB_VALIDATION`. Drawn once in a process.
    """
    tasks = [name]
    if name in ("letters", "tuning letters"):
        tasks = [t for t in LAB_TRAINING if name == "letters" or f"lab:{t}" not in LAB_VALIDATION]
    sizes = [len(task_classes(t)) for t in tasks]
    classes, images, labels = (), [], []
    for task, size in zip(tasks, sizes, strict=True):
        for image, label in task_rows(task, count * size // sum(sizes), seed=seed, faces=faces):
            images.append(image)
            labels.append(label + len(classes))
        classes += task_classes(task)
    source = {"path": f"lab:{name}", "count": count, "faces": faces, "seed": seed}
    return LabelledImages.from_images(images, labels, classes, (TEMPLATE,), f"lab:{name}", source)


# --- real images ----------------------------------------------------------------------------------------------------


def _file(folder: str, name: str) -> Path:
    path = Path(folder) / name
    if not path.is_file():
        raise FileNotFoundError(
            f"no {path}. Fix: --data_dir must hold fashion_mnist-*.parquet, digits-*.parquet and emoji_*.parquet"
        )
    return path


def _emoji(folder: str, vendor: str) -> datasets.Dataset:
    return read_files("parquet", [_file(folder, f"emoji_{vendor}.parquet")])


def real_suite() -> tuple[str, ...]:
    """Zero-shot sets never seen in fine-tuning: two held-out splits, and an emoji vendor unseen even in pre-training."""
    whole = ("real:fashion_mnist", "real:digits", "real:twemoji categories")
    return (*whole, *(f"real:twemoji {c}" for c in EMOJI_CATEGORIES))


def real_images(name: str, folder: str, *, training: bool) -> LabelledImages:
    """`fashion_mnist`, `digits`, `noto` or `twemoji` (by name), `<vendor> categories`, `<vendor> <category>` (names within it).

    `<vendor> tuning` is all names but those of the categories in `REAL_VALIDATION`.
    """
    source = {"path": f"real:{name}", "data_dir": str(folder)}
    if name in ("fashion_mnist", "digits"):
        split = "train" if training else "test"
        images = load_images(DatasetSpec(str(_file(folder, f"{name}-{split}.parquet")), templates=(TEMPLATE,)))
        spoken = "the handwritten digit {}" if name == "digits" else "{}"
        images = images.with_classes([spoken.format(c.lower()) for c in images.classes])
        return replace(images, name=f"real:{name}", source={**source, "split": split})
    vendor, _, subset = name.partition(" ")
    if vendor not in ("noto", "twemoji"):
        raise ValueError(
            f"no real set is called {name!r}; there are fashion_mnist, digits, noto, twemoji, "
            "'<vendor> categories' and '<vendor> <category>'"
        )
    data = _emoji(folder, vendor)
    categories, labels = data.features["category"].names, data["category"][:]
    if subset == "categories":
        classes = tuple(c.lower() for c in categories)
    else:
        wanted = {subset} if subset else set(categories)
        if subset == "tuning":
            wanted = {c for c in categories if f"real:noto {c}" not in REAL_VALIDATION}
        elif not wanted <= set(categories):
            raise ValueError(f"no category {subset!r} among the emoji; there are {', '.join(categories)}")
        data = data.select([i for i, c in enumerate(labels) if categories[c] in wanted])
        captions = data["caption"][:]
        classes = tuple(dict.fromkeys(captions))
        labels = [classes.index(c) for c in captions]
    check_classes(classes)
    return LabelledImages.from_images(data, labels, classes, (TEMPLATE,), f"real:{name}", source)


def captioned_rows(folder: str | Path) -> list[tuple[Image.Image, tuple[str, ...]]]:
    """(image, its captions) to pre-train on: Fashion-MNIST and digits of the training splits, and Noto's emoji."""
    templates = ("{}", TEMPLATE, "a picture of {}")
    rows = []
    for name in ("fashion_mnist", "digits"):
        images = real_images(name, str(folder), training=True)
        for row in images:
            rows.append((row["image"], tuple(t.format(images.classes[row["label"]]) for t in templates)))
    data = _emoji(str(folder), "noto")
    categories, kinds = (data.features[c].names for c in ("category", "subcategory"))
    for row in data:
        names = tuple(t.format(row["caption"]) for t in templates)
        groups = (categories[row["category"]], kinds[row["subcategory"]].replace("-", " "))
        rows += [(to_rgb(row["image"]), (*names, *names, *(TEMPLATE.format(g.lower()) for g in groups)))] * 12
    return rows
