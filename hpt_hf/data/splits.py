"""Parts of a data set kept aside, so that settings are never chosen on test images."""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from hpt_hf.data.dataset import LabelledImages


def held_out(images: LabelledImages, share: float, seed: int) -> tuple[LabelledImages, LabelledImages | None]:
    """(training part, held-out slice): a random share fixed by the seed, for choosing settings without a test set."""
    if not 0 <= share < 1:
        raise ValueError(f"held_out={share}: expected a share of at least 0 and below 1")
    if share == 0:
        return images, None
    count = round(share * len(images))
    if not 0 < count < len(images):
        raise ValueError(f"held_out={share}: got {count} of {len(images)} images, expected some in each part, or 0")
    order = np.random.default_rng(seed).permutation(len(images)).tolist()
    aside = replace(images.select(sorted(order[:count])), name=f"{images.name} (held out)")
    return images.select(sorted(order[count:])), aside


def leave_out_classes(images: LabelledImages, share: float) -> tuple[LabelledImages, LabelledImages | None]:
    """(images of the classes that stay, images of a random share of classes, always the same), each with its own classes.

    Settings that keep a CLIP's zero-shot accuracy can be told apart on classes that training never saw alone.

    Raises:
        ValueError: fewer than two classes in either part, or images without labels.
    """
    if not share:
        return images, None
    count = len(images.classes)
    aside = set(np.random.default_rng(0).permutation(count)[: round(share * count)].tolist())
    if not 2 <= len(aside) <= count - 2:
        raise ValueError(f"leave_out_classes: got {share} of {count} classes, expected at least 2 in each part")
    if not images.labelled:
        raise ValueError(f"leave_out_classes: {images.name} has no labels. Fix: leave it out")
    parts = []
    for kept, name in ((set(range(count)) - aside, images.name), (aside, f"{images.name} (classes left out)")):
        old = sorted(kept)
        part = images.select([i for i, label in enumerate(images.labels) if label in kept])
        part = part.with_classes([images.classes[label] for label in old], [old.index(v) for v in part.labels])
        parts.append(replace(part, name=name))
    return parts[0], parts[1]
