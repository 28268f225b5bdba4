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
    image, number, text = datasets.Image(), datasets.Value("float32"), datasets.Value("string")
    answer = datasets.ClassLabel(names=list(classifier.classes))
    clean_answers, answers = (classifier.classify(x).logits.argmax(1).tolist() for x in (images, perturbed))
    delta = (perturbed - images).flatten(1)
    columns = {
        "image": (image, [to_png(x) for x in images]),
        "adversarial": (image, [to_png(x) for x in perturbed]),
        "label": (answer, labels.tolist()),
        "clean_answer": (answer, clean_answers),
        "answer": (answer, answers),
        "linf": (number, delta.abs().amax(1).tolist()),
        "l2": (number, delta.norm(dim=1).tolist()),
        "end": (text, ends),
    }
    kinds = datasets.Features({name: kind for name, (kind, _) in columns.items()})
    file.parent.mkdir(parents=True, exist_ok=True)
    part = file.with_suffix(".part")
    datasets.Dataset.from_dict({n: v for n, (_, v) in columns.items()}, features=kinds).to_parquet(part)
    part.replace(file)
