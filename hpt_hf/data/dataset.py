"""Labelled images from the Hub, local parquet files, image folders or tar shards, as a `datasets.Dataset` of encoded images."""

from __future__ import annotations

import functools
import glob
import hashlib
import tarfile
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path

import datasets
import numpy as np
import pyarrow.compute as pc
import pyarrow.parquet
from PIL import Image
from transformers.utils import logging

from hpt_hf.data.class_names import match_classes, read_classes
from hpt_hf.data.collator import encoded, read_image, to_rgb
from hpt_hf.data.layout import files_below, parquet_files, split_folder, split_of, visible
from hpt_hf.models.zero_shot import TEMPLATE, check_templates
from hpt_hf.utils import did_you_mean

logger = logging.get_logger(__name__)

IMAGE_SUFFIXES = (".png", ".jpg", ".jpeg", ".jpe", ".jfif", ".webp", ".avif", ".jp2", ".bmp", ".gif", ".tif", ".tiff")
IMAGE_SUFFIXES += (".ppm", ".pgm", ".tga")


@dataclass(frozen=True)
class DatasetSpec:
    """Where a labelled set lies and how its classes are asked for.

    Args:
        path: Hub id, parquet file, folder of parquet files or tar shards, or image folder (one folder a class, or images alone).
        split, revision, config: of a Hub id or folder.
        image, label: column names; None: found by type, and an error if two would fit.
        classes: names in label order; or a dict from the data's names (WordNet ids, say) to better ones.
        templates: prompts with `{}` for the name; None: those the data brings along, else the paper's.
    """

    path: str
    split: str = "train"
    revision: str | None = None
    config: str | None = None
    image: str | None = None
    label: str | None = None
    classes: tuple[str, ...] | dict[str, str] | None = None
    templates: tuple[str, ...] | None = None


@dataclass(frozen=True)
class LabelledImages:
    """Images by index, and the prompts that ask for their classes.

    Args:
        data: columns `image` (encoded), `label` (ClassLabel; all None: unlabelled) and `row` (its number as loaded).
        source: how to open them again, as JSON: path, split, revision …
        skipped: (row, reason) of the images that could not be read.
    """

    data: datasets.Dataset
    templates: tuple[str, ...] = (TEMPLATE,)
    name: str = "data"
    source: dict = field(default_factory=dict)
    skipped: tuple[tuple[int, str], ...] = ()

    @classmethod
    def from_images(
        cls,
        images: datasets.Dataset | Iterable[Image.Image | bytes],
        labels: Sequence[int | None] | None,
        classes: Sequence[str],
        templates: Sequence[str] = (TEMPLATE,),
        name: str = "data",
        source: dict | None = None,
    ) -> LabelledImages:
        """From a `datasets.Dataset` with a column `image`, or from images in memory, which are kept as PNG."""
        if not isinstance(images, datasets.Dataset):
            cells = [i if isinstance(i, bytes) else to_rgb(i) for i in images]
            images = datasets.Dataset.from_dict({"image": cells}, features=datasets.Features(image=datasets.Image()))
        data = images.select_columns("image").cast_column("image", datasets.Image(decode=False))
        labels = [None] * len(data) if labels is None else list(labels)
        data = data.add_column("label", labels, feature=datasets.ClassLabel(names=list(classes)))
        return cls(data.add_column("row", np.arange(len(data))), tuple(templates), name, source or {})

    def __len__(self) -> int:
        return len(self.data)

    def __getitem__(self, index: int) -> dict:
        """{"image": RGB PIL image, "label": int or None}. Raises ValueError, with the row, if the image cannot be read."""
        row = self.data[int(index)]
        file = f" ({row['image']['path']})" if row["image"] and row["image"]["path"] else ""
        where = f"row {row['row']}{file} of {self.name}"
        image = read_image(row["image"], where, "repair or remove it, or pass --on_corrupt skip")
        return {"image": image, "label": row["label"]}

    @property
    def classes(self) -> tuple[str, ...]:
        return tuple(self.data.features["label"].names)

    @property
    def labels(self) -> list[int | None]:
        return self.data["label"][:]

    @functools.cached_property
    def digest(self) -> str:
        """Of labels and images: the sizes of all encoded ones, and the bytes of a fixed sample of at most 1,024."""
        cells, total = self.data["image"], hashlib.sha256(repr(self.labels).encode())
        sizes = [len(c["bytes"]) if c["bytes"] is not None else Path(c["path"]).stat().st_size for c in cells]
        total.update(repr(sizes).encode())
        for i in np.random.default_rng(0).permutation(len(self))[:1024].tolist():
            total.update(encoded(cells[i]))
        return total.hexdigest()[:16]

    @property
    def labelled(self) -> bool:
        return self.data.data["label"].null_count == 0

    def select(self, indices: Iterable[int]) -> LabelledImages:
        return replace(self, data=self.data.select(indices))

    def with_classes(self, classes: Sequence[str], labels: Sequence[int | None] | None = None) -> LabelledImages:
        """The same images under other class names, and labels; None: the same."""
        labels, feature = self.labels if labels is None else labels, datasets.ClassLabel(names=list(classes))
        return replace(self, data=self.data.remove_columns("label").add_column("label", labels, feature=feature))

    def without_class(self, name: str | None) -> LabelledImages:
        """All images but those of one class, which an attack towards that class can be run on; None: all.

        Raises:
            ValueError: there is no such class.
        """
        if name is None:
            return self
        if name not in self.classes:
            near = did_you_mean(name, self.classes)
            raise ValueError(f"{name!r} is none of the {len(self.classes)} classes of {self.name}{near}")
        number = self.classes.index(name)
        return self.select([i for i, label in enumerate(self.labels) if label != number])

    def without_unreadable(self) -> LabelledImages:
        """Read every image once and leave out those that cannot be read: before training, so that all epochs have one length."""
        kept, skipped = [], []
        for index in range(len(self)):
            try:
                self[index]
                kept.append(index)
            except ValueError as error:
                skipped.append((self.data[index]["row"], str(error).split(". Fix")[0]))
        if not kept:
            raise ValueError(f"none of the {len(self)} images of {self.name} can be read; the first: {skipped[0][1]}")
        if not skipped:
            return self
        reasons = "; ".join(reason for _, reason in skipped[:5])
        logger.warning(f"{len(skipped)} of {len(self)} images of {self.name} are skipped: {reasons}")
        return replace(self.select(kept), skipped=tuple(skipped))


