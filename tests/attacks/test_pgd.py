"""Proves that the attack is a float32 attack on the pixels alone, finds the optimum where it is known, and changes nothing else."""

import pytest
import torch
import torch.nn.functional as F

from hpt_hf.attacks.engine import frozen
from hpt_hf.attacks.losses import cross_entropy, margin, targeted_dlr
from hpt_hf.attacks.noise import Noise
from hpt_hf.attacks.pgd import pgd
from hpt_hf.attacks.threat_model import ThreatModel

LOSSES = {"pgd": cross_entropy, "cw": margin}


def attack(model, batch, *, threat=None, steps=5, step_size=2 / 255, name="pgd", noise=True, rows=slice(None)):
    labels = batch["labels"][rows]
    return pgd(
        lambda x: LOSSES[name](model.classify(x).logits, labels),
        batch["images"][rows],
        threat or ThreatModel("linf", "8/255"),
        steps=steps,
        step_size=step_size,
        noise=Noise(batch["image_ids"][rows]) if noise else None,
    )


def accuracy(model, images, labels):
    with torch.no_grad():
        return (model.classify(images).logits.argmax(1) == labels).float().mean().item()


@pytest.mark.parametrize("name", LOSSES)
@pytest.mark.parametrize(("norm", "eps", "step"), [("linf", "8/255", 2 / 255), ("l2", 1.0, 0.25)])
@pytest.mark.parametrize("noise", [True, False])
def test_pgd_raises_the_loss_of_every_picture(trained, batch, name, norm, eps, step, noise):
    threat = ThreatModel(norm, eps)
    adversarial = attack(trained, batch, threat=threat, step_size=step, name=name, noise=noise)
    with torch.no_grad():
        before, after = (
            LOSSES[name](trained.classify(x).logits, batch["labels"]) for x in (batch["images"], adversarial)
        )
    assert (after > before).all()
    assert threat.contains(adversarial, batch["images"]).all()
    assert not adversarial.requires_grad


@pytest.mark.parametrize("norm", ["linf", "l2"])
@pytest.mark.parametrize("noise", [None, Noise(torch.arange(4))])
def test_a_linear_loss_is_driven_to_its_known_maximum(norm, noise):
    generator = torch.Generator().manual_seed(0)
    images, weight = torch.rand(4, 3, 5, 5, generator=generator), torch.randn(4, 3, 5, 5, generator=generator)
    images = images * 0.4 + 0.3  # clear of 0 and 1, where the l-2 optimum has no closed form
    threat = ThreatModel(norm, 0.1)
    got = pgd(lambda x: (x * weight).flatten(1).sum(1), images, threat, steps=60, step_size=0.05, noise=noise)
    unit = weight.sign() if norm == "linf" else weight / weight.flatten(1).norm(dim=1).view(-1, 1, 1, 1)
    assert torch.allclose(got, images + 0.1 * unit, atol=1e-6 if norm == "linf" else 1e-4)


def test_zero_steps_return_the_start(trained, batch):
    def refuse(x):
        raise AssertionError("no gradient was asked for")

    images, noise, threat = batch["images"], Noise(batch["image_ids"]), ThreatModel("linf", "8/255")
    assert torch.equal(pgd(refuse, images, threat, steps=0, step_size=0.1, noise=None), images)
    start = pgd(refuse, images, threat, steps=0, step_size=0.1, noise=noise)
    assert torch.equal(start, threat.random_start(images, noise)) and not torch.equal(start, images)


def test_eps_zero_changes_nothing(trained, batch):
    for norm in ("linf", "l2"):
        assert torch.equal(attack(trained, batch, threat=ThreatModel(norm, "0")), batch["images"])


def test_autocast_around_the_attack_does_not_reach_it(trained, batch):
    outside = attack(trained, batch)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(attack(trained, batch), outside)
        # The control: autocast is on here, and would have changed the answer.
        half = trained(batch["images"]).embeds
    assert not torch.equal(half, trained(batch["images"]).embeds)


@pytest.mark.parametrize("guard", [torch.no_grad, torch.enable_grad])
def test_works_whatever_the_gradient_mode_and_keeps_it(trained, batch, guard):
    expected = attack(trained, batch)
    with guard():
        mode = torch.is_grad_enabled()
        assert torch.equal(attack(trained, batch), expected)
        assert torch.is_grad_enabled() == mode


@pytest.mark.parametrize("freeze", [True, False])
def test_no_gradient_reaches_the_parameters(trained, batch, freeze):
    parameters = dict(trained.named_parameters())
    asked = {name: p.requires_grad for name, p in parameters.items()}
    assert any(asked.values()) and not all(asked.values())
    weights = {name: p.detach().clone() for name, p in parameters.items()}
    held = "model.visual_projection.weight"
    parameters[held].grad = torch.full_like(parameters[held], 7.0)  # of an accumulation step, say
    try:
        if freeze:
            with frozen(trained):
                attack(trained, batch)
        else:
            attack(trained, batch)
        assert (parameters[held].grad == 7).all()
        assert all(p.grad is None for name, p in parameters.items() if name != held)
    finally:
        parameters[held].grad = None
    assert {name: p.requires_grad for name, p in parameters.items()} == asked
    assert all(torch.equal(p, weights[name]) for name, p in parameters.items())


