"""The 17 zero-shot sets of the field by name, from the Hub, at pinned revisions, under both protocols.

Ids and pins were collected from public code and stored Hub pages (docs/evaluation.md says how); none could be downloaded where this was written.
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
    """Where a set lies: `shards` is clip-benchmark's webdataset layout, otherwise parquet with `image` and `label` columns."""

    repository: str
    revision: str | None  # a commit; None: nobody pins it, the newest is taken and recorded
    images: int
    split: str = "test"
    image: str | None = None
    label: str | None = None
    shards: bool = True


@dataclass(frozen=True)
class ZeroShotSet:
    """One set: where the protocols take it from (`native`: None if no copy of torchvision's split is known), how many classes.

    `renamed`: classes whose names in the data equal another's, by number.
    """

    classes: int
    input: Source
    native: Source | None
    renamed: dict[int, str] | None = None


def _same(classes: int, source: Source, **changes) -> ZeroShotSet:
    """Most sets have one test split, in clip-benchmark as in torchvision."""
    return ZeroShotSet(classes, source, source, **changes)


_EUROSAT = Source(
    "timm/eurosat-rgb", "b4e28552cd5f3932b6abc37eb20d3e84901ad728", 27_000, "train+validation+test", shards=False
)


# clip-benchmark's own repositories where a full commit is publicly pinned, otherwise DataComp's copies of the same test splits (djghosh/…).
SETS: dict[str, ZeroShotSet] = {
    "cifar10": _same(10, Source("djghosh/wds_cifar10_test", "7509909b272be4338642a3162ae09f4c4d259262", 10_000)),
    "cifar100": _same(
        100, Source("clip-benchmark/wds_vtab-cifar100", "c181ce0341d21e40ebe4f35a8fc56dd547e20418", 10_000)
    ),
    "stl10": _same(10, Source("djghosh/wds_stl10_test", "9df2c4de5740764de4b1efce408da3291803b38e", 8_000)),
    "sun397": _same(397, Source("clip-benchmark/wds_sun397", "a1bd6dd6591442545a21ef5de31f40d2b5cf5b15", 108_754)),
    "food101": _same(101, Source("clip-benchmark/wds_food101", "147a52fcbbb4f9d14293f9e2d821744d6883efef", 25_250)),
    "pets": _same(37, Source("clip-benchmark/wds_vtab-pets", "3fbd1f21f076311402bb2bf2a9d1a04b72a4266d", 3_669)),
    "flowers102": _same(
        102, Source("djghosh/wds_vtab-flowers_test", "e433f2df2999e77401a627de654bddbeadf6f8e9", 6_149)
    ),
    "dtd": _same(47, Source("djghosh/wds_vtab-dtd_test", "276b0059cb0cc956aaf588225d5197c13924adb3", 1_880)),
    "eurosat": ZeroShotSet(
        10, Source("djghosh/wds_vtab-eurosat_test", "7d107212549825bf1fc46d322d0839e9cc8a3ff1", 5_400), _EUROSAT
    ),
    "fgvc_aircraft": _same(
        100, Source("djghosh/wds_fgvc_aircraft_test", "6b5e12a741d27b63718dd08365b866a9a8e5e7a5", 3_333)
    ),
    "imagenet1k": _same(
        1000,
        Source("clip-benchmark/wds_imagenet1k", "b24c7a5a3ef12df09089055d1795e2ce7c7e7397", 50_000),
        renamed={
            744: "projectile missile",
            836: "sunglass",
        },  # they are "missile" and "sunglasses" there, as 657 and 837 are
    ),
    "caltech101": ZeroShotSet(
        102, Source("clip-benchmark/wds_vtab-caltech101", "96c3ed2decb80d5fe120fb8a0179f25c82cbee78", 6_085), None
    ),
    "cars": _same(196, Source("djghosh/wds_cars_test", "5f571837da18cb1fc390072ad57d6fb89e7b1f71", 8_041)),
    "pcam": _same(2, Source("clip-benchmark/wds_vtab-pcam", "502695fe1a141108650e3c5b91c8b5e0ff84ed49", 32_768)),
    "country211": _same(
        211, Source("clip-benchmark/wds_country211", "1699f138f0558342a1cbf99f7cf36b4361bb5ebc", 21_100)
    ),
    "caltech256": _same(
        257, Source("ilee0022/Caltech-256", None, 30_607, "train+validation+test", label="text", shards=False)
    ),  # `label`: a bare number
    "tiny_imagenet": _same(
        200, Source("zh-plus/tiny-imagenet", "5a77092c28e51558c5586e9c5eb71a7e17a5e43f", 10_000, "valid", shards=False)
    ),
}


