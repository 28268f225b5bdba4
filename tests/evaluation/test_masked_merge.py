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
    found = clean_gradients(robust, images)
    batch = Collator(robust.processor)(list(images))
    F.cross_entropy(robust.classify(batch["images"]).logits, batch["labels"]).backward()
    for name, parameter in robust.model.named_parameters():
        if name in found:
            assert torch.allclose(found[name], parameter.grad.abs(), atol=1e-6), name
    assert all(name.startswith(("vision_model", "visual_projection")) for name in found)


@pytest.mark.parametrize("share", [0.0, 0.25, 0.9])
def test_the_share_with_the_largest_gradients_is_the_originals(pair, share):
    (original, robust), images = pair, make_images(8)
    gradients, merged = clean_gradients(robust, images), masked(original, robust, images, share)
    theta0, theta1, theta = (m.model.state_dict() for m in (original, robust, merged))
    for name, got in theta.items():
        if name not in gradients:
            assert torch.equal(got, theta1[name])
            continue
        back = got != theta1[name]
        assert torch.equal(got[back], theta0[name][back])
        count = int(share * got.numel())
        assert back.sum() >= count and (not count or gradients[name][back].min() >= gradients[name][~back].max())
