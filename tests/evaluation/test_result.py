"""Proves that a EvalResult survives its file, that what is no EvalResult of this version is refused, and that its intervals are right."""

from __future__ import annotations

import itertools
import json
import math
import re

import numpy as np
import pytest
from conftest import make_result

from hpt_hf.evaluation.result import FORMAT, EvalResult, mean, read_results
from hpt_hf.evaluation.statistics import percent, wilson
from hpt_hf.utils import slug, write_json

CHECK = {"name": "few_samples", "raised": True, "seen": "7 pictures; below 50"}

# --- files


def test_a_score_survives_its_file_with_everything_in_it(tmp_path):
    plain = make_result()
    full = make_result(
        model="tête/模型",
        revision="abc",
        dataset="lab:digits",
        source={"path": "lab:digits", "classes": ("a", "b"), "limit": 7},
        steps=5,
        target="dog",
        parts={"apgd-ce": 50.0, "square": 40.0},
        verdict="suspicious",
        suspicions=(CHECK,),
        checks=(CHECK, {**CHECK, "raised": None}),
        notes=("a note",),
        skipped=("row 3",),
    )
    for number, one in enumerate((plain, full)):
        again = EvalResult.read(write_json(tmp_path / f"{number}.json", one.to_json()))
        assert again == one and again.to_json() == one.to_json()
        assert isinstance(again.interval, tuple) and isinstance(again.per_class["cat"], tuple)
        assert (again.question, again.file_name, again.worst_class) == (one.question, one.file_name, one.worst_class)
    assert read_results(tmp_path) == [plain, full]


def refused(tmp_path, content) -> str:
    """What is said of a file of this content; it names the file."""
    file = tmp_path / "score.json"
    file.write_bytes(content if isinstance(content, bytes) else json.dumps(content).encode())
    with pytest.raises(ValueError) as error:
        EvalResult.read(file)
    assert str(file) in str(error.value)
    with pytest.raises(ValueError, match="score.json"):
        read_results(tmp_path)
    return str(error.value)


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (b"", "holds no JSON"),
        (b"{half", "holds no JSON"),
        (b"\xff\xfe\x00", "holds no JSON"),
        ([1, 2], "has no key 'robust'"),
        ("robust", "has no key 'robust'"),
        ({"model": "m"}, "has no key 'robust'"),
        (None, "has no key 'robust'"),
    ],
    ids=["empty", "half", "bytes", "list", "word", "other", "null"],
)
def test_what_is_not_a_score_is_refused(tmp_path, content, says):
    assert f"is not a EvalResult: it {says}" in refused(tmp_path, content)


def test_a_score_of_another_version_is_refused_and_not_guessed_at(tmp_path):
    record = make_result(versions={"hpt_hf": "9.8.7"}).to_json()
    newer = refused(tmp_path, record | {"format": FORMAT + 1})
    assert (
        f"by hpt_hf 9.8.7 in format {FORMAT + 1}, this version reads format {FORMAT}" in newer
        and "image_ids" not in newer
    )
    assert "evaluate again, or read it with the version that wrote it" in newer
    older = {k: v for k, v in record.items() if k not in ("format", "protocol")} | {"resolution": "input"}
    assert (
        "in format 1" in (said := refused(tmp_path, older))
        and "keys that differ: format, protocol, resolution" in said
    )
    for versions in ({}, None):
        assert "by hpt_hf an unknown version" in refused(tmp_path, record | {"format": 1, "versions": versions})


@pytest.mark.parametrize("missing", ["interval", "per_class", "fingerprint", "seed", "notes"])
def test_a_score_that_lacks_a_key_or_has_one_more_is_refused(tmp_path, missing):
    record = make_result().to_json()
    assert f"keys that differ: {missing})" in refused(tmp_path, {k: v for k, v in record.items() if k != missing})
    assert "keys that differ: odd)" in refused(tmp_path, record | {"odd": 1})


def test_a_folder_without_scores_has_none_and_they_come_in_the_order_of_their_names(tmp_path):
    assert read_results(tmp_path) == read_results(tmp_path / "absent") == []
    scores = [make_result(dataset=name) for name in ("c", "a", "b")]
    for one in scores:
        write_json(tmp_path / one.file_name, one.to_json())
    assert [s.dataset for s in read_results(tmp_path)] == ["a", "b", "c"]


# --- names of files


def test_a_file_has_one_name_for_each_model_set_and_question():
    """Otherwise one EvalResult would silently overwrite another; a slug alone knows neither case nor other alphabets, and 1e-3 is 1e+3 to it."""
    choices = {
        "model": ["ours", "Ours", "模型", "型模", "our s", "x" * 300, "x" * 301],
        "fingerprint": ["0123456789abcdef", "0123456789abcdff"],
        "dataset": ["cats", "lab:cats", "lab-cats", "猫", "犬", ""],
        "attack": ["pgd-20", "pgd-20 towards 猫", "pgd-20 towards 犬", "pgd-2"],
        "norm": ["linf", "l2"],
        "eps": ["1/255", "1e-3", "1e+3", "0.5", "0/5"],
        "protocol": ["input", "native"],
    }
    names = [make_result(**dict(zip(choices, v, strict=True))).file_name for v in itertools.product(*choices.values())]
    assert len(set(names)) == len(names) == math.prod(len(v) for v in choices.values())
    assert len({n.lower() for n in names}) == len(names), "some file systems know no case"
    assert all(re.fullmatch(r"[a-z0-9][a-z0-9-]*\.json", n) and len(n) < 255 for n in names)


