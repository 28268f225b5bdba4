"""Every recipe in the repository parses, builds and trains for two steps on tiny models, and says in its header what is known of it."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import yaml
from conftest import CLASSES, encode, make_images, write_parquet

from hpt_hf.commands.parser import parse
from hpt_hf.commands.train import RECIPE, build_attack, run

ROOT = Path(__file__).parent.parent
RECIPES = sorted(p for p in (ROOT / "recipes").rglob("*.yaml") if p.parent.name not in ("accelerate", "attacks"))
PRESETS = sorted((ROOT / "recipes" / "attacks").glob("*.yaml"))
SHORT = "--max_steps 2 --use_cpu true --dataloader_num_workers 0 --per_device_train_batch_size 4"
SHORT += " --gradient_accumulation_steps 1 --held_out 0.2 --logging_steps 1 --disable_tqdm true"
OTHER = re.compile("eps2|eps4|l14")  # recipes of another experiment
WORDNET_IDS = ("n01443537", "n02129165", "n02190166", "n02206856", "n02395406")  # goldfish, lion, fly, bee, hog


def test_the_recipes_that_were_asked_for_are_there():
    methods = ("hpt", "hpt_gpd", "tecoa", "fare", "pmg_aft", "anchor_clean")
    wanted = {
        "quickstart",
        "own_images",
        *(f"best/{n}" for n in ("glyphs", "photographs", "tiny_imagenet", "imagenet")),
    }
    wanted |= {f"{world}/{m}" for m in methods for world in ("lab", "real", "photographs")}
    wanted |= {f"{world}/{m}" for m in ("ucat", "pmg_anchor_clean") for world in ("lab", "photographs")}
    wanted |= {f"tiny_imagenet/hpt_gpd_{model}" for model in ("vit_b32_eps2", "vit_b32_eps4", "vit_l14_eps1")}
    wanted |= {f"tiny_imagenet/{m}_vit_b32_eps1" for m in methods}
    assert {str(p.relative_to(ROOT / "recipes").with_suffix("")) for p in RECIPES} == wanted and len(wanted) == 37


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda p: f"{p.parent.name}/{p.stem}")
def test_recipe_runs_two_steps(recipe, tmp_path, student_path, proxy_path, monkeypatch):
    monkeypatch.chdir(ROOT)  # recipes name their class file from the repository's root
    text = recipe.read_text()
    assert len(text.splitlines()) <= 40
    assert "# hardware:" in text and "# command:" in text
    images = make_images(20)
    encoded, names = [encode(row["image"]) for row in images], WORDNET_IDS if "imagenet_wordnet" in text else CLASSES
    data = write_parquet(tmp_path / "data.parquet", encoded, images.labels, names=names)
    flags = f"--config {recipe} --dataset {data} --model {student_path} {SHORT} --output_dir {tmp_path / 'out'}"
    if "\nproxy:" in text:
        flags += f" --proxy {proxy_path}"
    data, method, training = parse(RECIPE, flags.split())
    record = run(data, method, training)
    assert record["steps"] == record["trainer"].state.global_step == 2
    logged = [row["phase"] for row in record["trainer"].state.log_history if "phase" in row]
    assert logged == (["ga", "hpt"] if method.method == "hpt_gpd" else [method.method] * 2)
    assert (tmp_path / "out" / "model.safetensors").is_file()
    assert set(record["held_out"]) == {"eval_clean_accuracy", "eval_robust_accuracy"}


def test_recipes_of_one_experiment_differ_only_in_the_method():
    """`diff` between two of them is the science: the data, the threat and the number of epochs are the same lines."""
    same = ("dataset", "eps", "attack_steps", "attack_step_size", "held_out", "model", "per_device_train_batch_size")
    for group in ("lab", "real", "photographs", "tiny_imagenet"):
        found = [yaml.safe_load(p.read_text()) for p in RECIPES if p.parent.name == group and not OTHER.search(p.stem)]
        assert len({tuple(recipe.get(name) for name in same) for recipe in found}) == 1, group
        assert len({recipe.get("ga_epochs", 0) + recipe["num_train_epochs"] for recipe in found}) == 1, group


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
