"""Proves that the schedule is the right function of the step. What comes of it: training/test_trainer.py."""

from __future__ import annotations

import math

import pytest
from conftest import gpd_schedule

from hpt_hf.method.objectives import OBJECTIVES
from hpt_hf.method.schedule import Phase, Schedule

HPT, GA = OBJECTIVES["hpt"], OBJECTIVES["ga"]


def phase(steps, learning_rate, warmup_steps=0, decay="cosine"):
    return Phase(HPT, steps, learning_rate, warmup_steps, decay=decay)


HALF = math.sqrt(0.5) / 2  # cos(45 degrees) / 2


@pytest.mark.parametrize(
    ("one", "rates"),
    [
        (phase(4, 2.0), [2, 1 + 2 * HALF, 1, 1 - 2 * HALF, 0]),
        (phase(7, 0.3, 3), [0.1, 0.2, 0.3, 0.3, 0.3 * (0.5 + HALF), 0.15, 0.3 * (0.5 - HALF), 0]),
        (phase(6, 0.4, 2, "linear"), [0.2, 0.4, 0.4, 0.3, 0.2, 0.1, 0]),
        (phase(4, 0.4, 2, "constant"), [0.2, 0.4, 0.4, 0.4, 0.4]),
    ],
)
def test_rates_of_a_phase_written_out(one, rates):
    assert [one.rate(s) for s in range(len(rates))] == pytest.approx(rates, abs=1e-12)


@pytest.mark.parametrize(("steps", "warmup"), [(1, 0), (1, 1), (10, 0), (10, 3), (10, 10), (200, 20)])
def test_rate_climbs_to_its_peak_and_falls_and_no_step_has_rate_0(steps, warmup):
    rates = [phase(steps, 0.7, warmup).rate(s) for s in range(steps)]
    assert rates[:warmup] == sorted(set(rates[:warmup])) and rates[warmup:] == sorted(set(rates[warmup:]))[::-1]
    assert max(rates) == pytest.approx(0.7) and min(rates) > 0


def test_each_phase_has_its_own_curve():
    schedule = gpd_schedule(warm_up_steps=4, steps=6, warm_up_learning_rate=0.01, learning_rate=5.0, warmup_steps=2)
    first, second = schedule.phases
    assert schedule.total_steps == 10
    # Steps past the end belong to the last phase.
    assert [schedule.phase(s).objective.name for s in range(12)] == ["ga"] * 4 + ["hpt"] * 8
    rates = [first.rate(s) for s in range(4)] + [second.rate(s) for s in range(6)]
    assert [schedule.learning_rate(s) for s in range(10)] == rates
    assert rates[0] == 0.01 and rates[4] == 2.5 and rates[5] == 5.0


@pytest.mark.parametrize(
    ("warm_up", "steps", "interval", "averages", "pulls"),
    [
        (5, 7, 2, [1, 3, 4], [7, 9, 11]),  # the last average is that of the phase's short interval
        (4, 6, 2, [1, 3], [6, 8]),  # not at 4, the first interval of the second stage; not at 10, after the last
        (6, 4, 1, [0, 1, 2, 3, 4, 5], [7, 8, 9]),
        (3, 4, 100, [2], []),  # an interval longer than both: one average, no pull
    ],
)
def test_events_written_out(warm_up, steps, interval, averages, pulls):
    schedule = gpd_schedule(warm_up_steps=warm_up, steps=steps, interval=interval)
    beyond = range(warm_up + steps + 2 * interval)
    assert [s for s in beyond if schedule.averages_after(s)] == averages
    assert [s for s in beyond if schedule.restarts_at(s)] == [warm_up]
    assert [s for s in beyond if schedule.pulls_at(s)] == pulls
    assert not any(gpd_schedule(warm_up_steps=warm_up, restart=False).restarts_at(s) for s in beyond)
    plain = Schedule.single(HPT, steps=8, learning_rate=1.0)
    assert not any(f(s) for f in (plain.restarts_at, plain.pulls_at, plain.averages_after) for s in beyond)


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"steps": 0}, "steps: got 0, expected at least 1"),
        *(({"learning_rate": rate}, "expected a positive number") for rate in (0.0, math.nan, math.inf)),
        ({"warmup_steps": 11}, "warmup_steps: got 11, expected 0 to 10"),
        ({"warmup_steps": -1}, "warmup_steps: got -1"),
        ({"decay": "cosinus"}, "decay: got cosinus, expected one of"),
        ({"ema": 1.1}, "ema: got 1.1, expected a ratio"),
        ({"pull": math.nan}, "pull: got nan, expected a ratio"),
    ],
)
def test_a_phase_that_cannot_be_run_is_refused(changes, says):
    with pytest.raises(ValueError, match=f"phase hpt: .*{says}"):
        Phase(HPT, **({"steps": 10, "learning_rate": 1.0} | changes))


def test_a_schedule_that_cannot_be_run_is_refused():
    pulled, too_late = Phase(HPT, 4, 1.0, pull=0.5), Phase(HPT, 4, 1.0, pull=0.5, ema=0.9)
    for phases in ((too_late,), (pulled, Phase(GA, 4, 1.0, ema=0.9))):
        with pytest.raises(ValueError, match="no phase before it has an ema"):
            Schedule(phases)
    for phases, says in (((), "at least one phase"), ((phase(1, 1.0),), "interval: got 0")):
        with pytest.raises(ValueError, match=says):
            Schedule(phases, interval=0)
