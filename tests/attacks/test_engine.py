"""Proves that an attack reports only what it can show, asks no more than it must, and finds what is known to be there."""

from __future__ import annotations

import math
from fractions import Fraction

import pytest
import torch
import torch.nn.functional as F
from conftest import CLASSES

from hpt_hf.attacks.apgd import APGD
from hpt_hf.attacks.engine import Misclassification, TargetedMisclassification, TargetReached, frozen, search
from hpt_hf.attacks.losses import cross_entropy, margin
from hpt_hf.attacks.noise import Noise
from hpt_hf.attacks.pgd import PGD, pgd
from hpt_hf.attacks.square import Square
from hpt_hf.attacks.suite import ATTACKS, worst_case
from hpt_hf.attacks.threat_model import ThreatModel

NAMES = tuple(ATTACKS)
GRADIENTS = tuple(name for name in NAMES if name != "square")
# Ball and steps at which each attack breaks some of the pictures and leaves some: what does all or nothing proves little.
CASES = {(name, "linf"): ("20/255", 4) for name in GRADIENTS} | {(name, "l2"): (3, 4) for name in GRADIENTS}
CASES |= {("square", "linf"): ("64/255", 40), ("square", "l2"): (25, 40)}
every_attack = pytest.mark.parametrize(("name", "norm"), CASES)


def run(model, batch, name, norm, *, eps=None, steps=None, seed=0, rows=slice(None), image_ids=None):
    """An attack by its name on pictures of the batch, at the settings of its case."""
    own_eps, own_steps = CASES[name, norm]
    threat = ThreatModel(norm, own_eps if eps is None else eps)
    noise = Noise((batch["image_ids"] if image_ids is None else image_ids)[rows], seed)
    attack = ATTACKS[name][0]
    with frozen(model):
        return attack(
            lambda x: model.classify(x).logits,
            batch["images"][rows],
            batch["labels"][rows],
            threat,
            steps or own_steps,
            noise,
        )


class Asked:
    """A classifier of pixels that remembers every batch it was asked about."""

    def __init__(self, answer):
        self.answer, self.calls = answer, []

    def __call__(self, x):
        self.calls.append(x.detach().clone())
        return self.answer(x)

    @property
    def rows(self) -> int:
        return sum(map(len, self.calls))

    def who(self, call: int, images) -> list[int]:
        """Which images these were: the nearest ones, in balls far smaller than the distance between images."""
        return torch.cdist(self.calls[call].flatten(1), images.flatten(1)).argmin(1).tolist()


class Climb:
    """A goal that is never reached: what the classifier says is the loss itself."""

    def loss(self, logits, rows):
        return logits[:, 0]

    def reached(self, logits, rows):
        return torch.zeros(len(logits), dtype=torch.bool)


def grey(count, side=8, seed=0):
    """Random images clear of 0 and 1, where balls are whole and optima have closed forms."""
    return 0.3 + 0.4 * torch.rand(count, 3, side, side, generator=torch.Generator().manual_seed(seed))


def linear(classes, side=8, seed=1):
    weight = torch.randn(classes, 3 * side * side, generator=torch.Generator().manual_seed(seed))
    return weight, lambda x: (x.flatten(1) - 0.5) @ weight.T


# --- every attack ---------------------------------------------------------------------------------------------------------


@every_attack
def test_what_is_broken_is_answered_wrongly_and_lies_in_the_ball(trained, batch, name, norm):
    found, broken = run(trained, batch, name, norm)
    assert ThreatModel(norm, CASES[name, norm][0]).contains(found, batch["images"]).all()
    assert found.dtype == torch.float32 and not found.requires_grad and broken.dtype == torch.bool
    with torch.no_grad():
        assert torch.equal(trained.classify(found).logits.argmax(1) != batch["labels"], broken)
        assert torch.equal(trained.classify(batch["images"]).logits.argmax(1), batch["labels"]), (
            "all were right before"
        )
    assert 0 < broken.sum() < len(broken)


@every_attack
def test_whether_a_picture_breaks_does_not_depend_on_its_batch(trained, batch, name, norm):
    whole = run(trained, batch, name, norm, rows=slice(0, 10))[1]
    for size in (1, 7):
        parts = [run(trained, batch, name, norm, rows=slice(i, min(i + size, 10)))[1] for i in range(0, 10, size)]
        assert torch.equal(torch.cat(parts), whole), f"in batches of {size}"
    backwards = run(trained, batch, name, norm, rows=torch.arange(9, -1, -1))[1]
    assert torch.equal(backwards.flip(0), whole)
    assert 0 < whole.sum() < 10


@every_attack
def test_all_chance_hangs_on_key_and_seed(trained, batch, name, norm):
    first, again = (run(trained, batch, name, norm, steps=3) for _ in range(2))
    assert torch.equal(first[0], again[0]) and torch.equal(first[1], again[1])
    other_seed = run(trained, batch, name, norm, steps=3, seed=1)[0]
    other_keys = run(trained, batch, name, norm, steps=3, image_ids=batch["image_ids"] + 1)[0]
    for other in (other_seed, other_keys):
        assert (other != first[0]).flatten(1).any(1).all(), "every picture"


