"""Attack losses: what an attack maximises, per example."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from hpt_hf.types import Labels, Logits, PerExample


def cross_entropy(logits: Logits, labels: Labels) -> PerExample:
    """-log p(label): what PGD maximises."""
    return F.cross_entropy(logits, labels, reduction="none")


def margin(logits: Logits, labels: Labels) -> PerExample:
    """Best wrong logit minus the right one (Carlini & Wagner 2017); unlike the cross-entropy it does not saturate."""
    wrong = logits.scatter(1, labels[:, None], -torch.inf).amax(1)
    return wrong - logits.gather(1, labels[:, None])[:, 0]


def targeted_dlr(logits: Logits, labels: Labels, targets: Labels) -> PerExample:
    """(z_target - z_label) / (z_1 - (z_3 + z_4) / 2) (Croce & Hein 2020, equation 7); below four classes undivided."""
    difference = (logits.gather(1, targets[:, None]) - logits.gather(1, labels[:, None]))[:, 0]
    if logits.shape[1] < 4:
        return difference
    top = logits.topk(4, dim=1).values
    return difference / (top[:, 0] - top[:, 2:].mean(1)).clamp_min(1e-12)
