"""Any module from images in [0, 1] to logits, as something that can be attacked and measured."""

from __future__ import annotations

from collections.abc import Sequence
from types import SimpleNamespace

import torch

from hpt_hf.models.preprocessing import Preprocessing
from hpt_hf.models.zero_shot import ZeroShotClassifier
from hpt_hf.types import Images, ZeroShotOutput


class LogitsClassifier(torch.nn.Module):
    """A classifier whose classes are its own: output i is class i of the data.

    Args:
        model: (batch, 3, height, width) in [0, 1] -> (batch, classes) logits, or an object with `logits`.
        side: images are resized to so many pixels and cut to a square, as CLIP's are.

    Raises, where it is asked: ValueError for outputs that are no logits over the data's classes.
    """

    lora, revision = None, None

    def __init__(self, model: torch.nn.Module, side: int):
        super().__init__()
        self.model, self.image_size = model, side
        self.classes: tuple[str, ...] = ()
        self.head = torch.empty(0, 0)
        as_clips = Preprocessing(side, side, crop=True, resample=3, mean=(0.0,) * 3, std=(1.0,) * 3)
        self.processor = SimpleNamespace(image_processor=as_clips)

    @property
    def device(self) -> torch.device:
        return next((p.device for p in self.model.parameters()), torch.device("cpu"))

    def plain_state(self) -> dict[str, torch.Tensor]:
        return self.model.state_dict()

    def identity(self) -> list:
        """What decides its answers beside its weights, as JSON."""
        return [repr(self.model), self.image_size]

    def set_classes(self, classes: Sequence[str], templates: Sequence[str] = ()) -> LogitsClassifier:
        self.classes = tuple(classes)
        return self

    def classify(self, images: Images) -> ZeroShotOutput:
        logits = self.model(images)
        logits = getattr(logits, "logits", logits)
        expected = (len(images), len(self.classes))
        if not isinstance(logits, torch.Tensor) or tuple(logits.shape) != expected or not logits.is_floating_point():
            got = tuple(logits.shape) if isinstance(logits, torch.Tensor) else type(logits).__name__
            raise ValueError(f"model: got {got}, expected {expected} logits, one for each of the data's classes")
        ones = logits.new_ones(len(images))
        if len(images) and (logits >= 0).all() and torch.allclose(logits.sum(1), ones, atol=1e-4):
            raise ValueError("model: got probabilities, expected logits: a softmax hides gradients. Fix: leave it out")
        return ZeroShotOutput(logits=logits.float())

    def forward(self, images: Images) -> ZeroShotOutput:
        return self.classify(images)


Classifier = ZeroShotClassifier | LogitsClassifier  # what is attacked and measured
