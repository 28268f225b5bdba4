"""Proves that a result survives its file, that old and newer files are read, and that its intervals are right."""

from __future__ import annotations

import itertools
import json
import math
import re

import pytest
from conftest import make_result

from hpt_hf.evaluation.result import EvalResult, read_results, read_results_of, told_apart
from hpt_hf.evaluation.statistics import mean, percent, wilson
from hpt_hf.evaluation.tables import result_table
from hpt_hf.utils import write_json

CHECK = {"name": "few_images", "raised": True, "detail": "7 images"}

# What the version before wrote.
DOUBT = {"name": "restarts", "raised": True, "seen": "5 of 9"}
FORMAT_2 = {"model": "hpt_gpd", "fingerprint": "41bfd20aefaba555", "revision": None, "dataset": "lab:planets"}
FORMAT_2 |= {"classes": 2, "source": {"path": "lab:planets", "limit": None}, "templates": ["This is a photo of {}."]}
FORMAT_2 |= {"n": 60, "rows": "8b6a51208f68da9e", "attack": "standard", "steps": 20, "norm": "linf", "eps": "6/255"}
FORMAT_2 |= {"protocol": "input", "seed": 0, "target": None, "clean": 90.0, "robust": 53.33, "robust_is": "right …"}
FORMAT_2 |= {"clean_interval": [79.85, 95.34], "interval": [40.89, 65.37], "verdict": "suspicious", "format": 2}
FORMAT_2 |= {"parts": {"apgd-ce": 56.67, "square": 53.33}, "per_class": {"earth": [30, 27, 15], "mars": [30, 27, 17]}}
FORMAT_2 |= {"checks": [DOUBT, {"name": "baseline", "raised": None, "seen": ""}], "suspicions": [DOUBT], "notes": []}
FORMAT_2 |= {"seconds": 0.9, "versions": {"hpt_hf": "0.1.0"}, "hardware": "a CPU", "skipped": []}


def test_a_result_survives_its_file_with_everything_in_it(tmp_path):
    settings = {"model": "tête/模型", "revision": "abc", "steps": 5, "target": "dog"}
    settings |= {"dataset": "lab:digits", "source": {"path": "lab:digits", "classes": ("a", "b"), "limit": 7}}
    settings |= {"n_after": {"apgd-ce": 50, "square": 40}, "skipped": ("row 3",)}
    full = make_result(**settings, sanity_checks=(CHECK, {**CHECK, "raised": None}))
    for number, one in enumerate((make_result(), full)):
        again = EvalResult.read(write_json(tmp_path / f"{number}.json", one.to_json()))
        assert again == one and again.to_json() == one.to_json()
    assert read_results(tmp_path) == [make_result(), full]


def test_accuracies_and_intervals_follow_from_counts():
    one = make_result(per_class={"a": (30, 20, 10), "b": (10, 10, 9)}, n_after={"apgd-ce": 25, "square": 19})
    assert (one.clean, one.robust, one.accuracy_after) == (75.0, 47.5, {"apgd-ce": 62.5, "square": 47.5})
    assert (one.clean_interval, one.interval) == (wilson(30, 40), wilson(19, 40))
    assert "never taken for 'cat'" in make_result(target="cat").robust_is and "every query" in make_result().robust_is


PASSED, UNKNOWN, DOUBTFUL = CHECK | {"raised": False}, CHECK | {"raised": None}, CHECK | {"name": "more_steps"}


def test_the_verdict_follows_from_the_checks():
    for checks, verdict in (
        ((), "unchecked"),
        ((UNKNOWN,), "unchecked"),
        ((PASSED, UNKNOWN), "clear"),
        ((PASSED, CHECK, CHECK | {"name": "baseline"}), "remark"),
        ((CHECK, DOUBTFUL), "suspicious"),
    ):
        judged = make_result(sanity_checks=checks)
        assert judged.verdict == verdict and judged.raised == tuple(c for c in checks if c["raised"])


