"""Square asks about the points of the paper's random search, read off its queries, and needs no gradient."""

import math

import pytest
import torch
from conftest import Recorder, grey, linear

from hpt_hf.attacks.engine import Criterion, run_attack
from hpt_hf.attacks.noise import Noise
from hpt_hf.attacks.square import Square
from hpt_hf.attacks.suite import ATTACKS
from hpt_hf.attacks.threat_model import ThreatModel

NORMS = pytest.mark.parametrize("norm", ["linf", "l2"])
CLIMB = Criterion(lambda logits, rows: logits[:, 0], lambda logits, rows: torch.zeros(len(logits), dtype=torch.bool))


def test_the_side_of_the_squares_follows_the_papers_schedule():
    """Of 10,000 queries the covered share, 0.8 at first, halves after these; other numbers stretch them."""
    marks, threat = (10, 50, 200, 500, 1000, 2000, 4000, 6000, 8000), ThreatModel()
    full = Square(threat, 10_000)
    for halvings, (begin, end) in enumerate(zip((-1, *marks), (*marks, 9_999), strict=True)):
        expected = round(math.sqrt(0.8 / 2**halvings * 224 * 200))
        assert full.side(begin + 1, 224, 200) == full.side(end, 224, 200) == expected
    assert [Square(threat, 5000).side(q, 32, 32) for q in range(5000)] == [
        full.side(2 * q, 32, 32) for q in range(5000)
    ]
    assert full.side(9_999, 8, 8) == 1, "never less than a pixel"


def search(norm, eps, count, height, width):
    """Images, start and (number, query, best point before it) of 60 queries; the best is found again from outside."""
    generator = torch.Generator().manual_seed(0)
    images = 0.4 + 0.2 * torch.rand(count, 3, height, width, generator=generator)
    weight = torch.randn(count, 3, 1, 1, generator=generator) + 0.3 * torch.randn(images.shape, generator=generator)
    asked, threat = Recorder(lambda x: (x * weight).sum((1, 2, 3))[:, None]), ThreatModel(norm, eps)
    run_attack(asked, images, Square(threat, 60), noise=Noise(torch.arange(count)), criterion=CLIMB)
    assert len(asked.calls) == 60
    first = highest = asked.answer(asked.calls[0])
    best, steps = asked.calls[0], []
    for number, x in enumerate(asked.calls[1:], 1):
        steps.append((number, x, best))
        loss = asked.answer(x)
        best = torch.where((loss > highest)[..., None, None], x, best)
        highest = torch.maximum(highest, loss)
    assert (highest > first).all(), "it climbs"
    return images, asked.calls[0], steps


