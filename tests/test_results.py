"""The figures in the documents are those of the results files: nobody types a number."""

from __future__ import annotations

import json
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


def missing(table: str, document: str) -> list[str]:
    """Lines of a table that a document does not show."""
    text = (ROOT / document).read_text(encoding="utf-8").splitlines()
    return [line for line in table.splitlines() if line not in text]


def test_readme_and_results_show_the_quickstarts_own_table():
    summary = json.loads((ROOT / "docs" / "results" / "quickstart.json").read_text())
    assert summary["smoke"] is False and len(summary["tasks"]) >= 12
    table = result_table(summary)
    assert len(table.splitlines()) == 2 + 6
    for document in ("README.md", "docs/experiments.md"):
        assert missing(table, document) == [], document


@pytest.mark.parametrize(("group", "sets"), [("lab", 15), ("real", 12)])
def test_results_show_the_comparisons_own_tables(group, sets):
    results = json.loads((ROOT / "docs" / "results" / f"compare-{group}.json").read_text())
    assert {"vanilla", "hpt", "hpt_gpd", "tecoa", "anchor_clean"} <= set(results)
    for method, record in results.items():
        assert all(len(run["per_set"]) == sets for run in record["runs"]), method
        if method != "vanilla":
            chosen = float(compare.choose(record["rates"]))
            assert {run["learning_rate"] for run in record["runs"]} == {chosen}
            assert compare.recipe(group, method, [])[2].learning_rate == chosen, (
                "the recipe holds the rate that was chosen"
            )
    assert missing(compare.table(results), "docs/experiments.md") == []
    assert missing(compare.rate_table(results), "docs/experiments.md") == []
    assert len(compare.table(results).splitlines()) == 2 + len(results) + 2


def test_the_recipe_for_own_images_holds_the_rate_that_its_rule_chooses():
    rows = json.loads((ROOT / "docs" / "results" / "own_images.json").read_text())["rows"]
    assert len(rows) == len(own_images.SETS) * len(own_images.RATES) and len(own_images.SETS) >= 4
    chosen, table = own_images.choose(rows)
    flags = ["--config", "own_images", "--dataset", "x", "--output_dir", "out", "--use_cpu", "true"]
    _, method, training = parse(RECIPE, flags)
    assert training.learning_rate == chosen and method.ga_learning_rate == pytest.approx(0.3 * chosen)
    assert missing(table, "docs/experiments.md") == []


def test_the_page_on_families_shows_how_far_the_resize_inside_the_model_is_from_each_processor():
    found = json.loads((ROOT / "docs" / "results" / "preprocessing.json").read_text())["found"]
    assert missing(preprocessing.table(found), "docs/families.md") == [] and len(found) == len(
        preprocessing.PROCESSORS
    )
    assert missing(lora.table(json.loads((ROOT / "docs/results/lora.json").read_text())), "docs/families.md") == []
    assert all(most <= 1.2 for each in found.values() for most, _ in each.values())


def test_the_log_shows_what_each_proxy_teaches():
    found = json.loads((ROOT / "docs" / "results" / "proxies.json").read_text())
    assert missing(proxies.table(found), "docs/experiments.md") == []
    assert sum(run["row"] in proxies.PROXIES for run in found["runs"]) == len(proxies.PROXIES) * len(proxies.SEEDS)


def test_evaluation_shows_the_comparison_with_the_independent_implementation():
    runs = json.loads((ROOT / "docs" / "results" / "independent.json").read_text())
    for run in runs:
        assert missing(independent.table(run), "docs/evaluation.md") == []
        for total in run["eps"].values():
            ours, theirs = (total[who]["square"][0] for who in ("ours", "independent"))
            assert 100 * abs(ours - theirs) / total["n"] <= 0.5, (
                "another implementation of the same attacks, the same accuracy"
            )
    assert len({eps for run in runs for eps in run["eps"]}) == 3


@pytest.mark.parametrize("world", study.WORLDS)
def test_results_show_the_study_of_teachers(world):
    found = json.loads((ROOT / "docs" / "results" / f"study-{world}.json").read_text())
    strict = json.loads((ROOT / "docs" / "results" / f"strict-{world}.json").read_text())
    tables = [study.kept(found), study.table(found), study.margins(found), study.table(strict)]
    assert [missing(table, "docs/results.md") for table in tables] == [[]] * len(tables)
    assert strict["checked"] and strict["attack"].startswith("standard") and len(strict["rows"]) >= 4
    assert {row["row"] for row in found["rows"]} <= set(study.ROWS) and len(found["rows"]) >= 8
    assert all(row["difference"] or row["row"] == study.REFERENCE for row in found["rows"])