def load_images(spec: DatasetSpec | str, *, on_corrupt: str = "error") -> LabelledImages:
    """Load a set and check its labels against its classes.

    Args:
        spec: a spec, a local path or a Hub id.
        on_corrupt: unreadable images are an `"error"`, or `"skip"`ped with a list.

    Raises:
        FileNotFoundError, ValueError: nothing there, no image column, no classes, labels out of range.
    """
    if on_corrupt not in ("error", "skip"):
        raise ValueError(f"on_corrupt={on_corrupt!r}: expected 'error' or 'skip'")
    spec = DatasetSpec(spec) if isinstance(spec, str) else spec
    path, label, names, templates, local = Path(spec.path).expanduser(), spec.label, None, (TEMPLATE,), False
    check_templates(spec.templates or templates)
    name = path.stem if path.is_file() else path.absolute().name
    if split_of(name):  # many sets have a folder or file called "val"
        name = f"{path.absolute().parent.name}/{name}"
    if path.is_dir() and (list(path.glob("*.tar")) or list(path.glob("*/*.tar"))):
        data, names, templates = _shards(path, spec.split)
        label = label or "cls"
    elif path.is_dir() and not files_below(path, [".parquet"]):
        data = _image_folder(path, spec.split)
    elif path.exists():
        data, local = _parquet(path, spec.split), True
    else:
        check_hub_id(spec.path)
        data = load_from_hub(spec)
        name = f"{spec.path}:{spec.split}"
    if not len(data):
        raise ValueError(f"{spec.path} (split {spec.split}) holds no images")
    check_templates(spec.templates or templates)
    source = {k: v for k, v in asdict(spec).items() if v is not None}
    spec = replace(spec, label=label, templates=spec.templates or templates)
    images = label_images(data, spec, names, name, source)
    if local:
        _check_cells(images.data, spec.path)
    return images.without_unreadable() if on_corrupt == "skip" else images


def label_images(
    data: datasets.Dataset, spec: DatasetSpec, names: Sequence[str] | None, name: str, source: dict
) -> LabelledImages:
    """The images of a loaded set and the places of their labels; `names`: the set's own, if they lie beside it.

    Raises:
        ValueError: no image column, no classes, labels out of range.
    """
    image, label = find_columns(data, spec.image, spec.label, spec.path)
    labels, names = _read_labels(data, label, names)
    classes, places = match_classes(names, spec.classes, spec.path)
    _check_labels(labels, len(places), spec.path)
    labels = [None if v is None else places[v] for v in labels]
    data = data.select_columns(image).rename_columns({image: "image"})
    return LabelledImages.from_images(data, labels, classes, spec.templates or (TEMPLATE,), name, source)


