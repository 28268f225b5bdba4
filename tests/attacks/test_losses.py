"""The attack losses are their formulas, per image, with the gradients that are wanted of them."""

import pytest
import torch

from hpt_hf.attacks.losses import cross_entropy, margin, targeted_dlr


def make_logits(count, classes, seed=0):
    """(logits, labels, targets): every pair of a label and another class, over and over."""
    labels = torch.arange(count) % classes
    targets = (labels + 1 + torch.arange(count) // classes % (classes - 1)) % classes
    return 3 * torch.randn(count, classes, generator=torch.Generator().manual_seed(seed)), labels, targets


@pytest.mark.parametrize("classes", [2, 3, 4, 5, 11])
def test_margin_and_dlr_are_their_formulas_on_python_numbers(classes):
    """Sorting and means written out: an index off by one would pass unseen."""
    logits, labels, targets = make_logits(240, classes)
    margins, towards = margin(logits, labels).tolist(), targeted_dlr(logits, labels, targets).tolist()
    for z, y, t, m, d in zip(logits.tolist(), labels.tolist(), targets.tolist(), margins, towards, strict=True):
        best = sorted(z, reverse=True)
        assert m == pytest.approx(max(v for i, v in enumerate(z) if i != y) - z[y], abs=1e-5)
        spread = best[0] - sum(best[2:4]) / 2 if classes > 3 else 1
        assert d == pytest.approx((z[t] - z[y]) / spread, rel=1e-4, abs=1e-5)
    assert torch.equal(margin(logits, labels) > 0, logits.argmax(1) != labels)
    for loss in (cross_entropy, margin, lambda z, y: targeted_dlr(z, y, (y + 1) % classes)):
        alone = torch.cat([loss(logits[i : i + 1], labels[i : i + 1]) for i in range(240)])
        assert loss(logits, labels).shape == (240,) and torch.allclose(loss(logits, labels), alone), "not means"


@pytest.mark.parametrize("classes", [2, 3, 4, 5])
@pytest.mark.parametrize("scale", [1, 0, 100])
def test_the_gradient_of_the_dlr_loss_is_finite_and_never_vanishes(classes, scale):
    """Equal logits have no spread, those far apart leave the cross-entropy no gradient: neither may stop an attack."""
    logits, labels, targets = make_logits(24, classes, seed=2)
    logits = (scale * logits).requires_grad_(True)
    loss = targeted_dlr(logits, labels, targets)
    (gradient,) = torch.autograd.grad(loss.sum(), logits)
    assert loss.isfinite().all() and gradient.isfinite().all() and gradient.any(1).all()
