"""Proves that the schedule is the right function of the step, and that GPDCallback does what the paper says."""

from __future__ import annotations

import math
from types import SimpleNamespace

import pytest
import torch
from conftest import gpd_schedule

from hpt_hf.method.gpd import PIVOT_FILE, GPDCallback
from hpt_hf.method.objectives import OBJECTIVES
from hpt_hf.method.schedule import Phase, Schedule

HPT, GA = OBJECTIVES["hpt"], OBJECTIVES["ga"]


def phase(steps, learning_rate, warmup_steps=0, decay="cosine"):
    return Phase(HPT, steps, learning_rate, warmup_steps, decay=decay)


# --- pure functions


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
        *(({"learning_rate": rate}, "expected a positive number") for rate in (-1.0, 0.0, math.nan, math.inf)),
        ({"epochs": 0}, "epochs: got 0, expected a positive number"),
        ({"warmup_steps": 11}, "warmup_steps: got 11, expected 0 to 10"),
        ({"warmup_steps": -1}, "warmup_steps: got -1"),
        ({"decay": "cosinus"}, "decay: got cosinus, expected one of"),
        ({"ema": 1.1}, "ema: got 1.1, expected a ratio"),
        ({"pull": -0.1}, "pull: got -0.1, expected a ratio"),
        ({"pull": math.nan}, "pull: got nan, expected a ratio"),
    ],
)
def test_a_phase_that_cannot_be_run_is_refused(changes, says):
    with pytest.raises(ValueError, match=f"phase hpt: .*{says}"):
        Phase(HPT, **({"steps": 10, "learning_rate": 1.0} | changes))


@pytest.mark.parametrize(
    ("phases", "interval", "says"),
    [
        ((), 1, "at least one phase"),
        ((phase(1, 1.0),), 0, "interval: got 0"),
        ((Phase(HPT, 4, 1.0, pull=0.5),), 1, "hpt is pulled to a pivot"),
        ((Phase(HPT, 4, 1.0, pull=0.5, ema=0.9),), 1, "no phase before it has an ema"),  # its own comes too late
        ((Phase(HPT, 4, 1.0, pull=0.5), Phase(GA, 4, 1.0, ema=0.9)), 1, "no phase before it has an ema"),
    ],
)
def test_a_schedule_that_cannot_be_run_is_refused(phases, interval, says):
    with pytest.raises(ValueError, match=says):
        Schedule(phases, interval)


# --- the callback, on a student that "trains" by known steps


class Toy(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.a = torch.nn.Parameter(torch.tensor([1.0, 2.0]))
        self.b = torch.nn.Parameter(torch.tensor([-4.0]))
        self.frozen = torch.nn.Parameter(torch.tensor([7.0]), requires_grad=False)


def drive(callback, model, optimizer, start: int, end: int, move) -> list[dict]:
    """Walk the steps as the Trainer does, `move(step)` at a time. Returns the weights each step began with."""
    begun = []
    for step in range(start, end):
        callback.on_step_begin(None, SimpleNamespace(global_step=step), None, optimizer=optimizer)
        begun.append({n: p.detach().clone() for n, p in model.named_parameters()})
        with torch.no_grad():
            for p in (model.a, model.b):
                optimizer.state[p] = {"momentum_buffer": torch.ones_like(p)}
                p.add_(move(step))
        callback.on_step_end(None, SimpleNamespace(global_step=step + 1), None)
    return begun


def toy(schedule):
    model = Toy()
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=1.0, momentum=0.9)
    return model, optimizer, GPDCallback(schedule, model)