@pytest.mark.parametrize(
    ("first", "second", "name"),
    [
        ({"source": {"path": "p", "split": "a"}}, {"source": {"path": "p", "split": "b"}}, "cats (a)"),
        ({"templates": ("a {}",)}, {"templates": ("the {}",)}, "cats (a {})"),
        ({"per_class": {"x": (9, 5, 1)}}, {"per_class": {"y": (9, 5, 1)}}, "cats (x)"),
        ({"images_digest": "1" * 16}, {"images_digest": "2" * 16}, "cats (11111111)"),
    ],
)
def test_results_of_one_name_are_told_apart_and_none_overwrites_another(first, second, name):
    results = [make_result(**first), make_result(**second)]
    told = told_apart(results)
    assert told[0].dataset == name != told[1].dataset and len({r.file_name for r in results}) == 2
    assert name in result_table(results)
    others = [make_result(), make_result(dataset="dogs"), make_result(eps="2/255")]
    assert told_apart(others) == others


def test_the_file_tells_its_reader_the_figures_which_are_not_read(tmp_path):
    told = make_result(sanity_checks=(CHECK,)).to_json()
    assert (told["clean"], told["robust"], told["verdict"], told["raised"]) == (60.0, 40.0, "remark", ["few_images"])
    assert told["interval"] == wilson(40, 100) and told["accuracy_after"] == {"pgd": 40.0} and told["format"] == 3
    edited = told | {"robust": 99.0, "interval": [98.0, 100.0], "verdict": "clear", "raised": []}
    edited |= {"format": 4, "energy": {"joules": 7}}  # of a newer version
    assert EvalResult.read(write_json(tmp_path / "one.json", edited)) == make_result(sanity_checks=(CHECK,))


def test_a_file_of_the_version_before_is_read(tmp_path):
    one = EvalResult.read(write_json(tmp_path / "old.json", FORMAT_2))
    assert (one.n, one.n_clean, one.n_robust, one.n_after) == (60, 54, 32, {"apgd-ce": 34, "square": 32})
    same = ("clean", "robust", "n", "seed", "steps", "eps", "seconds", "verdict")
    assert all(getattr(one, name) == FORMAT_2[name] for name in same)
    assert one.accuracy_after == FORMAT_2["parts"] and one.images_digest == FORMAT_2["rows"]
    assert one.raised == ({"name": "restarts", "raised": True, "detail": "5 of 9"},) and len(one.sanity_checks) == 2
    assert EvalResult.read(write_json(tmp_path / "new.json", one.to_json())) == one


def without(record: dict, *names: str) -> dict:
    return {k: v for k, v in record.items() if k not in names}


NEW = make_result().to_json()
REFUSED = {
    "empty": (b"", "Expecting value"),
    "bytes": (b"\xff\xfe\x00", "codec can't decode"),
    "a list": ([1, 2], "'list' object has no attribute"),
    "other": ({"model": "m"}, "missing"),
    "an older format": (without(FORMAT_2, "protocol", "format"), "missing .*'images_digest'"),
    "format 2 without": (without(FORMAT_2, "parts"), "KeyError.'parts'"),
    "without seed": (without(NEW, "seed"), "missing .*'seed'"),
    **{f"format 2, {claim}%": (FORMAT_2 | {"robust": claim}, ".") for claim in (120.0, -1.0, 95.0, "high", None)},
    **{f"{claim} robust": (NEW | {"n_robust": claim}, ".") for claim in (-1, 61, "7", None)},
    "of nothing": (NEW | {"n": 0, "n_clean": 0, "n_robust": 0}, "0 right of 0 images"),
}


@pytest.mark.parametrize("kind", REFUSED)
def test_what_is_no_result_or_cannot_be_is_refused_with_its_name(kind, tmp_path):
    content, says = REFUSED[kind]
    (tmp_path / "one.json").write_bytes(content if isinstance(content, bytes) else json.dumps(content).encode())
    with pytest.raises(ValueError, match=f"one.json is no result that can be read: .*{says}.*Fix:"):
        read_results(tmp_path)


