"""Data: labelled pictures from the Hub, local parquet or image folders, and the batches made of them. The seam to `datasets`.

Whatever a picture's mode (grey, palette, CMYK, 16 bit, transparent), a batch holds RGB in [0, 1], cut as the model's processor cuts it.
"""

from __future__ import annotations

import glob
import tarfile
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path

import datasets
import numpy as np
from transformers.utils import logging

from hpt_hf.data.class_names import match_classes, read_classes
from hpt_hf.data.collator import encoded, to_rgb
from hpt_hf.models.zero_shot import TEMPLATE, check_classes, check_templates
from hpt_hf.utils import did_you_mean

logger = logging.get_logger(__name__)


IMAGE_SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".ppm")


SPLIT_FOLDERS = ("train", "val", "valid", "validation", "dev", "test")


@dataclass(frozen=True)
class DatasetSpec:
    """Where a labelled set lies and how its classes are asked for.

    Args:
        path: Hub id, parquet file, folder of parquet files, or image folder (one folder a class, or pictures alone).
        split, revision, config: of a Hub id or folder.
        image, label: column names; None: found by type, and an error if two would fit.
        classes: names in label order, if the features have none; or a dict from the features' names (WordNet ids, say) to better ones.
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


@dataclass
class LabelledImages:
    """Pictures by index, their labels and the classes these index; `skipped` lists (row, reason) of those that could not be read."""

    rows: object  # anything with len(), [i] -> {"image": PIL image or encoded bytes, "label": int or None}, and labels
    classes: tuple[str, ...]
    templates: tuple[str, ...] = (TEMPLATE,)
    name: str = "data"
    source: dict = field(default_factory=dict)  # how to open them again, as JSON: path, split, revision …
    kept: Sequence[int] | None = None  # row numbers; None for all
    skipped: list[tuple[int, str]] = field(default_factory=list)

    def __len__(self) -> int:
        return len(self.rows) if self.kept is None else len(self.kept)

    def row_id(self, index: int) -> int:
        """The row of the data set that picture `index` is."""
        return index if self.kept is None else self.kept[index]

    def __getitem__(self, index: int) -> dict:
        """{"image": RGB PIL image, "label": int or None}.

        Raises:
            ValueError: the picture cannot be read; the message names its row.
        """
        row_id = self.row_id(int(index))
        where = f"row {row_id}"
        try:
            row = self.rows[row_id]  # an empty cell or a file that is gone fails here
            where = row.get("where", where)
            return {"image": to_rgb(row["image"]), "label": row["label"]}
        except Exception as error:  # Pillow's decoders raise a zoo of types on damaged files
            raise ValueError(
                f"{where} of {self.name} cannot be read ({type(error).__name__}: {error}); repair or remove it, or pass --on_corrupt skip"
            ) from error

    @property
    def labelled(self) -> bool:
        return self.rows.labels is not None

    def without_class(self, name: str | None) -> LabelledImages:
        """All pictures but those of one class: what an attack towards that class can be run on. None: all.

        Raises:
            ValueError: there is no such class.
        """
        if name is None:
            return self
        if name not in self.classes:
            raise ValueError(
                f"{name!r} is none of the {len(self.classes)} classes of {self.name}{did_you_mean(name, self.classes)}"
            )
        number = self.classes.index(name)
        ids = [self.row_id(i) for i in range(len(self))]
        return replace(self, kept=[i for i in ids if self.rows.labels[i] != number])

    def without_unreadable(self) -> LabelledImages:
        """Read every picture once and leave out those that cannot be.

        Up front and not on the way: the epochs keep one length on every process, and a resumed run meets the same batches.
        """
        kept, skipped = [], []
        for index in range(len(self)):
            try:
                self[index]
                kept.append(self.row_id(index))
            except ValueError as error:
                skipped.append((self.row_id(index), str(error).split("; repair")[0]))
        if skipped:
            logger.warning(
                f"{len(skipped)} of {len(self)} pictures of {self.name} are skipped: "
                + "; ".join(reason for _, reason in skipped[:5])
            )
        if not kept:
            raise ValueError(
                f"none of the {len(self)} pictures of {self.name} can be read; the first: {skipped[0][1]}"
            )
        return replace(self, kept=kept, skipped=skipped)


def load_images(spec: DatasetSpec | str, *, on_corrupt: str = "error") -> LabelledImages:
    """Load a set and check its labels against its classes before anything is computed on it.

    Args:
        spec: a spec, a local path or a Hub id.
        on_corrupt: unreadable pictures are an `"error"`, or `"skip"`ped with a list.

    Raises:
        FileNotFoundError, ValueError: nothing there, no image column, no classes, labels out of range; each says what was expected.
    """
    if on_corrupt not in ("error", "skip"):
        raise ValueError(f"on_corrupt={on_corrupt!r}: expected 'error' or 'skip'")
    if isinstance(spec, str):
        spec = DatasetSpec(spec)
    path, templates = Path(spec.path), spec.templates
    check_templates(templates or (TEMPLATE,))
    if path.is_dir() and (list(path.glob("*/*.tar")) or list(path.glob("*.tar"))):
        rows, names, own = _webdataset(path, spec)
        templates, name = templates or own, path.name
        check_templates(templates or (TEMPLATE,))
    elif path.is_dir() and not any(path.rglob("*.parquet")):
        # A folder called "train" beside others called "car" and "bus" is a class and not a split.
        splits = {f.name for f in path.iterdir() if f.is_dir()} <= {spec.split, *SPLIT_FOLDERS}
        rows, names = _image_folder(path / spec.split if splits and (path / spec.split).is_dir() else path)
        name = path.name
    else:
        rows, names = _table(spec)
        name = path.stem if path.exists() else f"{spec.path}:{spec.split}"
    if names is not None:
        _check_labels(rows, names, spec.path)
    classes, places = match_classes(names, spec.classes, spec.path)
    if places is not None and rows.labels:
        rows.labels = [None if v is None else places[v] for v in rows.labels]
    if classes is None:
        raise ValueError(
            f"{spec.path} names no classes: its labels are plain numbers, or it has none. Give the names: --classes cat dog … or --classes_file names.txt"
        )
    check_classes(classes)
    if len(rows) == 0:
        raise ValueError(f"{spec.path} (split {spec.split}) holds no pictures")
    _check_labels(rows, classes, spec.path)
    source = {k: v for k, v in asdict(spec).items() if v is not None}
    pictures = LabelledImages(rows, tuple(classes), tuple(templates or (TEMPLATE,)), name, source)
    return pictures.without_unreadable() if on_corrupt == "skip" else pictures


class _Files:
    """Pictures of a folder, read when asked for."""

    def __init__(self, files: list[Path], labels: list[int] | None):
        self.files, self.labels = files, labels

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, index: int) -> dict:
        file = self.files[index]
        return {
            "image": file.read_bytes(),
            "label": None if self.labels is None else self.labels[index],
            "where": f"file {file.name}",
        }


def _image_folder(path: Path) -> tuple[_Files, tuple[str, ...] | None]:
    """One sub-folder a class, names in alphabetical order; or pictures alone, which have no labels."""
    files = sorted(f for f in path.rglob("*") if f.suffix.lower() in IMAGE_SUFFIXES)
    if not files:
        raise ValueError(f"{path} holds no parquet file and no picture ({', '.join(IMAGE_SUFFIXES)})")
    folders = sorted({f.relative_to(path).parts[0] for f in files if len(f.relative_to(path).parts) > 1})
    if not folders:
        return _Files(files, None), None
    loose = [f.name for f in files if len(f.relative_to(path).parts) == 1]
    if loose:
        raise ValueError(
            f"{path} has pictures both in class folders ({', '.join(folders[:4])} …) and beside them ({', '.join(loose[:4])} …): which class are those?"
        )
    return _Files(files, [folders.index(f.relative_to(path).parts[0]) for f in files]), tuple(folders)


class _Table:
    """Rows of a `datasets.Dataset` with the two columns renamed and images left encoded, so that a damaged one is ours to report."""

    def __init__(self, table: datasets.Dataset, image: str, label: str | None, names: Sequence[str] | None = None):
        self.image, self.label = image, label
        self.table = table.cast_column(image, datasets.Image(decode=False))
        # -1 is how the Hub writes "no label" in hidden test splits.
        number = {n: i for i, n in enumerate(names)}.__getitem__ if names else int
        labels = None if label is None else [None if v is None or v == -1 else number(v) for v in table[label]]
        self.labels = None if labels is None or all(v is None for v in labels) else labels

    def __len__(self) -> int:
        return len(self.table)

    def __getitem__(self, index: int) -> dict:
        cell = self.table[index][self.image]
        return {"image": encoded(cell), "label": None if self.labels is None else self.labels[index]}


def _table(spec: DatasetSpec) -> tuple[_Table, tuple[str, ...] | None]:
    path, split = Path(spec.path), spec.split
    if path.is_file():
        if path.suffix != ".parquet":
            raise ValueError(
                f"{path} is not a parquet file: give a parquet file, a folder of them, an image folder or a Hub id"
            )
        table = datasets.load_dataset("parquet", data_files=glob.escape(str(path)), split="train")
    elif path.is_dir():
        wanted = split.split("+")  # as `datasets` writes a union
        # The Hub's own names say which files are wanted. A README might speak of splits that were not downloaded, and all would be unpacked.
        named = {s: sorted(path.rglob(f"{s}-*-of-*.parquet")) for s in wanted}
        if all(named.values()) and len({f.parent for files in named.values() for f in files}) == 1:
            named = {s: [glob.escape(str(f)) for f in files] for s, files in named.items()}
            splits = datasets.load_dataset("parquet", data_files=named)
        else:
            splits = datasets.load_dataset(str(path))
        if not set(wanted) <= set(splits) and max(len(splits), len(wanted)) > 1:
            raise ValueError(
                f"{path} has no split {split!r}; it has {', '.join(splits)}: choose one with --split (--split in a recipe)"
            )
        chosen = [splits[s] for s in wanted] if set(wanted) <= set(splits) else list(splits.values())
        table = datasets.concatenate_datasets(chosen)
    else:
        check_hub_id(spec.path)
        table = datasets.load_dataset(spec.path, spec.config, split=split, revision=spec.revision)
    image, label, names = find_columns(table, spec)
    if label is not None and table.features[label].dtype in ("string", "large_string"):
        names = tuple(sorted(set(table.unique(label)) - {None}))  # as with folders: alphabetical
        return _Table(table, image, label, names), names
    return _Table(table, image, label), names


class _Shards:
    """Pictures in tar files, each read where it lies: no cache that could answer for a shard since changed, and no second copy on the disk."""

    def __init__(self, places: list[tuple[Path, str, int, int]], labels: list[int]):
        self.places, self.labels = places, labels

    def __len__(self) -> int:
        return len(self.places)

    def __getitem__(self, index: int) -> dict:
        shard, name, start, size = self.places[index]
        with shard.open("rb") as file:
            file.seek(start)
            return {
                "image": file.read(size),
                "label": self.labels[index],
                "where": f"row {index} ({name} in {shard.name})",
            }


def _webdataset(path: Path, spec: DatasetSpec) -> tuple[_Shards, tuple[str, ...] | None, tuple[str, ...] | None]:
    """clip-benchmark's layout: `<split>/*.tar` of pictures with a `cls` member, and class names and templates (`{c}`) in text files beside.

    `load_dataset(folder)` would read the one-line nshards.txt beside the shards as the data set.
    """
    folder = path / spec.split if (path / spec.split).is_dir() else path
    shards = sorted(folder.glob("*.tar"), key=lambda f: (len(f.name), f.name))  # 2.tar before 10.tar
    if not shards:
        raise ValueError(
            f"{path} has shards in {', '.join(sorted({f.parent.name for f in path.glob('*/*.tar')}))}, none for the split {spec.split!r}"
        )
    count = folder / "nshards.txt"
    if count.is_file() and count.read_text().strip() != str(len(shards)):
        raise ValueError(
            f"{folder} holds {len(shards)} shards and its nshards.txt says {count.read_text().strip()!r}: the download is not complete"
        )
    places, labels = [], []
    for shard in shards:
        for place, label in _shard(shard, spec.image, spec.label or "cls"):
            places.append(place)
            labels.append(label)
    names, templates = path / "classnames.txt", path / "zeroshot_classification_templates.txt"
    names = read_classes(names) if names.is_file() else None
    templates = (
        templates.read_text(encoding="utf-8-sig").replace("{c}", "{}").splitlines() if templates.is_file() else ()
    )
    return _Shards(places, labels), names, tuple(t.strip() for t in templates if t.strip()) or None


def _shard(shard: Path, image: str | None, label: str) -> list[tuple[tuple[Path, str, int, int], int]]:
    """((shard, name, start, length), label) of every picture of one shard, in its order."""
    samples: dict[str, dict[str, tarfile.TarInfo]] = {}
    try:
        with tarfile.open(shard, "r:") as archive:
            members = archive.getmembers()
            archive.fileobj.seek(archive.offset)
            # tarfile takes whatever it cannot read behind the first member for the end; the end is a block of zeros.
            if archive.fileobj.read(tarfile.BLOCKSIZE) != bytes(tarfile.BLOCKSIZE):
                raise tarfile.ReadError("it ends in the middle")
    except (tarfile.TarError, EOFError, OSError) as error:
        raise ValueError(f"the shard {shard} cannot be read ({error}): delete it and download it again") from None
    for member in members:
        folder, _, name = member.name.rpartition("/")
        key, _, kind = name.partition(".")
        if not member.isreg() or not key or not kind:
            continue
        sample = samples.setdefault(f"{folder}/{key}", {})
        if kind.lower() in sample:
            raise ValueError(f"the shard {shard} has {member.name} twice")
        sample[kind.lower()] = member
    rows = []
    with shard.open("rb") as file:
        for sample in samples.values():
            fits = [k for k in sample if k == image or image is None and f".{k}" in IMAGE_SUFFIXES]
            if len(fits) != 1 or label not in sample:
                raise ValueError(
                    f"in the shard {shard}, {next(iter(sample.values())).name} and what belongs to it ({', '.join(sample)}) should be "
                    f"one picture{f' called {image!r}' if image else ''} and its label, called {label!r}"
                )
            file.seek(sample[label].offset_data)
            number = file.read(sample[label].size)
            if not number.strip().isdigit():
                raise ValueError(
                    f"in the shard {shard}, {sample[label].name} should hold the number of a class, it holds {number[:40]!r}"
                )
            member = sample[fits[0]]
            rows.append(((shard, member.name, member.offset_data, member.size), int(number)))
    return rows


def check_hub_id(path: str) -> None:
    """Raise FileNotFoundError for what is not there and cannot be a Hub id either."""
    if Path(path).is_absolute() or path.startswith(".") or path.count("/") != 1:
        raise FileNotFoundError(
            f"no data at {path}: neither a file nor a folder, and not a Hub id of the form owner/name"
        )


def find_columns(table, spec: DatasetSpec) -> tuple[str, str | None, tuple[str, ...] | None]:
    """(image column, label column, class names if it holds them) of a data set or a stream."""
    image = _column(table, spec.image, datasets.Image, "image", spec.path)
    label = _column(table, spec.label, datasets.ClassLabel, "label", spec.path, required=False)
    if label is None and "label" in table.column_names:
        label = "label"
    named = label is not None and isinstance(table.features[label], datasets.ClassLabel)
    return image, label, tuple(table.features[label].names) if named else None


def _column(table, given: str | None, kind: type, what: str, path: str, *, required: bool = True) -> str | None:
    if given is not None:
        if given not in table.column_names:
            raise ValueError(f"{path} has no column {given!r} for the {what}; it has {', '.join(table.column_names)}")
        return given
    fits = [n for n, feature in table.features.items() if isinstance(feature, kind)]
    if what in fits:
        return what
    if len(fits) == 1:
        return fits[0]
    if fits or required:
        raise ValueError(
            f"{path} has {len(fits)} columns of {what}s ({', '.join(fits) or 'none'}) among {', '.join(table.column_names)}: say which with --{what}_column"
        )
    return None


def _check_labels(rows, classes: Sequence[str], path: str) -> None:
    labels = rows.labels
    if labels is None:
        return
    wrong = [(i, v) for i, v in enumerate(labels) if v is not None and not 0 <= v < len(classes)]
    if wrong:
        raise ValueError(
            f"{len(wrong)} labels of {path} are out of range: row {wrong[0][0]} has label {wrong[0][1]}, and there are {len(classes)} classes (0 to {len(classes) - 1})"
        )
    missing = sum(v is None for v in labels)
    if 0 < missing < len(labels):
        raise ValueError(f"{missing} of {len(labels)} rows of {path} have no label: label all of them or none")


def held_out(pictures: LabelledImages, share: float, seed: int) -> tuple[LabelledImages, LabelledImages | None]:
    """(training part, held-out slice): a fixed random share by seed, for choosing rates without looking at a test set."""
    if not 0 <= share < 1:
        raise ValueError(f"held_out={share}: expected a share of at least 0 and below 1")
    count = round(share * len(pictures))
    if count == 0:
        return pictures, None
    if count >= len(pictures):
        raise ValueError(f"held_out={share} leaves none of the {len(pictures)} pictures for training")
    order = np.random.default_rng(seed).permutation(len(pictures)).tolist()
    kept, aside = (
        replace(pictures, kept=[pictures.row_id(i) for i in sorted(p)]) for p in (order[count:], order[:count])
    )
    return kept, replace(aside, name=f"{pictures.name} (held out)")