def test_average_restart_and_pull_equal_the_recurrences_by_hand():
    model, optimizer, callback = toy(gpd_schedule(warm_up_steps=5, steps=5, interval=2, ema=0.75, pull=0.25))
    begun = drive(callback, model, optimizer, 0, 10, lambda step: step + 1.0)
    # Warm-up: after steps 0..4 the first weight, 1, has grown by 1, 3, 6, 10, 15; averages after steps 1, 3 and 4.
    ema = 1.0
    for theta in (1 + 3, 1 + 10, 1 + 15):
        ema = 0.75 * ema + 0.25 * theta
    assert callback.average["a"][0].item() == pytest.approx(ema, abs=1e-6)
    assert callback.average["b"].item() == pytest.approx(ema - 5, abs=1e-6), "the same moves from -4 instead of 1"
    # Second stage: from vanilla, + 6, + 7, pull, + 8, + 9, pull, + 10.
    theta = 0.25 * (1 + 6 + 7) + 0.75 * ema
    assert begun[7]["a"][0].item() == pytest.approx(theta, abs=1e-6)
    theta = 0.25 * (theta + 8 + 9) + 0.75 * ema
    assert begun[9]["a"][0].item() == pytest.approx(theta, abs=1e-6)
    assert model.a[0].item() == pytest.approx(theta + 10, abs=1e-6), "no pull after the last step"
    assert model.frozen.item() == 7.0 and "frozen" not in callback.average


def test_restart_gives_exactly_the_vanilla_weights_and_no_momentum():
    model, optimizer, callback = toy(gpd_schedule())
    drive(callback, model, optimizer, 0, 5, lambda step: 0.1 * (step + 1))
    assert len(optimizer.state) == 2 and not torch.equal(model.a, Toy().a), "or the rest proves nothing"
    callback.on_step_begin(None, SimpleNamespace(global_step=5), None, optimizer=optimizer)
    assert all(torch.equal(p, q) for p, q in zip(model.parameters(), Toy().parameters(), strict=True))
    assert len(optimizer.state) == 0


def test_pull_keeps_momentum_and_continuing_keeps_the_weights():
    model, optimizer, callback = toy(gpd_schedule(restart=False))
    begun = drive(callback, model, optimizer, 0, 7, lambda step: 1.0)
    assert begun[5]["a"].tolist() == [6.0, 7.0]
    state = {p: optimizer.state[p]["momentum_buffer"] for p in (model.a, model.b)}
    callback.on_step_begin(None, SimpleNamespace(global_step=7), None, optimizer=optimizer)
    assert model.a[0].item() == pytest.approx(0.5 * 8 + 0.5 * callback.average["a"][0].item())
    assert all(optimizer.state[p]["momentum_buffer"] is buffer for p, buffer in state.items())


@pytest.mark.parametrize("cut", range(1, 10))
def test_a_callback_loaded_at_any_step_goes_on_as_if_never_stopped(cut, tmp_path):
    def move(step):
        return math.sin(step + 1.0)

    whole, optimizer, callback = toy(gpd_schedule())
    drive(callback, whole, optimizer, 0, 10, move)
    model, optimizer, first = toy(gpd_schedule())
    drive(first, model, optimizer, 0, cut, move)
    first.save(tmp_path)
    resumed, optimizer, second = toy(gpd_schedule())
    resumed.load_state_dict(model.state_dict())
    second.load(tmp_path)
    drive(second, resumed, optimizer, cut, 10, move)
    assert all(torch.equal(p, q) for p, q in zip(resumed.parameters(), whole.parameters(), strict=True))
    assert all(torch.equal(second.average[n], callback.average[n]) for n in ("a", "b"))


@pytest.mark.parametrize(
    ("schedule", "zero", "files"),
    [
        (gpd_schedule(), False, []),
        (Schedule.single(HPT, steps=8, learning_rate=1.0), True, []),
        (gpd_schedule(), True, [PIVOT_FILE]),
    ],
)
def test_only_the_first_process_saves_and_only_where_there_is_a_pivot(schedule, zero, files, tmp_path):
    (tmp_path / "checkpoint-3").mkdir()
    state = SimpleNamespace(global_step=3, is_world_process_zero=zero)
    GPDCallback(schedule, Toy()).on_save(SimpleNamespace(output_dir=str(tmp_path)), state, None)
    assert [p.name for p in (tmp_path / "checkpoint-3").iterdir()] == files
