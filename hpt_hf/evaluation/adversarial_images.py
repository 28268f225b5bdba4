"""Adversarial images kept as a data set: what `datasets` opens from a folder of parquet files."""

from __future__ import annotations

from pathlib import Path

import datasets
import torch

from hpt_hf.data.collator import to_png
from hpt_hf.models.logits_classifier import Classifier
from hpt_hf.types import Images, Labels


@torch.no_grad()
def save_images(
    file: Path, classifier: Classifier, images: Images, perturbed: Images, labels: Labels, ends: list[str]
) -> None:
    """One batch as a parquet file, whole or not at all.

    Columns: `image` and `adversarial` as the model sees them, in 256 levels; `label`, `clean_answer` and `answer`, that to
    the adversarial image before it was rounded; `linf` and `l2`, the distance in [0, 1] pixels; `end` as in a result.
    """
    names = datasets.ClassLabel(names=list(classifier.classes))
    answers = [classifier.classify(x).logits.argmax(1).tolist() for x in (images, perturbed)]
    delta = (perturbed - images).flatten(1)
    columns = {
        "image": [to_png(x) for x in images],
        "adversarial": [to_png(x) for x in perturbed],
        "label": labels.tolist(),
        "clean_answer": answers[0],
        "answer": answers[1],
        "linf": delta.abs().amax(1).tolist(),
        "l2": delta.norm(dim=1).tolist(),
        "end": ends,
    }
    kinds = {name: datasets.Image() for name in ("image", "adversarial")}
    kinds |= dict.fromkeys(("label", "clean_answer", "answer"), names)
    kinds |= {"linf": datasets.Value("float32"), "l2": datasets.Value("float32"), "end": datasets.Value("string")}
    file.parent.mkdir(parents=True, exist_ok=True)
    part = file.with_suffix(".part")
    datasets.Dataset.from_dict(columns, features=datasets.Features(kinds)).to_parquet(part)
    part.replace(file)
