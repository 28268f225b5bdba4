"""The 17 zero-shot sets of the field by name, from the Hub, at pinned revisions, under both protocols.

Ids and pins were collected from public code and Hub pages (docs/evaluation.md says how); none could be downloaded where this was written.
"""

from __future__ import annotations

import json
import re
from dataclasses import dataclass, replace
from pathlib import Path

from huggingface_hub import snapshot_download

from hpt_hf.data.class_names import read_classes
from hpt_hf.data.dataset import DatasetSpec, LabelledImages, load_images
from hpt_hf.models.zero_shot import TEMPLATE
from hpt_hf.utils import did_you_mean


@dataclass(frozen=True)
class Source:
    """Where a set lies: `shards` is clip-benchmark's webdataset layout, otherwise parquet."""

    repository: str
    revision: str | None  # a commit; None: nobody pins it, the newest is taken and recorded
    images: int
    split: str = "test"
    label: str | None = None
    shards: bool = True


@dataclass(frozen=True)
class ZeroShotSet:
    """How many classes, and where each protocol takes the images from (`native`: torchvision's split; None: no copy is known)."""

    classes: int
    input: Source
    native: Source | None


# name -> (classes, images, revision, repository): one test split for both protocols. clip-benchmark's own repositories where a full
# commit is publicly pinned, otherwise DataComp's copies of the same test splits (djghosh/…).
_SHARDS = {
    "cifar10": (10, 10_000, "7509909b272be4338642a3162ae09f4c4d259262", "djghosh/wds_cifar10_test"),
    "cifar100": (100, 10_000, "c181ce0341d21e40ebe4f35a8fc56dd547e20418", "clip-benchmark/wds_vtab-cifar100"),
    "stl10": (10, 8_000, "9df2c4de5740764de4b1efce408da3291803b38e", "djghosh/wds_stl10_test"),
    "sun397": (397, 108_754, "a1bd6dd6591442545a21ef5de31f40d2b5cf5b15", "clip-benchmark/wds_sun397"),
    "food101": (101, 25_250, "147a52fcbbb4f9d14293f9e2d821744d6883efef", "clip-benchmark/wds_food101"),
    "pets": (37, 3_669, "3fbd1f21f076311402bb2bf2a9d1a04b72a4266d", "clip-benchmark/wds_vtab-pets"),
    "flowers102": (102, 6_149, "e433f2df2999e77401a627de654bddbeadf6f8e9", "djghosh/wds_vtab-flowers_test"),
    "dtd": (47, 1_880, "276b0059cb0cc956aaf588225d5197c13924adb3", "djghosh/wds_vtab-dtd_test"),
    "eurosat": (10, 5_400, "7d107212549825bf1fc46d322d0839e9cc8a3ff1", "djghosh/wds_vtab-eurosat_test"),
    "fgvc_aircraft": (100, 3_333, "6b5e12a741d27b63718dd08365b866a9a8e5e7a5", "djghosh/wds_fgvc_aircraft_test"),
    "imagenet1k": (1000, 50_000, "b24c7a5a3ef12df09089055d1795e2ce7c7e7397", "clip-benchmark/wds_imagenet1k"),
    "caltech101": (102, 6_085, "96c3ed2decb80d5fe120fb8a0179f25c82cbee78", "clip-benchmark/wds_vtab-caltech101"),
    "cars": (196, 8_041, "5f571837da18cb1fc390072ad57d6fb89e7b1f71", "djghosh/wds_cars_test"),
    "pcam": (2, 32_768, "502695fe1a141108650e3c5b91c8b5e0ff84ed49", "clip-benchmark/wds_vtab-pcam"),
    "country211": (211, 21_100, "1699f138f0558342a1cbf99f7cf36b4361bb5ebc", "clip-benchmark/wds_country211"),
}
_CALTECH256 = Source("ilee0022/Caltech-256", None, 30_607, "train+validation+test", "text", False)
_EUROSAT_PIN, _TINY_PIN = "b4e28552cd5f3932b6abc37eb20d3e84901ad728", "5a77092c28e51558c5586e9c5eb71a7e17a5e43f"
_EUROSAT = Source("timm/eurosat-rgb", _EUROSAT_PIN, 27_000, "train+validation+test", shards=False)
_TINY_IMAGENET = Source("zh-plus/tiny-imagenet", _TINY_PIN, 10_000, "valid", shards=False)
SETS: dict[str, ZeroShotSet] = {
    **{name: ZeroShotSet(n, s := Source(where, pin, images), s) for name, (n, images, pin, where) in _SHARDS.items()},
    "caltech256": ZeroShotSet(257, _CALTECH256, _CALTECH256),
    "tiny_imagenet": ZeroShotSet(200, _TINY_IMAGENET, _TINY_IMAGENET),
}
SETS["eurosat"] = replace(SETS["eurosat"], native=_EUROSAT)
SETS["caltech101"] = replace(SETS["caltech101"], native=None)

