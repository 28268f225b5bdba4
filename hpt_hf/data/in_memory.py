"""Labelled images that lie in memory: a `datasets.Dataset`, or a pair of tensors."""

from __future__ import annotations

from collections.abc import Sequence

import datasets
import numpy as np
import torch
from PIL import Image

from hpt_hf.data.dataset import DatasetSpec, LabelledImages, label_images
from hpt_hf.models.zero_shot import TEMPLATE


def images_of(
    dataset, *, classes: Sequence[str] | None = None, templates: Sequence[str] | None = None
) -> LabelledImages:
    """A `datasets.Dataset`, or a pair of tensors, as labelled images.

    Args:
        dataset: with a column of images and one of labels; or ((n, 3, height, width) in [0, 1], (n,) class indices),
            kept in the 256 levels that images have.
        classes: names in label order; None: the data's own.

    Raises:
        ValueError: labels that do not fit, or no class names.
    """
    templates = tuple(templates or (TEMPLATE,))
    if isinstance(dataset, LabelledImages):
        return dataset
    if isinstance(dataset, datasets.Dataset):
        spec = DatasetSpec("dataset", classes=tuple(classes) if classes else None, templates=templates)
        return label_images(dataset, spec, None, "dataset", {})
    pixels, labels = (torch.as_tensor(part).cpu() for part in dataset)
    if pixels.ndim != 4 or pixels.shape[1] != 3 or pixels.min() < 0 or pixels.max() > 1:
        raise ValueError(f"images: got {tuple(pixels.shape)}, expected (n, 3, height, width) in [0, 1]")
    if classes is None:
        classes = [f"class {i}" for i in range(int(labels.max()) + 1)]
    if len(labels) != len(pixels):
        raise ValueError(f"labels: got {len(labels)} for {len(pixels)} images, expected one each")
    levels = (pixels * 255).round().byte().permute(0, 2, 3, 1).numpy()
    rows = [Image.fromarray(np.ascontiguousarray(row)) for row in levels]
    return LabelledImages.from_images(rows, fitting(labels.tolist(), len(classes)), classes, templates, "tensors")


def fitting(labels, count: int) -> list[int]:
    labels = list(labels)
    if odd := [v for v in labels if not isinstance(v, int) or not 0 <= v < count]:
        raise ValueError(f"labels: got {odd[0]!r}, expected class indices from 0 to {count - 1}")
    return labels