def read_files(kind: str, files: Sequence[Path], **options):
    """Local files, in order, by a loader of `datasets`, which copies them into its cache, and again when their time changes."""
    if kind == "parquet" and len(files) > 1:
        told = {(pyarrow.parquet.read_schema(f).metadata or {}).get(b"huggingface") for f in files}
        if len(told) > 1:
            raise ValueError(f"{files[0].parent}: got {len(told)} kinds of columns or classes, expected one")
    names = [glob.escape(str(f)) for f in files]
    try:
        return datasets.load_dataset(kind, data_files=names, split="train", **options)
    except (ValueError, datasets.exceptions.DatasetGenerationError) as error:
        raise ValueError(f"{files[0]} (1 of {len(files)} files) cannot be read: {error.__cause__ or error}") from error


def _image_folder(path: Path, split: str) -> datasets.Dataset:
    """One sub-folder a class, in alphabetical order; or images alone, without labels.

    Not `imagefolder`: it takes the innermost folder for the class, and a class called "train" for a split.
    """
    path = split_folder(path, split)
    left_out: list[Path] = []
    files = files_below(path, IMAGE_SUFFIXES, left_out)
    if not files:
        raise ValueError(f"{path} holds no parquet file and no image ({', '.join(IMAGE_SUFFIXES)})")
    folders = [f for f in visible(path) if f.is_dir()]
    if empty := [f.name for f in folders if any(f.rglob("*")) and not files_below(f, IMAGE_SUFFIXES)]:
        raise ValueError(f"{path}: got class folders without an image: {empty[:4]} ({', '.join(IMAGE_SUFFIXES)})")
    if left_out:
        some = ", ".join(sorted(f.name for f in left_out)[:4])
        logger.warning(f"{path}: {len(files)} images; hidden or no image, and left out, are {len(left_out)} ({some})")
    columns: dict[str, list] = {"image": [str(f) for f in files]}
    features = datasets.Features(image=datasets.Image())
    parts = [f.relative_to(path).parts for f in files]
    folders = {p[0] for p in parts if len(p) > 1}
    if folders := sorted(folders, key=lambda name: (int(name) if name.isdecimal() else -1, name)):
        if loose := [p[0] for p in parts if len(p) == 1]:
            raise ValueError(f"{path} has images beside its class folders {folders[:4]}: which class is {loose[0]}?")
        columns["label"] = [folders.index(p[0]) for p in parts]
        features["label"] = datasets.ClassLabel(names=folders)
    return datasets.Dataset.from_dict(columns, features=features)


def _parquet(path: Path, split: str) -> datasets.Dataset:
    if not path.is_dir() and (not path.is_file() or path.suffix != ".parquet"):
        raise ValueError(f"{path} is not a parquet file. Fix: give one, a folder of them or of images, or a Hub id.")
    if path.is_file():
        return read_files("parquet", [path])
    try:  # before the folder's README is asked, which might speak of splits that were not downloaded
        return read_files("parquet", parquet_files(path, split))
    except ValueError:
        readme = path / "README.md"
        if not readme.is_file() or "data_files:" not in readme.read_text("utf-8", "replace"):
            raise
    splits, wanted = datasets.load_dataset(str(path)), split.split("+")
    if not set(wanted) <= set(splits):
        raise ValueError(f"{path} has no split {split!r}, it has {', '.join(splits)}. Fix: choose one with --split.")
    return datasets.concatenate_datasets([splits[s] for s in wanted])


def _shards(path: Path, split: str) -> tuple[datasets.Dataset, tuple[str, ...] | None, tuple[str, ...]]:
    """clip-benchmark's layout: `<split>/*.tar` of images, each with a `cls` member; class names and templates beside.

    Shards are named one by one: `load_dataset(folder)` would read the one-line nshards.txt among them as the data set.
    """
    folder = path / split if (path / split).is_dir() else path
    shards = sorted(folder.glob("*.tar"), key=lambda f: (len(f.name), f.name))  # 2.tar before 10.tar
    if not shards:
        others = ", ".join(sorted({f.parent.name for f in path.glob("*/*.tar")}))
        raise ValueError(f"{path} has shards in {others}, none for the split {split!r}")
    count = folder / "nshards.txt"
    if count.is_file() and (said := count.read_text().strip()) != str(len(shards)):
        raise ValueError(
            f"{folder}: got {len(shards)} shards, expected {said!r} (nshards.txt). Fix: download the rest"
        )
    for shard in shards:
        try:
            with tarfile.open(shard, "r:") as archive:
                archive.getmembers()
                archive.fileobj.seek(archive.offset)
                # tarfile takes a cut-off archive for a shorter one; a whole one ends with a block of zeros.
                if archive.fileobj.read(tarfile.BLOCKSIZE) != bytes(tarfile.BLOCKSIZE):
                    raise tarfile.ReadError("it ends in the middle")
        except (tarfile.TarError, EOFError, OSError) as error:
            raise ValueError(f"the shard {shard} cannot be read ({error}). Fix: download it again.") from None
    names, templates = path / "classnames.txt", path / "zeroshot_classification_templates.txt"
    lines = templates.read_text("utf-8-sig").replace("{c}", "{}").splitlines() if templates.is_file() else []
    names = read_classes(names) if names.is_file() else None
    return read_files("webdataset", shards), names, tuple(t.strip() for t in lines if t.strip()) or (TEMPLATE,)


