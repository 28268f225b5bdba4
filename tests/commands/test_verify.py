"""Proves that honest Scores verify, whatever was measured, and that edited, old and unmeasurable ones are told apart from them."""

from __future__ import annotations

import dataclasses
import json
import shutil
from pathlib import Path

import datasets
import pytest
from conftest import CLASSES, make_images, save_tiny_clip, write_image_folder
from PIL import Image

from hpt_hf.attacks.suite import EvaluationAttack
from hpt_hf.attacks.threat_model import ThreatModel
from hpt_hf.commands import evaluate, verify
from hpt_hf.evaluation.evaluator import evaluate as measure
from hpt_hf.evaluation.result import EvalResult, read_results
from hpt_hf.evaluation.statistics import percent, wilson
from hpt_hf.lab.datasets import WEIGHTS
from hpt_hf.models.zero_shot import ZeroShotClassifier
from hpt_hf.utils import write_json

EPS = "16/255"  # breaks about half of what the trained student knows


@pytest.fixture(scope="module")
def filled(tmp_path_factory, trained) -> Path:
    """A model folder that `hpt-hf evaluate` filled, and its data beside it."""
    folder = tmp_path_factory.mktemp("verify")
    trained.save_pretrained(folder / "model")
    score(folder / "model", write_image_folder(folder / "data", make_images()))
    return folder


def score(model: Path, data: str, *more: str) -> None:
    flags = ["--attack", "pgd", "--attack_steps", "5", "--eps", EPS, "--probe", "0", "--batch_size", "16"]
    evaluate.main([*flags, "--model", str(model), "--dataset", data, "--output_dir", str(model), *more])


@pytest.fixture
def model(filled, tmp_path) -> Path:
    """A copy of the model folder, to spoil."""
    return shutil.copytree(filled / "model", tmp_path / "model")


def run(capsys, *argv) -> tuple[int, list[list[str]], str]:
    """Exit code, the rows of the table, and the last line."""
    with pytest.raises(SystemExit) as left:
        verify.main([str(a) for a in argv])
    out = capsys.readouterr().out
    rows = [[c.strip() for c in line.strip("|").split("|")] for line in out.splitlines() if line.startswith("|")]
    return left.value.code, rows[2:], out.splitlines()[-1]


def error_of(*argv) -> str:
    with pytest.raises(SystemExit) as left:
        verify.main([str(a) for a in argv])
    assert isinstance(left.value.code, str), "an error exits 1 with a message"
    return left.value.code


def the_file(model: Path) -> Path:
    (file,) = (model / "results").iterdir()
    return file


def edit(model: Path, **changes) -> None:
    file = the_file(model)
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))


# --- honest Scores --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("named", [False, True])
def test_what_was_just_measured_is_inside(named, model, capsys):
    code, rows, last = run(capsys, *(["--model"] if named else []), model)
    (claim,) = read_results(model / "results")
    assert code == 0 and last == "2 of 2 figures inside, 0 outside, 0 not measured."
    assert 0 < claim.robust < claim.clean, "or there is little to claim"
    assert [(r[2], r[3], r[5], r[6]) for r in rows] == [
        (figure, f"{getattr(claim, figure):.1f}", f"{getattr(claim, figure):.1f}", "inside")
        for figure in ("clean", "robust")
    ]
    assert {r[0] for r in rows} == {"data"} and {r[1] for r in rows} == {f"pgd-5 linf {EPS}"}


KINDS = {
    "targeted": ["--attack", "pgd", "--target", "dog"],
    "native": ["--protocol", "native"],
    "standard": ["--attack", "standard", "--attack_steps", "3"],
    "own steps": ["--attack", "apgd-ce", "cw", "--attack_steps", "4", "--seed", "7"],
    "l2": ["--norm", "l2", "--eps", "1.5"],
    "limited": ["--limit", "15"],
    "names": ["--classes", "puss", "hound", "home", "red motor", "oak", "--templates", "{}", "a {}"],
}


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_of_score_measures_to_the_same_figure(kind, filled, model, tmp_path, capsys):
    shutil.rmtree(model / "results")
    data = write_image_folder(tmp_path / "larger", make_images(size=40)) if kind == "native" else str(filled / "data")
    score(model, data, *KINDS[kind])
    capsys.readouterr()
    code, rows, _ = run(capsys, model, "--batch_size", "7")
    assert code == 0 and len(rows) == (4 if kind == "own steps" else 2)
    assert all(r[3] == r[5] and r[6] == "inside" for r in rows), rows
    claims = read_results(model / "results")
    assert {"targeted": claims[0].target == "dog", "limited": claims[0].n == 15}.get(kind, claims[0].n == 40)