@pytest.mark.parametrize(
    "name", ["../../etc/passwd", "..", ".", "/", "-rf", "a b;c|d\n", "CON:", "\\\\server\\x", "--"]
)
def test_no_name_leads_out_of_the_folder_or_looks_like_a_flag(name, tmp_path):
    for field in ("model", "dataset", "attack"):
        one = make_result(**{field: name})
        assert re.fullmatch(r"[a-z0-9][a-z0-9-]*\.json", one.file_name)
        assert write_json(tmp_path / one.file_name, one.to_json()).parent == tmp_path


def test_a_name_shows_what_it_is_of_and_hangs_on_nothing_else():
    name = make_result(model="out/ours/", dataset="lab:digits", attack="apgd-ce-100", eps="8/255").file_name
    assert name.startswith("ours--lab-digits--apgd-ce-100--linf--8-255--input--")
    assert (
        name
        == make_result(
            model="elsewhere/ours", dataset="lab:digits", attack="apgd-ce-100", eps="8/255", seconds=9.0
        ).file_name
    )
    assert slug("  A photo: of_a (cat)! ") == "a-photo-of-a-cat"


# --- what follows from the counts


def test_the_worst_class_is_that_with_the_lowest_share_and_of_equals_the_one_with_most_pictures():
    worst = {"cat": (10, 9, 5), "dog": (100, 90, 49), "few": (2, 2, 1), "none": (1, 0, 1)}
    assert make_result(per_class=worst).worst_class == ("dog", 100, 49)
    assert make_result(per_class={"a": (3, 3, 0), "b": (7, 0, 0), "c": (5, 5, 1)}).worst_class == ("b", 7, 0)
    assert make_result(per_class={"only": (4, 4, 4)}).worst_class == ("only", 4, 4)


def test_means_are_unweighted():
    scores = [make_result(n=10, clean=60.0, robust=40.0), make_result(n=1000, clean=20.0, robust=0.0)]
    assert mean(scores) == {"clean": 40.0, "robust": 20.0} and mean(scores[:1]) == {"clean": 60.0, "robust": 40.0}
    assert percent(1, 3) == 33.33 and percent(0, 7) == 0 and percent(7, 7) == 100


def test_a_question_is_protocol_attack_ball_sample_and_seed_and_not_the_set_or_model():
    assert make_result(dataset="a", model="b", fingerprint="c").question == make_result().question
    for change in (
        {"protocol": "native"},
        {"attack": "cw-20"},
        {"norm": "l2"},
        {"eps": "2/255"},
        {"seed": 3},
        {"source": {"limit": 9}},
    ):
        assert make_result(**change).question != make_result().question
        assert make_result(**change).file_name != make_result().file_name


# --- intervals


@pytest.mark.parametrize(
    ("right", "n", "low", "high"),
    [  # R: binom::binom.wilson
        (0, 10, 0.0, 27.75),
        (10, 10, 72.25, 100.0),
        (5, 10, 23.66, 76.34),
        (1, 100, 0.18, 5.45),
        (400, 1000, 37.01, 43.07),
    ],
)
def test_wilson_gives_the_published_numbers(right, n, low, high):
    assert wilson(right, n) == pytest.approx((low, high), abs=0.006)


@pytest.mark.parametrize("n", [1, 7, 100, 1000, 50_000])
def test_wilson_bounds_are_the_proportions_just_rejected(n):
    """By definition: at a bound p, the observed share lies z standard errors of p away."""
    for right in {0, 1, n // 3, n // 2, n - 1, n}:
        bounds = wilson(right, n)
        assert 0 <= bounds[0] <= 100 * right / n <= bounds[1] <= 100
        for p in (b / 100 for b in bounds):
            if 0 < p < 1:
                # Rounded to 0.01 points: as far as a bound may have moved by that, so may the distance.
                reach = 1.959964 * math.sqrt(p * (1 - p) / n)
                slack = 6e-5 * (1 + 1.959964 * abs(1 - 2 * p) / (2 * math.sqrt(p * (1 - p) * n)))
                assert abs(abs(right / n - p) - reach) <= slack


def test_wilson_is_symmetric_narrows_with_n_and_knows_nothing_of_nothing():
    assert wilson(0, 0) == (0.0, 100.0)
    for right, n in ((3, 10), (1, 50)):
        low, high = wilson(right, n)
        assert wilson(n - right, n) == pytest.approx((100 - high, 100 - low), abs=0.011)
    widths = [np.diff(wilson(4 * 10**k, 10 * 10**k))[0] for k in range(4)]
    assert widths == sorted(widths, reverse=True) and widths[0] > 10 * widths[3]


@pytest.mark.parametrize("claim", [120.0, -1.0, "high", None])
def test_a_claim_that_is_no_percentage_is_refused(tmp_path, claim):
    file = tmp_path / "score.json"
    file.write_text(json.dumps(make_result().to_json() | {"robust": claim}))
    with pytest.raises(ValueError, match="expected percentages"):
        EvalResult.read(file)