@every_attack
@pytest.mark.parametrize("training", [True, False])
def test_an_attack_changes_nothing_but_what_it_returns(trained, batch, name, norm, training):
    """Not even of a model that asks for gradients: `frozen` saves the work, the attack itself must keep its hands off."""
    parameters = dict(trained.named_parameters())
    weights = {n: p.detach().clone() for n, p in parameters.items()}
    asked = {n: p.requires_grad for n, p in parameters.items()}
    held = "model.visual_projection.weight"
    parameters[held].grad = torch.full_like(parameters[held], 7.0)  # of an accumulation step, say
    images, keys, state = batch["images"].clone(), batch["image_ids"].clone(), torch.get_rng_state()
    eps, _ = CASES[name, norm]
    trained.train(training)
    try:
        ATTACKS[name][0](
            lambda x: trained.classify(x).logits,
            batch["images"],
            batch["labels"],
            ThreatModel(norm, eps),
            3,
            Noise(batch["image_ids"]),
        )
        assert all(m.training == training for m in trained.modules())
        assert (parameters[held].grad == 7).all()
        assert all(p.grad is None for n, p in parameters.items() if n != held)
    finally:
        parameters[held].grad = None
        trained.eval()
    assert torch.equal(torch.get_rng_state(), state)
    assert {n: p.requires_grad for n, p in parameters.items()} == asked
    assert all(torch.equal(p, weights[n]) for n, p in parameters.items())
    assert (
        torch.equal(batch["images"], images)
        and torch.equal(batch["image_ids"], keys)
        and not batch["images"].requires_grad
    )


@pytest.mark.parametrize("name", NAMES)
def test_neither_autocast_nor_the_gradient_mode_around_reaches_it(trained, batch, name):
    found, broken = run(trained, batch, name, "linf", steps=3)
    with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16):
        inside = run(trained, batch, name, "linf", steps=3)
        # The control: autocast is on here, and would have changed the answer.
        half = trained(batch["images"]).embeds
        assert not torch.is_grad_enabled()
    assert torch.equal(inside[0], found) and torch.equal(inside[1], broken)
    with torch.no_grad():
        assert not torch.equal(half, trained(batch["images"]).embeds)


@every_attack
def test_more_steps_or_a_larger_ball_never_break_fewer(trained, batch, name, norm):
    eps, steps = CASES[name, norm]
    by_steps = [int(run(trained, batch, name, norm, steps=n)[1].sum()) for n in (1, steps, 2 * steps)]
    by_eps = [
        int(run(trained, batch, name, norm, eps=ThreatModel(norm, eps).radius * f)[1].sum()) for f in (0, 0.5, 1, 1.6)
    ]
    assert by_steps == sorted(by_steps) and by_eps == sorted(by_eps), (by_steps, by_eps)
    assert by_eps[0] == 0 < by_eps[-1] and by_eps[2] == by_steps[1]


@pytest.mark.gpu
@every_attack
def test_every_attack_runs_where_its_images_are(name, norm):
    """Whatever a strategy makes for itself must lie on the images' device, and chance is the same on every one."""
    images = grey(12, side=12)
    weight, _ = linear(4, side=12)
    labels, threat = (
        ((images - 0.5).flatten(1) @ weight.T).argmax(1),
        ThreatModel(norm, {"linf": 0.004, "l2": 0.05}[norm]),
    )
    outcomes = []
    for device in ("cpu", "cuda"):
        w = weight.to(device)
        found, broken = ATTACKS[name][0](
            lambda x, w=w: (x - 0.5).flatten(1) @ w.T,
            images.to(device),
            labels.to(device),
            threat,
            20,
            Noise(torch.arange(12, device=device)),
        )
        assert threat.contains(found, images.to(device)).all()
        outcomes.append(broken.cpu())
    assert torch.equal(*outcomes)


@every_attack
def test_an_empty_batch_is_an_empty_answer(name, norm):
    empty, none = torch.empty(0, 3, 8, 8), torch.empty(0, dtype=torch.int64)
    found, broken = ATTACKS[name][0](
        lambda x: x.flatten(1)[:, :4], empty, none, ThreatModel(norm, 0.1), 3, Noise(none)
    )
    assert found.shape == empty.shape and broken.shape == (0,)


@pytest.mark.parametrize("name", NAMES)
def test_what_no_attack_may_start_from_is_refused(name):
    images, labels, keys = grey(4), torch.zeros(4, dtype=torch.int64), torch.arange(4)
    _, logits_fn = linear(4)

    def attack(images, keys):
        ATTACKS[name][0](lambda x: logits_fn(x.float()), images, labels, ThreatModel("linf", 0.1), 2, Noise(keys))

    for half in (torch.float16, torch.bfloat16):
        with pytest.raises(TypeError, match=f"float32.*{half}"):
            attack(images.to(half), keys)
    with pytest.raises(ValueError, match="un-normalised"):
        attack(images * 255, keys)
    with pytest.raises(ValueError, match="3 image ids for 4 images"):
        attack(images, keys[:3])


# --- what it costs ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("norm", ["linf", "l2"])
@pytest.mark.parametrize("name", NAMES)
def test_a_broken_image_is_never_asked_about_again(name, norm):
    """Image by image, against what the classifier itself saw. Two classes: of several targets see the queue's own test below."""
    images = grey(24, side=10)
    weight, answer = linear(2, side=10)
    logits_fn = Asked(answer)
    labels, strength = answer(images).argmax(1), {"linf": 0.01, "l2": 0.1}[norm] * (4 if name == "square" else 1)
    steps = 30 if name == "square" else 5
    _, broken = ATTACKS[name][0](
        logits_fn, images, labels, ThreatModel(norm, strength), steps, Noise(torch.arange(24))
    )
    standing, sizes = list(range(24)), []
    first = 1 if name == "apgd-t" else 0  # which asks about the clean images first, to rank the classes
    for call in range(first, len(logits_fn.calls)):
        assert logits_fn.who(call, images) == standing
        wrong = (answer(logits_fn.calls[call]).argmax(1) != labels[standing]).tolist()
        standing = [image for image, w in zip(standing, wrong, strict=True) if not w]
        sizes.append(len(standing))
    assert standing == (~broken).nonzero()[:, 0].tolist()
    assert len(sizes) == (steps if name == "square" else steps + 1) and sizes[0] > sizes[-1] > 0, (
        "some, at several queries"
    )


