"""Streams: training images read as they come, from the Hub or from parquet files too large to unpack, resumable anywhere.

The order is a pure function of seed, epoch and place: shards in a random order, their rows shuffled within blocks. So a resumed run meets the
rows that the uninterrupted one would have met, for any number of processes and workers. (`datasets`' own buffered shuffle loses its buffer.)
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import datasets
import numpy as np
import pyarrow.parquet
import torch
from PIL import Image

from hpt_hf.data.class_names import match_classes
from hpt_hf.data.collator import encoded
from hpt_hf.data.dataset import DatasetSpec, check_hub_id, find_columns, read_files
from hpt_hf.models.zero_shot import TEMPLATE, check_templates

BLOCK = 2048  # rows that are shuffled together, and held in memory as they are stored


@dataclass
class StreamedImages(torch.utils.data.IterableDataset):
    """Labelled images in a stream; to the Trainer a data set of known length.

    Args:
        data: columns `image` (encoded) and, if labelled, `label`.
        length: images there are; an epoch ends with the last whole batch.
        places: the place in `classes` of each number in the label column.
        batch: images of a batch over all processes: whole ones go to each of the loader's workers in turn.
        seed: of the order.
        epoch, start: the next epoch, and how many of its images were trained on already.
    """

    data: datasets.IterableDataset
    length: int
    places: list[int]
    classes: tuple[str, ...]
    templates: tuple[str, ...] = (TEMPLATE,)
    name: str = "data"
    batch: int = 1
    seed: int = 0
    epoch: int = 0
    start: int = 0

    def __len__(self) -> int:
        return self.length // self.batch * self.batch

    @property
    def labelled(self) -> bool:
        return "label" in self.data.features

    def set_epoch(self, epoch: int) -> None:
        if epoch != self.epoch:
            self.start = 0  # only the epoch that was broken off is taken up in its middle
        self.epoch = epoch

    def fast_forward(self, epoch: int, batches: int) -> None:
        """Go on in this epoch, after so many of its batches."""
        self.epoch, self.start = epoch, batches * self.batch

    def __iter__(self) -> Iterator[dict]:
        worker = torch.utils.data.get_worker_info()
        own, workers = (0, 1) if worker is None else (worker.id, worker.num_workers)
        return (row for place, row in enumerate(self._rows()) if place // self.batch % workers == own)

    def _rows(self) -> Iterator[dict]:
        blank = {"image": Image.new("RGB", (1, 1)), "label": 0 if self.labelled else None}
        first = self.start // BLOCK  # the blocks before were trained on whole, and are not even read
        yield from [blank] * (first * BLOCK)
        shards = self.data.shuffle(generator=np.random.default_rng([self.seed, self.epoch]), buffer_size=1)
        # `iter` and not the plain loop: in a loader's worker that would hand out the worker's own shards only.
        blocks = shards.skip(first * BLOCK).take(len(self) - first * BLOCK).iter(batch_size=BLOCK)
        place = first * BLOCK
        for number, block in enumerate(blocks, first):
            labels = block.get("label", [None] * len(block["image"]))
            for i in np.random.default_rng([self.seed, self.epoch, number]).permutation(len(labels)).tolist():
                row = f"row {number * BLOCK + i} of epoch {self.epoch} of {self.name}"
                yield blank if place < self.start else self._row(block["image"][i], labels[i], row)
                place += 1
        if place < len(self):
            raise ValueError(
                f"{self.name} ended after {place} images, expected {self.length}. Fix: give the number with --images."
            )

    def _row(self, cell: dict | None, label: int | None, where: str) -> dict:
        if cell is None:
            raise ValueError(f"{where} has no image")
        if self.labelled and (label is None or not 0 <= label < len(self.places)):
            raise ValueError(f"{where} has the label {label!r}, and there are {len(self.places)} classes (from 0)")
        return {"image": encoded(cell), "label": self.places[label] if self.labelled else None, "where": where}


def open_stream(spec: DatasetSpec, *, length: int | None = None, batch: int = 1, seed: int = 0) -> StreamedImages:
    """Open a Hub id, a parquet file or a folder of them as a stream.

    Args:
        length: how many images there are, where the data set does not say; or how many to use.
        batch, seed: of `StreamedImages`.

    Raises:
        FileNotFoundError, ValueError: nothing there, nothing that can be streamed, no classes, or no length.
    """
    check_templates(spec.templates or (TEMPLATE,))
    path = Path(spec.path)
    if path.exists():
        files = [path] if path.is_file() else _split_files(path, spec.split)
        if not files or any(f.suffix != ".parquet" for f in files):
            raise ValueError(f"{path} cannot be streamed: expected a Hub id, a parquet file or a folder of them")
        data = read_files("parquet", files, streaming=True)
        known = sum(pyarrow.parquet.read_metadata(f).num_rows for f in files)
    else:
        check_hub_id(spec.path)
        data = datasets.load_dataset(spec.path, spec.config, split=spec.split, revision=spec.revision, streaming=True)
        known = data.info.splits[spec.split].num_examples if spec.split in (data.info.splits or {}) else None
    if length is not None and not 1 <= length <= (known or length):
        raise ValueError(f"--images {length}: expected 1 to {known or 'the number there are'} ({spec.path})")
    if not (length or known):
        raise ValueError(f"{spec.path} does not say how many images it has. Fix: give the number with --images.")
    if data.features is None:
        raise ValueError(f"{spec.path} does not say what its columns hold. Fix: leave out --streaming.")
    image, label = find_columns(data, spec)
    names = None
    if label is not None:
        kind = data.features[label]
        names = kind.names if isinstance(kind, datasets.ClassLabel) else None
        if not kind.dtype.startswith(("int", "uint")):
            raise ValueError(
                f"the labels of {spec.path} are {kind.dtype}, expected numbers: a stream is not read ahead"
            )
    classes, places = match_classes(names, spec.classes, spec.path)
    columns = {image: "image"} | ({label: "label"} if label is not None else {})
    data = data.select_columns(list(columns)).rename_columns({k: v for k, v in columns.items() if k != v})
    return StreamedImages(
        data.cast_column("image", datasets.Image(decode=False)),
        length or known,
        places,
        classes,
        tuple(spec.templates or (TEMPLATE,)),
        path.stem if path.exists() else f"{spec.path}:{spec.split}",
        batch,
        seed,
    )


def _split_files(folder: Path, split: str) -> list[Path]:
    """The parquet files of a split, by the Hub's names (train-00000-of-00002); files of other names are all taken."""
    files = sorted(folder.rglob("*.parquet"))
    splits = {f: found[1] for f in files if (found := re.fullmatch(r"(.+)-\d+-of-\d+", f.stem))}
    if splits and split not in splits.values():
        there = ", ".join(sorted(set(splits.values())))
        raise ValueError(f"{folder} has no split {split!r}, it has {there}. Fix: choose one with --split.")
    return [f for f in files if splits[f] == split] if len(splits) == len(files) else files
