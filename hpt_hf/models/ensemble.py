"""Several frozen classifiers as one teacher."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from hpt_hf.models.zero_shot import ZeroShotClassifier
from hpt_hf.types import Images, Logits, ZeroShotOutput


class Ensemble(torch.nn.Module):
    """The mean of the members' probabilities. They need no shared embedding space; only their classes must agree.

    Each computes on its own device and in its own precision, and costs one forward pass.

    Args:
        members: with their classes set.
        weights: a positive number for each; None: all alike.

    Raises:
        ValueError: other classes than the first member's, or weights that do not fit.
    """

    def __init__(self, members: Sequence[ZeroShotClassifier], weights: Sequence[float] | None = None):
        super().__init__()
        self.members = torch.nn.ModuleList(members)
        self.classes, self.templates = members[0].classes, members[0].templates
        if odd := [m.model.name_or_path for m in members if m.classes != self.classes]:
            raise ValueError(f"{odd[0]} and {members[0].model.name_or_path} have different classes: expected the same")
        weights = [1.0] * len(members) if weights is None else list(weights)
        if len(weights) != len(members) or not all(weight > 0 for weight in weights):
            raise ValueError(f"proxy_weights: got {weights}, expected {len(members)} numbers above 0")
        self.weights = [weight / sum(weights) for weight in weights]

    def classify(self, images: Images) -> ZeroShotOutput:
        """Logits that are the logarithm of the mean probabilities, and each member's own; no embeddings."""
        each = [m.classify(images.to(m.device)).logits.to(images.device) for m in self.members]
        logits = torch.stack(each)
        return ZeroShotOutput(logits=mean_probabilities(logits, self.weights), members=logits)

    def forward(self, images: Images) -> ZeroShotOutput:
        return self.classify(images)


def mean_probabilities(logits: torch.Tensor, weights: Sequence[float]) -> Logits:
    """The logarithm of the weighted mean of probabilities; `logits`: (members, batch, classes)."""
    shares = torch.tensor(weights, device=logits.device)[:, None, None]
    return torch.logsumexp(logits.log_softmax(-1) + (shares / shares.sum()).log(), dim=0)


def members(model: ZeroShotClassifier | Ensemble | None) -> list[ZeroShotClassifier]:
    """The classifiers that a reference is made of: several, one, or none."""
    return list(model.members) if isinstance(model, Ensemble) else [model] if model is not None else []
