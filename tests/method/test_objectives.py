"""Proves each objective against its equation, and that no forward runs twice or leaks gradients."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from hpt_hf.method.objectives import ATTACK_LOSSES, OBJECTIVES, Divergence, Teachers, Views
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
        logits = images.flatten(1) @ self.head
        return ZeroShotOutput(logits=logits, embeds=images.flatten(1) @ self.body, cosines=logits.tanh() / 3)


class World:
    """One batch with its three models and what they say of it, computed without `Views`."""

    def __init__(self, labelled=True, references=("proxy", "anchor"), shift=0):
        self.x, self.x_adv = torch.rand(2, 7, 3, 2, 2, generator=torch.Generator().manual_seed(0))
        self.y = (torch.tensor([0, 1, 2, 3, 4, 0, 1]) + shift) % 5
        self.student, self.proxy, self.anchor = Linear(1), Linear(2), Linear(3)
        given = {name: getattr(self, name) for name in references}
        views = Views(self.x, student=self.student, labels=self.y if labelled else None, multiplier=2.0, **given)
        self.views = views.attacked(self.x_adv)

    def logits(self, model, images):
        return images.flatten(1) @ model.head

    def mixed(self, weight=0.5):
        """What anchor and proxy say of the clean images together."""
        anchor, proxy = (self.logits(m, self.x).softmax(1) for m in (self.anchor, self.proxy))
        return (weight * anchor + (1 - weight) * proxy).log()

    def embeds(self, model, images):
        return images.flatten(1) @ model.body


def kl(p_logits, q_logits, p_temperature=1.0, q_temperature=1.0):
    """KL(p || q), mean over the batch, with both temperatures."""
    p, q = torch.softmax(p_logits / p_temperature, 1), torch.softmax(q_logits / q_temperature, 1)
    return p_temperature * q_temperature * (p * (p / q).log()).sum(1).mean()


def squares(embeds):
    return (embeds**2).sum(1).mean()


def ce(logits, y):
    return -torch.softmax(logits, 1)[torch.arange(len(y)), y].log().mean()


def dirichlet(student, anchor):
    """KL(Dir(a) || Dir(b)) written out, over the sum of b."""
    a, b = (torch.exp((c.double() + 1) / 0.07) for c in (student, anchor))
    total, digamma = a.sum(1, keepdim=True), torch.special.digamma
    value = torch.lgamma(a.sum(1)) - torch.lgamma(b.sum(1)) + (torch.lgamma(b) - torch.lgamma(a)).sum(1)
    value = value + ((a - b) * (digamma(a) - digamma(total))).sum(1)
    return (value / b.sum(1)).mean().float()


# The table of docs/methods.md. d(student, teacher) is the divergence of the direction under test.
EQUATIONS = {
    "hpt": lambda w, d: d(w.logits(w.student, w.x_adv), w.logits(w.proxy, w.x_adv)),
    "ga": lambda w, d: d(w.logits(w.student, w.x_adv), w.logits(w.proxy, w.x)),
    "anchor_clean": lambda w, d: d(w.logits(w.student, w.x_adv), w.logits(w.anchor, w.x)),
    "tecoa": lambda w, d: ce(w.logits(w.student, w.x_adv), w.y),
    "fare": lambda w, d: squares(w.embeds(w.student, w.x_adv) - w.embeds(w.anchor, w.x)),
    "lore": lambda w, d: (
        EQUATIONS["fare"](w, d)
        + 2.0 * (squares(w.embeds(w.student, w.x) - w.embeds(w.anchor, w.x)) - 0.1 * squares(w.embeds(w.anchor, w.x)))
    ),
    "agft": lambda w, d: d(w.logits(w.student, w.x_adv), w.logits(w.anchor, w.x)),
    "distillation": lambda w, d: d(w.logits(w.student, w.x_adv), w.mixed()),
    "ucat": lambda w, d: (
        ce(w.logits(w.student, w.x_adv), w.y)
        + dirichlet(w.logits(w.student, w.x_adv).tanh() / 3, w.logits(w.anchor, w.x).tanh() / 3)
    ),
    "pmg_aft": lambda w, d: (
        ce(w.logits(w.student, w.x_adv), w.y)
        + d(w.logits(w.student, w.x_adv), w.logits(w.anchor, w.x_adv))
        + d(w.logits(w.student, w.x_adv), w.logits(w.student, w.x))
    ),
    "pmg_anchor_clean": lambda w, d: EQUATIONS["pmg_aft"](w, d) + EQUATIONS["anchor_clean"](w, d),
}
DIRECTIONS = {"forward": lambda s, t, S, T: kl(t, s, T, S), "reverse": lambda s, t, S, T: kl(s, t, S, T)}


def test_each_objective_has_its_equation_here():
    assert set(OBJECTIVES) == set(EQUATIONS) == {o.name for o in OBJECTIVES.values()}
    assert {n for n, o in OBJECTIVES.items() if o.divergence != Divergence("forward", 1.0, 1.0)} == {"agft"}


@pytest.mark.parametrize("temperatures", [(1.0, 1.0), (2.5, 2.5), (0.5, 1.4)], ids=str)
@pytest.mark.parametrize("direction", DIRECTIONS)
@pytest.mark.parametrize("name", EQUATIONS)
def test_loss_and_its_gradient_are_those_of_the_equation(name, direction, temperatures):
    world = World()
    objective = dataclasses.replace(OBJECTIVES[name], divergence=Divergence(direction, *temperatures))
    loss = sum(objective(world.views).values())
    expected = EQUATIONS[name](world, lambda s, t: DIRECTIONS[direction](s, t, *temperatures))
    assert loss.shape == () and torch.allclose(loss, expected, rtol=1e-5)
    weight = world.student.body if name in ("fare", "lore") else world.student.head
    (got,), (wanted,) = (torch.autograd.grad(v, weight) for v in (loss, expected))
    assert torch.allclose(got, wanted, rtol=1e-4, atol=1e-5) and got.abs().sum() > 0


@pytest.mark.parametrize("name", EQUATIONS)
def test_each_forward_that_is_named_runs_once_and_references_carry_no_gradient(name):
    world, objective = World(), OBJECTIVES[name]
    for _ in range(2):  # asked twice, and by the attack as well
        sum(objective(world.views).values())
        objective.attack_loss(world.views.student.adversarial, objective.attack_target(world.views))
    for who in ("student", "proxy", "anchor"):
        shown = getattr(world, who).shown
        assert len(shown) == len({id(images) for images, _ in shown}), f"{who} saw the same images twice"
        assert all(gradients == (who == "student") for _, gradients in shown)
        assert bool(shown) == (who in ("student", *objective.references))
    assert any(images is world.x for images, _ in world.student.shown) == (
        name in ("pmg_aft", "pmg_anchor_clean", "lore")
    )
    sum(objective(world.views).values()).backward()
    assert all(p.grad is None for m in (world.proxy, world.anchor) for p in m.parameters())


def test_no_gradient_where_the_caller_wants_none():
    world = World()
    with torch.no_grad():
        assert not world.views.student.adversarial.logits.requires_grad


@pytest.mark.parametrize("name", EQUATIONS)
def test_needs_labels_is_true_exactly_where_the_loss_reads_them(name):
    same = torch.equal(*(sum(OBJECTIVES[name](World(shift=i).views).values()) for i in (0, 1)))
    assert same == (not OBJECTIVES[name].needs_labels)


@pytest.mark.parametrize("name", EQUATIONS)
def test_the_attack_maximises_cross_entropy_a_divergence_or_fares_distance_image_by_image(name):
    world = World()
    got = OBJECTIVES[name].attack_loss(world.views.student.adversarial, OBJECTIVES[name].attack_target(world.views))
    if name == "agft":  # image by image: of one alone the mean is its own
        student, anchor = world.logits(world.student, world.x_adv), world.logits(world.anchor, world.x)
        expected = torch.stack([kl(anchor[i : i + 1], student[i : i + 1], 100 / 72, 100 / 180) for i in range(7)])
    elif name in ("fare", "lore"):
        expected = ((world.embeds(world.student, world.x_adv) - world.embeds(world.anchor, world.x)) ** 2).sum(1)
    else:
        expected = -torch.log_softmax(world.logits(world.student, world.x_adv), 1)[torch.arange(7), world.y]
    assert got.shape == (7,) and torch.allclose(got, expected, rtol=1e-5)


# --- teachers

SOFT = [name for name, objective in OBJECTIVES.items() if objective.teachers]


@pytest.mark.parametrize("weights", [(), (1.0, 1.0), (3.0, 1.0)], ids=str)
def test_of_several_teachers_the_mean_probability_is_learned_also_only_where_they_agree(weights):
    world = World()
    world.anchor.head.data += world.proxy.head.data  # so that they agree on some
    teachers = Teachers(("anchor_clean", "proxy_clean"), weights)
    mixed = world.mixed(weights[0] / sum(weights) if weights else 0.5)
    assert torch.allclose(teachers.logits(world.views).softmax(1), mixed.softmax(1), atol=1e-6)
    assert teachers.references == ("anchor", "proxy") and teachers.taught(world.views).tolist() == [1.0] * 7
    agreeing = dataclasses.replace(teachers, agreeing=True)
    agree = world.logits(world.anchor, world.x).argmax(1) == world.logits(world.proxy, world.x).argmax(1)
    assert 0 < agree.sum() < 7 and torch.equal(agreeing.taught(world.views), agree.float())
    objective = dataclasses.replace(OBJECTIVES["distillation"], teachers=agreeing)
    each = Divergence().per_example(world.logits(world.student, world.x_adv), mixed)
    assert torch.allclose(objective(world.views)["distillation"], (each * agree).sum() / 7, rtol=1e-5)


@pytest.mark.parametrize("name", SOFT)
def test_an_attack_on_the_divergence_knows_no_label_and_asks_teachers_of_clean_images(name):
    objective = dataclasses.replace(OBJECTIVES[name], attack=ATTACK_LOSSES["kl"])
    losses = []
    for shift in (0, 1):
        world = World(shift=shift)
        target = objective.attack_target(world.views)
        assert all(images is world.x for m in (world.proxy, world.anchor) for images, _ in m.shown)
        losses.append(objective.attack_loss(world.views.student.adversarial, target))
    assert torch.equal(*losses) and losses[0].shape == (7,)


# --- the divergence


@pytest.mark.parametrize("direction", DIRECTIONS)
def test_divergence_is_a_mean_over_the_batch_finite_and_in_float32(direction):
    s, t = torch.randn(2, 8, 5, generator=torch.Generator().manual_seed(5))
    divergence = Divergence(direction)
    assert torch.allclose(divergence(s.repeat(3, 1), t.repeat(3, 1)), divergence(s, t))  # a sum would have tripled
    # The head's logits may be far apart: no probability of exactly 0 may make it infinite.
    assert divergence(torch.tensor([[1000.0, 0.0]]), torch.tensor([[0.0, 1000.0]])) == 1000
    half = s.bfloat16(), t.bfloat16()
    assert torch.equal(divergence(*half), divergence(*(v.float() for v in half)))


# --- labels


@pytest.mark.parametrize("present", [("proxy", "anchor"), ("proxy",), ("anchor",)])
def test_where_there_are_no_labels_the_references_clean_answer_stands_in(present):
    world = World(labelled=False, references=present)
    teacher = getattr(world, present[0])  # the proxy where there is one
    assert torch.equal(world.views.labels, world.logits(teacher, world.x).argmax(1))
    assert [images is world.x for images, _ in teacher.shown] == [True]
    told = World(references=present)
    assert torch.equal(told.views.labels, told.y) and not getattr(told, present[0]).shown


# --- what is refused


@pytest.mark.parametrize(
    ("refused", "says"),
    [
        (lambda: Divergence("forward", float("nan")), "student_temp.*positive"),
        (lambda: Divergence("forward", 1.0, 0.0), "teacher_temperature.*positive"),
        (lambda: Teachers(()), "teachers: got"),
        (lambda: Teachers(("anchor_clean", "anchor_clean")), "teachers: got"),
        (lambda: Teachers(("anchor_dirty",)), "expected one or more of anchor_clean"),
        (lambda: Teachers(("anchor_clean",), (1.0, 2.0)), "expected 1 numbers above 0"),
        (lambda: dataclasses.replace(OBJECTIVES["tecoa"], attack=ATTACK_LOSSES["kl"]), "attack_loss: got 'kl'"),
        (lambda: dataclasses.replace(OBJECTIVES["hpt"], attack=ATTACK_LOSSES["embedding"]), "'ce' or 'kl'"),
        (lambda: dataclasses.replace(OBJECTIVES["tecoa"], attack_on="proxy"), "attack_on: got 'proxy'"),
        (lambda: dataclasses.replace(OBJECTIVES["fare"], attack_on="anchor"), "attack_on: got 'anchor'"),
        (lambda: Divergence("backward"), "forward.*reverse"),
        (lambda: World(labelled=False, references=()).views.labels, "neither a proxy nor an anchor"),
    ],
)
def test_what_cannot_be_computed_is_refused(refused, says):
    with pytest.raises(ValueError, match=says):
        refused()
