"""Proves each objective against its equation, written out here a second time, and that no forward is run twice or leaks gradients."""

import dataclasses

import pytest
import torch
from torch.distributions import Categorical, kl_divergence

from hpt_hf.method.objectives import OBJECTIVES, Divergence, Views, label_loss, tecoa
from hpt_hf.types import ZeroShotOutput


class Linear(torch.nn.Module):
    """The smallest model with logits and embeds; it remembers what it was shown and whether gradients were on."""

    def __init__(self, seed, classes=5, dim=4):
        super().__init__()
        generator = torch.Generator().manual_seed(seed)
        self.head = torch.nn.Parameter(torch.randn(12, classes, generator=generator))
        self.body = torch.nn.Parameter(torch.randn(12, dim, generator=generator))
        self.shown = []

    def forward(self, images):
        self.shown.append((images, torch.is_grad_enabled()))
        flat = images.flatten(1)
        return ZeroShotOutput(logits=flat @ self.head, embeds=flat @ self.body)


class World:
    """One batch with its three models and what they say of it, computed without `Views`."""

    def __init__(self, labelled=True):
        generator = torch.Generator().manual_seed(0)
        self.x, self.x_adv = torch.rand(2, 7, 3, 2, 2, generator=generator)
        self.y = torch.tensor([0, 1, 2, 3, 4, 0, 1])
        self.student, self.proxy, self.anchor = Linear(1), Linear(2), Linear(3)
        views = Views(
            self.x, student=self.student, proxy=self.proxy, anchor=self.anchor, labels=self.y if labelled else None
        )
        self.views = views.attacked(self.x_adv)

    def logits(self, model, images):
        return images.flatten(1) @ model.head

    def embeds(self, model, images):
        return images.flatten(1) @ model.body


def kl(p_logits, q_logits, temperature=1.0):
    """KL(p || q), mean over the batch, with the square of the temperature (Hinton et al. 2015)."""
    p, q = (torch.softmax(v / temperature, 1) for v in (p_logits, q_logits))
    return temperature**2 * (p * (p / q).log()).sum(1).mean()


def ce(logits, y):
    return -torch.softmax(logits, 1)[torch.arange(len(y)), y].log().mean()


# METHOD.md's table. d(student, teacher) is the divergence of the direction under test.
EQUATIONS = {
    "hpt": lambda w, d: d(w.logits(w.student, w.x_adv), w.logits(w.proxy, w.x_adv)),
    "ga": lambda w, d: d(w.logits(w.student, w.x_adv), w.logits(w.proxy, w.x)),
    "anchor_clean": lambda w, d: d(w.logits(w.student, w.x_adv), w.logits(w.anchor, w.x)),
    "tecoa": lambda w, d: ce(w.logits(w.student, w.x_adv), w.y),
    "fare": lambda w, d: ((w.embeds(w.student, w.x_adv) - w.embeds(w.anchor, w.x)) ** 2).sum(1).mean(),
    "pmg_aft": lambda w, d: (
        ce(w.logits(w.student, w.x_adv), w.y)
        + d(w.logits(w.student, w.x_adv), w.logits(w.anchor, w.x_adv))
        + d(w.logits(w.student, w.x_adv), w.logits(w.student, w.x))
    ),
}
DIRECTIONS = {"forward": lambda s, t, T=1.0: kl(t, s, T), "reverse": lambda s, t, T=1.0: kl(s, t, T)}


def with_divergence(name, divergence):
    return dataclasses.replace(OBJECTIVES[name], divergence=divergence)


def test_the_table_names_each_objective_once_and_all_are_proved_here():
    assert set(OBJECTIVES) == set(EQUATIONS)
    assert all(o.name == key and o.divergence == Divergence("forward", 1.0) for key, o in OBJECTIVES.items())


