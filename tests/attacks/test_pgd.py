"""PGD in training and evaluation: the iterates of the textbook, the number of passes, and optima that are known."""

import pytest
import torch
from conftest import Recorder, grey

from hpt_hf.attacks.engine import misclassification, pixel_gradient, run_attack
from hpt_hf.attacks.losses import cross_entropy, margin
from hpt_hf.attacks.noise import Noise
from hpt_hf.attacks.pgd import PGD, TrainingAttack
from hpt_hf.attacks.threat_model import ThreatModel

BALLS = pytest.mark.parametrize(("norm", "eps", "step"), [("linf", "20/255", 5 / 255), ("l2", 2.5, 0.6)])


def written_out_pgd(loss_fn, images, threat, steps, step_size, noise):
    """All iterates."""
    x = images if noise is None else threat.random_start(images, noise)
    iterates = [x]
    for _ in range(steps):
        x = x.clone().requires_grad_(True)
        (gradient,) = torch.autograd.grad(loss_fn(x).sum(), x)
        size = 1 if threat.norm == "linf" else gradient.flatten(1).norm(dim=1)[:, None, None, None].clamp_min(1e-12)
        unit = gradient.sign() if threat.norm == "linf" else gradient / size
        x = threat.project(x.detach() + step_size * unit, images)
        iterates.append(x)
    return iterates


@BALLS
@pytest.mark.parametrize("random_start", [True, False])
@pytest.mark.parametrize("steps", [0, 1, 4])
def test_training_takes_every_step_and_no_more(trained, batch, norm, eps, step, random_start, steps):
    """Also of images that are wrong already; the last iterate is not asked about: S steps are S forward passes."""
    images, labels, threat = batch["images"], batch["labels"].roll(1), ThreatModel(norm, eps)
    asked = Recorder(lambda x: cross_entropy(trained.classify(x).logits, labels))
    attack = TrainingAttack(threat, steps, step, random_start)
    found = attack(asked, images, batch["image_ids"], seed=3, round=5)
    noise = Noise(batch["image_ids"], 3, 5) if random_start else None
    expected = written_out_pgd(asked.answer, images, threat, steps, step, noise)
    assert len(asked.calls) == steps
    for got, wanted in zip([*asked.calls, found], expected, strict=True):
        assert torch.equal(got, wanted)


@BALLS
@pytest.mark.parametrize("loss", [cross_entropy, margin])
def test_with_a_criterion_it_stops_at_the_first_success_and_is_the_same_before(trained, batch, loss, norm, eps, step):
    images, labels, threat, noise = batch["images"], batch["labels"], ThreatModel(norm, eps), Noise(batch["image_ids"])
    logits_fn = Recorder(lambda x: trained.classify(x).logits)
    goal = misclassification(loss, labels)
    found, broken = run_attack(logits_fn, images, PGD(threat, 6, step), noise=noise, criterion=goal)
    iterates = written_out_pgd(lambda x: loss(trained.classify(x).logits, labels), images, threat, 6, step, noise)
    first = torch.full((len(images),), 99)
    for number in reversed(range(7)):
        with torch.no_grad():
            first[trained.classify(iterates[number]).logits.argmax(1) != labels] = number
    for number in range(7):
        torch.testing.assert_close(found[first == number], iterates[number][first == number])
    assert torch.equal(first < 99, broken) and 0 < broken.sum() < len(images)
    torch.testing.assert_close(found[~broken], iterates[6][~broken])
    standing = [int((first >= n).sum()) for n in range(7)]
    assert [len(x) for x in logits_fn.calls] == standing, "the broken leave the batch"


def test_a_step_of_training_is_the_radius_unless_told_otherwise():
    images, image_ids, threat = grey(3), torch.arange(3), ThreatModel("linf", "8/255")

    def end(*steps, seed=0, round=5):
        return TrainingAttack(threat, *steps)(lambda x: x.flatten(1).sum(1), images, image_ids, seed=seed, round=round)

    assert torch.equal(end(2), threat.project(images + 1, images)), "from anywhere in the ball"
    assert not torch.equal(end(0), end(0, round=6)) and not torch.equal(end(0), end(0, seed=1))
    assert 0 < (end(1, 1 / 255) - end(0)).abs().max() <= 1 / 255 + 1e-6


@pytest.mark.parametrize("loss_fn", [lambda x: x.detach().sum((1, 2, 3)), lambda x: torch.ones(4, requires_grad=True)])
def test_a_loss_cut_off_from_the_pixels_is_an_error_in_training_and_a_zero_in_evaluation(loss_fn):
    """A model that is measured may be such a one; training on it would be training without an attack."""
    with pytest.raises(RuntimeError, match="grad|graph"):
        TrainingAttack(ThreatModel())(loss_fn, grey(4), torch.arange(4), seed=0, round=0)
    images = grey(4).requires_grad_(True)
    assert not pixel_gradient(loss_fn(images), images).any()
