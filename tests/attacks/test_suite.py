"""APGD-T tries every target it should, the worst case is taken image by image, Square sees what gradients do not."""

import math

import pytest
import torch
from conftest import Recorder, grey, linear

from hpt_hf.attacks.losses import cross_entropy
from hpt_hf.attacks.noise import Noise
from hpt_hf.attacks.pgd import TrainingAttack
from hpt_hf.attacks.suite import ATTACKS, EvaluationAttack, worst_case
from hpt_hf.attacks.threat_model import ThreatModel

NORMS = pytest.mark.parametrize("norm", ["linf", "l2"])
GRADIENTS = [name for name in ATTACKS if name != "square"]
apgd_t = ATTACKS["apgd-t"][0]


def one_reachable(classes, rank):
    """A linear classifier of grey images into class 0, of which only the wrong class of that rank can be reached.

    The steepest way to it makes the likeliest wrong class less likely, so losses that look at that one walk away.
    """
    way = torch.randn(192, generator=torch.Generator().manual_seed(5)).sign()
    behind = torch.tensor([0.0, 1.0] + [30.0 + c for c in range(2, classes)])[:classes]
    slope = torch.zeros(classes)
    slope[1] = -0.05  # within 0.1, all pixels together are worth 19.2: not enough
    slope[rank + 1] = 0.15 * behind[rank + 1]  # more than enough
    return lambda x: ((x - 0.5).flatten(1) @ way)[:, None] * slope - behind


@NORMS
@pytest.mark.parametrize(
    ("classes", "rank"), [(2, 0), (3, 0), (3, 1), (4, 2), (5, 1), (5, 2), (5, 3), (12, 8), (12, 9)]
)
def test_apgd_t_reaches_a_class_that_nothing_untargeted_looks_at(classes, rank, norm):
    """Nine targets, or as many as there are: the tenth likeliest is not one."""
    images, answer = torch.full((3, 3, 8, 8), 0.5), one_reachable(classes, rank)
    threat = ThreatModel(norm, 0.1 if norm == "linf" else 0.1 * math.sqrt(192))
    labels, noise = torch.zeros(3, dtype=torch.int64), Noise(torch.arange(3))
    assert (answer(images).argsort(1, descending=True) == torch.arange(classes)).all(), "the ranks are as named"
    for name in GRADIENTS:
        broken = ATTACKS[name][0](answer, images, labels, threat, 12, noise)[1]
        assert broken.tolist() == [rank < 9 if name == "apgd-t" else rank == 0] * 3, name


@NORMS
@pytest.mark.parametrize("classes", [2, 4, 7])
def test_apgd_t_breaks_exactly_what_can_be_broken(classes, norm):
    """On a linear classifier a class is in reach where its deficit is at most eps times the difference's dual norm."""
    images, (weight, answer) = grey(40), linear(classes)
    logits, radius = answer(images), {"linf": 0.005, "l2": 0.05}[norm]
    labels, threat, noise = logits.argmax(1), ThreatModel(norm, radius), Noise(torch.arange(40))
    dual = (weight[None] - weight[labels][:, None]).norm(1 if norm == "linf" else 2, dim=2)
    spare = logits - logits.gather(1, labels[:, None]) + radius * dual
    spare = spare.scatter(1, labels[:, None], -torch.inf).amax(1)
    broken = apgd_t(answer, images, labels, threat, 20, noise)[1]
    clear = spare.abs() > 0.02 * radius * dual.amax(1)
    assert torch.equal(broken[clear], spare[clear] > 0) and clear.sum() > 30 and 0 < broken.sum() < 40


def test_the_queue_forgets_the_targets_of_broken_images_and_keeps_its_batches_full():
    images, (_, answer) = grey(24), linear(5)
    logits_fn, labels, threat = Recorder(answer), answer(images).argmax(1), ThreatModel("linf", 0.006)
    apgd_t(logits_fn, images, labels, threat, 5, Noise(torch.arange(24)))
    who, lost = [logits_fn.who(call, images) for call in range(len(logits_fn.calls))], set()
    for call in range(1, 7):  # the likeliest wrong class of every image, after the clean images
        wrong = answer(logits_fn.calls[call]).argmax(1) != labels[who[call]]
        lost |= {image for image, w in zip(who[call], wrong.tolist(), strict=True) if w}
    later = {image for images in who[7:] for image in images}
    assert later == set(range(24)) - lost and 3 < len(lost) < 21
    assert len(who[7]) == min(24, 3 * len(later)), "several targets of one image: no small batch"


