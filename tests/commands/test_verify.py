"""Honest results verify, whatever was measured, and edited, old and unmeasurable ones are told apart from them."""

import dataclasses
import json
import shutil
from pathlib import Path

import pytest
from conftest import CLASSES, encode, make_images, write_image_folder, write_parquet
from PIL import Image

from hpt_hf.commands import evaluate, verify
from hpt_hf.evaluation.evaluator import evaluate as measure
from hpt_hf.evaluation.result import EvalResult, read_results
from hpt_hf.evaluation.statistics import percent, wilson
from hpt_hf.lab.datasets import WEIGHTS
from hpt_hf.models.zero_shot import ZeroShotClassifier
from hpt_hf.utils import write_json

EPS = "16/255"  # breaks about half of what the trained student knows


def score(model: Path, data: str, *more: str) -> None:
    flags = ["--attack", "pgd", "--attack_steps", "5", "--eps", EPS, "--probe", "0", "--batch_size", "16"]
    evaluate.main([*flags, "--model", str(model), "--dataset", data, "--output_dir", str(model), *more])


@pytest.fixture(scope="module")
def filled(tmp_path_factory, trained) -> Path:
    """A model folder that `hpt-hf evaluate` filled, and its data beside it."""
    folder = tmp_path_factory.mktemp("verify")
    trained.save_pretrained(folder / "model")
    score(folder / "model", write_image_folder(folder / "data", make_images()))
    return folder


@pytest.fixture
def model(filled, tmp_path) -> Path:
    """A copy of the model folder, to spoil."""
    return shutil.copytree(filled / "model", tmp_path / "model")