def test_a_folder_has_its_results_in_order_those_of_the_version_before_too(tmp_path):
    assert read_results(tmp_path) == read_results(tmp_path / "absent") == read_results_of(tmp_path) == []
    one, two, again = make_result(dataset="a"), make_result(dataset="b"), make_result(dataset="b", seconds=9.0)
    for place, result in (("scores", two), ("results", again), ("results", one)):
        write_json(tmp_path / place / result.file_name, result.to_json())
    assert read_results(tmp_path / "results") == read_results_of(tmp_path) == [one, again], "the newer of one name"


def test_a_file_has_one_name_for_each_model_set_and_question_which_is_neither_a_path_nor_a_flag():
    choices = {
        "model": ["ours", "Ours", "模型", "型模", "our s", "x" * 300, "x" * 301, "../../etc/passwd", "/", "-rf"],
        "fingerprint": ["0123456789abcdef", "0123456789abcdff"],
        "dataset": ["cats", "lab:cats", "lab-cats", "猫", "犬", "", "..", "CON:", "a b;c|d\n"],
        "attack": ["pgd-20", "pgd-20 towards 猫", "pgd-20 towards 犬", "pgd-2"],
        "norm": ["linf", "l2"],
        "eps": ["1/255", "1e-3", "1e+3"],
        "protocol": ["input", "native"],
    }
    names = [make_result(**dict(zip(choices, v, strict=True))).file_name for v in itertools.product(*choices.values())]
    assert len(set(names)) == len(names) == math.prod(len(v) for v in choices.values())
    assert len({n.lower() for n in names}) == len(names), "some file systems know no case"
    assert all(re.fullmatch(r"[a-z0-9][a-z0-9-]*\.json", n) and len(n) < 255 for n in names)


def test_a_name_shows_what_it_is_of_and_hangs_on_nothing_else():
    about = {"dataset": "lab:digits", "attack": "apgd-ce-100", "eps": "8/255"}
    name = make_result(model="out/ours/", **about).file_name
    assert name.startswith("ours--lab-digits--apgd-ce-100--linf--8-255--input--")
    assert name == make_result(model="elsewhere/ours", seconds=9.0, **about).file_name


def test_a_question_is_protocol_attack_ball_sample_and_seed_and_not_the_set_or_model():
    assert make_result(dataset="a", model="b", fingerprint="c").question == make_result().question
    other = ({"protocol": "native"}, {"attack": "cw-20"}, {"norm": "l2"}, {"eps": "2/255"}, {"seed": 3})
    for change in (*other, {"source": {"limit": 9}}):
        assert make_result(**change).question != make_result().question
        assert make_result(**change).file_name != make_result().file_name


def test_the_worst_class_is_that_with_the_lowest_share_and_of_equals_the_one_with_most_images():
    worst = {"cat": (10, 9, 5), "dog": (100, 90, 49), "few": (2, 2, 1), "none": (1, 0, 1)}
    assert make_result(per_class=worst).worst_class == ("dog", 100, 49)
    assert make_result(per_class={"a": (3, 3, 0), "b": (7, 0, 0), "c": (5, 5, 1)}).worst_class == ("b", 7, 0)


def test_means_are_unweighted():
    results = [make_result(per_class={"a": (10, 6, 4)}), make_result(per_class={"a": (1000, 200, 0)})]
    assert mean(results) == {"clean": 40.0, "robust": 20.0} and percent(1, 3) == 33.33


WILSON = {(0, 10): (0, 27.75), (10, 10): (72.25, 100), (5, 10): (23.66, 76.34)}  # R: binom::binom.wilson
WILSON |= {(1, 100): (0.18, 5.45), (400, 1000): (37.01, 43.07), (0, 0): (0, 100)}  # of nothing nothing is known


def test_wilson_gives_the_published_numbers():
    for counts, ends in WILSON.items():
        assert wilson(*counts) == pytest.approx(ends, abs=0.006)
