"""Proves that the metric for `evaluate` is the plain share, in pieces, by path and over processes too."""

from __future__ import annotations

import json
import subprocess
import sys

import evaluate
import numpy as np
import pytest

import hpt_hf.evaluation.metric
from hpt_hf.evaluation.metric import RobustAccuracy
from hpt_hf.evaluation.statistics import wilson

SEEDS = range(4)


def answers(seed: int, n: int = 37, classes: int = 4) -> dict[str, np.ndarray]:
    """Predictions that are right more often than by chance; some images are right under attack only."""
    rng = np.random.default_rng(seed)
    labels = rng.integers(0, classes, n)
    clean, attacked = (np.where(rng.random(n) < share, labels, rng.integers(0, classes, n)) for share in (0.7, 0.4))
    return {"predictions": clean, "adv_predictions": attacked, "references": labels}


def plain(predictions, adv_predictions, references) -> dict:
    """Image by image."""
    rows = list(zip(predictions, adv_predictions, references, strict=True))
    right, robust = sum(p == y for p, _, y in rows), sum(p == y and a == y for p, a, y in rows)
    n = len(rows)
    groups = {int(y): [row for row in rows if row[2] == y] for y in references}
    return {
        "n": n,
        "n_clean": right,
        "n_robust": robust,
        "per_class": {
            y: (len(own), sum(p == y for p, _, _ in own), sum(p == a == y for p, a, _ in own))
            for y, own in groups.items()
        },
        "clean": pytest.approx(100 * right / n),
        "clean_interval": wilson(right, n),
        "robust": pytest.approx(100 * robust / n),
        "interval": wilson(robust, n),
    }


@pytest.fixture
def metric(tmp_path):
    return RobustAccuracy(cache_dir=str(tmp_path))


@pytest.mark.parametrize("seed", SEEDS)
def test_it_is_the_share_of_right_answers(seed, metric):
    asked = answers(seed)
    found = metric.compute(**asked)
    assert found == plain(**asked) and 0 < found["robust"] < found["clean"] < 100
    assert found["interval"][0] < found["robust"] < found["interval"][1]


@pytest.mark.parametrize("sizes", [(37,), (1,) * 37, (10, 0, 20, 7)], ids=len)
def test_batches_in_pieces_are_all_at_once(sizes, metric, tmp_path):
    asked = answers(1)
    for end, size in zip(np.cumsum(sizes), sizes, strict=True):
        metric.add_batch(**{k: v[end - size : end] for k, v in asked.items()})
    assert metric.compute() == RobustAccuracy(cache_dir=str(tmp_path / "other")).compute(**asked)


def test_computing_starts_afresh(metric):
    for seed in SEEDS:
        asked = answers(seed, n=20 + seed)
        assert metric.compute(**asked) == plain(**asked)


def test_lists_arrays_and_tensors_are_the_same(metric):
    import torch

    asked = answers(2)
    found = [metric.compute(**{k: kind(v) for k, v in asked.items()}) for kind in (list, np.asarray, torch.from_numpy)]
    assert found[0] == found[1] == found[2] == plain(**asked)


@pytest.mark.parametrize("seed", SEEDS)
def test_robust_never_exceeds_clean(seed, metric):
    """Also where the attack makes more answers right than it makes wrong."""
    asked = answers(seed)
    asked["predictions"], asked["adv_predictions"] = asked["adv_predictions"], asked["references"]
    found = metric.compute(**asked)
    assert found["robust"] == found["clean"] < 100


def test_it_is_loaded_by_path_without_a_network(tmp_path, monkeypatch):
    monkeypatch.setattr(evaluate.config, "HF_MODULES_CACHE", str(tmp_path / "modules"), raising=False)
    found = evaluate.load(hpt_hf.evaluation.metric.__file__, cache_dir=str(tmp_path))
    assert type(found) is not RobustAccuracy and isinstance(found, evaluate.Metric)
    assert found.compute(**answers(0)) == plain(**answers(0))


@pytest.mark.parametrize("short", ["predictions", "adv_predictions", "references"])
def test_wrong_lengths_nothing_and_one_of_the_three_missing_are_errors(short, metric):
    asked = answers(0)
    with pytest.raises(ValueError, match=r"Mismatch in the number of .*3[67]"):
        metric.compute(**asked | {short: asked[short][:-1]})
    with pytest.raises(ValueError, match="adv_predictions"):
        metric.compute(predictions=asked["predictions"], references=asked["references"])
    with pytest.raises(ValueError, match="no images were added"):
        metric.compute(**{k: v[:0] for k, v in asked.items()})


@pytest.mark.multiprocess
def test_rank_0_gets_the_result_over_all_processes_and_the_others_none(tmp_path):
    """Two real processes, of which each sees every second batch, and the second fewer."""
    ranks = [
        subprocess.Popen([sys.executable, __file__, str(tmp_path), str(rank), "2"], stdout=subprocess.PIPE, text=True)
        for rank in (0, 1)
    ]
    found = [json.loads(rank.communicate(timeout=120)[0]) for rank in ranks]
    assert [rank.returncode for rank in ranks] == [0, 0]
    whole = plain(**answers(3))
    assert found[1] is None and all(found[0][k] == whole[k] for k in ("n", "n_clean", "n_robust", "clean", "robust"))


def worker(folder: str, rank: int, world: int) -> None:
    metric = RobustAccuracy(cache_dir=folder, num_process=world, process_id=rank, experiment_id="two")
    asked = answers(3)
    for number, start in enumerate(range(0, 37, 5)):
        if number % world == rank:
            metric.add_batch(**{k: v[start : start + 5] for k, v in asked.items()})
    print(json.dumps(metric.compute()))


if __name__ == "__main__":
    worker(sys.argv[1], *map(int, sys.argv[2:]))