@pytest.mark.parametrize("name", NAMES)
def test_nothing_is_asked_once_all_are_broken(name):
    images = grey(6)
    _, answer = linear(3)
    logits_fn = Asked(answer)
    wrong = (answer(images).argmax(1) + 1) % 3
    _, broken = ATTACKS[name][0](logits_fn, images, wrong, ThreatModel("linf", 1e-6), 50, Noise(torch.arange(6)))
    assert broken.all() and [len(x) for x in logits_fn.calls] == ([6, 6] if name == "apgd-t" else [6])
    logits_fn.calls.clear()
    _, broken = ATTACKS[name][0](
        logits_fn, images, answer(images).argmax(1), ThreatModel("linf", 0.3), 50, Noise(torch.arange(6))
    )
    assert broken.all() and 6 < logits_fn.rows < 6 * 50 and all(map(len, logits_fn.calls))
    assert (answer(logits_fn.calls[-1]).argmax(1) != answer(images).argmax(1)[logits_fn.who(-1, images)]).all()


@pytest.mark.parametrize(
    ("name", "loss", "strategy"),
    [
        ("pgd", cross_entropy, PGD(7, 2.5 * ThreatModel("linf", 1e-4).radius / 7)),
        ("cw", margin, PGD(7, 2.5 * ThreatModel("linf", 1e-4).radius / 7)),
        ("apgd-ce", cross_entropy, APGD(7)),
        ("square", margin, Square(8)),
    ],
)
def test_a_name_stands_for_its_loss_and_its_strategy(name, loss, strategy):
    """Query by query: whoever compares with other people's numbers compares names."""
    images = grey(5)
    _, answer = linear(6)
    labels, threat, noise = answer(images).argmax(1), ThreatModel("linf", 1e-4), Noise(torch.arange(5))
    named, spelled_out = Asked(answer), Asked(answer)
    broken = ATTACKS[name][0](named, images, labels, threat, strategy.queries - (name != "square"), noise)[1]
    search(spelled_out, Misclassification(labels, loss), images, threat, strategy, noise=noise)
    assert not broken.any() and len(named.calls) == 8
    assert all(torch.equal(x, y) for x, y in zip(named.calls, spelled_out.calls, strict=True))


# --- PGD --------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("loss", [cross_entropy, margin])
@pytest.mark.parametrize(("norm", "eps", "step"), [("linf", "20/255", 5 / 255), ("l2", 2.5, 0.6)])
def test_the_search_stops_at_the_first_success_and_is_pgd_before(trained, batch, loss, norm, eps, step):
    images, labels, threat, noise = batch["images"], batch["labels"], ThreatModel(norm, eps), Noise(batch["image_ids"])
    logits_fn = Asked(lambda x: trained.classify(x).logits)
    found, broken = search(logits_fn, Misclassification(labels, loss), images, threat, PGD(6, step), noise=noise)
    # Against plain PGD of every length: broken at the first iterate that is wrong, and that iterate is what is handed back.
    iterates = [
        pgd(lambda x: loss(trained.classify(x).logits, labels), images, threat, steps=k, step_size=step, noise=noise)
        for k in range(7)
    ]
    expected = torch.full((len(images),), 99)
    for steps in reversed(range(7)):
        with torch.no_grad():
            expected[trained.classify(iterates[steps]).logits.argmax(1) != labels] = steps
    for steps in range(7):
        torch.testing.assert_close(found[expected == steps], iterates[steps][expected == steps])
    assert torch.equal(expected < 99, broken) and 0 < broken.sum() < len(images)
    torch.testing.assert_close(found[~broken], iterates[6][~broken])
    sizes = [int((expected >= steps).sum()) for steps in range(7)]
    assert [len(x) for x in logits_fn.calls] == sizes, "broken images are dropped from the batch"


def test_what_is_wrong_already_is_left_at_its_start(trained, batch):
    images, labels, threat, noise = (
        batch["images"],
        1 - batch["labels"],
        ThreatModel("linf", "8/255"),
        Noise(batch["image_ids"]),
    )
    with frozen(trained):
        goal = Misclassification(labels % len(CLASSES), margin)
        found, broken = search(lambda x: trained.classify(x).logits, goal, images, threat, PGD(3, 0.1), noise=noise)
    assert broken.sum() > 30 and torch.equal(found[broken], threat.random_start(images, noise)[broken])


@pytest.mark.parametrize(("name", "loss"), [("pgd", cross_entropy), ("cw", margin)])
def test_steps_are_two_and_a_half_radii_in_all(name, loss):
    """Madry et al.'s step, and each name with its own loss: every query is where plain PGD with these is after as many steps."""
    images = grey(5)
    _, answer = linear(6)
    logits_fn = Asked(answer)
    labels, threat, noise = answer(images).argmax(1), ThreatModel("linf", 1e-4), Noise(torch.arange(5))
    _, broken = ATTACKS[name][0](logits_fn, images, labels, threat, 7, noise)
    assert not broken.any() and len(logits_fn.calls) == 8

    def after(steps, loss):
        return pgd(
            lambda x: loss(answer(x), labels), images, threat, steps=steps, step_size=2.5 * 1e-4 / 7, noise=noise
        )

    for steps, x in enumerate(logits_fn.calls):
        torch.testing.assert_close(x, after(steps, loss), rtol=0, atol=1e-6)
    assert not torch.allclose(after(7, cross_entropy), after(7, margin), rtol=0, atol=5e-5)


