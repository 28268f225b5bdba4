"""Every attack reports only what it can show, asks no more than it must, and changes nothing."""

from __future__ import annotations

import pytest
import torch
from conftest import Recorder, grey, linear

from hpt_hf.attacks.apgd import APGD
from hpt_hf.attacks.engine import frozen, misclassification, run_attack, target_reached
from hpt_hf.attacks.losses import cross_entropy, margin
from hpt_hf.attacks.noise import Noise
from hpt_hf.attacks.pgd import PGD, TrainingAttack
from hpt_hf.attacks.square import Square
from hpt_hf.attacks.suite import ATTACKS
from hpt_hf.attacks.threat_model import ThreatModel

EVALUATION = tuple(ATTACKS)
NAMES = ("training", *EVALUATION)
# Ball and steps at which each attack breaks some of the images and leaves some.
CASES = {(name, norm): case for name in NAMES for norm, case in {"linf": ("20/255", 4), "l2": (3, 4)}.items()}
CASES |= {("square", "linf"): ("64/255", 40), ("square", "l2"): (25, 40)}
every_attack = pytest.mark.parametrize(("name", "norm"), CASES)
every_evaluation = pytest.mark.parametrize(("name", "norm"), [case for case in CASES if case[0] != "training"])


def attack(name, logits_fn, images, labels, threat, steps, noise):
    """An evaluation attack by its name, or training's PGD, whose last iterate is judged here."""
    if name != "training":
        return ATTACKS[name][0](logits_fn, images, labels, threat, steps, noise)
    training = TrainingAttack(threat, steps, threat.radius / 2)
    found = training(lambda x: cross_entropy(logits_fn(x), labels), images, noise.image_ids, seed=noise.seed, round=0)
    with torch.no_grad():
        return found, logits_fn(found).argmax(1) != labels


def run(model, batch, name, norm, *, eps=None, steps=None, seed=0, rows=slice(None), image_ids=None, freeze=True):
    """An attack on images of the batch, at the settings of its case."""
    own_eps, own_steps = CASES[name, norm]
    noise = Noise((batch["image_ids"] if image_ids is None else image_ids)[rows], seed)
    threat, images, labels = ThreatModel(norm, own_eps if eps is None else eps), batch["images"], batch["labels"]
    with frozen(model if freeze else torch.nn.Identity()):
        return attack(
            name, lambda x: model.classify(x).logits, images[rows], labels[rows], threat, steps or own_steps, noise
        )


@every_attack
def test_what_is_broken_is_answered_wrongly_and_lies_in_the_ball(trained, batch, name, norm):
    found, broken = run(trained, batch, name, norm)
    assert ThreatModel(norm, CASES[name, norm][0]).contains(found, batch["images"]).all()
    assert found.dtype == torch.float32 and not found.requires_grad and broken.dtype == torch.bool
    with torch.no_grad():
        assert torch.equal(trained.classify(found).logits.argmax(1) != batch["labels"], broken)
        assert torch.equal(trained.classify(batch["images"]).logits.argmax(1), batch["labels"]), "all were right"
    assert 0 < broken.sum() < len(broken)


@every_attack
def test_whether_an_image_breaks_does_not_depend_on_its_batch(trained, batch, name, norm):
    whole = run(trained, batch, name, norm, rows=slice(0, 8))[1]
    for size in (1, 5):
        parts = [run(trained, batch, name, norm, rows=rows)[1] for rows in torch.arange(7, -1, -1).split(size)]
        assert torch.equal(torch.cat(parts).flip(0), whole), f"backwards in batches of {size}"
    assert 0 < whole.sum() < 8


@every_attack
def test_all_chance_hangs_on_image_id_and_seed(trained, batch, name, norm):
    def found(**changes):
        return run(trained, batch, name, norm, steps=3, rows=slice(0, 10), **changes)[0]

    first = found()
    assert torch.equal(first, found())
    for change in ({"seed": 1}, {"image_ids": batch["image_ids"] + 1}):
        assert (found(**change) != first).flatten(1).any(1).all(), "every image"


@every_attack
def test_an_attack_changes_nothing_but_what_it_returns(trained, batch, name, norm):
    """Not even of a model that asks for gradients: `frozen` saves the work, the attack itself keeps its hands off."""
    held = trained.get_parameter("model.visual_projection.weight")
    held.grad = torch.full_like(held, 7.0)  # of an accumulation step, say
    trained.train().model.vision_model.eval()  # some of its modules train, and some do not

    def state():
        parameters = [(p.detach().clone(), p.requires_grad) for p in trained.parameters()]
        return [parameters, [m.training for m in trained.modules()], {k: v.clone() for k, v in batch.items()}]

    before, chance = state(), torch.get_rng_state()
    try:
        run(trained, batch, name, norm, steps=3, freeze=False)
        torch.testing.assert_close(state(), before, rtol=0, atol=0)
        assert (held.grad == 7).all() and sum(p.grad is not None for p in trained.parameters()) == 1
    finally:
        held.grad = None
        trained.eval()
    assert torch.equal(torch.get_rng_state(), chance) and not batch["images"].requires_grad


@pytest.mark.parametrize("name", NAMES)
def test_neither_autocast_nor_the_gradient_mode_around_reaches_it(trained, batch, name):
    found = run(trained, batch, name, "linf", steps=3)[0]
    with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16):
        inside = run(trained, batch, name, "linf", steps=3)[0]
        half = trained(batch["images"]).embeds  # the control: autocast is on here, and would have changed the answer
        assert not torch.is_grad_enabled()
    with torch.no_grad():
        assert torch.equal(inside, found) and not torch.equal(half, trained(batch["images"]).embeds)