@pytest.mark.parametrize("training", [True, False])
def test_mode_random_state_and_images_stay(trained, batch, training):
    trained.train(training)
    images, state = batch["images"].clone(), torch.get_rng_state()
    attack(trained, batch)
    assert torch.equal(torch.get_rng_state(), state)
    assert all(m.training == training for m in trained.modules())
    assert torch.equal(batch["images"], images) and not batch["images"].requires_grad
    trained.eval()


def test_frozen_restores_exactly_what_it_took_even_after_an_error(trained):
    asked = [p.requires_grad for p in trained.parameters()]
    with pytest.raises(KeyError), frozen(trained):
        assert not any(p.requires_grad for p in trained.parameters())
        raise KeyError
    assert [p.requires_grad for p in trained.parameters()] == asked


def first_pixel(value):
    images = torch.rand(2, 3, 4, 4)
    images[1, 2, 3, 3] = value
    return images


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_images_of_another_precision_are_refused(dtype):
    with pytest.raises(TypeError, match=f"float32.*{dtype}"):
        pgd(
            lambda x: x.sum((1, 2, 3)),
            torch.rand(2, 3, 4, 4).to(dtype),
            ThreatModel(),
            steps=1,
            step_size=0.1,
            noise=None,
        )


@pytest.mark.parametrize("value", [-0.01, 1.01, 255.0, float("nan"), float("inf"), -float("inf")])
def test_images_outside_their_range_are_refused(value):
    with pytest.raises(ValueError, match=r"\[0, 1\].*un-normalised"):
        pgd(lambda x: x.sum((1, 2, 3)), first_pixel(value), ThreatModel(), steps=1, step_size=0.1, noise=None)


def test_an_empty_batch_is_an_empty_answer():
    empty = torch.empty(0, 3, 4, 4)
    noise = Noise(torch.empty(0, dtype=torch.int64))
    assert (
        pgd(lambda x: x.sum((1, 2, 3)), empty, ThreatModel(), steps=2, step_size=0.1, noise=noise).shape == empty.shape
    )


@pytest.mark.parametrize("name", LOSSES)
@pytest.mark.parametrize(("norm", "eps", "step"), [("linf", "8/255", 2 / 255), ("l2", 1.0, 0.25)])
def test_a_picture_gets_the_same_attack_in_any_batch(trained, batch, name, norm, eps, step):
    settings = {"threat": ThreatModel(norm, eps), "step_size": step, "name": name}
    whole = attack(trained, batch, **settings, rows=slice(0, 8))
    alone = torch.cat([attack(trained, batch, **settings, rows=slice(i, i + 1)) for i in range(8)])
    backwards = attack(trained, batch, **settings, rows=torch.arange(7, -1, -1)).flip(0)
    for other in (alone, backwards):
        difference = (other - whole).abs()
        # A matrix product of another shape rounds otherwise, and sign() turns a rounding near 0 into a step: few pixels may differ.
        assert (difference > 1e-4).float().mean() < 0.002, (difference > 1e-4).float().mean()
        with torch.no_grad():
            losses = [cross_entropy(trained.classify(x).logits, batch["labels"][:8]) for x in (whole, other)]
        assert torch.allclose(*losses, rtol=1e-2, atol=1e-3)


def test_equal_pictures_start_alike_and_different_ones_apart(trained, batch):
    images, keys = batch["images"][[0, 1, 0]], batch["image_ids"][[0, 1, 0]]
    start = ThreatModel("linf", "8/255").random_start(images, Noise(keys)) - images
    assert torch.equal(start[0], start[2]) and not torch.allclose(start[0], start[1], atol=1e-3)


def test_a_large_ball_leaves_no_accuracy_and_a_growing_one_leaves_ever_less(trained, batch):
    clean = accuracy(trained, batch["images"], batch["labels"])
    assert clean > 0.9
    for name in LOSSES:
        left = [clean]
        for eps in (2 / 255, 8 / 255, 32 / 255, 0.5):
            threat = ThreatModel("linf", eps)
            left.append(
                accuracy(
                    trained,
                    attack(trained, batch, threat=threat, steps=10, step_size=eps / 4, name=name),
                    batch["labels"],
                )
            )
        assert left == sorted(left, reverse=True), left
        assert left[-1] == 0, left  # above 0 = masked gradients


# --- what is maximised


@pytest.mark.parametrize("classes", [2, 5])
def test_margin_is_positive_exactly_where_the_answer_is_wrong(classes):
    logits = torch.randn(200, classes, generator=torch.Generator().manual_seed(0))
    labels = torch.arange(200) % classes
    got = margin(logits, labels)
    for row, y, value in zip(logits.tolist(), labels.tolist(), got.tolist(), strict=True):
        assert value == pytest.approx(max(v for i, v in enumerate(row) if i != y) - row[y], abs=1e-6)
    assert torch.equal(got > 0, logits.argmax(1) != labels)


