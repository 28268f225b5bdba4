"""A masked merge gives back exactly the coordinates with the largest clean gradients, and no others."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from conftest import make_images

from hpt_hf.data.collator import Collator
from hpt_hf.evaluation.masked_merge import clean_gradients, masked
from hpt_hf.models.zero_shot import ZeroShotClassifier


@pytest.fixture(scope="module")
def pair(student_path):
    original, robust = (ZeroShotClassifier.from_pretrained(student_path) for _ in range(2))
    torch.manual_seed(0)
    with torch.no_grad():
        for parameter in robust.model.parameters():
            parameter.add_(0.01 * torch.randn_like(parameter))
    return original, robust


def test_gradients_are_those_of_the_clean_loss(pair):
    robust, images = pair[1], make_images(8)
    found, batch = clean_gradients(robust, images), Collator(robust.processor)(list(images))
    F.cross_entropy(robust.classify(batch["images"]).logits, batch["labels"]).backward()
    assert {n.split(".")[0] for n in found} == {"vision_model", "visual_projection"}
    for name, gradient in found.items():
        assert torch.allclose(gradient, robust.model.get_parameter(name).grad.abs(), atol=1e-6), name


@pytest.mark.parametrize("share", [0.0, 0.25, 0.9])
def test_the_share_with_the_largest_gradients_is_the_originals(pair, share):
    gradients, merged = clean_gradients(pair[1], make_images(8)), masked(*pair, make_images(8), share)
    theta0, theta1, theta = (m.model.state_dict() for m in (*pair, merged))
    for name, got in theta.items():
        back = got != theta1[name]
        assert torch.equal(got[back], theta0[name][back])
        count = int(share * got.numel()) if name in gradients else 0
        assert back.sum() >= count and (count or not back.any())
        assert not count or gradients[name][back].min() >= gradients[name][~back].max()