def test_a_score_of_the_lab_is_measured_on_the_same_glyphs(model, tmp_path_factory, capsys):
    student = tmp_path_factory.mktemp("glyphs")
    ZeroShotClassifier.from_pretrained(WEIGHTS / "student").save_pretrained(student)
    score(student, "lab:digits", "--limit", "20", "--attack_steps", "2", "--eps", "1/255")
    capsys.readouterr()
    code, rows, _ = run(capsys, student)
    assert code == 0 and [r[3] for r in rows] == [r[5] for r in rows] and rows[0][0] == "lab:digits"
    assert len({r[3] for r in rows}) == 2 and [r[6] for r in rows] == ["inside", "inside"], (
        "the same 20, so no other images"
    )
    code, rows, _ = run(capsys, student, "--limit", "12")
    assert "on 12 other images than the result's 20" in rows[0][6]


def test_a_real_set_may_lie_elsewhere_now(model, tmp_path, capsys):
    shutil.rmtree(model / "results")
    (tmp_path / "real").mkdir()
    pictures = make_images(20)
    rows = {"image": [row["image"] for row in pictures], "label": pictures.labels}
    features = datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(names=list(CLASSES))})
    datasets.Dataset.from_dict(rows, features).to_parquet(tmp_path / "real" / "fashion_mnist-test.parquet")
    score(model, "real:fashion_mnist", "--data_dir", str(tmp_path / "real"))
    shutil.move(tmp_path / "real", tmp_path / "moved")
    capsys.readouterr()
    code, rows, _ = run(capsys, model)
    assert code == 1 and all("not measured" in r[6] for r in rows)
    code, rows, _ = run(capsys, model, "--data_dir", tmp_path / "moved")
    assert code == 0 and [r[3] for r in rows] == [r[5] for r in rows] and rows[0][0] == "real:fashion_mnist"


def test_scores_may_lie_elsewhere(model, tmp_path, capsys):
    shutil.move(model / "results", tmp_path / "elsewhere")
    assert run(capsys, model, "--results", tmp_path / "elsewhere")[0] == 0


# --- other Scores ---------------------------------------------------------------------------------------------------------


OLD = {"n_clean": "clean", "n_robust": "robust"}


@pytest.mark.parametrize("format", [2, 3])
@pytest.mark.parametrize(("count", "more"), [("n_robust", 8), ("n_robust", -8), ("n_clean", -8)])
def test_a_result_that_claims_twenty_points_more_or_less_is_outside(count, more, format, model, capsys):
    (claim,) = read_results(model / "results")
    claims = {name: getattr(claim, name) + more * (name == count) for name in OLD}
    if format == 2:
        claims = {OLD[name]: percent(value, 40) for name, value in claims.items()}
        claims |= {"format": 2, "rows": claim.images_digest, "parts": claim.accuracy_after, "checks": []}
    edit(model, **claims, interval=(0.0, 100.0), clean_interval=(0.0, 100.0))
    code, rows, last = run(capsys, model)
    verdicts = {r[2]: r[6] for r in rows}
    assert code == 1 and verdicts.pop(OLD[count]) == "OUTSIDE" and list(verdicts.values()) == ["inside"]
    assert last == "1 of 2 figures inside, 1 outside, 0 not measured."


def test_a_claim_of_a_weaker_attack_is_outside(model, capsys):
    """`steps` and `eps` say what was run; a result that was measured in a smaller ball does not hold in the one it names."""
    edit(model, eps="28/255")
    code, rows, _ = run(capsys, model)
    assert code == 1 and rows[1][6] == "OUTSIDE" and rows[0][6] == "inside"


def test_other_weights_are_said(model, tmp_path, capsys):
    save_tiny_clip(tmp_path / "other", seed=9)
    shutil.copytree(model / "results", tmp_path / "other" / "results")
    code, rows, _ = run(capsys, tmp_path / "other")
    assert (
        code == 1 and all("the weights are not those of the result" in r[6] for r in rows) and "OUTSIDE" in rows[0][6]
    )


def test_weights_that_differ_by_a_hair_are_said_and_may_hold(model, capsys):
    changed = ZeroShotClassifier.from_pretrained(model)
    changed.model.logit_scale.data += 1e-4
    changed.save_pretrained(model)
    code, rows, _ = run(capsys, model)
    assert code == 0 and [r[6] for r in rows] == ["inside (the weights are not those of the result)"] * 2


def test_data_that_is_gone_is_not_measured(model, capsys):
    edit(model, source=json.loads(the_file(model).read_text())["source"] | {"path": "/nowhere/at/all"})
    code, rows, last = run(capsys, model)
    assert code == 1 and all(r[6].startswith("not measured (no data at /nowhere") for r in rows)
    assert [r[5] for r in rows] == ["", ""] and last == "0 of 2 figures inside, 0 outside, 2 not measured."


def test_a_score_without_a_source_is_not_measured(model, trained, capsys):
    """Of pictures in memory nobody knows where they came from."""
    shutil.rmtree(model / "results")
    found = measure(trained, make_images(), EvaluationAttack(ThreatModel("linf", EPS), "pgd", 2), name="m", probe=0)
    write_json(model / "results" / "one.json", found.to_json())
    code, rows, _ = run(capsys, model)
    assert code == 1 and all("does not say where its images came from" in r[6] for r in rows)