# --- APGD -------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("steps", [100, 50, 200, 1000])
def test_checkpoints_are_the_papers(steps):
    """p(j+1) = p(j) + max(p(j) - p(j-1) - 0.03, 0.06), starting with 0 and 0.22, in exact fractions of the number of steps."""
    marks = [Fraction(0), Fraction(22, 100)]
    while marks[-1] <= 1:
        marks.append(marks[-1] + max(marks[-1] - marks[-2] - Fraction(3, 100), Fraction(6, 100)))
    exact = [math.ceil(mark * steps) for mark in marks]
    got = list(APGD(steps).checkpoints().items())
    if steps % 100 == 0:
        assert [step for step, _ in got] == exact[1:-1]
    assert got[0] == (exact[1], exact[1]) and all(step <= steps for step, _ in got)
    assert [stretch for _, stretch in got] == [
        b - a for a, b in zip([0] + [s for s, _ in got], [s for s, _ in got], strict=False)
    ]


def test_checkpoints_of_a_hundred_steps_are_the_known_ones_and_few_steps_have_some():
    assert list(APGD(100).checkpoints()) == [22, 41, 57, 70, 80, 87, 93, 99]
    for steps in range(1, 30):
        marks = list(APGD(steps).checkpoints())
        assert marks == sorted(set(marks)) and marks and marks[0] >= 1 and marks[-1] <= steps


def written_out_apgd(loss, gradient, start, project, unit, radius, steps):
    """The points that APGD asks about, for one image on Python floats, with the conditions as the paper states them."""
    points, losses, step, best, at_check = [start], [loss(start)], 2 * radius, 0, None
    x, before, halved, reasons = start, start, True, []
    checks, stretch = {}, max(1, int(0.22 * steps))
    while sum(checks.values()) + stretch <= steps:
        checks[sum(checks.values()) + stretch] = stretch
        stretch = max(stretch - max(1, int(0.03 * steps)), max(1, int(0.06 * steps)))
    for k in range(steps):
        if k == 0:
            at_check = losses[0]
        if k in checks:
            rises = sum(losses[i] > losses[i - 1] for i in range(k - checks[k] + 1, k + 1))
            few, still = rises <= 0.75 * checks[k], not halved and losses[best] <= at_check
            halved, at_check = few or still, losses[best]
            reasons.append((few, still))
            if halved:
                step, x = step / 2, points[best]
        z = project([a + step * b for a, b in zip(x, unit(gradient(x)), strict=True)])
        share = 0.75 if k else 1
        moved = [a + share * (c - a) + (1 - share) * (a - b) for a, b, c in zip(x, before, z, strict=True)]
        before, x = x, project(moved)
        points.append(x)
        losses.append(loss(x))
        best = max(range(len(losses)), key=lambda i: (losses[i], -i))
    return points, reasons


@pytest.mark.parametrize(
    ("steps", "turns"), [(100, {(True, False)}), (30, {(True, False), (True, True), (False, True)})]
)
def test_apgd_asks_about_the_points_of_the_written_out_algorithm(steps, turns):
    """Several images in one batch on hills of their own, some with the top inside the ball and some outside: each as if it were alone."""
    count, radius, happened = 8, 0.1, set()
    generator = torch.Generator().manual_seed(3)
    images = grey(count, side=2)
    shift = torch.rand(count, 12, generator=generator) - 0.5
    bend = 0.3 + torch.rand(count, 12, generator=generator)
    for norm, size in (("linf", 0.2), ("l2", 0.1)):
        top = images.flatten(1) + size * shift * torch.tensor([0.5, 1, 2, 4] * 2)[:, None]
        queries = Asked(lambda x, top=top: -(bend * (x.flatten(1) - top) ** 2).sum(1, keepdim=True))
        search(queries, Climb(), images, ThreatModel(norm, radius), APGD(steps), noise=Noise(torch.arange(count)))
        for i in range(count):
            centre, peak, weight = (t[i].double().flatten().tolist() for t in (images, top, bend))

            def project(x, norm=norm, centre=centre):
                away = [a - c for a, c in zip(x, centre, strict=True)]
                if norm == "linf":
                    return [c + min(max(d, -radius), radius) for c, d in zip(centre, away, strict=True)]
                return [c + d * min(1, radius / math.hypot(*away)) for c, d in zip(centre, away, strict=True)]

            def unit(g, norm=norm):
                return [math.copysign(1, v) for v in g] if norm == "linf" else [v / math.hypot(*g) for v in g]

            expected, reasons = written_out_apgd(
                lambda x, p=peak, w=weight: -sum(b * (a - t) ** 2 for a, t, b in zip(x, p, w, strict=True)),
                lambda x, p=peak, w=weight: [-2 * b * (a - t) for a, t, b in zip(x, p, w, strict=True)],
                queries.calls[0][i].double().flatten().tolist(),
                project,
                unit,
                radius,
                steps,
            )
            got = torch.stack([call[i].flatten() for call in queries.calls]).double()
            # The last steps are of about 1e-3: one that went another way would show.
            torch.testing.assert_close(got, torch.tensor(expected, dtype=torch.float64), rtol=0, atol=1e-4)
            happened |= set(reasons)
    assert happened == turns | {(False, False)}, "each way of being stuck, and of not being"