@pytest.mark.parametrize("temperature", [1.0, 2.5])
@pytest.mark.parametrize("direction", DIRECTIONS)
@pytest.mark.parametrize("name", EQUATIONS)
def test_loss_and_its_gradient_are_those_of_the_equation(name, direction, temperature):
    world = World()
    loss = sum(with_divergence(name, Divergence(direction, temperature))(world.views).values())
    expected = EQUATIONS[name](world, lambda s, t: DIRECTIONS[direction](s, t, temperature))
    assert loss.shape == () and torch.allclose(loss, expected, rtol=1e-5)
    weight = world.student.body if name == "fare" else world.student.head
    (got,), (wanted,) = (torch.autograd.grad(v, weight) for v in (loss, expected))
    assert torch.allclose(got, wanted, rtol=1e-4, atol=1e-6) and got.abs().sum() > 0


@pytest.mark.parametrize("name", EQUATIONS)
def test_each_forward_runs_at_most_once_and_references_carry_no_gradient(name):
    world = World()
    objective = OBJECTIVES[name]
    for _ in range(2):  # asked twice, and by the attack as well
        sum(objective(world.views).values())
        objective.attack_loss(world.views.student.adversarial, objective.attack_target(world.views))
    for who in ("student", "proxy", "anchor"):
        shown = getattr(world, who).shown
        assert len(shown) == len({id(images) for images, _ in shown}), f"{who} saw the same images twice"
        assert all(gradients == (who == "student") for _, gradients in shown)
        if who != "student" and who not in objective.references:
            assert not shown, f"{name} ran the {who}, which it does not name"
        if who in objective.references:
            assert shown, f"{name} names the {who} and never asks it"
    sum(objective(world.views).values()).backward()
    assert all(p.grad is None for m in (world.proxy, world.anchor) for p in m.parameters())


def test_the_clean_student_runs_only_where_the_loss_asks_for_it():
    for name in OBJECTIVES:
        world = World()
        OBJECTIVES[name](world.views)
        seen = [images is world.x for images, _ in world.student.shown]
        assert any(seen) == (name == "pmg_aft"), name


def test_no_gradient_where_the_caller_wants_none():
    world = World()
    with torch.no_grad():
        assert not world.views.student.adversarial.logits.requires_grad
    assert world.student.shown == [(world.x_adv, False)]


# --- the divergence


@pytest.mark.parametrize("temperature", [0.5, 1.0, 4.0])
def test_both_directions_are_torchs_kl(temperature):
    generator = torch.Generator().manual_seed(4)
    s, t = 10 * torch.randn(2, 9, 6, generator=generator)
    student, teacher = (Categorical(logits=v / temperature) for v in (s, t))
    forward, reverse = (Divergence(d, temperature)(s, t) / temperature**2 for d in ("forward", "reverse"))
    assert torch.allclose(forward, kl_divergence(teacher, student).mean(), rtol=1e-4)
    assert torch.allclose(reverse, kl_divergence(student, teacher).mean(), rtol=1e-4)
    assert not torch.allclose(forward, reverse, rtol=1e-2)


@pytest.mark.parametrize("direction", DIRECTIONS)
def test_divergence_is_zero_for_equals_positive_else_and_a_mean_over_the_batch(direction):
    s, t = torch.randn(2, 8, 5, generator=torch.Generator().manual_seed(5))
    divergence = Divergence(direction)
    assert divergence(s, s).abs() < 1e-6 and divergence(s, t) > 0.1
    assert torch.allclose(divergence(s.repeat(3, 1), t.repeat(3, 1)), divergence(s, t))  # a sum would have tripled
    assert torch.allclose(divergence(s + 100, t - 100), divergence(s, t), atol=1e-4)
    # The head's logits may be far apart: no probability of exactly 0 may make it infinite.
    far = torch.tensor([[1000.0, 0.0]]), torch.tensor([[0.0, 1000.0]])
    assert divergence(*far) == 1000