@NORMS
@pytest.mark.parametrize(("height", "width"), [(16, 16), (12, 20), (20, 12)])
def test_square_changes_windows_of_its_best_point_and_stays_on_the_ball(norm, height, width):
    images, start, steps = search(norm, 0.1, 6, height, width)
    strategy, moves, start = Square(ThreatModel(norm, 0.1), 60), 0, start - images
    if norm == "linf":
        assert torch.allclose(start, 0.1 * start.sign()[:, :, :1].expand_as(start), atol=1e-6), "columns of one sign"
        assert len(set(map(str, start.sign()[:, :, 0].flatten(0, 1).tolist()))) > 12, "of chance"
    for number, x, best in steps:
        torch.testing.assert_close(
            strategy.threat.distance(x, images).float(), torch.full((6,), 0.1), rtol=0, atol=1e-5
        )
        side = min(strategy.side(number, height, width), height, width)
        odd = min(max(3, side) // 2 * 2 + 1, (min(height, width) - 1) // 2 * 2 + 1)
        for change, delta in zip((x - best).abs() > 1e-5, x - images, strict=True):
            rows, columns = (change.any(0).any(d).nonzero()[:, 0] for d in (1, 0))
            moves += len(rows) > 0
            if norm == "l2":
                assert 0 < change.any(0).sum() <= 2 * odd * odd
            elif len(rows):  # or a square of the sign that stood there
                assert rows[-1] - rows[0] < side and columns[-1] - columns[0] < side
                inside = delta[:, rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1]
                one_sign = torch.isclose(inside, 0.1 * inside.sign()[:, :1, :1], atol=1e-6).flatten(1).all(1)
                assert one_sign[change.flatten(1).any(1)].all(), "a channel that changes has one in all the window"
    assert moves > 200


def papers_bump(side):
    """The update of equation 2 of arXiv 1912.00049, cell by cell: two hills of opposite sign, of unit norm."""

    def hill(height, width):
        middle = height // 2
        far = [[max(abs(r - middle), abs(s - width // 2)) for s in range(width)] for r in range(height)]
        return [[sum(1 / (middle + 1 - k) ** 2 for k in range(middle - d + 1)) for d in row] for row in far]

    bump = torch.cat([torch.tensor(hill(side, side // 2)), -torch.tensor(hill(side, side - side // 2))], dim=1)
    return bump / bump.norm()


def test_squares_of_the_l2_ball_are_the_papers_update():
    """Algorithm 3: in one window every channel becomes a bump of either sign on top of what stood there.

    Bump and old perturbation weigh the same, channel by channel, and a second window gives its norm away.
    """
    images, _, steps = search("l2", 0.5, 3, 16, 16)
    strategy, sides = Square(ThreatModel("l2", 0.5), 60), set()
    for number, x, best in steps:
        new, old = x - images, best - images
        torch.testing.assert_close(new.flatten(2).norm(dim=2), old.flatten(2).norm(dim=2), rtol=1e-4, atol=1e-5)
        side = max(3, strategy.side(number, 16, 16)) // 2 * 2 + 1
        sides.add(side)
        # (image, channel, window, side * side), for every place of the window
        now, before = (t.unfold(2, side, 1).unfold(3, side, 1).reshape(3, 3, -1, side * side) for t in (new, old))
        now, before = (t / t.norm(dim=3, keepdim=True).clamp_min(1e-12) for t in (now, before))
        errors = []
        for bump in (papers_bump(side), papers_bump(side).T):
            signed = torch.stack([before + bump.flatten(), before - bump.flatten()])
            signed = signed / signed.norm(dim=-1, keepdim=True).clamp_min(1e-12)
            errors.append((signed - now).abs().amax(-1).amin(0).amax(1))  # the better sign of the worst channel
        assert (torch.stack(errors).amin((0, 2)) < 1e-3).all(), f"query {number}: no window holds the update"
    assert len(sides) > 2


@NORMS
@pytest.mark.parametrize(("height", "width"), [(64, 40), (40, 64), (7, 7), (4, 4), (9, 3), (3, 9)])
def test_square_takes_images_of_any_shape(norm, height, width):
    """At native resolution images are as tall or wide as they come."""
    images = 0.4 + 0.2 * torch.rand(2, 3, height, width, generator=torch.Generator().manual_seed(0))
    threat, labels = ThreatModel(norm, 0.05), torch.zeros(2, dtype=torch.int64)
    logits_fn = Recorder(lambda x: torch.stack([torch.ones(len(x)), x.mean((1, 2, 3))], dim=1))
    assert not ATTACKS["square"][0](logits_fn, images, labels, threat, 30, Noise(torch.arange(2)))[1].any()
    assert len(logits_fn.calls) == 30
    for x in logits_fn.calls:
        assert threat.contains(x, images).all() and (x != images).flatten(1).any(1).all()


@NORMS
def test_square_asks_for_no_gradient_and_keeps_no_graph(norm):
    images, (_, answer), modes = grey(5), linear(3), set()
    logits_fn = lambda x: modes.add((torch.is_grad_enabled(), x.requires_grad)) or answer(x)  # noqa: E731
    labels, threat = answer(images).argmax(1), ThreatModel(norm, 0.01)
    with torch.enable_grad():
        ATTACKS["square"][0](logits_fn, images, labels, threat, 20, Noise(torch.arange(5)))
    assert modes == {(False, False)}
