"""A sweep chooses by its rule on what training never saw, runs nothing twice, and measures the chosen setting alone."""

from __future__ import annotations

import json
import re
import shutil

import pytest
from conftest import contents, make_images

from hpt_hf.commands import sweep
from hpt_hf.commands.parser import RecipeError
from hpt_hf.data.splits import leave_out_classes

STEPS = "--method anchor_clean --max_steps 3 --per_device_train_batch_size 8 --eps 8/255 --use_cpu true --disable_tqdm true"


@pytest.fixture(scope="module")
def flags(tmp_path_factory, paths):
    place = tmp_path_factory.mktemp("sweep")
    for name, seed in (("train", 0), ("other", 3), ("test", 5)):
        images = make_images(40, seed=seed)
        images.data.remove_columns("row").to_parquet(place / f"{name}.parquet")
    flags = f"--dataset {place / 'train.parquet'} --model {paths[0]} {STEPS} --learning_rate 1e-3 10 --limit 20"
    flags += f" --leave_out_classes 0.4 --choose_on {place / 'other.parquet'} --measure_on {place / 'test.parquet'}"
    return [*flags.split(), "--measure_attack_steps", "2", "--seed", "0", "1"]


@pytest.fixture(scope="module")
def swept(flags, tmp_path_factory):
    folder = tmp_path_factory.mktemp("swept")
    sweep.main([*flags, "--output_dir", str(folder)])
    return folder


def chosen(folder) -> str:
    return sweep.name_of(json.loads((folder / "sweep.json").read_text())["chosen"])


def test_the_rule_takes_the_highest_mean_on_left_out_classes_and_further_sets(swept):
    record = json.loads((swept / "sweep.json").read_text())
    means = {name: (s["clean"] + s["robust"]) / 2 for name, s in record["settings"].items()}
    assert set(means) == {"learning_rate=1e-3", "learning_rate=10"}
    assert len(set(means.values())) == 2, "or any choice would do"
    best = max(means, key=means.get)
    assert record["chosen"] == {"learning_rate": best.split("=")[1]} and set(record["runs"]) == {"0", "1"}
    for seen in record["settings"].values():
        assert {name.split("/")[-1] for name in seen["sets"]} == {"train (classes left out)", "other"}
    assert f"Chosen: {best}" in (swept / "choice.md").read_text()
    assert "<svg" in (swept / "choice.svg").read_text()


def test_only_the_chosen_setting_is_trained_on_all_classes_and_measured_on_the_test_set(swept):
    tested = {str(f.relative_to(swept).parent.parent) for f in swept.rglob("results/*test*.json")}
    assert tested == {f"{chosen(swept)}/seed0", f"{chosen(swept)}/seed1"}
    for folder, classes in (("choice/learning_rate=1e-3", 3), (f"{chosen(swept)}/seed0", 5)):
        assert json.loads((swept / folder / "train.json").read_text())["classes"] == classes


def test_nothing_is_run_twice_and_what_is_missing_is(swept, flags, monkeypatch):
    before, trained = contents(swept), []
    monkeypatch.setattr(sweep.train, "run", lambda *recipe: trained.append(recipe[2].output_dir))
    sweep.main([*flags, "--output_dir", str(swept)])
    assert contents(swept) == before and not trained
    (swept / chosen(swept) / "seed1" / "train.json").rename(swept / "aside.json")
    sweep.main([*flags, "--output_dir", str(swept)])
    (swept / "aside.json").rename(swept / chosen(swept) / "seed1" / "train.json")
    assert [folder.split("/")[-1] for folder in trained] == ["seed1"]


@pytest.mark.parametrize(
    ("more", "probe", "told"),
    [
        (["--measure_attack_steps", "3"], 0, ("pgd-3", 20, "unchecked")),
        (["--limit", "15"], 0, ("pgd-2", 15, "unchecked")),
        ([], 8, ("pgd-2", 20, "remark")),
    ],
)
def test_what_stands_there_answers_no_other_question(more, probe, told, swept, flags, tmp_path):
    grid = sweep.Grid.read([*flags, *more, "--output_dir", str(tmp_path)])
    folder = shutil.copytree(swept / chosen(swept) / "seed0", tmp_path / "seed0")
    sets = sweep._opened(grid.args.measure_on, None, None)
    setting = {"learning_rate": chosen(swept).split("=")[1]}
    recipe = grid.recipe(setting, "0", folder, "--leave_out_classes", "0")
    (found,) = sweep.run_one(grid, folder, recipe, sets, probe)
    assert (found.attack, found.n, found.verdict) == told


@pytest.mark.parametrize("more", ["--eps 4/255", "--max_steps 4", "--optim adamw_torch"])
def test_a_folder_with_runs_of_another_recipe_is_refused(more, swept, flags):
    before, name = contents(swept), more.split()[0][2:]
    with pytest.raises(RecipeError, match=f"another recipe: {name}: got"):
        sweep.run(sweep.Grid.read([*flags, *more.split(), "--output_dir", str(swept)]))
    assert contents(swept) == before


def test_a_run_that_another_process_is_at_is_left_to_it(swept):
    folder = swept / chosen(swept) / "seed0"
    with sweep.sole(folder) as mine, sweep.sole(folder) as second:
        assert mine and not second


def test_a_setting_that_diverges_is_not_chosen_and_stops_nothing(flags, tmp_path, capsys):
    """One rate of two is far too high; alone it leaves nothing to choose."""
    line = " ".join([*flags, "--output_dir", str(tmp_path / "out")])
    high = re.sub(r"--learning_rate( [^-]\S*)+", "--learning_rate 1e30 1e-3", line)
    sweep.main(high.split())
    assert chosen(tmp_path / "out") == "learning_rate=1e-3"
    assert "learning_rate=1e30 diverged" in capsys.readouterr().out
    with pytest.raises(RecipeError, match="every setting diverged"):
        sweep.run(sweep.Grid.read(high.replace("1e-3", "1e31").split()))


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ("learning_rate 1e-3 10 --learnin_rate 1", "unknown key --learnin_rate.*learning_rate"),
        ("learning_rate 1e-3 10 --kl_direction forward sideways", "sideways"),
        ("learning_rate 1e-3 fast", "fast"),
        ("leave_out_classes 0.9", "at least 2 in each part"),
        ("leave_out_classes 0 --choose_on", "nothing to choose on"),
        ("output_dir", "output_dir: got none"),
    ],
)
def test_a_mistake_is_told_before_anything_is_trained(change, says, flags, tmp_path):
    line = " ".join([*flags, "--output_dir", str(tmp_path / "out")])
    for flag in change.split(" --"):  # instead of what is said of it there
        line = re.sub(rf" --{flag.split()[0]}( [^-]\S*)+", "", line) + f" --{flag}"
    with pytest.raises(ValueError, match=says):
        sweep.run(sweep.Grid.read(line.removesuffix(" --choose_on").split()))
    assert not list(tmp_path.rglob("train.json"))


def test_classes_left_out_are_the_same_every_time_and_in_no_training_image():
    images = make_images(40)
    (stay, aside), (again, _) = leave_out_classes(images, 0.4), leave_out_classes(images, 0.4)
    assert {*stay.classes, *aside.classes} == {*images.classes} and again.digest == stay.digest
    assert (len(stay.classes), len(aside.classes), len(stay) + len(aside)) == (3, 2, 40)
    for part in (stay, aside):
        for i in range(0, len(part), 7):
            row = part.data[i]["row"]
            assert part.classes[part.labels[i]] == images.classes[images.labels[row]]
    assert leave_out_classes(images, 0.0) == (images, None)