def open_set(name: str, protocol: str, *, revision: str | None = None, on_corrupt: str = "error") -> LabelledImages:
    """A set by name, under a protocol, with its class names, its number of classes and of images checked.

    `input` takes the set's own templates where it brings any, `native` the paper's one. Files are kept in the Hub's cache, so a second call, or
    one with HF_HUB_OFFLINE=1, needs no network. `revision`: the commit of an earlier EvalResult instead of the pinned or newest one.

    Raises:
        ValueError: no such set, none for this protocol, or other contents than expected.
        OSError: it cannot be downloaded and is not in the cache.
    """
    if name not in SETS:
        raise ValueError(f"no set is called {name!r}" + did_you_mean(name, SETS, f"there are {', '.join(SETS)}"))
    entry = SETS[name]
    source = entry.input if protocol == "input" else entry.native
    if source is None:
        raise ValueError(
            f"{name} has no known copy of torchvision's split on the Hub, which the protocol 'native' means: give your own with --data"
        )
    pinned = source.revision is not None
    source = replace(source, revision=revision or source.revision)
    folder = download(source)
    templates = None if protocol == "input" else (TEMPLATE,)
    classes = _class_names(folder, name, entry, source)
    spec = DatasetSpec(
        str(folder), split=source.split, image=source.image, label=source.label, classes=classes, templates=templates
    )
    images = load_images(spec)
    found = (len(images.classes), len(images))
    if found != (expected := (entry.classes, source.images)):
        raise ValueError(
            f"{name} from {source.repository} at {folder.name} has {found[0]} classes and {found[1]} images, "
            f"expected {expected[0]} and {expected[1]}"
        )
    if not source.shards and not classes:
        images = images.with_classes([_spoken(c) for c in images.classes])
    origin = {
        "set": name,
        "protocol": protocol,
        "repository": source.repository,
        "revision": folder.name,
        "pinned": pinned,
    }
    images = replace(images, name=name, source=origin)
    return images.without_unreadable() if on_corrupt == "skip" else images


def download(source: Source) -> Path:
    """The folder of the repository at its commit, from the cache or the Hub; the folder is called as the commit."""
    splits = source.split.split("+")
    patterns = ["classnames.txt", "zeroshot_classification_templates.txt"]
    patterns += [f"{s}/*" for s in splits] if source.shards else [f"*{s}*.parquet" for s in splits]
    try:
        return Path(
            snapshot_download(
                source.repository, repo_type="dataset", revision=source.revision, allow_patterns=patterns
            )
        )
    except (OSError, ValueError) as error:  # offline, unknown, gated: the Hub's client says which
        raise OSError(
            f"the data set {source.repository} ({source.revision or 'newest'}) is neither in the cache nor to be had from the Hub: {error}"
        ) from error


def _spoken(name: str) -> str:
    """A folder's name as words: "AnnualCrop" -> "annual crop", "015.bonsai-101" -> "bonsai", "eiffel-tower" -> "eiffel tower"."""
    name = re.sub(r"^\d+\.|-101$", "", name)
    return re.sub(r"(?<=[a-z])(?=[A-Z])|[-_]", " ", name).lower()


def _class_names(
    folder: Path, name: str, entry: ZeroShotSet, source: Source
) -> tuple[str, ...] | dict[str, str] | None:
    """Names for the prompts where those in the data will not do; None: they will."""
    if name == "tiny_imagenet":  # its names are WordNet ids
        return json.loads((Path(__file__).parent / "imagenet_wordnet.json").read_text(encoding="utf-8"))
    if not source.shards:
        return None
    names = list(read_classes(folder / "classnames.txt"))
    for number, better in (entry.renamed or {}).items():
        if number < len(names) and names.count(names[number]) > 1:
            names[number] = better
    # FGVC Aircraft and others are written with underscores in some copies; a prompt is read as words.
    return tuple(n.replace("_", " ") for n in names)