def test_gradients_of_both_losses_are_the_textbook_ones():
    logits = torch.randn(30, 4, generator=torch.Generator().manual_seed(1), requires_grad=True)
    labels = torch.arange(30) % 4
    right = F.one_hot(labels, 4).float()
    (ce,) = torch.autograd.grad(cross_entropy(logits, labels).sum(), logits)
    assert torch.allclose(ce, logits.softmax(1) - right, atol=1e-6)
    (cw,) = torch.autograd.grad(margin(logits, labels).sum(), logits)
    best_wrong = F.one_hot((logits - 1e9 * right).argmax(1), 4).float()
    assert torch.equal(cw, best_wrong - right)


def test_margin_does_not_saturate_where_the_cross_entropy_does():
    logits, labels = torch.tensor([[300.0, 0.0, 1.0]], requires_grad=True), torch.tensor([0])
    (ce,) = torch.autograd.grad(cross_entropy(logits, labels).sum(), logits)
    (cw,) = torch.autograd.grad(margin(logits, labels).sum(), logits)
    assert not ce.any() and cw.abs().sum() == 2


def label_and_target(count, classes):
    """Every pair of a label and another class, over and over."""
    labels = torch.arange(count) % classes
    return labels, (labels + 1 + torch.arange(count) // classes % (classes - 1)) % classes


@pytest.mark.parametrize("classes", [2, 4, 5, 11])
def test_towards_is_its_formula_on_python_numbers(classes):
    """Sorting and means written out: the loss picks them with topk, where an index off by one would pass unseen."""
    logits = 3 * torch.randn(240, classes, generator=torch.Generator().manual_seed(0))
    labels, targets = label_and_target(240, classes)
    got = targeted_dlr(logits, labels, targets).tolist()
    for row, y, t, value in zip(logits.tolist(), labels.tolist(), targets.tolist(), got, strict=True):
        best = sorted(row, reverse=True)
        spread = 1 if classes == 2 else best[0] - (best[2] + best[3]) / 2
        assert value == pytest.approx((row[t] - row[y]) / spread, rel=1e-4, abs=1e-5)
    assert {v > 0 for v in got} == {True, False}


def test_no_rescaling_and_no_shift_of_the_logits_changes_towards():
    """A model cannot hide from it behind a small or a large temperature; the cross-entropy, the control, it can."""
    logits = torch.randn(60, 5, generator=torch.Generator().manual_seed(1))
    labels, targets = label_and_target(60, 5)
    first = targeted_dlr(logits, labels, targets)
    for scale, shift in ((100, 0), (0.01, 0), (1, 30), (100, -7)):
        assert torch.allclose(targeted_dlr(scale * logits + shift, labels, targets), first, rtol=1e-3, atol=1e-4)
        if scale != 1:
            assert not torch.allclose(
                cross_entropy(scale * logits + shift, labels), cross_entropy(logits, labels), rtol=0.1
            )


@pytest.mark.parametrize("classes", [2, 3, 4, 5])
@pytest.mark.parametrize("logits", ["random", "equal", "saturated"])
def test_the_gradient_of_towards_is_finite_and_never_vanishes(classes, logits):
    """Equal logits have no spread, and those far apart leave the cross-entropy without a gradient: neither may stop a search."""
    random = torch.randn(24, classes, generator=torch.Generator().manual_seed(2))
    values = {"random": random, "equal": torch.zeros_like(random), "saturated": 100 * random}[logits]
    values.requires_grad_(True)
    labels, targets = label_and_target(24, classes)
    loss = targeted_dlr(values, labels, targets)
    (gradient,) = torch.autograd.grad(loss.sum(), values)
    assert loss.isfinite().all() and gradient.isfinite().all()
    assert gradient.any(1).all() and torch.allclose(gradient.sum(1), torch.zeros(24), atol=1e-5)
    right = values.argmax(1) == labels
    assert logits == "equal" or ((loss < 0)[right]).all() and right.any(), (
        "below the label as long as the answer is right"
    )
    if logits == "random" and classes > 3:
        assert torch.allclose((gradient * values).sum(1), torch.zeros(24), atol=1e-4), (
            "rescaling the logits gains nothing"
        )
        assert (targeted_dlr(values + 1e-3 * gradient, labels, targets) > loss).all()


def test_losses_are_per_picture_and_not_means():
    logits, labels = torch.randn(6, 3), torch.tensor([0, 1, 2, 0, 1, 2])
    for loss in (*LOSSES.values(), lambda z, y: targeted_dlr(z, y, (y + 1) % 3)):
        alone = torch.cat([loss(logits[i : i + 1], labels[i : i + 1]) for i in range(6)])
        assert loss(logits, labels).shape == (6,) and torch.allclose(loss(logits, labels), alone)
