"""The figures in the documents are those of the results files: nobody types a number."""

from __future__ import annotations

import json
import re
from pathlib import Path

import attack_cost
import compare
import fronts
import independent
import lora
import narrow
import own_images
import photographs
import preprocessing
import proxies
import pytest
import scaling
import step
import study
import yaml

from hpt_hf.commands import interpolate as dial
from hpt_hf.commands.parser import parse
from hpt_hf.commands.quickstart import result_table
from hpt_hf.commands.train import RECIPE, build_attack
from hpt_hf.lab.photographs import PHOTO_SUITE
from hpt_hf.utils import markdown

ROOT = Path(__file__).parent.parent


def result(name: str):
    return json.loads((ROOT / "docs" / "results" / f"{name}.json").read_text())


def strict_table(strict: dict) -> str:
    rows = []
    for name, s in strict["sets"].items():
        interval = "{:.1f}–{:.1f}".format(*s["interval"])
        rows.append((name, s["clean"], s["robust"], interval, *s["parts"].values(), s["verdict"]))
    header = ("task", "clean %", "robust %", "95%", "after APGD-CE", "after APGD-T", "after Square", "verdict")
    return markdown(header, [*rows, ("mean", strict["mean"]["clean"], strict["mean"]["robust"], "", "", "", "", "")])


# (results file, what makes a table of it, the document that shows it, its rows)
SHOWN = [
    *(("quickstart", result_table, document, 6) for document in ("README.md", "docs/experiments.md")),
    *((f"compare-{group}", compare.table, "docs/experiments.md", 7) for group in compare.GROUPS),
    *((f"compare-{group}", compare.rate_table, "docs/experiments.md", None) for group in compare.GROUPS),
    ("own_images", lambda found: own_images.choose(found["rows"])[1], "docs/experiments.md", 5),
    ("preprocessing", lambda found: preprocessing.table(found["found"]), "docs/families.md", 6),
    ("lora", lora.table, "docs/families.md", 4),
    ("proxies", proxies.table, "docs/experiments.md", 6),
    *(("independent", lambda runs, i=i: independent.table(runs[i]), "docs/evaluation.md", None) for i in (0, 1)),
    *((f"study-{w}", make, "docs/results.md", None) for w in study.WORLDS for make in (study.kept, study.table)),
    *((f"study-{w}", study.margins, "docs/results.md", None) for w in study.WORLDS),
    *((f"strict-{w}", study.table, "docs/results.md", None) for w in study.WORLDS),
    ("study-photographs", study.brief, "README.md", 9),
    ("fronts-photographs", fronts.table, "docs/results.md", None),
    *((f"narrow-{w}", narrow.table, "docs/results.md", None) for w in narrow.WORLDS),
    ("photographs", photographs.table, "docs/lab.md", None),
    ("photographs", photographs.kept_table, "docs/lab.md", None),
    ("strict", strict_table, "docs/experiments.md", 13),
    ("dial", dial.table, "docs/experiments.md", None),
    ("step", step.table, "docs/performance.md", 7),
    ("scaling", scaling.table, "docs/performance.md", 12),
    ("scaling", scaling.loading_table, "docs/performance.md", 3),
    ("attack_cost", attack_cost.table, "docs/performance.md", len(attack_cost.OPTIONS)),
    ("attack_cost", lambda found: attack_cost.watch_table(found["watch"]), "docs/performance.md", 3),
]


@pytest.mark.parametrize(("name", "make", "document", "rows"), SHOWN)
def test_a_document_shows_the_table_of_its_results(name, make, document, rows):
    table, text = make(result(name)).splitlines(), (ROOT / document).read_text(encoding="utf-8").splitlines()
    assert [line for line in table if line not in text] == []
    assert len(table) == 2 + rows if rows else len(table) > 3


def test_every_results_file_is_shown():
    files = {file.stem for file in (ROOT / "docs" / "results").glob("*.json")}
    assert files == {name for name, *_ in SHOWN}


# --- what the results say


@pytest.mark.parametrize("group", ["lab", "real"])
def test_the_recipes_of_a_comparison_hold_the_rates_that_its_rule_chooses(group):
    for method, record in result(f"compare-{group}").items():
        assert all(len(run["per_set"]) == len(compare.GROUPS[group][-1]) for run in record["runs"]), method
        if method != "vanilla":
            chosen = float(compare.choose(record["rates"]))
            assert {run["learning_rate"] for run in record["runs"]} == {chosen}
            assert compare.recipe(group, method, [])[2].learning_rate == chosen