def test_apgd_ends_nearer_to_a_top_inside_the_ball_than_pgd():
    """Steps of one size end up jumping across the top; halved ones, from the best point, close in."""
    images, radius = grey(20, side=2), 0.1
    offset = torch.linspace(-0.06, 0.06, 20)[:, None]
    ends = {}
    for name, strategy in {"pgd": PGD(20, 2.5 * radius / 20), "apgd": APGD(20)}.items():
        logits_fn = Asked(lambda x: -((x - images).flatten(1) - offset).square().sum(1, keepdim=True))
        search(logits_fn, Climb(), images, ThreatModel("linf", radius), strategy, noise=Noise(torch.arange(20)))
        ends[name] = ((logits_fn.calls[-1] - images).flatten(1) - offset).abs().amax(1)
    assert (ends["apgd"] < ends["pgd"]).all() and ends["apgd"].mean() < ends["pgd"].mean() / 2


@pytest.mark.parametrize("norm", ["linf", "l2"])
def test_a_linear_loss_is_driven_to_its_known_maximum(norm):
    images = grey(6)
    weight = torch.randn(6, 192, generator=torch.Generator().manual_seed(4))

    def logits_fn(x):
        return (x.flatten(1) * weight).sum(1, keepdim=True)

    found, broken = search(logits_fn, Climb(), images, ThreatModel(norm, 0.1), APGD(40), noise=Noise(torch.arange(6)))
    unit = weight.sign() if norm == "linf" else weight / weight.norm(dim=1, keepdim=True)
    best = images.flatten(1) + 0.1 * unit
    torch.testing.assert_close(found.flatten(1), best, rtol=0, atol=1e-7 if norm == "linf" else 1e-4)
    assert not broken.any()


# --- APGD-T -----------------------------------------------------------------------------------------------------------------


def one_reachable(classes, rank):
    """A linear classifier of grey images into class 0, where only the wrong class of that rank can be reached, far behind the others.

    The steepest way to it makes the likeliest wrong class less likely, so losses that look at that one walk away.
    """
    way = torch.randn(192, generator=torch.Generator().manual_seed(5)).sign()
    behind = torch.tensor([0.0, 1.0] + [30.0 + c for c in range(2, classes)])[:classes]
    slope = torch.zeros(classes)
    slope[1] = -0.05  # within 0.1, all pixels together are worth 19.2: not enough
    slope[rank + 1] = 0.15 * behind[rank + 1]  # more than enough
    return lambda x: ((x - 0.5).flatten(1) @ way)[:, None] * slope - behind


@pytest.mark.parametrize(
    ("classes", "rank", "reached"),
    [
        (2, 0, True),
        (3, 0, True),
        (3, 1, True),
        (4, 2, True),
        (5, 1, True),
        (5, 2, True),
        (5, 3, True),
        (12, 8, True),
        (12, 9, False),
    ],
)
@pytest.mark.parametrize("norm", ["linf", "l2"])
def test_apgd_t_reaches_a_class_that_nothing_untargeted_looks_at(classes, rank, reached, norm):
    """Nine targets, or as many as there are: the tenth likeliest is not one."""
    images, answer = torch.full((3, 3, 8, 8), 0.5), one_reachable(classes, rank)
    threat = ThreatModel(norm, 0.1 if norm == "linf" else 0.1 * math.sqrt(192))
    labels, noise = torch.zeros(3, dtype=torch.int64), Noise(torch.arange(3))
    assert (answer(images).argsort(1, descending=True) == torch.arange(classes)).all(), (
        "the ranks are what they are called"
    )
    broken = {name: ATTACKS[name][0](answer, images, labels, threat, 12, noise)[1] for name in GRADIENTS}
    assert broken["apgd-t"].tolist() == [reached] * 3
    for name in ("pgd", "cw", "apgd-ce"):
        assert broken[name].tolist() == [rank == 0] * 3, "the likeliest wrong class is where everything goes"


@pytest.mark.parametrize("norm", ["linf", "l2"])
@pytest.mark.parametrize("classes", [2, 4, 7])
def test_apgd_t_breaks_exactly_what_can_be_broken_and_all_that_any_target_alone_breaks(classes, norm):
    """On a linear classifier a class is within reach where its deficit is at most eps times the dual norm of the difference."""
    images, count = grey(40), 40
    weight, answer = linear(classes)
    labels, radius = answer(images).argmax(1), {"linf": 0.005, "l2": 0.05}[norm]
    threat, noise = ThreatModel(norm, radius), Noise(torch.arange(count))
    apart = weight[None] - weight[labels][:, None]
    dual = apart.norm(1 if norm == "linf" else 2, dim=2)
    logits = answer(images)
    spare = (
        (logits - logits.gather(1, labels[:, None]) + radius * dual).scatter(1, labels[:, None], -torch.inf).amax(1)
    )
    _, broken = ATTACKS["apgd-t"][0](answer, images, labels, threat, 20, noise)
    clear = spare.abs() > 0.02 * radius * dual.amax(1)
    assert torch.equal(broken[clear], spare[clear] > 0) and clear.sum() > 30 and 0 < broken.sum() < count
    for target in range(classes):
        goal = TargetedMisclassification(labels, torch.where(labels == target, (target + 1) % classes, target))
        alone = search(answer, goal, images, threat, APGD(20), noise=noise)[1]
        assert not (alone & ~broken)[clear].any()