# ImageNet's "missile" and "sunglasses" occur twice in clip-benchmark's list.
_IMAGENET_NAMES = {744: ("missile", "projectile missile"), 836: ("sunglasses", "sunglass")}


def open_set(name: str, protocol: str, *, revision: str | None = None, on_corrupt: str = "error") -> LabelledImages:
    """A set by name, under a protocol, with its numbers of classes and of images checked.

    `input` takes the set's own templates where it brings any, `native` the paper's one. Files are kept in the Hub's cache.
    `revision`: the commit of an earlier result instead of the pinned or newest one.

    Raises:
        ValueError: no such set, none for this protocol, or other contents than expected.
        OSError: it cannot be downloaded and is not in the cache.
    """
    if name not in SETS:
        raise ValueError(f"no set is called {name!r}" + did_you_mean(name, SETS, f"there are {', '.join(SETS)}"))
    source = SETS[name].input if protocol == "input" else SETS[name].native
    if source is None:
        raise ValueError(f"{name} has no known copy of torchvision's split, for 'native'. Fix: your own, by its path.")
    folder = _download(replace(source, revision=revision or source.revision))
    classes = _class_names(folder, name, source)
    templates = None if protocol == "input" else (TEMPLATE,)
    spec = DatasetSpec(str(folder), split=source.split, label=source.label, classes=classes, templates=templates)
    images = load_images(spec)
    if (found := (len(images.classes), len(images))) != (expected := (SETS[name].classes, source.images)):
        where = f"{name} from {source.repository} at {folder.name}"
        raise ValueError(f"{where}: got (classes, images) {found}, expected {expected}")
    if classes is None:
        images = images.with_classes([_spoken(c) for c in images.classes])
    origin = {"set": name, "protocol": protocol, "repository": source.repository, "revision": folder.name}
    images = replace(images, name=name, source=origin | {"pinned": source.revision is not None})
    return images.without_unreadable() if on_corrupt == "skip" else images


def _download(source: Source) -> Path:
    """The folder of the repository at its commit, which is its name, from the cache or the Hub."""
    splits = source.split.split("+")
    patterns = ["classnames.txt", "zeroshot_classification_templates.txt"]
    patterns += [f"{s}/*" for s in splits] if source.shards else [f"*{s}*.parquet" for s in splits]
    options = {"repo_type": "dataset", "revision": source.revision, "allow_patterns": patterns}
    try:
        return Path(snapshot_download(source.repository, **options))
    except (OSError, ValueError) as error:  # offline, unknown, gated: the Hub's client says which
        what = f"{source.repository} ({source.revision or 'newest'})"
        raise OSError(f"{what} is neither in the cache nor to be had from the Hub: {error}") from error


def _spoken(name: str) -> str:
    """A folder's name as words: "AnnualCrop" -> "annual crop", "015.bonsai-101" -> "bonsai", "eiffel-tower" -> "eiffel tower"."""
    name = re.sub(r"^\d+\.|-101$", "", name)
    return re.sub(r"(?<=[a-z])(?=[A-Z])|[-_]", " ", name).lower()


def _class_names(folder: Path, name: str, source: Source) -> tuple[str, ...] | dict[str, str] | None:
    """Names for the prompts; None: the data's own, spoken."""
    if name == "tiny_imagenet":  # its names are WordNet ids
        return json.loads((Path(__file__).parent / "imagenet_wordnet.json").read_text(encoding="utf-8"))
    if not source.shards:
        return None
    names = list(read_classes(folder / "classnames.txt"))
    for number, (twice, better) in _IMAGENET_NAMES.items() if name == "imagenet1k" else ():
        if names.count(twice) > 1 and names[number] == twice:
            names[number] = better
    return tuple(n.replace("_", " ") for n in names)
