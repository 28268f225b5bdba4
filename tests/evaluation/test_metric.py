"""Proves that the metric for `evaluate` is the plain share, in pieces and by path too."""

from __future__ import annotations

import evaluate
import numpy as np
import pytest
import torch

import hpt_hf.evaluation.metric
from hpt_hf.evaluation.metric import RobustAccuracy
from hpt_hf.evaluation.statistics import wilson


def answers(seed: int, n: int = 37, classes: int = 4) -> dict[str, np.ndarray]:
    """Predictions that are right more often than by chance; some images are right under attack only."""
    rng = np.random.default_rng(seed)
    labels = rng.integers(0, classes, n)
    clean, attacked = (np.where(rng.random(n) < share, labels, rng.integers(0, classes, n)) for share in (0.7, 0.4))
    return {"predictions": clean, "adv_predictions": attacked, "references": labels}


def plain(predictions, adv_predictions, references) -> dict:
    """Image by image."""
    per_class: dict = {}
    for p, a, y in zip(predictions, adv_predictions, references, strict=True):
        n, right, robust = per_class.get(y, (0, 0, 0))
        per_class[y] = (n + 1, right + (p == y), robust + (p == a == y))
    n, right, robust = (sum(counts) for counts in zip(*per_class.values(), strict=True))
    found = {"n": n, "n_clean": right, "n_robust": robust, "per_class": per_class}
    found |= {"clean": pytest.approx(100 * right / n), "clean_interval": wilson(right, n)}
    return found | {"robust": pytest.approx(100 * robust / n), "interval": wilson(robust, n)}


@pytest.fixture
def metric(tmp_path):
    return RobustAccuracy(cache_dir=str(tmp_path))


@pytest.mark.parametrize("kind", [list, np.asarray, torch.from_numpy])
def test_it_is_the_share_of_right_answers_afresh_each_time_of_whatever_holds_them(kind, metric):
    for seed in range(4):
        asked = answers(seed, n=37 + seed)
        found = metric.compute(**{k: kind(v) for k, v in asked.items()})
        assert found == plain(**asked) and 0 < found["robust"] < found["clean"] < 100


@pytest.mark.parametrize("sizes", [(1,) * 37, (10, 0, 20, 7)], ids=len)
def test_batches_in_pieces_are_all_at_once(sizes, metric):
    asked = answers(1)
    for end, size in zip(np.cumsum(sizes), sizes, strict=True):
        metric.add_batch(**{k: v[end - size : end] for k, v in asked.items()})
    assert metric.compute() == plain(**asked)


def test_it_is_loaded_by_path_without_a_network(tmp_path, monkeypatch):
    monkeypatch.setattr(evaluate.config, "HF_MODULES_CACHE", str(tmp_path / "modules"), raising=False)
    found = evaluate.load(hpt_hf.evaluation.metric.__file__, cache_dir=str(tmp_path))
    assert type(found) is not RobustAccuracy and found.compute(**answers(0)) == plain(**answers(0))


def test_nothing_added_is_an_error(metric):
    with pytest.raises(ValueError, match="no images were added"):
        metric.compute(**{k: v[:0] for k, v in answers(0).items()})