@pytest.mark.parametrize("classes", [2, 3, 5, 12])
def test_where_nothing_can_be_broken_every_target_is_tried_to_its_end(classes):
    images = grey(4)
    _, answer = linear(classes)
    logits_fn = Asked(answer)
    _, broken = ATTACKS["apgd-t"][0](
        logits_fn, images, answer(images).argmax(1), ThreatModel("linf", 0), 5, Noise(torch.arange(4))
    )
    assert not broken.any() and logits_fn.rows == 4 + min(9, classes - 1) * 4 * 6
    assert {len(x) for x in logits_fn.calls} == {4}, "in full batches"


def test_the_queue_forgets_the_targets_of_broken_images_and_keeps_its_batches_full():
    images = grey(24)
    _, answer = linear(5)
    logits_fn = Asked(answer)
    labels, threat = answer(images).argmax(1), ThreatModel("linf", 0.006)
    found, broken = ATTACKS["apgd-t"][0](logits_fn, images, labels, threat, 5, Noise(torch.arange(24)))
    # The first round is the likeliest wrong class of every image, once each; the clean images were asked about before.
    lost = set()
    for call in range(1, 7):
        who = logits_fn.who(call, images)
        assert len(set(who)) == len(who)
        wrong = answer(logits_fn.calls[call]).argmax(1) != labels[who]
        lost |= {image for image, w in zip(who, wrong.tolist(), strict=True) if w}
    later = {image for call in range(7, len(logits_fn.calls)) for image in logits_fn.who(call, images)}
    assert later == set(range(24)) - lost and 3 < len(lost) < 21
    assert len(logits_fn.calls[7]) == min(24, 3 * len(later)), (
        "several targets of one image, rather than a small batch"
    )
    assert torch.equal(answer(found).argmax(1) != labels, broken) and threat.contains(found, images).all()


# --- Square -----------------------------------------------------------------------------------------------------------------


def test_the_side_of_the_squares_follows_the_papers_schedule():
    """Of 10,000 queries the covered share, 0.8 at first, halves after these; any other number of queries stretches them."""
    marks = (10, 50, 200, 500, 1000, 2000, 4000, 6000, 8000)
    full = Square(10_000)
    for halvings, (begin, end) in enumerate(zip((-1, *marks), (*marks, 9_999), strict=True)):
        expected = round(math.sqrt(0.8 / 2**halvings * 224 * 200))
        assert full.side(begin + 1, 224, 200) == full.side(end, 224, 200) == expected
    for queries in (1, 3, 100, 5000):
        sides = [Square(queries).side(q, 32, 32) for q in range(queries)]
        assert sides[0] == round(math.sqrt(0.8 * 32 * 32)) and sides == sorted(sides, reverse=True) and sides[-1] >= 1
    assert [Square(5000).side(q, 32, 32) for q in range(5000)] == [full.side(2 * q, 32, 32) for q in range(5000)]
    assert full.side(9_999, 8, 8) == 1, "never less than a pixel"