def check_hub_id(path: str) -> None:
    """Raise FileNotFoundError for what is not there and cannot be a Hub id either."""
    if Path(path).is_absolute() or path.startswith(".") or path.count("/") != 1:
        raise FileNotFoundError(f"no data at {path}: neither a file nor a folder, nor a Hub id of the form owner/name")


def _check_cells(data: datasets.Dataset, path: str) -> None:
    """Raise ValueError for cells of a parquet file that point to files: whoever made it knows none of this machine."""
    cells = data.with_format("arrow")[:]["image"]
    paths = pc.and_(pc.is_null(pc.struct_field(cells, "bytes")), pc.is_valid(pc.struct_field(cells, "path")))
    if (row := pc.index(paths, True).as_py()) >= 0:
        raise ValueError(f"row {row} of {path} holds the path of a file, expected the image itself")


def load_from_hub(spec: DatasetSpec, **options):
    try:
        return datasets.load_dataset(spec.path, spec.config, split=spec.split, revision=spec.revision, **options)
    except (OSError, datasets.exceptions.DatasetNotFoundError) as error:
        raise OSError(f"no data at {spec.path}: no file or folder, nor to be had from the Hub ({error})") from error


def find_columns(data, image: str | None, label: str | None, path: str) -> tuple[str, str | None]:
    """(image column, label column if any): as given, else by name and type, else the only one of its type."""
    found = []
    for what, given, kind in (("image", image, datasets.Image), ("label", label, datasets.ClassLabel)):
        fits = [given] if given else [n for n, feature in data.features.items() if isinstance(feature, kind)]
        if not given:  # labels may be plain numbers or words
            named = [n for n in (what, f"{what}s") if n in data.features and (n in fits or what == "label")]
            fits = named[:1] or fits
        if len(fits) > 1 or (fits or [what])[0] not in data.features and (fits or what == "image"):
            there = ", ".join(data.features)
            raise ValueError(f"{path}: no one column for the {what}, got {fits} of {there}. Fix: --{what}_column")
        found.append(fits[0] if fits else None)
    return found[0], found[1]


def _read_labels(
    data: datasets.Dataset, column: str | None, names: Sequence[str] | None
) -> tuple[list[int | None], Sequence[str] | None]:
    """(a number or None for each row, the data's own class names if it has any)."""
    if column is None:
        return [None] * len(data), names
    values, feature = data[column][:], data.features[column]
    if not isinstance(feature, (datasets.ClassLabel, datasets.Value)):
        kind = type(feature).__name__
        raise ValueError(f"the labels in column {column!r}: got {kind}, expected one number or word each")
    if isinstance(feature, datasets.ClassLabel):
        names = feature.names
    elif feature.dtype in ("string", "large_string"):
        names = sorted(set(values) - {None})
        number = {n: i for i, n in enumerate(names)}
        values = [number.get(v) for v in values]
    # -1 is how the Hub writes "no label" in hidden test splits.
    if odd := [(i, v) for i, v in enumerate(values) if isinstance(v, float) and not v.is_integer()]:  # NaN, too
        raise ValueError(f"the labels in column {column!r}: row {odd[0][0]} has {odd[0][1]}, expected a whole number")
    return [None if v is None or v == -1 else int(v) for v in values], names


def _check_labels(labels: Sequence[int | None], classes: int, path: str) -> None:
    if wrong := [(i, v) for i, v in enumerate(labels) if v is not None and not 0 <= v < classes]:
        row, value = wrong[0]
        raise ValueError(f"{len(wrong)} labels of {path} are out of range: row {row} has {value} of {classes} classes")
    if 0 < (missing := labels.count(None)) < len(labels):
        raise ValueError(f"{missing} of {len(labels)} rows of {path} have no label. Fix: label all of them or none.")