def test_temperature_keeps_the_size_of_the_gradient():
    s, t = (torch.randn(8, 5, generator=torch.Generator().manual_seed(i)) * 0.1 for i in (6, 7))
    sizes = []
    for temperature in (1.0, 8.0):
        s = s.detach().requires_grad_(True)
        sizes.append(torch.autograd.grad(Divergence("forward", temperature)(s, t), s)[0].norm())
    assert torch.allclose(sizes[1], sizes[0], rtol=0.1)


def test_divergence_is_float32_for_half_precision_logits():
    s, t = (10 * torch.randn(2, 9, 6, generator=torch.Generator().manual_seed(8))).bfloat16()
    got = Divergence()(s, t)
    assert got.dtype == torch.float32 and torch.equal(got, Divergence()(s.float(), t.float()))


@pytest.mark.parametrize("temperature", [0.0, -1.0, float("nan")])
def test_a_temperature_that_is_not_positive_is_an_error(temperature):
    with pytest.raises(ValueError, match="positive"):
        Divergence(temperature=temperature)


def test_an_unknown_direction_says_what_the_two_mean():
    with pytest.raises(ValueError, match="forward.*reverse"):
        Divergence("backward")


# --- labels


def test_given_labels_are_used_and_no_reference_is_asked():
    world = World()
    assert torch.equal(world.views.labels, world.y)
    assert not world.proxy.shown and not world.anchor.shown


@pytest.mark.parametrize("present", [("proxy", "anchor"), ("proxy",), ("anchor",)])
def test_without_labels_the_reference_s_clean_answer_stands_in(present):
    world = World(labelled=False)
    views = Views(world.x, student=world.student, **{name: getattr(world, name) for name in present})
    views = views.attacked(world.x_adv)
    teacher = getattr(world, present[0])  # the proxy where there is one
    assert torch.equal(views.labels, world.logits(teacher, world.x).argmax(1))
    assert [images is world.x for images, _ in teacher.shown] == [True]
    assert torch.allclose(label_loss(views.student.adversarial, views.labels).mean(), tecoa(views, Divergence())["ce"])


def test_without_labels_and_references_there_is_a_clear_error():
    world = World(labelled=False)
    with pytest.raises(ValueError, match="neither a proxy nor an anchor"):
        _ = Views(world.x, student=world.student).labels


# --- what the attack maximises


@pytest.mark.parametrize("name", EQUATIONS)
def test_the_attack_s_loss_is_the_table_s_one_number_a_picture(name):
    world = World()
    got = OBJECTIVES[name].attack_loss(world.views.student.adversarial, OBJECTIVES[name].attack_target(world.views))
    if name == "fare":
        expected = ((world.embeds(world.student, world.x_adv) - world.embeds(world.anchor, world.x)) ** 2).sum(1)
    else:
        expected = -torch.log_softmax(world.logits(world.student, world.x_adv), 1)[torch.arange(7), world.y]
    assert got.shape == (7,) and torch.allclose(got, expected, rtol=1e-5)


@pytest.mark.parametrize("name", OBJECTIVES)
@pytest.mark.parametrize("attack_on", ["student", "proxy", "anchor"])
def test_an_attack_is_on_the_student_or_on_a_proxy_that_the_objective_has(name, attack_on):
    if attack_on == "student" or attack_on == "proxy" and "proxy" in OBJECTIVES[name].references:
        assert dataclasses.replace(OBJECTIVES[name], attack_on=attack_on).attack_on == attack_on
    else:
        with pytest.raises(ValueError, match="'proxy' where"):
            dataclasses.replace(OBJECTIVES[name], attack_on=attack_on)


@pytest.mark.parametrize("name", EQUATIONS)
def test_needs_labels_is_true_exactly_where_the_loss_reads_them(name):
    """Where it is False, any labels give the same loss."""
    one, other = World(), World()
    other.views._labels = (other.y + 1) % 5
    same = torch.equal(*(sum(OBJECTIVES[name](w.views).values()) for w in (one, other)))
    assert same == (not OBJECTIVES[name].needs_labels)