def run(capsys, *argv) -> tuple[int, list[list[str]], str]:
    """Exit code, the rows of the table, and the last line."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as left:
        verify.main([str(a) for a in argv])
    out = capsys.readouterr().out
    rows = [[c.strip() for c in line.strip("|").split("|")] for line in out.splitlines() if line.startswith("|")]
    return left.value.code, rows[2:], out.splitlines()[-1]


def the_file(model: Path) -> Path:
    (file,) = (model / "results").iterdir()
    return file


def edit(model: Path, **changes) -> None:
    file = the_file(model)
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))


def repeats(rows) -> bool:
    """Every figure is measured as it was claimed."""
    return len(rows) > 0 and all(r[3] == r[5] and r[6] == "inside" for r in rows)


KINDS = {
    "towards a class of another name": "--target hound --classes puss hound home motor oak --templates {} a_{}",
    "a sample of native images": "--protocol native --limit 12",
    "standard": "--attack standard --attack_steps 3",
    "own steps, seed and norm": "--attack apgd-ce cw --attack_steps 4 --seed 7 --norm l2 --eps 3",
}


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_of_score_measures_to_the_same_figure(kind, model, tmp_path, capsys):
    shutil.rmtree(model / "results")
    score(model, write_image_folder(tmp_path / "data", make_images(20, size=40)), *KINDS[kind].split())
    code, rows, last = run(capsys, model, "--batch_size", "7", "--limit", "400")  # more than the result has
    assert code == 0 and len(rows) == (4 if "own" in kind else 2) and repeats(rows), rows
    assert last == f"{len(rows)} of {len(rows)} figures inside, 0 outside, 0 not measured."
    claim = read_results(model / "results")[0]
    assert claim.robust < claim.clean and rows[0][:3] == ["data", f"{claim.attack} {claim.norm} {claim.eps}", "clean"]
    assert (claim.n, claim.target) == {"tow": (16, "hound"), "a s": (12, None)}.get(kind[:3], (20, None))


def test_a_score_of_the_lab_is_measured_on_the_same_glyphs(tmp_path, capsys):
    ZeroShotClassifier.from_pretrained(WEIGHTS / "student").save_pretrained(tmp_path)
    score(tmp_path, "lab:digits", "--limit", "20", "--attack_steps", "2", "--eps", "1/255")
    code, rows, _ = run(capsys, tmp_path)
    assert code == 0 and rows[0][0] == "lab:digits" and repeats(rows) and rows[0][3] != rows[1][3]
    assert "on 12 other images than the result's 20" in run(capsys, tmp_path, "--limit", "12")[1][0][6]


def test_a_real_set_and_the_results_may_lie_elsewhere_now(model, tmp_path, capsys):
    pictures, file = make_images(20), tmp_path / "real" / "fashion_mnist-test.parquet"
    write_parquet(file, [encode(row["image"]) for row in pictures], pictures.labels, names=CLASSES)
    shutil.rmtree(model / "results")
    score(model, "real:fashion_mnist", "--data_dir", str(file.parent))
    shutil.move(file.parent, tmp_path / "moved")
    code, rows, _ = run(capsys, model)
    assert code == 1 and all("not measured" in r[6] for r in rows)
    elsewhere = shutil.move(model / "results", tmp_path / "elsewhere")
    code, rows, _ = run(capsys, model, "--data_dir", tmp_path / "moved", "--results", elsewhere)
    assert code == 0 and rows[0][0] == "real:fashion_mnist" and repeats(rows)


OLD = {"n_clean": "clean", "n_robust": "robust"}


@pytest.mark.parametrize(("count", "more", "format"), [("n_robust", 8, 2), ("n_robust", -8, 3), ("n_clean", -8, 3)])
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


def test_other_weights_are_said_and_may_hold(model, capsys):
    changed, said = ZeroShotClassifier.from_pretrained(model), "(the weights are not those of the result)"
    changed.model.logit_scale.data += 1e-4
    changed.save_pretrained(model)
    code, rows, _ = run(capsys, model)
    assert code == 0 and [r[6] for r in rows] == [f"inside {said}"] * 2


def test_other_pictures_at_the_same_place_are_said(filled, model, tmp_path, capsys):
    data = shutil.copytree(filled / "data", tmp_path / "data")
    for file in sorted(data.glob("*/*.png"))[:20]:
        Image.new("RGB", (32, 32), "white").save(file)
    edit(model, source=json.loads(the_file(model).read_text())["source"] | {"path": str(data)})
    code, rows, _ = run(capsys, model)
    assert code == 1 and rows[0][6] == "OUTSIDE (on 40 other images than the result's 40)"


UNMEASURABLE = {
    "eps": ("-1", ""),
    "n_after": ({"x": 3}, ""),
    "source, a number": ({"path": 3}, ""),
    "source, gone": ({"path": "/nowhere/at/all", "split": "train"}, "no data at /nowhere"),
    "source of pictures in memory": ({"limit": None}, "the result does not say where its images came from"),
}


@pytest.mark.parametrize("name", UNMEASURABLE)
def test_what_cannot_be_measured_is_said_and_hides_no_other_result(name, model, capsys):
    value, says = UNMEASURABLE[name]
    lost = dataclasses.replace(EvalResult.read(the_file(model)), dataset="lost").to_json()
    write_json(model / "results" / "lost.json", lost | {name.split()[0].strip(","): value})
    code, rows, last = run(capsys, model)
    lost = [row for row in rows if row[0] == "lost"]
    assert code == 1 and [row[5] for row in lost] == ["", ""]
    assert all(row[6].startswith(f"not measured ({says}") for row in lost)
    assert last == "2 of 4 figures inside, 0 outside, 2 not measured."


MALFORMED = {
    "n": "20", "eps": None, "n_after": {}, "per_class": {"cat": [1]}, "source": None, "templates": "a {}",
    "sanity_checks": [{"name": "x"}], "versions": [], "seed": "0", "steps": "ten", "classes": None, "skipped": {},
}  # fmt: skip


@pytest.mark.parametrize("name", MALFORMED)
def test_a_malformed_result_is_one_line_with_the_fields_name(name, model):
    edit(model, **{name: MALFORMED[name]})
    with pytest.raises(SystemExit, match=f"is no result that can be read.*{name}"):
        verify.main([str(model)])


def test_fewer_pictures_judge_the_claim_by_their_own_interval(model, capsys):
    claim = EvalResult.read(the_file(model))
    code, rows, _ = run(capsys, model, "--limit", "12")
    assert code == 0 and all(r[6] == "inside (on 12 other images than the result's 40)" for r in rows)
    low, high = wilson(round(float(rows[1][5]) * 12 / 100), 12)
    for robust in {*range(40)} & {int(0.4 * bound) + more for bound in (low, high) for more in (0, 1)}:
        edit(model, n_clean=max(robust, claim.n_clean), n_robust=robust)
        (_, row), held = run(capsys, model, "--limit", "12")[1], low <= 100 * robust / 40 <= high
        assert row[6].startswith("inside" if held else "OUTSIDE"), (robust, low, high)


def test_another_seed_is_another_start_of_the_attack(model, capsys, monkeypatch):
    asked = []
    monkeypatch.setattr(verify, "evaluate", lambda *a, **k: asked.append(a[2]) or measure(*a, **k))
    assert run(capsys, model, "--seed", "5")[0] == 0 and run(capsys, model)[0] == 0
    assert [a.seed for a in asked] == [5, 0] and asked[0] == dataclasses.replace(asked[1], seed=5)
