"""Proves that a paired comparison is of the same images, counts what it says, and that its intervals cover."""

from __future__ import annotations

import csv
from dataclasses import replace

import numpy as np
import pytest
from conftest import make_result

from hpt_hf.commands.compare import CompareArguments, run
from hpt_hf.evaluation.comparison import compare, named, paired, without_seed
from hpt_hf.evaluation.tables import Results
from hpt_hf.utils import write_json


def result(ends: str, **changes):
    n, right, robust = len(ends), len(ends) - ends.count("w"), ends.count("r")
    return make_result(per_class={"a": (n, right, robust)}, ends=ends, **changes)


def test_a_difference_is_counted_image_by_image():
    ours, theirs = result("rrrrrrr000"), result("rrrr000r00", model="theirs")  # three are ours alone, one is theirs
    robust, clean = (paired([ours], [theirs], kind) for kind in ("robust", "clean"))
    assert robust.value == 20.0 and clean.value == 0.0
    # Agresti & Min's: 4 discordant pairs and one more half each way, of 12.
    half = 100 * 1.96 * np.sqrt(((4 + 1) - 2**2 / 12) / 12**2)
    assert (robust.low, robust.high) == pytest.approx((20 - half, 20 + half), abs=0.01)
    assert clean.low < 0 < clean.high, "ten images without a difference prove no equality"
    back = paired([theirs], [ours], "robust")
    assert (back.value, back.low, back.high) == (-robust.value, -robust.high, -robust.low)


def test_pairing_is_sharper_than_two_intervals_and_covers():
    """Correlated models, 2 sets of 150 images: 19 of 20 intervals hold the true difference of 5 points."""
    rng, found = np.random.default_rng(0), []
    for _ in range(400):
        runs = [], []
        for name in ("x", "y"):
            luck = rng.random(150)
            for model, share in zip(runs, (0.45, 0.40), strict=True):
                own = np.where(rng.random(150) < 0.2, rng.random(150), luck)
                model.append(result("".join("r" if u < share else "0" for u in own), dataset=name))
        found.append(paired(*runs, "robust"))
    assert 0.92 <= np.mean([one.low <= 5 <= one.high for one in found]) <= 0.98
    assert np.mean([one.high - one.low for one in found]) < 0.8 * 2 * 196 * np.sqrt(2 * 0.25 / 300)


def test_means_are_over_sets_and_seeds_and_the_front_is_told():
    runs = (("runs/a/seed0", "r" * 60), ("runs/a/seed1", "r" * 58 + "00"), ("b", "r" * 20 + "0" * 40))
    results = [result(ends, model=m, dataset=name, fingerprint=m) for m, ends in runs for name in ("x", "y")]
    best, other = compare(results, "b")
    assert (best.model, best.seeds, best.sets, best.n) == ("runs/a", 2, 2, 120)
    assert best.robust == pytest.approx((100 + 58 / 0.6) / 2, abs=0.01) and best.spread[1] > 0 == best.spread[0]
    assert best.against["robust"].value == pytest.approx(best.robust - 100 / 3, abs=0.01)
    assert other.against is None and other.dominated_by == ("runs/a",) and best.dominated_by == ()
    assert list(named([replace(best, model=m) for m in ("a/x/seed", "a/y/seed")]).values()) == ["x/seed", "y/seed"]
    assert [without_seed(m) for m in ("x/seed3", "x-seed_12", "seedling", "seed1")] == ["x", "x", "seedling", "seed1"]


@pytest.mark.parametrize(
    ("other", "says"),
    [
        (None, "expected two models"),
        (result("rr0w", model="b", attack="cw-20"), "expected one attack"),
        (result("rr0", model="b"), "other images or classes"),
        (result("rr0w", model="b", dataset="dogs"), "has no result on"),
        (replace(result("rr0w", model="b"), ends=""), "how each image ended"),
        (result("rr0w", model="b"), "reference: got 'nobody', expected one of"),
    ],
)
def test_what_cannot_be_compared_is_refused(other, says):
    with pytest.raises(ValueError, match=says):
        compare([result("rr0w"), *filter(None, [other])], "nobody" if says.startswith("reference") else None)


def test_the_command_writes_one_comparison_in_four_forms(tmp_path):
    for model, ends in (("ours", "rrrr000w"), ("the_others", "rr00000w")):
        one = result(ends, model=model, fingerprint=model)
        write_json(tmp_path / model / "results" / one.file_name, one.to_json())
    folders = [str(tmp_path / m) for m in ("ours", "the_others")]
    text = run(CompareArguments(folders, output_dir=str(tmp_path / "out"), reference="the_others"))
    assert "+25.0 (" in text and text in (tmp_path / "out" / "comparison.md").read_text()
    (ours, theirs) = csv.DictReader((tmp_path / "out" / "comparison.csv").read_text().splitlines())
    assert (ours["model"], ours["robust"], ours["robust_difference"]) == ("ours", "50.0", "25.0")
    tex = (tmp_path / "out" / "comparison.tex").read_text()
    assert r"\toprule" in tex and r"the\_others" in tex and theirs["robust_difference"] == "0.0"
    assert "<svg" in (tmp_path / "out" / "comparison.svg").read_text()
    with pytest.raises(ValueError, match="expected folders with results"):
        run(CompareArguments([str(tmp_path / "nothing")]))


def test_results_are_a_table_in_pandas_markdown_and_latex():
    results = Results((result("rr0w"), result("r00w", model="b_2", attack="cw-20")))
    frame = results.to_pandas()
    assert list(frame["robust"]) == [50.0, 25.0] and list(frame["attack"]) == ["pgd-20", "cw-20"]
    assert results.to_markdown().count("| data set") == 2 and len(results) == 2
    assert r"b\_2" in results.to_latex() and r"\bottomrule" in results.to_latex()
