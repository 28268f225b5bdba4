"""The vocabulary: what the tensors that travel between the rooms of this package look like (jaxtyping, checked in the tests)."""

from __future__ import annotations

from dataclasses import dataclass

from jaxtyping import Float, Int
from torch import Tensor
from transformers.utils import ModelOutput

# Un-normalised RGB in [0, 1]. Normalisation happens inside the model, so that a pixel means the same to every model.
Images = Float[Tensor, "batch 3 height width"]
# The same at the size that the vision tower reads.
InputImages = Float[Tensor, "batch 3 tall wide"]
# logit_scale * cosine similarity to each class's prompt.
Logits = Float[Tensor, "batch classes"]
# Projected, not normalised.
Embeds = Float[Tensor, "batch dim"]
# Indices into the class list.
Labels = Int[Tensor, "batch"]
# One number per image, for example its loss.
PerExample = Float[Tensor, "batch"]
# One 63-bit number per image: a digest of its pixels. The attack's randomness hangs on it and not on the place in a batch.
ImageIds = Int[Tensor, "batch"]


@dataclass
class ZeroShotOutput(ModelOutput):
    """What a model says of a batch: logits, and projected embeddings that are not normalised, both float32; of several models, each one's logits, too."""

    logits: Logits | None = None
    embeds: Embeds | None = None
    cosines: Logits | None = None  # to each class's prompt
    members: Float[Tensor, "members batch classes"] | None = None  # of an ensemble: the logits of each