@pytest.mark.parametrize("norm", ["linf", "l2"])
@pytest.mark.parametrize(("height", "width"), [(16, 16), (12, 20), (20, 12)])
def test_square_changes_windows_of_its_best_point_and_stays_on_the_ball(norm, height, width):
    """The best point is found again from outside: the highest loss so far."""
    generator = torch.Generator().manual_seed(0)
    images = 0.4 + 0.2 * torch.rand(6, 3, height, width, generator=generator)
    weight = torch.randn(6, 3, 1, 1, generator=generator) + 0.3 * torch.randn(6, 3, height, width, generator=generator)
    strategy, threat = Square(60), ThreatModel(norm, 0.1)
    logits_fn = Asked(lambda x: (x * weight).sum((1, 2, 3))[:, None])
    search(logits_fn, Climb(), images, threat, strategy, noise=Noise(torch.arange(6)))
    assert len(logits_fn.calls) == 60
    best = logits_fn.calls[0]
    losses = [logits_fn.answer(x)[:, 0] for x in logits_fn.calls]
    start = best - images
    if norm == "linf":
        assert torch.allclose(start.abs(), torch.full_like(start, 0.1), atol=1e-6)
        assert torch.allclose(start, start[:, :, :1].expand_as(start), atol=1e-6), "columns of one sign"
        assert len(set(map(str, start.sign()[:, :, 0].flatten(0, 1).tolist()))) > 12, "of chance"
    highest, moves = losses[0], 0
    for query in range(1, 60):
        x = logits_fn.calls[query]
        torch.testing.assert_close(threat.distance(x, images).float(), torch.full((6,), 0.1), rtol=0, atol=1e-5)
        side = min(strategy.side(query, height, width), height, width)
        for i in range(6):
            changed = ((x[i] - best[i]).abs() > 1e-5).any(0)
            rows, columns = changed.any(1).nonzero()[:, 0], changed.any(0).nonzero()[:, 0]
            moves += len(rows) > 0
            if not len(rows):
                assert norm == "linf", "a square of the sign that stood there"
            elif norm == "linf":
                assert rows[-1] - rows[0] < side and columns[-1] - columns[0] < side
                inside = (x[i] - images[i])[:, rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1]
                assert torch.allclose(inside.abs(), torch.full_like(inside, 0.1), atol=1e-6)
                # A channel that changes is of one sign in the whole window.
                assert (
                    (inside.sign() == inside.sign()[:, :1, :1])
                    .flatten(1)
                    .all(1)[((x[i] - best[i]).abs() > 1e-5).any((1, 2))]
                    .all()
                )
            else:
                odd = min(max(3, side) // 2 * 2 + 1, (min(height, width) - 1) // 2 * 2 + 1)
                assert changed.sum() <= 2 * odd * odd
        better = losses[query] > highest
        best, highest = torch.where(better[:, None, None, None], x, best), torch.maximum(highest, losses[query])
    assert moves > 200 and (highest > losses[0] + 0.1).all(), "it climbs"


def papers_bump(side):
    """The update of equation 2 of arXiv 1912.00049, cell by cell: two hills of opposite sign, of unit norm together."""

    def hill(height, width):
        middle = height // 2
        return [
            [
                sum(1 / (middle + 1 - k) ** 2 for k in range(middle - max(abs(r - middle), abs(s - width // 2)) + 1))
                for s in range(width)
            ]
            for r in range(height)
        ]

    left, right = torch.tensor(hill(side, side // 2)), -torch.tensor(hill(side, side - side // 2))
    bump = torch.cat([left, right], dim=1)
    return bump / bump.norm()


def test_squares_of_the_l2_ball_are_the_papers_update():
    """Algorithm 3, read off the queries: in one window every channel becomes a bump of either sign on top of what stood there.

    Bump and old perturbation weigh the same, channel by channel, and a second window gives its norm away, channel by channel.
    """
    generator, count = torch.Generator().manual_seed(0), 3
    images = 0.4 + 0.2 * torch.rand(count, 3, 16, 16, generator=generator)
    weight = torch.randn(count, 3, 16, 16, generator=generator)
    strategy, threat = Square(60), ThreatModel("l2", 0.5)
    logits_fn = Asked(lambda x: (x * weight).sum((1, 2, 3))[:, None])
    search(logits_fn, Climb(), images, threat, strategy, noise=Noise(torch.arange(count)))
    best, highest, sides = logits_fn.calls[0], logits_fn.answer(logits_fn.calls[0])[:, 0], set()
    for query in range(1, 60):
        x = logits_fn.calls[query]
        new, old = x - images, best - images
        torch.testing.assert_close(new.flatten(2).norm(dim=2), old.flatten(2).norm(dim=2), rtol=1e-4, atol=1e-5)
        side = max(3, strategy.side(query, 16, 16)) // 2 * 2 + 1
        sides.add(side)
        # (image, channel, window, side * side), for every place of the window
        now, before = (t.unfold(2, side, 1).unfold(3, side, 1).reshape(count, 3, -1, side * side) for t in (new, old))
        before = before / before.norm(dim=3, keepdim=True).clamp_min(1e-12)
        candidates = []
        for bump in (papers_bump(side), papers_bump(side).T):
            signed = torch.stack([before + bump.flatten(), before - bump.flatten()])
            signed = signed / signed.norm(dim=-1, keepdim=True).clamp_min(1e-12)
            error = (signed - now / now.norm(dim=3, keepdim=True).clamp_min(1e-12)).abs().amax(-1)
            candidates.append(error.amin(0).amax(1))  # the better sign of each channel, the worst channel
        assert (torch.stack(candidates).amin((0, 2)) < 1e-3).all(), f"query {query}: no window holds the update"
        better = logits_fn.answer(x)[:, 0] > highest
        best = torch.where(better[:, None, None, None], x, best)
        highest = torch.maximum(highest, logits_fn.answer(x)[:, 0])
    assert len(sides) > 2


@pytest.mark.parametrize("norm", ["linf", "l2"])
@pytest.mark.parametrize(("height", "width"), [(64, 40), (40, 64), (7, 7), (4, 4), (9, 3), (3, 9)])
def test_square_takes_pictures_of_any_shape(norm, height, width):
    """At native resolution pictures are as tall or wide as they come."""
    images = 0.4 + 0.2 * torch.rand(2, 3, height, width, generator=torch.Generator().manual_seed(0))
    threat, labels = ThreatModel(norm, 0.05), torch.zeros(2, dtype=torch.int64)
    logits_fn = Asked(lambda x: torch.stack([torch.ones(len(x)), x.mean((1, 2, 3))], dim=1))
    found, broken = ATTACKS["square"][0](logits_fn, images, labels, threat, 30, Noise(torch.arange(2)))
    assert not broken.any() and len(logits_fn.calls) == 30
    for x in logits_fn.calls:
        assert threat.contains(x, images).all() and (x != images).flatten(1).any(1).all()


class NoBackward(torch.autograd.Function):
    """The identity, of which nobody may ask a gradient."""

    @staticmethod
    def forward(context, x):
        return x.clone()

    @staticmethod
    def backward(context, gradient):
        raise AssertionError("a gradient was asked for")


@pytest.mark.parametrize("norm", ["linf", "l2"])
def test_square_needs_no_gradient_and_keeps_no_graph(norm):
    images = grey(5)
    _, answer = linear(3)
    labels, threat, noise = answer(images).argmax(1), ThreatModel(norm, 0.01), Noise(torch.arange(5))

    def logits_fn(x):
        modes.append((torch.is_grad_enabled(), x.requires_grad))
        return answer(NoBackward.apply(x))

    modes = []
    with torch.enable_grad():
        ATTACKS["square"][0](logits_fn, images, labels, threat, 20, noise)
    assert modes and set(modes) == {(False, False)}
    for name in GRADIENTS:
        with pytest.raises(AssertionError, match="a gradient was asked for"):
            ATTACKS[name][0](logits_fn, images, labels, threat, 20, noise)


@pytest.mark.parametrize("norm", ["linf", "l2"])
def test_square_breaks_what_hides_its_gradient(norm):
    """Rounded pixels have none, so whoever follows gradients stays where chance put it: robust to PGD, and yet not robust."""
    images = grey(12, side=12)
    way = torch.randn(12, 12, generator=torch.Generator().manual_seed(6)).repeat(3, 1, 1)

    def logits_fn(x):
        score = (((20 * x).round() / 20 - 0.5) * way).sum((1, 2, 3))
        return torch.stack([score, torch.zeros_like(score)], dim=1)

    labels, noise = logits_fn(images).argmax(1), Noise(torch.arange(12))
    x = images.clone().requires_grad_(True)
    assert not torch.autograd.grad(logits_fn(x).sum(), x)[0].any()
    threat = ThreatModel(norm, 0.08 if norm == "linf" else 2.0)
    broken = {name: ATTACKS[name][0](logits_fn, images, labels, threat, 60, noise)[1] for name in NAMES}
    assert broken["square"].sum() > 9
    for name in GRADIENTS:
        assert broken[name].sum() < 4 and not (broken[name] & ~broken["square"]).any()


# --- several in turn, and goals ---------------------------------------------------------------------------------------------


def test_attacks_in_turn_break_what_any_part_breaks_of_what_stands():
    """Parts that break by a list, so that nothing is left to chance: who was shown what, and what comes back."""
    images, keys = grey(8), torch.arange(8) * 11 + 5
    lists, shown = ({0, 3}, {3, 4, 5}, set(), {0, 5, 6}), []

    def part(number):
        def attack(x, rows, noise):
            assert torch.equal(x, images[rows]) and torch.equal(noise.image_ids, keys[rows]) and noise.seed == 9
            shown.append((number, rows.tolist(), noise.round))
            return x + 0.001 * (number + 1), torch.tensor([row in lists[number] for row in rows.tolist()])

        return attack

    found, who = worst_case([part(n) for n in range(4)], images, Noise(keys, 9, round=2))
    assert who.tolist() == [0, -1, -1, 0, 1, 1, 3, -1]
    assert [rows for _, rows, _ in shown] == [list(range(8)), [1, 2, 4, 5, 6, 7], [1, 2, 6, 7], [1, 2, 6, 7]]
    by = torch.tensor([1, 4, 4, 1, 2, 2, 4, 4])  # who broke it, or came last
    torch.testing.assert_close(found, images + 0.001 * by[:, None, None, None])
    assert shown[0][2] == 2 and len({draw for _, _, draw in shown}) == 4, (
        "each part draws noise of its own, the first the given"
    )


def test_attacks_in_turn_end_when_nothing_stands():
    def refuse(x, rows, noise):
        raise AssertionError("all are broken")

    images = grey(3)
    all_broken = lambda x, rows, noise: (x, torch.ones(len(x), dtype=torch.bool))  # noqa: E731
    found, who = worst_case([all_broken, refuse], images, Noise(torch.arange(3)))
    assert who.tolist() == [0, 0, 0] and torch.equal(found, images)
    none = Noise(torch.empty(0, dtype=torch.int64))
    assert worst_case([refuse], images[:0], none)[1].shape == (0,)


@pytest.mark.parametrize("strategy", [PGD(6, 0.02), APGD(6)])
def test_a_chosen_answer_is_what_the_search_is_for(trained, batch, strategy):
    """Broken is the answer that was chosen, not any wrong one; and pictures that have it already are done before they begin."""
    images, labels, threat = batch["images"], batch["labels"], ThreatModel("linf", "20/255")
    targets = (labels + torch.arange(len(labels)) // len(CLASSES)) % len(CLASSES)
    logits_fn = Asked(lambda x: trained.classify(x).logits)
    with frozen(trained):
        found, broken = search(
            logits_fn, TargetReached(targets, cross_entropy), images, threat, strategy, noise=Noise(batch["image_ids"])
        )
    with torch.no_grad():
        before, after = (trained.classify(x).logits for x in (images, found))
    assert torch.equal(after.argmax(1) == targets, broken) and threat.contains(found, images).all()
    assert ((after.argmax(1) != labels) & ~broken).any(), "wrong, but not as chosen"
    already = targets == labels
    assert broken[already].all() and 0 < broken[~already].sum() < (~already).sum()
    assert len(logits_fn.calls[1]) == (~already).sum()
    p, q = (z.log_softmax(1).gather(1, targets[:, None])[:, 0][~already] for z in (before, after))
    assert (q > p).float().mean() > 0.9


@pytest.mark.parametrize("goal", ["wrong", "towards", "chosen"])
def test_a_goal_keeps_to_the_rows_that_it_is_asked_about(goal):
    """The logits are of the standing images only, the labels of all: each row must find its own."""
    generator = torch.Generator().manual_seed(7)
    logits, rows = torch.randn(9, 5, generator=generator), torch.tensor([1, 4, 7])
    labels, targets = torch.arange(9) % 5, (torch.arange(9) * 2 + 1) % 5
    chosen = {
        "wrong": Misclassification(labels, margin),
        "towards": TargetedMisclassification(labels, targets),
        "chosen": TargetReached(targets, cross_entropy),
    }[goal]
    everything = torch.arange(9)
    torch.testing.assert_close(chosen.loss(logits[rows], rows), chosen.loss(logits, everything)[rows])
    assert torch.equal(chosen.reached(logits[rows], rows), chosen.reached(logits, everything)[rows])
    answers = logits.argmax(1)
    assert torch.equal(
        chosen.reached(logits, everything), answers == targets if goal == "chosen" else answers != labels
    )
    if goal == "chosen":
        assert torch.allclose(chosen.loss(logits, everything), -F.cross_entropy(logits, targets, reduction="none"))
