"""Attack losses: what an attack maximises, per example."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from hpt_hf.types import Labels, Logits, PerExample


def cross_entropy(logits: Logits, labels: Labels) -> PerExample:
    """-log p(label): what PGD maximises."""
    return F.cross_entropy(logits, labels, reduction="none")


def margin(logits: Logits, labels: Labels) -> PerExample:
    """Best wrong logit minus the right one: what CW maximises; it does not saturate where the cross-entropy does."""
    right = logits.gather(1, labels[:, None])[:, 0]
    wrong = logits.scatter(1, labels[:, None], -torch.inf).amax(1)
    return wrong - right


def targeted_dlr(logits: Logits, labels: Labels, targets: Labels) -> PerExample:
    """The target's logit minus the right one, in units of the spread between the best and the mean of the third and the fourth.

    The targeted DLR loss (Croce & Hein 2020, equation 7): no rescaling of the logits changes it. It needs four classes; with fewer the difference
    stands as it is, since no logit would be left that the loss does not move itself.
    """
    difference = (logits.gather(1, targets[:, None]) - logits.gather(1, labels[:, None]))[:, 0]
    if logits.shape[1] < 4:
        return difference
    top = logits.topk(4, dim=1).values
    return difference / (top[:, 0] - top[:, 2:].mean(1)).clamp_min(1e-12)
