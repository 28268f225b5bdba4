"""Proves that a forecast counts the passes of an evaluation, on a clock that a pass of one image moves by one."""

from __future__ import annotations

import pytest
from conftest import make_images, write_image_folder

from hpt_hf.attacks.suite import EvaluationAttack
from hpt_hf.attacks.threat_model import ThreatModel
from hpt_hf.commands import evaluate as command
from hpt_hf.evaluation import forecast as forecasts
from hpt_hf.evaluation.evaluator import evaluate
from hpt_hf.evaluation.forecast import forecast


@pytest.fixture
def clock(trained, monkeypatch):
    """Passes of single images so far."""
    passed, classify = [0], trained.classify

    def counted(images):
        passed[0] += len(images)
        return classify(images)

    monkeypatch.setattr(trained, "classify", counted)
    monkeypatch.setattr(forecasts.time, "perf_counter", lambda: passed[0])
    return passed


@pytest.mark.parametrize(
    ("name", "steps", "eps", "count", "probe"),
    [
        ("pgd", None, 16, 60, 12),
        ("cw", 100, 28, 60, 0),  # nearly all fall, late: the steps are small
        ("apgd-ce", None, 16, 150, 0),
        ("apgd-ce", None, 16, 20, 24),
        ("standard", None, 16, 60, 24),
    ],
)
def test_it_counts_the_passes_within_a_fifth(name, steps, eps, count, probe, trained, clock):
    images, attack = make_images(count), EvaluationAttack(ThreatModel("linf", f"{eps}/255"), name, steps)
    said = forecast(trained, images, attack, limit=None, probe=probe)
    before = clock[0]
    result = evaluate(trained, images, attack, name="m", probe=probe)
    assert 10 < result.robust < 90, "else there is nothing to foretell"
    assert said == pytest.approx(clock[0] - before, rel=0.2)


def test_the_command_says_it_and_asked_for_no_more_does_no_more(paths, tmp_path, capsys):
    data, out = write_image_folder(tmp_path / "images", make_images(10)), tmp_path / "out"
    flags = ["--model", paths[0], "--dataset", str(data), "--output_dir", str(out), "--eps", "1/255", "2/255"]
    command.main([*flags, "--estimate", "true"])
    assert "2 evaluations: about " in capsys.readouterr().err and not out.exists()