def test_one_score_that_cannot_be_measured_does_not_hide_the_others(model, capsys):
    lost = dataclasses.replace(
        EvalResult.read(the_file(model)), dataset="lost", source={"path": "/nowhere/at/all", "limit": None}
    )
    write_json(model / "results" / "lost.json", lost.to_json())
    code, rows, last = run(capsys, model)
    assert (
        code == 1
        and last == "2 of 4 figures inside, 0 outside, 2 not measured."
        and {r[0] for r in rows} == {"data", "lost"}
    )


def test_other_pictures_at_the_same_place_are_said(filled, model, tmp_path, capsys):
    data = shutil.copytree(filled / "data", tmp_path / "data")
    edit(model, source=json.loads(the_file(model).read_text())["source"] | {"path": str(data)})
    assert run(capsys, model)[0] == 0
    for file in sorted(data.glob("*/*.png"))[:20]:
        Image.new("RGB", (32, 32), "white").save(file)
    code, rows, _ = run(capsys, model)
    assert code == 1 and all("OUTSIDE (on 40 other images than the result's 40)" in r[6] for r in rows[:1])


# --- --limit and --seed -----------------------------------------------------------------------------------------------------


def test_fewer_pictures_judge_the_claim_by_their_own_interval(model, capsys):
    claim = EvalResult.read(the_file(model))
    code, rows, _ = run(capsys, model, "--limit", "12")
    assert code == 0 and all(r[6] == "inside (on 12 other images than the result's 40)" for r in rows)
    low, high = wilson(round(float(rows[1][5]) * 12 / 100), 12)
    for robust in {0, *range(40)} & {int(0.4 * bound) + more for bound in (low, high) for more in (-1, 0, 1, 2)}:
        edit(model, n_clean=max(robust, claim.n_clean), n_robust=robust)
        (_, row), held = run(capsys, model, "--limit", "12")[1], low <= 100 * robust / 40 <= high
        assert row[6].startswith("inside" if held else "OUTSIDE"), (robust, low, high)
    edit(model, n_clean=claim.n_clean, n_robust=claim.n_robust)
    assert not any("other images" in r[6] for r in run(capsys, model, "--limit", "400")[1]), (
        "more than there are are all"
    )


def test_another_seed_is_another_start_of_the_attack(model, capsys, monkeypatch):
    asked = []
    monkeypatch.setattr(verify, "evaluate", lambda *a, **k: asked.append(a[2]) or measure(*a, **k))
    assert run(capsys, model, "--seed", "5")[0] == 0 and run(capsys, model)[0] == 0
    assert [a.seed for a in asked] == [5, 0] and asked[0] == dataclasses.replace(asked[1], seed=5)


# --- mistakes -------------------------------------------------------------------------------------------------------------


def test_nothing_claimed_is_an_error(model):
    shutil.rmtree(model / "results")
    assert error_of(model).startswith(f"hpt-hf verify: no results in {model}: nothing is claimed")
    (model / "results").mkdir()
    assert "no results in" in error_of(model)


@pytest.mark.parametrize("text", ["", "[]", '{"clean": 1}', "\0\0"])
def test_a_file_that_is_no_result_is_refused_and_one_of_the_future_is_not(text, model, capsys):
    edit(model, format=4, energy="7 J")
    assert run(capsys, model)[0] == 0
    (model / "results" / "odd.json").write_text(text)
    assert "odd.json is no result that can be read" in error_of(model)


MALFORMED = {
    "n": "20", "eps": None, "n_after": {}, "per_class": {"cat": [1]}, "source": None, "templates": "a {}",
    "sanity_checks": [{"name": "x"}], "versions": [], "seed": "0", "steps": "ten", "classes": None, "skipped": {},
}  # fmt: skip
UNMEASURABLE = {"eps": "-1", "norm": "l7", "protocol": "x", "source": {"path": 3}, "n_after": {"x": 3}}


@pytest.mark.parametrize("name", MALFORMED)
def test_a_malformed_result_is_one_line_with_the_fields_name(name, model):
    edit(model, **{name: MALFORMED[name]})
    said = error_of(model)
    assert "is no result that can be read" in said and name in said


@pytest.mark.parametrize("name", UNMEASURABLE)
def test_a_result_of_what_there_is_not_is_not_measured(name, model, capsys):
    edit(model, **{name: UNMEASURABLE[name]})
    code, rows, last = run(capsys, model)
    assert code == 1 and len(rows) == 2 and all(row[-1].startswith("not measured (") for row in rows)
    assert last == "0 of 2 figures inside, 0 outside, 2 not measured."


def test_a_model_that_is_not_there_is_an_error(model, tmp_path):
    shutil.copytree(model / "results", tmp_path / "results")
    assert "no model at" in error_of(tmp_path / "gone", "--results", tmp_path / "results")
    assert error_of("--limit", "3").startswith("hpt-hf verify: ")
