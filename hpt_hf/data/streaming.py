"""Streams: training pictures read as they come, from the Hub or from parquet files too large to unpack, in an order that can be taken up again anywhere.

The order is a pure function of seed, epoch and place: shards in a random order, and their rows shuffled within blocks. So a resumed run meets the rows
that the uninterrupted one would have met, whatever the number of processes and of workers; what was seen is passed over without being decoded.
"""

from __future__ import annotations

import glob
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import datasets
import numpy as np
import torch
from PIL import Image

from hpt_hf.data.class_names import match_classes
from hpt_hf.data.collator import encoded
from hpt_hf.data.dataset import DatasetSpec, check_hub_id, find_columns
from hpt_hf.models.zero_shot import TEMPLATE, check_classes, check_templates

BLOCK = 2048  # rows that are shuffled together, and held in memory as they are stored


@dataclass
class StreamedImages(torch.utils.data.IterableDataset):
    """Labelled pictures in a stream; to the Trainer a data set of known length.

    Args:
        rows: a `datasets.IterableDataset`, images not decoded.
        length: pictures there are; an epoch ends with the last whole batch, since every step must weigh the same.
        image, label: their columns.
        places: number in the label column -> index in `classes`; None: the same.
        chunk: pictures of a batch over all processes: whole ones go to each of the loader's workers in turn.
        seed: of the order.
        start: pictures of the next epoch that were trained on already.
    """

    rows: datasets.IterableDataset
    length: int
    image: str
    label: str | None
    places: list[int] | None
    classes: tuple[str, ...]
    templates: tuple[str, ...] = (TEMPLATE,)
    name: str = "data"
    chunk: int = 1
    seed: int = 0
    start: int = 0
    epoch: int = 0

    def __len__(self) -> int:
        return self.length // self.chunk * self.chunk

    @property
    def labelled(self) -> bool:
        return self.label is not None

    def set_epoch(self, epoch: int) -> None:
        if epoch != self.epoch:
            self.start = 0  # only the epoch that was broken off is taken up in its middle
        self.epoch = epoch

    def fast_forward(self, epoch: int, batches: int) -> None:
        """Go on in this epoch, after so many of its batches."""
        self.epoch, self.start = epoch, batches * self.chunk

    def __iter__(self) -> Iterator[dict]:
        worker = torch.utils.data.get_worker_info()
        mine, workers = (0, 1) if worker is None else (worker.id, worker.num_workers)
        for place, row in self._in_order():
            if place // self.chunk % workers == mine:
                yield row

    def _in_order(self) -> Iterator[tuple[int, dict]]:
        shards = self.rows.shuffle(generator=np.random.default_rng([self.seed, self.epoch]), buffer_size=1)
        # Whole blocks that were seen are not even read where the format allows it; a blank keeps the place of each of their rows.
        blank = {"image": Image.new("RGB", (1, 1)), "label": 0 if self.labelled else None}
        first = self.start // BLOCK
        yield from ((place, blank) for place in range(first * BLOCK))
        # `iter` and not the plain loop: in a loader's worker that would hand out the worker's own shards only.
        blocks = shards.skip(first * BLOCK).take(len(self) - first * BLOCK).iter(batch_size=BLOCK)
        place = first * BLOCK
        for number, block in enumerate(blocks, first):
            order = np.random.default_rng([self.seed, self.epoch, number]).permutation(len(block[self.image]))
            for index in order.tolist():
                row = {column: values[index] for column, values in block.items()}
                yield place, blank if place < self.start else self._row(row, number * BLOCK + index)
                place += 1
        if place < len(self):
            raise ValueError(
                f"{self.name} ended after {place} pictures, and was said to have {self.length}: give the number with --images"
            )

    def _row(self, row: dict, number: int) -> dict:
        where = f"row {number} of epoch {self.epoch} of {self.name}"
        cell, label = row[self.image], None
        if cell is None:
            raise ValueError(f"{where} has no picture")
        if self.label is not None:
            value = row[self.label]
            label = (
                value
                if self.places is None or value is None or not 0 <= value < len(self.places)
                else self.places[value]
            )
            if not isinstance(label, int) or not 0 <= label < len(self.classes):
                raise ValueError(
                    f"{where} has the label {value!r}, and there are {len(self.classes)} classes (0 to {len(self.classes) - 1})"
                )
        return {"image": encoded(cell), "label": label, "where": where}


def open_stream(spec: DatasetSpec, *, pictures: int | None = None) -> StreamedImages:
    """Open a Hub id, a parquet file or a folder of them as a stream.

    Args:
        pictures: how many there are, where the data set does not say.

    Raises:
        FileNotFoundError, ValueError: nothing there, nothing that can be streamed, no classes, or no number of pictures.
    """
    check_templates(spec.templates or (TEMPLATE,))
    path = Path(spec.path)
    if path.exists():
        files = [path] if path.is_file() else sorted(path.rglob("*.parquet"))
        if path.is_dir():
            # The Hub's own names say which split a file belongs to; files of other names are all taken.
            splits = {f: found[1] for f in files if (found := re.fullmatch(r"(.+)-\d+-of-\d+", f.stem))}
            if splits and spec.split not in splits.values():
                raise ValueError(
                    f"{path} has no split {spec.split!r}; it has {', '.join(sorted(set(splits.values())))}: choose one with --split"
                )
            files = [f for f in files if splits[f] == spec.split] if len(splits) == len(files) else files
        if not files or any(f.suffix != ".parquet" for f in files):
            raise ValueError(
                f"{path} cannot be streamed: expected a Hub id, a parquet file or a folder of them; image folders and tar shards are read where they lie, without --streaming"
            )
        rows = datasets.load_dataset(
            "parquet", data_files=[glob.escape(str(f)) for f in files], split="train", streaming=True
        )
        import pyarrow.parquet

        known = sum(pyarrow.parquet.ParquetFile(f).metadata.num_rows for f in files)
    else:
        check_hub_id(spec.path)
        rows = datasets.load_dataset(spec.path, spec.config, split=spec.split, revision=spec.revision, streaming=True)
        known = rows.info.splits[spec.split].num_examples if spec.split in (rows.info.splits or {}) else None
    if pictures is not None and pictures < 1:
        raise ValueError(f"--images {pictures}: expected at least 1")
    length = pictures or known
    if not length:
        raise ValueError(
            f"{spec.path} does not say how many pictures it has, and the schedule hangs on it: give the number with --images"
        )
    if known and pictures and pictures > known:
        raise ValueError(f"--images {pictures}: {spec.path} has {known}")
    if rows.features is None:
        raise ValueError(
            f"{spec.path} does not say what its columns hold: it cannot be streamed; leave out --streaming"
        )
    image, label, names = find_columns(rows, spec)
    if label is not None and names is None and not rows.features[label].dtype.startswith(("int", "uint")):
        raise ValueError(
            f"the labels of {spec.path} are of type {rows.features[label].dtype}: a stream's must be numbers, or its classes would only be known at its end"
        )
    classes, places = match_classes(names, spec.classes, spec.path)
    if classes is None:
        raise ValueError(
            f"{spec.path} names no classes: give the names, --classes cat dog … or --classes_file names.txt"
        )
    check_classes(classes)
    rows = rows.select_columns([image] + [label] * (label is not None)).cast_column(
        image, datasets.Image(decode=False)
    )
    return StreamedImages(
        rows,
        length,
        image,
        label,
        places,
        tuple(classes),
        tuple(spec.templates or (TEMPLATE,)),
        path.stem if path.exists() else f"{spec.path}:{spec.split}",
    )