def test_the_worst_case_is_what_any_stage_breaks_of_what_the_ones_before_left():
    """Stages that break by a list: who was shown what, and what comes back; nothing runs once all are broken."""
    images, image_ids, threat = grey(8), torch.arange(8) * 11 + 5, ThreatModel()
    lists, shown = ({0, 3}, {3, 4, 5}, set(), {0, 5, 6}, {1, 2, 7}, {0}), []

    def stage(logits_fn, x, labels, threat, steps, noise):
        rows = labels.tolist()
        assert torch.equal(x, images[rows]) and torch.equal(noise.image_ids, image_ids[rows]) and noise.seed == 9
        shown.append((rows, noise.round))
        return x + 0.001 * (steps + 1), torch.tensor([row in lists[steps] for row in rows])

    def run(stages, rows=slice(None)):
        noise = Noise(image_ids[rows], 9, round=2)
        return worst_case([(stage, n) for n in stages], len, images[rows], torch.arange(8)[rows], threat, noise)

    found, by = run(range(4))
    assert by.tolist() == [0, -1, -1, 0, 1, 1, 3, -1]
    assert [rows for rows, _ in shown] == [list(range(8)), [1, 2, 4, 5, 6, 7], [1, 2, 6, 7], [1, 2, 6, 7]]
    last = torch.tensor([1, 4, 4, 1, 2, 2, 4, 4])  # who broke it, or came last
    torch.testing.assert_close(found, images + 0.001 * last[:, None, None, None])
    assert shown[0][1] == 2 and len({draw for _, draw in shown}) == 4, "each has noise of its own, the first the given"
    shown.clear()
    assert (run(range(6))[1] >= 0).all() and len(shown) == 5
    assert run(range(6), slice(0, 0))[1].shape == (0,) and len(shown) == 5


# --- attacks by name


def make_attack(name="pgd", steps=5, eps="20/255", **settings):
    return EvaluationAttack(ThreatModel("linf", eps), name, steps, **settings)


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"name": "zzz"}, f"there are {', '.join(ATTACKS)}, standard"),
        ({"name": "apgd-t", "target": "cat"}, "no attack towards a target is called 'apgd-t'"),
        ({"protocol": "full"}, "protocol='full': expected 'input'"),
    ],
)
def test_an_attack_that_does_not_exist_is_an_error(settings, says):
    with pytest.raises(ValueError, match=says):
        make_attack(**settings)


OWN_STEPS = {"pgd": 20, "cw": 20, "apgd-ce": 100, "apgd-t": 100, "square": 5000}


@pytest.mark.parametrize("name", [*ATTACKS, "standard"])
@pytest.mark.parametrize("steps", [None, 3])
def test_every_attack_runs_its_own_steps_or_the_given_ones_and_says_so(monkeypatch, trained, batch, name, steps):
    """The names and numbers under which robust accuracies are compared in print."""
    ran, chosen = {}, EvaluationAttack(ThreatModel(), name, steps)
    for stage, (_, own) in ATTACKS.items():

        def spy(logits_fn, images, labels, threat, steps, noise, stage=stage):
            ran[stage] = steps
            return images.clone(), torch.zeros(len(images), dtype=torch.bool)

        monkeypatch.setitem(ATTACKS, stage, (spy, own))
    chosen.run(trained, batch["images"], batch["image_ids"], batch["labels"])
    own = {"apgd-ce": 100, "apgd-t": 100, "square": 500} if name == "standard" else {name: OWN_STEPS[name]}
    assert [*ran.items()] == [(n, steps or own[n]) for n in own] == [*chosen.stages.items()]
    shown = steps or OWN_STEPS.get(name)
    assert str(chosen) == (f"{name}-{shown}" if shown else name)


@pytest.mark.parametrize("name", ["square", "standard"])
def test_craft_is_full_length_pgd_whatever_the_name(trained, batch, name):
    chosen = make_attack(name, 6, seed=2)
    crafted = chosen.craft(trained, batch["images"], batch["image_ids"], batch["labels"])
    loss_fn = lambda x: cross_entropy(trained.classify(x).logits, batch["labels"])  # noqa: E731
    expected = TrainingAttack(chosen.threat, 6, 2.5 * chosen.threat.radius / 6)
    assert torch.equal(crafted, expected(loss_fn, batch["images"], batch["image_ids"], seed=2, round=0))
