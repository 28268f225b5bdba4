"""Keep the original's coordinates where clean accuracy hangs on them (a masked merge, as PISTOLE's GISM does)."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from hpt_hf.data.collator import Collator
from hpt_hf.data.dataset import LabelledImages
from hpt_hf.evaluation.evaluator import batches
from hpt_hf.models.zero_shot import ZeroShotClassifier


def clean_gradients(model: ZeroShotClassifier, images: LabelledImages) -> dict[str, torch.Tensor]:
    """Name -> sum over batches of |d cross-entropy on clean images / d parameter|, of the vision side."""
    model.set_classes(images.classes, images.templates).freeze_text()
    named = {n: p for n, p in model.model.named_parameters() if p.requires_grad}
    found = {n: torch.zeros_like(p) for n, p in named.items()}
    for batch in batches(images, Collator(model.processor), batch_size=64, limit=512):
        logits = model.classify(batch["images"].to(model.device)).logits
        loss = F.cross_entropy(logits, batch["labels"].to(model.device))
        for name, gradient in zip(named, torch.autograd.grad(loss, list(named.values())), strict=True):
            found[name] += gradient.abs()
    return found


def masked(
    original: ZeroShotClassifier, robust: ZeroShotClassifier, images: LabelledImages, share: float
) -> ZeroShotClassifier:
    """The robust model with the original's value in the `share` of each tensor's coordinates whose clean gradient is largest.

    Args:
        images: training images, never test images.
        share: 0 (the robust model) to below 1.
    """
    theta0, theta1 = original.model.state_dict(), robust.model.state_dict()
    merged = dict(theta1)
    for name, gradient in clean_gradients(robust, images).items():
        count = int(share * gradient.numel())
        if count:
            least = gradient.flatten().topk(count).values[-1]
            merged[name] = torch.where(gradient >= least, theta0[name], theta1[name])
    return robust.with_weights(merged)
