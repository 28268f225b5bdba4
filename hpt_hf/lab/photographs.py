"""The photographs' world: `photos:<set>` from a folder of the field's own sets (Tiny-ImageNet, CIFAR-10, Flickr8k … at 28 to 96 px).

Models are pre-trained on Tiny-ImageNet's training images by name, synonym and kind, and on Flickr8k's captions; every other set is zero-shot.
"""

from __future__ import annotations

from pathlib import Path

import datasets
from PIL import Image

from hpt_hf.data.collator import to_rgb
from hpt_hf.data.dataset import LabelledImages, read_files
from hpt_hf.models.zero_shot import TEMPLATE
from hpt_hf.utils import did_you_mean, read_json

# The kinds that Tiny-ImageNet's classes are asked for by, each class by the first of these in its chain of hypernyms.
GROUPS = ("dog", "feline", "primate", "hoofed mammal", "bird", "amphibian", "reptile", "insect", "arachnid")
GROUPS += ("sea creature", "food", "clothing", "vehicle", "building", "structure", "container", "device", "furniture")
GROUPS += ("landscape", "sports equipment")
SETS = ("cifar10", "imagenette", "caltech101", "food101", "flowers102", "gtsrb", "ucmerced", "grocery", "dtd10")
SETS += ("stanford_cars", "mnist")
DOMAINS = ("photo", "art painting", "cartoon", "sketch")
# Quarters of Tiny-ImageNet's classes: two to train on, one to choose settings on, one that neither has met.
QUARTERS = {"": (0, 1, 2, 3), "narrow": (0,), "seen": (0, 2), "held out": (1,), "unseen": (3,)}
PHOTO_VALIDATION = ("photos:tiny_imagenet held out",)
# What the student of docs/lab.md reads at least three times as well as chance.
PHOTO_SUITE = tuple(f"photos:tiny_imagenet{part}" for part in (" unseen", " groups", "")) + ("photos:caltech101",)


def _rows(folder: str, name: str) -> datasets.Dataset:
    path = Path(folder) / f"{name}.parquet"
    if not path.is_file():
        raise FileNotFoundError(
            f"no {path}: expected the folder of the photographs' world. Fix: --data_dir (docs/lab.md)"
        )
    return read_files("parquet", [path])


def captioned_photographs(folder: str) -> list[tuple[Image.Image, tuple[str, ...]]]:
    """(image, its captions) to pre-train on: Tiny-ImageNet's and Flickr8k's training images."""
    kinds = read_json(Path(folder) / "tiny_imagenet_hypernyms.json")
    rows = []
    for row in _rows(folder, "tiny_imagenet-train"):
        kind = kinds[row["wnid"]]
        name, above = kind["name"], kind["hypernyms"]
        names = (name, TEMPLATE.format(name), f"a photo of a {name}", f"a {name}, a kind of {above[0]}")
        others = tuple(TEMPLATE.format(other) for other in (*kind["synonyms"][:2], *above))
        rows.append((to_rgb(row["image"]), (*names, *names, *others)))
    for row in _rows(folder, "flickr8k-train"):
        rows.append((to_rgb(row["image"]), tuple(row["caption"])))
    return rows


def photo_images(name: str, folder: str, *, training: bool) -> LabelledImages:
    """A set by name, its test images or, `training`, those to fine-tune on (Tiny-ImageNet and CIFAR-10 have such).

    `tiny_imagenet` by the names of its 200 classes, `tiny_imagenet groups` by kind, `tiny_imagenet narrow` and so on: those
    `QUARTERS` of the classes alone; `pacs <domain>`; and every name of `SETS`.

    Raises:
        ValueError, FileNotFoundError: no such set, or not in this folder.
    """
    base, _, part = name.partition(" ")
    parts = {"tiny_imagenet": (*QUARTERS, "groups"), "pacs": DOMAINS}.get(base, ("",))
    if base not in (*SETS, "tiny_imagenet", "pacs") or part not in parts:
        known = (*SETS, *(f"tiny_imagenet {p}".strip() for p in ("", "groups")), *(f"pacs {d}" for d in DOMAINS))
        raise ValueError(f"no set of photographs is called {name!r}{did_you_mean(name, known, ', '.join(known))}")
    split = "train" if training and base in ("tiny_imagenet", "cifar10") else "test"
    data = _rows(folder, f"{base}-{'val' if (base, split) == ('tiny_imagenet', 'test') else split}")
    labels, classes = data["label"][:], data.features["label"].names
    if base == "pacs":
        domains = data.features["domain"].names
        kept = [i for i, domain in enumerate(data["domain"]) if domains[domain] == part]
    elif part == "groups":
        kinds = read_json(Path(folder) / "tiny_imagenet_hypernyms.json")
        above = [next((h for h in kinds[wnid]["hypernyms"] if h in GROUPS), None) for wnid in data["wnid"]]
        kept = [i for i, kind in enumerate(above) if kind]
        labels, classes = [kind and GROUPS.index(kind) for kind in above], GROUPS
    else:
        wanted = [c for i, c in enumerate(classes) if i % 4 in QUARTERS[part]]
        kept = [i for i, label in enumerate(labels) if classes[label] in wanted]
        labels = [wanted.index(classes[label]) if classes[label] in wanted else None for label in labels]
        classes = wanted
    source = {"path": f"photos:{name}", "data_dir": str(folder), "split": split}
    return LabelledImages.from_images(
        data.select(kept), [labels[i] for i in kept], classes, (TEMPLATE,), f"photos:{name}", source
    )
