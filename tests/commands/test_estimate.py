"""A forecast is the arithmetic of what was measured, touches nothing, and is said at the start of training.

That it comes true is measured in docs/performance.md.
"""

from types import SimpleNamespace

import pytest
import torch
from conftest import gpd_schedule, make_images, make_trainer, write_image_folder
from transformers import TrainerControl, TrainerState, TrainingArguments

from hpt_hf.commands.estimate import Cost, main, predict
from hpt_hf.commands.parser import parse
from hpt_hf.commands.train import RECIPE, run
from hpt_hf.training import timing as stopwatch
from hpt_hf.training.timing import Stopwatch
from hpt_hf.utils import duration, peak_memory


def test_durations_are_said_in_two_units():
    said = [duration(seconds) for seconds in (0, 0.4, 59.6, 95, 3600, 3661, 90_061, 172_800)]
    assert said == ["0 s", "0 s", "1 min", "1 min 35 s", "1 h", "1 h 1 min", "1 d 1 h", "2 d"]


@pytest.fixture
def clock(monkeypatch):
    """Time that passes when it is told to."""
    clock = SimpleNamespace(now=100.0)
    monkeypatch.setattr(stopwatch.time, "perf_counter", lambda: clock.now)
    return clock


def watched(**steps) -> Stopwatch:
    return Stopwatch(gpd_schedule(**steps), torch.device("cpu"))


def walk(watch, clock, seconds, *, saves=(), first=0):
    """Steps of the given lengths; after some of them a checkpoint of 1,000 seconds."""
    args, control = TrainingArguments(use_cpu=True), TrainerControl()
    state = TrainerState(global_step=first, is_world_process_zero=True)
    watch.on_train_begin(args, state, control)
    for length in seconds:
        clock.now += length
        state.global_step += 1
        watch.on_step_end(args, state, control)
        if state.global_step in saves:
            clock.now += 1000
            watch.on_save(args, state, control)


def test_each_phase_has_its_own_pace_and_one_that_is_not_reached_yet_that_of_the_one_before(clock):
    watch = watched(warm_up_steps=6, steps=20)
    walk(watch, clock, [50, 9, 9, 2, 2, 2] + [30, 9, 9, 4, 4, 4, 4], saves=(4, 8))
    assert watch.seconds(0) == 2 and watch.seconds(1) == 4 and watch.saving == 1000, "checkpoints are not steps"
    assert watch.remaining(0) == 6 * 2 + 20 * 4 and watch.remaining(13) == 13 * 4 and watch.remaining(26) == 0
    watch = watched(warm_up_steps=50, steps=100)
    with pytest.raises(ValueError, match="no step of phase 0 was timed"):
        watch.seconds(0)
    walk(watch, clock, [9, 9, 9, 2, 2])
    assert watch.remaining(5) == (45 + 100) * 2


def test_a_resumed_run_knows_only_what_it_has_seen(clock):
    watch = watched(warm_up_steps=6, steps=20)
    walk(watch, clock, [9, 9, 9, 5, 5], first=10)
    assert watch.seconds(1) == 5 and watch.remaining(15) == 11 * 5


def test_the_run_is_announced_once(clock, capsys):
    watch = watched(warm_up_steps=50, steps=1000)
    walk(watch, clock, [9] * 3 + [2.0] * 30)
    said, rest = capsys.readouterr().err, (1050 - 13) * 2
    assert said.count("to go") == 1 and f"{duration(rest)} to go" in said
    assert "1037 steps of 2 s; 0.576 process-hours" in said


def test_training_says_when_it_will_be_over(tmp_path, student, proxy, capsys):
    make_trainer(tmp_path, student, gpd_schedule(warm_up_steps=8, steps=12), proxy=proxy, num_train_epochs=4).train()
    said = [line for line in capsys.readouterr().err.splitlines() if "to go, until" in line]
    assert len(said) == 1 and "7 steps of" in said[0] and "GiB of memory a process" in said[0]


def test_a_cost_adds_up_and_counts_every_process():
    cost = Cost((("preparing", 1, 10.0), ("a step of hpt", 1000, 3.59)), 4, "cuda", 5 * 2**30, 2**29)
    said = str(cost)
    assert "1 h = 1 hours on 4 processes, 4 GPU-hours; 5.0 GiB of memory each, 0.50 GiB on disk" in said
    assert "| a step of hpt" in said and "1,000" in said


@pytest.fixture(scope="module")
def flags(tmp_path_factory, student_path, proxy_path):
    data = write_image_folder(tmp_path_factory.mktemp("cost") / "data", make_images(40))
    line = f"--method hpt_gpd --dataset {data} --model {student_path} --proxy {proxy_path} --use_cpu true"
    line += " --per_device_train_batch_size 8 --num_train_epochs 30 --ga_epochs 10 --learning_rate 1e-4"
    return f"{line} --disable_tqdm true"


def test_a_prediction_knows_the_whole_run_and_leaves_nothing(flags, tmp_path):
    out = tmp_path / "never"
    more = f"--held_out 0.2 --save_strategy steps --save_steps 25 --save_total_limit 2 --output_dir {out}"
    recipe = parse(RECIPE, f"{flags} {more}".split())
    cost = predict(*recipe, steps=5)
    counts = {"preparing": 1, "a step of ga": 40, "a step of hpt": 120, "a checkpoint": 6, "the held-out slice": 2}
    assert {what: count for what, count, _ in cost.parts} == counts | {"the export": 1}
    assert all(each > 0 for _, _, each in cost.parts) and cost.processes == 1 and cost.device == "cpu"
    assert cost.memory == pytest.approx(peak_memory(torch.device("cpu")), rel=0.01) and cost.memory > 2**27
    assert not out.exists() and recipe[2].output_dir == str(out) and recipe[2].save_steps == 25


def test_a_probe_does_not_outlast_a_short_run_and_the_disk_is_what_the_run_leaves(flags, tmp_path):
    more = f"--max_steps 4 --save_strategy steps --save_steps 2 --output_dir {tmp_path / 'run'}"
    recipe = parse(RECIPE, f"{flags} {more}".split())
    cost = predict(*recipe, steps=500)
    assert [count for what, count, _ in cost.parts if what.startswith("a step")] == [1, 3]
    run(*recipe)
    left = sum(f.stat().st_size for f in (tmp_path / "run").rglob("*") if f.is_file())
    assert cost.disk == pytest.approx(left, rel=0.05)


def test_the_command_prints_the_table(flags, tmp_path, capsys):
    main(f"{flags} --output_dir {tmp_path} --probe_steps 4 --max_steps 30".split())
    said = capsys.readouterr()
    assert "| a step of hpt" in said.out and "process-hours on cpu" in said.out and "to go" not in said.err
