"""Every recipe in the repository parses, builds and trains for two steps on tiny models, and says in its header what is known of it."""

from __future__ import annotations

from pathlib import Path

import datasets
import pytest
from conftest import CLASSES, make_images

from hpt_hf.commands.parser import parse
from hpt_hf.commands.train import RECIPE, DataArguments, MethodArguments, build_attack, run
from hpt_hf.training.config import HPTConfig

ROOT = Path(__file__).parent.parent
RECIPES = sorted(p for p in (ROOT / "recipes").rglob("*.yaml") if p.parent.name not in ("accelerate", "attacks"))
PRESETS = sorted((ROOT / "recipes" / "attacks").glob("*.yaml"))
WORDNET_IDS = ("n01443537", "n02129165", "n02190166", "n02206856", "n02395406")  # goldfish, lion, fly, bee, hog


def test_the_recipes_that_were_asked_for_are_there():
    names = {str(p.relative_to(ROOT / "recipes")) for p in RECIPES}
    methods = ("hpt", "hpt_gpd", "tecoa", "fare", "pmg_aft", "anchor_clean")
    wanted = {
        "quickstart.yaml",
        "own_images.yaml",
        *(f"best/{name}.yaml" for name in ("glyphs", "photographs", "tiny_imagenet", "imagenet")),
        *(f"lab/{m}.yaml" for m in methods),
        *(f"{world}/{m}.yaml" for m in methods for world in ("real", "photographs")),
    }
    wanted |= {f"tiny_imagenet/hpt_gpd_vit_b32_eps{e}.yaml" for e in (1, 2, 4)} | {
        "tiny_imagenet/hpt_gpd_vit_l14_eps1.yaml"
    }
    wanted |= {f"tiny_imagenet/{m}_vit_b32_eps1.yaml" for m in methods}
    assert wanted <= names
    assert len(RECIPES) == len(wanted) == 33


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda p: f"{p.parent.name}/{p.stem}")
def test_recipe_runs_two_steps(recipe, tmp_path, student_path, proxy_path, monkeypatch):
    monkeypatch.chdir(ROOT)  # recipes name their class file from the repository's root
    text = recipe.read_text()
    assert len(text.splitlines()) <= 40
    assert "# hardware:" in text and "# command:" in text
    pictures = make_images(20)
    labels = datasets.ClassLabel(names=list(WORDNET_IDS if "imagenet_wordnet" in text else CLASSES))
    features = datasets.Features({"image": datasets.Image(), "label": labels})
    rows = list(pictures)
    table = datasets.Dataset.from_dict(
        {"image": [r["image"] for r in rows], "label": [r["label"] for r in rows]}, features=features
    )
    table.to_parquet(tmp_path / "data.parquet")
    flags = [
        "--config",
        str(recipe),
        "--dataset",
        str(tmp_path / "data.parquet"),
        "--model",
        student_path,
        "--max_steps",
        "2",
    ]
    flags += [
        "--use_cpu",
        "true",
        "--dataloader_num_workers",
        "0",
        "--per_device_train_batch_size",
        "4",
        "--gradient_accumulation_steps",
        "1",
    ]
    flags += [
        "--output_dir",
        str(tmp_path / "out"),
        "--held_out",
        "0.2",
        "--logging_steps",
        "1",
        "--disable_tqdm",
        "true",
    ]
    if "\nproxy:" in text:
        flags += ["--proxy", proxy_path]
    data, method, training = parse((DataArguments, MethodArguments, HPTConfig), flags)
    record = run(data, method, training)
    assert record["steps"] == record["trainer"].state.global_step == 2
    logged = [row["phase"] for row in record["trainer"].state.log_history if "phase" in row]
    assert logged == (["ga", "hpt"] if method.method == "hpt_gpd" else [method.method] * 2)
    assert (tmp_path / "out" / "model.safetensors").is_file() and (tmp_path / "out" / "train.json").is_file()
    assert set(record["held_out"]) == {"eval_clean_accuracy", "eval_robust_accuracy"}


def test_recipes_of_one_experiment_differ_only_in_the_method():
    """`diff` between two of them is the science: the data, the threat and the number of epochs are the same lines."""
    for group in ("lab", "real", "photographs", "tiny_imagenet"):
        same = (
            "dataset:",
            "eps:",
            "attack_steps:",
            "attack_step_size:",
            "held_out:",
            "model:",
            "per_device_train_batch_size:",
        )
        shared = set()
        totals = set()
        for recipe in (
            p for p in RECIPES if p.parent.name == group and not any(e in p.stem for e in ("eps2", "eps4", "l14"))
        ):
            lines = [line for line in recipe.read_text().splitlines() if not line.startswith("#")]
            shared.add(tuple(line for line in lines if line.startswith(same)))
            epochs = [
                float(line.split(":")[1]) for line in lines if line.startswith(("ga_epochs:", "num_train_epochs:"))
            ]
            totals.add(sum(epochs))
        assert len(shared) == 1 and len(totals) == 1, (group, shared, totals)


@pytest.mark.parametrize("preset", PRESETS, ids=lambda p: p.stem)
def test_a_preset_lays_an_attack_over_any_recipe_and_touches_nothing_else(preset):
    assert len(PRESETS) == 3 and f"--config recipes/attacks/{preset.name}" in preset.read_text()
    made = set()
    for recipe in RECIPES:
        data = ["--dataset", "my_images"] if recipe.stem == "own_images" else []
        plain, laid = (
            parse(RECIPE, ["--config", str(recipe), *data, "--output_dir", "out", "--use_cpu", "true", *more])[:2]
            for more in ([], ["--config", str(preset)])
        )
        assert plain[0] == laid[0]
        changed = {k for k, v in vars(plain[1]).items() if vars(laid[1])[k] != v}
        assert changed <= {"attack_steps", "attack_step_size", "attack_random_start"}
        attack = build_attack(laid[1])
        made.add((attack.steps, round(attack.step_size / attack.threat.radius, 5), attack.random_start))
    assert len(made) == 1, "the same attack whatever the recipe said before"