def test_the_recipe_for_own_images_holds_the_rate_that_its_rule_chooses():
    rows = result("own_images")["rows"]
    assert len(rows) == len(own_images.SETS) * len(own_images.RATES)
    flags = ["--config", "own_images", "--dataset", "x", "--output_dir", "out", "--use_cpu", "true"]
    _, method, training = parse(RECIPE, flags)
    assert training.learning_rate == own_images.choose(rows)[0]
    assert method.ga_learning_rate == pytest.approx(0.3 * training.learning_rate)


def test_the_recipes_for_photographs_hold_the_rates_that_were_chosen():
    chosen = {row["row"]: float(row["rate"]) for row in result("fronts-photographs")["rows"] if row["chosen"]}
    for row, name in (("TeCoA", "tecoa"), ("anchor, clean", "anchor_clean"), ("PMG-AFT", "pmg_aft"), ("FARE", "fare")):
        recipe = yaml.safe_load((ROOT / "recipes" / "photographs" / f"{name}.yaml").read_text())
        assert recipe["learning_rate"] == chosen[row]


def test_another_implementation_of_the_same_attacks_finds_the_same_accuracy():
    for total in (total for run in result("independent") for total in run["eps"].values()):
        ours, theirs = (total[who]["square"][0] for who in ("ours", "independent"))
        assert 100 * abs(ours - theirs) / total["n"] <= 0.5


def test_the_resize_inside_the_model_is_near_each_processors():
    found = result("preprocessing")["found"]
    assert all(most <= 1.2 for each in found.values() for most, _ in each.values())


def test_the_photographs_suite_is_what_the_student_reads():
    sets = result("photographs")["sets"]
    assert {n for n, one in sets.items() if one["clean"]["student"] * one["classes"] >= 300} == set(PHOTO_SUITE)


def test_the_plain_step_does_the_same_as_ours(tmp_path):
    summary = result("step")
    same, (ours, plain) = summary["same"], summary["same"]["loss"]
    assert same["share_of_pixels_that_differ"] < 1e-4 and ours == pytest.approx(plain, rel=1e-4)
    step.plot(summary, tmp_path / "step.svg")
    assert (tmp_path / "step.svg").read_text().count("<path") > 50


def test_presets_of_attacks_are_those_that_were_measured():
    results = result("attack_cost")
    assert {r["seed"] for runs in results["options"].values() for r in runs} == {0, 1, 2}
    presets = {"one_step": "1 step, no random start", "paper": attack_cost.PAPER, "five_steps": "5 steps"}
    assert presets["one_step"] in attack_cost.holds(results)
    for preset, name in presets.items():
        said = f"--config {ROOT / attack_cost.RECIPE_FILE} --config attacks/{preset}"
        laid = build_attack(parse(RECIPE, said.split())[1])
        kind, steps, size, _ = attack_cost.OPTIONS[name]
        measured = kind(laid.threat, steps, size / 255)
        assert (laid.steps, laid.random_start) == (measured.steps, measured.random_start)
        assert laid.step_size == pytest.approx(measured.step_size, rel=1e-6)


def test_counting_plain_operations_from_small_steps_is_exact(monkeypatch):
    """The four small counts give the large one, whatever the four terms are."""
    monkeypatch.setattr(step, "count_flops", lambda kind, folder, c, i: 7 + 11 * c + 13 * i + 17 * c * i)
    assert step.count_plain_flops(Path(), 200, 16) == 7 + 11 * 200 + 13 * 16 + 17 * 200 * 16


@pytest.mark.parametrize("file", sorted((ROOT / "benchmarks").glob("*.py")), ids=lambda file: file.stem)
def test_a_benchmark_reads_only_flags_that_it_has(file):
    """`--output` is short for `--output_dir`, but `args.output` is not: it would fail after hours."""
    text = "".join(f.read_text() for f in (file, ROOT / "benchmarks" / "study.py"))  # whose parser others take
    known = set(re.findall(r'add_argument\(\s*"--(\w+)"', text))
    assert set(re.findall(r"(?<![.\w])args\.(\w+)", file.read_text())) <= known