@pytest.mark.gpu
@every_attack
def test_every_attack_runs_where_its_images_are(name, norm):
    """Whatever a strategy makes for itself lies on the images' device, and chance is the same on every one."""
    images, (_, answer) = grey(12, side=12), linear(4, side=12)
    labels, threat = answer(images).argmax(1), ThreatModel(norm, {"linf": 0.004, "l2": 0.05}[norm])
    outcomes = []
    for device in ("cpu", "cuda"):
        x, noise = images.to(device), Noise(torch.arange(12, device=device))
        found, broken = attack(name, answer, x, labels.to(device), threat, 20, noise)
        assert threat.contains(found, x).all()
        outcomes.append(broken.cpu())
    assert torch.equal(*outcomes)


@every_attack
def test_an_empty_batch_is_an_empty_answer_and_an_empty_ball_the_image_alone(name, norm):
    for count, eps in ((0, 0.1), (4, "0")):
        images, (_, answer), noise = grey(count), linear(4), Noise(torch.arange(count))
        found, broken = attack(name, answer, images, answer(images).argmax(1), ThreatModel(norm, eps), 3, noise)
        assert torch.equal(found, images) and broken.tolist() == [False] * count


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("change", ["three ids", "half", "double", -0.01, 1.01, torch.nan])
def test_what_no_attack_may_start_from_is_refused(name, change):
    images, labels, noise = grey(4), torch.zeros(4, dtype=torch.int64), Noise(torch.arange(4))
    if change == "three ids":
        noise, error, message = Noise(torch.arange(3)), Exception, "3 image ids for 4 images|image_ids"
    elif isinstance(change, str):
        images, error, message = getattr(images, change)(), TypeError, "expected float32"
    else:
        images[1, 2, 3, 3], error, message = change, ValueError, r"\[0, 1\]: un-normalised"
    with pytest.raises(error, match=message):
        attack(name, lambda x: linear(4)[1](x.float()), images, labels, ThreatModel(), 2, noise)


def test_frozen_restores_exactly_what_it_took_even_after_an_error(trained):
    asked = [p.requires_grad for p in trained.parameters()]
    with pytest.raises(KeyError), frozen(trained):
        assert not any(p.requires_grad for p in trained.parameters())
        raise KeyError
    assert [p.requires_grad for p in trained.parameters()] == asked


# --- with a criterion: an image leaves at its first success


@every_evaluation
def test_a_broken_image_is_never_asked_about_again(name, norm):
    """Image by image, against what the classifier itself saw. Two classes: of several targets see test_suite."""
    images, (_, answer) = grey(24, side=10), linear(2, side=10)
    logits_fn, labels = Recorder(answer), answer(images).argmax(1)
    eps, steps = {"linf": 0.01, "l2": 0.1}[norm] * (4 if name == "square" else 1), 30 if name == "square" else 5
    _, broken = attack(name, logits_fn, images, labels, ThreatModel(norm, eps), steps, Noise(torch.arange(24)))
    standing, sizes = list(range(24)), []
    first = 1 if name == "apgd-t" else 0  # which asks about the clean images first, to rank the classes
    for call in range(first, len(logits_fn.calls)):
        assert logits_fn.who(call, images) == standing
        wrong = (answer(logits_fn.calls[call]).argmax(1) != labels[standing]).tolist()
        standing = [image for image, w in zip(standing, wrong, strict=True) if not w]
        sizes.append(len(standing))
    assert standing == (~broken).nonzero()[:, 0].tolist()
    assert len(sizes) == (steps if name == "square" else steps + 1) and sizes[0] > sizes[-1] > 0


@pytest.mark.parametrize("name", EVALUATION)
def test_nothing_is_asked_once_all_are_broken(name):
    images, (_, answer) = grey(6), linear(3)
    logits_fn, right, noise = Recorder(answer), answer(images).argmax(1), Noise(torch.arange(6))
    _, broken = attack(name, logits_fn, images, (right + 1) % 3, ThreatModel("linf", 1e-6), 50, noise)
    assert broken.all() and [len(x) for x in logits_fn.calls] == ([6, 6] if name == "apgd-t" else [6])


@pytest.mark.parametrize(
    ("name", "loss", "strategy"),
    [
        ("pgd", cross_entropy, lambda threat: PGD(threat, 7, 2.5 * threat.radius / 7)),
        ("cw", margin, lambda threat: PGD(threat, 7)),
        ("apgd-ce", cross_entropy, lambda threat: APGD(threat, 7)),
        ("square", margin, lambda threat: Square(threat, 8)),
    ],
)
def test_a_name_stands_for_its_loss_and_its_strategy(name, loss, strategy):
    """Query by query: whoever compares with other people's numbers compares names."""
    images, (_, answer) = grey(5), linear(6)
    labels, threat, noise = answer(images).argmax(1), ThreatModel("linf", 1e-4), Noise(torch.arange(5))
    named, spelled_out = Recorder(answer), Recorder(answer)
    attack(name, named, images, labels, threat, 8 if name == "square" else 7, noise)
    run_attack(spelled_out, images, strategy(threat), noise=noise, criterion=misclassification(loss, labels))
    assert len(named.calls) == 8 and all(map(torch.equal, named.calls, spelled_out.calls))


def test_a_target_is_that_of_the_row_that_is_asked_about():
    """The logits are of the standing images only, the targets of all."""
    targets, rows = torch.arange(9) % 5, torch.tensor([1, 4, 7])
    logits, goal = torch.eye(5)[targets], target_reached(cross_entropy, targets)
    assert goal.reached(logits[rows], rows).all() and not goal.reached(logits[rows + 1], rows).any()
    assert torch.equal(goal.loss(logits[rows], rows), -cross_entropy(logits, targets)[rows])
