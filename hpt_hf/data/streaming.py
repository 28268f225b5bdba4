"""Streams: training images read as they come, from the Hub or from parquet files too large to unpack, resumable anywhere.

The order is a pure function of seed, epoch and place: shards in a random order, their rows shuffled within blocks. So a resumed run
meets the rows of the uninterrupted one, for any number of processes and workers. (`datasets`' own shuffle loses its buffer.)
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import datasets
import numpy as np
import pyarrow.parquet
import torch
from PIL import Image

from hpt_hf.data.class_names import match_classes
from hpt_hf.data.dataset import DatasetSpec, check_hub_id, find_columns, load_from_hub, read_files
from hpt_hf.data.layout import parquet_files
from hpt_hf.models.zero_shot import TEMPLATE, check_templates

BLOCK = 2048  # rows that are shuffled together, and held in memory as they are stored


@dataclass
class StreamedImages(torch.utils.data.IterableDataset):
    """Labelled images in a stream; to the Trainer a data set of known length.

    Args:
        data: images not decoded.
        image, label: the columns; no label: None.
        length: images there are; an epoch ends with the last whole batch.
        places: the place in `classes` of each number in the label column.
        batch: images of a batch over all processes: whole ones go to each of the loader's workers in turn.
        epoch, start: the next epoch, and how many of its images were trained on already.
    """

    data: datasets.IterableDataset
    image: str
    label: str | None
    length: int
    classes: tuple[str, ...]
    places: list[int]
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
        return self.label is not None

    def set_epoch(self, epoch: int) -> None:
        if epoch != self.epoch:
            self.start = 0  # only the epoch that was broken off is taken up in its middle
        self.epoch = epoch

    def fast_forward(self, epoch: int, batches: int) -> None:
        """Go on in this epoch, after so many of its batches: their images come as blanks, and nobody decodes them."""
        self.epoch, self.start = epoch, batches * self.batch

    def __iter__(self) -> Iterator[dict]:
        worker = torch.utils.data.get_worker_info()
        own, workers = (0, 1) if worker is None else (worker.id, worker.num_workers)
        return (row for place, row in enumerate(self._rows()) if place // self.batch % workers == own)

    def _rows(self) -> Iterator[dict]:
        blank = {"image": Image.new("RGB", (1, 1)), "label": 0 if self.labelled else None}
        first = self.start // BLOCK  # the blocks before this one were trained on whole, and are not even read
        place = first * BLOCK
        yield from [blank] * place
        shards = self.data.shuffle(generator=np.random.default_rng([self.seed, self.epoch]), buffer_size=1)
        # `iter` and not the plain loop: in a loader's worker that would hand out the worker's own shards only.
        for number, block in enumerate(shards.skip(place).take(len(self) - place).iter(batch_size=BLOCK), first):
            labels = block[self.label] if self.labelled else [None] * len(block[self.image])
            for i in np.random.default_rng([self.seed, self.epoch, number]).permutation(len(labels)).tolist():
                where = f"row {number * BLOCK + i} of epoch {self.epoch} of {self.name}"
                yield blank if place < self.start else self._row(block[self.image][i], labels[i], where)
                place += 1
        if place < len(self):
            raise ValueError(f"{self.name} ended after {place} images, expected {self.length}. Fix: --images {place}.")

    def _row(self, cell: dict | None, label: int | None, where: str) -> dict:
        if cell is None or cell["bytes"] is None:
            raise ValueError(f"{where} holds no image, or the path of one")
        if self.labelled:
            if label is None or not 0 <= label < len(self.places):
                raise ValueError(f"{where} has the label {label!r}, and there are {len(self.places)} classes")
            label = self.places[label]
        return {"image": cell["bytes"], "label": label, "where": where}


def open_stream(spec: DatasetSpec, *, length: int | None = None, batch: int = 1, seed: int = 0) -> StreamedImages:
    """Open a Hub id, a parquet file or a folder of them as a stream.

    Args:
        length: how many images there are, where the data set does not say; or how many to use.
        batch, seed: of `StreamedImages`.

    Raises:
        FileNotFoundError, ValueError: nothing there, nothing that can be streamed, no classes, or no length.
    """
    path, templates = Path(spec.path).expanduser(), tuple(spec.templates or (TEMPLATE,))
    check_templates(templates)
    if path.exists():
        files = [path] if path.is_file() else parquet_files(path, spec.split)
        if not files or any(f.suffix != ".parquet" for f in files):
            raise ValueError(f"{path} cannot be streamed: expected a Hub id, a parquet file or a folder of them")
        data = read_files("parquet", files, streaming=True)
        known = sum(pyarrow.parquet.read_metadata(f).num_rows for f in files)
        name = path.stem or path.absolute().name
    else:
        check_hub_id(spec.path)
        data = load_from_hub(spec, streaming=True)
        known = data.info.splits[spec.split].num_examples if spec.split in (data.info.splits or {}) else None
        name = f"{spec.path}:{spec.split}"
    if length is not None and not 1 <= length <= (known or length):
        raise ValueError(f"--images {length}: expected 1 to {known or 'as many as there are'}")
    if not (length or known) or data.features is None:
        raise ValueError(f"{spec.path} does not say how many images it has, or its columns. Fix: --images")
    image, label = find_columns(data, spec.image, spec.label, spec.path)
    kind = data.features[label] if label else None
    if label and not kind.dtype.startswith(("int", "uint")):
        raise ValueError(f"the labels of {spec.path} are of type {kind.dtype}, expected numbers in a stream")
    names = kind.names if isinstance(kind, datasets.ClassLabel) else None
    classes, places = match_classes(names, spec.classes, spec.path)
    data = data.select_columns([image, label] if label else [image]).cast_column(image, datasets.Image(decode=False))
    return StreamedImages(data, image, label, length or known, classes, places, templates, name, batch, seed)