def test_results_show_the_fronts_and_the_recipes_hold_the_rates_that_were_chosen():
    found = json.loads((ROOT / "docs" / "results" / "fronts-photographs.json").read_text())
    assert missing(fronts.table(found), "docs/results.md") == []
    photographs = json.loads((ROOT / "docs" / "results" / "study-photographs.json").read_text())
    assert missing(study.brief(photographs), "README.md") == []
    chosen = {row["row"]: float(row["rate"]) for row in found["rows"] if row["chosen"]}
    for row, name in (("TeCoA", "tecoa"), ("anchor, clean", "anchor_clean"), ("PMG-AFT", "pmg_aft"), ("FARE", "fare")):
        recipe = yaml.safe_load((ROOT / "recipes" / "photographs" / f"{name}.yaml").read_text())
        assert recipe["learning_rate"] == chosen[row]


@pytest.mark.parametrize("world", narrow.WORLDS)
def test_results_show_the_narrow_regime(world):
    found = json.loads((ROOT / "docs" / "results" / f"narrow-{world}.json").read_text())
    assert missing(narrow.table(found), "docs/results.md") == [] and len({r["rate"] for r in found["runs"]}) >= 2


def test_the_lab_shows_what_the_photographs_models_read():
    found = json.loads((ROOT / "docs" / "results" / "photographs.json").read_text())
    assert (
        missing(photographs.table(found), "docs/lab.md") == [] == missing(photographs.kept_table(found), "docs/lab.md")
    )
    read = {name for name, one in found["sets"].items() if one["clean"]["student"] * one["classes"] >= 300}
    assert read == set(PHOTO_SUITE), "the suite is what the student reads"


def strict_table(strict: dict) -> str:
    rows = [
        (name, s["clean"], s["robust"], "{:.1f}–{:.1f}".format(*s["interval"]), *s["parts"].values(), s["verdict"])
        for name, s in strict["sets"].items()
    ]
    header = ("task", "clean %", "robust %", "95%", "after APGD-CE", "after APGD-T", "after Square", "verdict")
    return markdown(header, [*rows, ("mean", strict["mean"]["clean"], strict["mean"]["robust"], "", "", "", "", "")])


def test_results_show_the_strict_evaluation():
    strict = json.loads((ROOT / "docs" / "results" / "strict.json").read_text())
    assert len(strict["sets"]) == 12 and {s["n"] for s in strict["sets"].values()} == {200}
    assert missing(strict_table(strict), "docs/experiments.md") == []


def test_results_show_the_dial():
    front = json.loads((ROOT / "docs" / "results" / "dial.json").read_text())
    assert len(front["points"]) == 11 and len(front["points"][0]["reported"]["sets"]) == 5
    assert missing(dial.table(front), "docs/experiments.md") == []


def test_performance_shows_the_benchmarks_own_table(tmp_path):
    summary = json.loads((ROOT / "docs" / "results" / "step.json").read_text())
    assert len(step.table(summary).splitlines()) == 2 + 7
    assert missing(step.table(summary), "docs/performance.md") == []
    pixels, (ours, plain) = summary["same"]["share_of_pixels_that_differ"], summary["same"]["loss"]
    assert pixels < 1e-4 and abs(ours - plain) < 1e-4 * plain, "the two steps do the same thing"
    step.plot(summary, tmp_path / "step.svg")
    assert (tmp_path / "step.svg").read_text().count("<path") > 50


def test_performance_shows_how_a_step_grows():
    found = json.loads((ROOT / "docs" / "results" / "scaling.json").read_text())
    assert len(scaling.table(found).splitlines()) == 2 + 5 + 4 + 3
    assert missing(scaling.table(found), "docs/performance.md") == []
    assert missing(scaling.loading_table(found), "docs/performance.md") == []


def test_performance_shows_what_attacks_cost_and_presets_are_those_that_were_measured():
    results = json.loads((ROOT / "docs" / "results" / "attack_cost.json").read_text())
    assert [{r["seed"] for r in runs} for runs in results["options"].values()] == [{0, 1, 2}] * len(
        attack_cost.OPTIONS
    )
    assert missing(attack_cost.table(results), "docs/performance.md") == []
    assert missing(attack_cost.watch_table(results["watch"]), "docs/performance.md") == []
    presets = {"one_step": "1 step, no random start", "paper": attack_cost.PAPER, "five_steps": "5 steps"}
    assert presets["one_step"] in attack_cost.holds(results)
    for preset, name in presets.items():
        said = [
            "--config",
            str(ROOT / attack_cost.RECIPE_FILE),
            "--config",
            str(ROOT / "recipes" / "attacks" / f"{preset}.yaml"),
        ]
        laid = build_attack(parse(RECIPE, said)[1])
        kind, steps, size, _ = attack_cost.OPTIONS[name]
        measured = kind(laid.threat, steps, size / 255)
        assert (laid.steps, laid.random_start) == (measured.steps, measured.random_start)
        assert laid.step_size == pytest.approx(measured.step_size, rel=1e-6)


def test_counting_plain_operations_from_small_steps_is_exact(monkeypatch):
    """The four small counts give the large one, whatever the four terms are."""
    monkeypatch.setattr(
        step,
        "count_flops",
        lambda kind, folder, classes, images: 7 + 11 * classes + 13 * images + 17 * classes * images,
    )
    assert step.count_plain_flops(Path(), 200, 16) == 7 + 11 * 200 + 13 * 16 + 17 * 200 * 16
