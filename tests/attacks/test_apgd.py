"""APGD asks about the points of the paper's algorithm, written out here once more on Python floats."""

import math
from fractions import Fraction

import pytest
import torch
from conftest import Recorder, grey

from hpt_hf.attacks.apgd import APGD
from hpt_hf.attacks.engine import Criterion, run_attack
from hpt_hf.attacks.noise import Noise
from hpt_hf.attacks.threat_model import ThreatModel

# Never reached: what the classifier says is the loss itself.
CLIMB = Criterion(lambda logits, rows: logits[:, 0], lambda logits, rows: torch.zeros(len(logits), dtype=torch.bool))


@pytest.mark.parametrize("steps", [1, 2, 5, 20, 29, 100, 1000])
def test_checkpoints_are_the_papers(steps):
    """p(j+1) = p(j) + max(p(j) - p(j-1) - 0.03, 0.06) from 0 and 0.22, in exact fractions of the number of steps."""
    marks = [Fraction(0), Fraction(22, 100)]
    while marks[-1] <= 1:
        marks.append(marks[-1] + max(marks[-1] - marks[-2] - Fraction(3, 100), Fraction(6, 100)))
    found = APGD(ThreatModel(), steps).checkpoints()
    if steps % 100 == 0:
        assert list(found) == [math.ceil(mark * steps) for mark in marks][1:-1]
    assert 1 <= min(found) <= math.ceil(0.22 * steps) and max(found) <= steps, "few steps have some too"
    assert list(found.values()) == [b - a for a, b in zip((0, *found), found, strict=False)]


def written_out_apgd(loss, gradient, start, project, unit, radius, steps):
    """The points that APGD asks about, for one image on Python floats, as the paper states it."""
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
    """Images in one batch on hills of their own, some with the top inside the ball: each as if it were alone."""
    count, radius, happened, generator = 8, 0.1, set(), torch.Generator().manual_seed(3)
    images, shift = grey(count, side=2), torch.rand(count, 12, generator=generator) - 0.5
    bend = 0.3 + torch.rand(count, 12, generator=generator)
    for norm, size in (("linf", 0.2), ("l2", 0.1)):
        top = images.flatten(1) + size * shift * torch.tensor([0.5, 1, 2, 4] * 2)[:, None]
        threat = ThreatModel(norm, radius)
        queries = Recorder(lambda x, top=top: -(bend * (x.flatten(1) - top) ** 2).sum(1, keepdim=True))
        run_attack(queries, images, APGD(threat, steps), noise=Noise(torch.arange(count), round=2), criterion=CLIMB)
        for i in range(count):
            centre, peak, weight = (t[i].double().flatten().tolist() for t in (images, top, bend))

            def project(x, norm=norm, centre=centre):
                away = [a - c for a, c in zip(x, centre, strict=True)]
                if norm == "linf":
                    return [c + min(max(d, -radius), radius) for c, d in zip(centre, away, strict=True)]
                return [c + d * min(1, radius / math.hypot(*away)) for c, d in zip(centre, away, strict=True)]

            expected, reasons = written_out_apgd(
                lambda x, p=peak, w=weight: -sum(b * (a - t) ** 2 for a, t, b in zip(x, p, w, strict=True)),
                lambda x, p=peak, w=weight: [-2 * b * (a - t) for a, t, b in zip(x, p, w, strict=True)],
                queries.calls[0][i].double().flatten().tolist(),
                project,
                lambda g, norm=norm: [math.copysign(1, v) if norm == "linf" else v / math.hypot(*g) for v in g],
                radius,
                steps,
            )
            got = torch.stack([call[i].flatten() for call in queries.calls]).double()
            # The last steps are of about 1e-3: one that went another way would show.
            torch.testing.assert_close(got, torch.tensor(expected, dtype=torch.float64), rtol=0, atol=1e-4)
            happened |= set(reasons)
    assert happened == turns | {(False, False)}, "each way of being stuck, and of not being"
