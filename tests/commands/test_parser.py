"""A recipe is read as typed text, the command line wins, and evaluate does what was said."""

from pathlib import Path

import pytest
import torch
from conftest import make_images, write_image_folder

from hpt_hf.commands import evaluate
from hpt_hf.commands.evaluate import EvaluateArguments
from hpt_hf.commands.parser import RecipeError, parse
from hpt_hf.commands.train import RECIPE as TYPES
from hpt_hf.commands.train import build_attack, build_schedule
from hpt_hf.evaluation.result import read_results

RECIPE = """
# a comment
method: hpt_gpd
dataset: pictures/
model: student
proxy: proxy
learning_rate: 2e-5
classes: [cat, red car, 7]
restart: false
ga_learning_rate: null
use_cpu: true
output_dir: out
"""


def read(tmp_path, *flags: str, text: str = RECIPE):
    (tmp_path / "recipe.yaml").write_text(text)
    return parse(TYPES, ["--config", str(tmp_path / "recipe.yaml"), *flags])


def test_a_recipe_becomes_dataclasses(tmp_path):
    data, method, training = read(tmp_path)
    assert (data.dataset, data.classes, data.on_corrupt) == ("pictures/", ["cat", "red car", "7"], "error")
    assert (method.method, method.restart, method.ga_learning_rate, method.eps) == ("hpt_gpd", False, None, "1/255")
    assert training.learning_rate == 2e-5 and isinstance(training.learning_rate, float), "YAML has 2e-5 as a string"
    assert training.use_cpu is True
    # The authors' optimizer, not transformers'.
    assert (str(training.optim.value), training.optim_args, training.max_grad_norm) == ("sgd", "momentum=0.9", 0.0)
    assert (training.weight_decay, training.report_to, training.dataloader_drop_last) == (0.0, [], True)


def test_the_command_line_wins_wherever_it_stands_and_of_two_recipes_the_later(tmp_path):
    assert read(tmp_path, "--classes", "a", "b")[0].classes == ["a", "b"], "a list is replaced and not added to"
    (tmp_path / "other.yaml").write_text("learning_rate: 1e-3\n")
    first, second = (str(tmp_path / name) for name in ("recipe.yaml", "other.yaml"))
    own = ["--restart", "true", "--method", "hpt"]
    for argv, rate in (
        (["--config", first, "--learning_rate", "3e-4"], 3e-4),
        (["--learning_rate=3e-4", "--config", first], 3e-4),
        ([f"--config={first}", "--config", second], 1e-3),
    ):
        _, method, training = parse(TYPES, [*argv, *own])
        assert (training.learning_rate, method.restart, method.method) == (rate, True, "hpt")


def test_text_of_a_recipe_stays_as_it_is_written(tmp_path):
    names = ["no", "yes", "on", "007", "1:30", "null", "1e3", "0x1F", "2024-01-01", "~", ".5", "1_000"]
    data, *_ = read(tmp_path, text=RECIPE.replace("[cat, red car, 7]", f"[{', '.join(names)}]"))
    assert data.classes == names


@pytest.mark.parametrize(
    ("given", "says"),
    [
        (["--prox", "p"], "unknown key --prox"),  # argparse alone would take it for --proxy
        (["--evaluation_strategy", "no"], "unknown key --evaluation_strategy; did you mean eval_strategy"),
        (["--xyzzy=1"], "unknown key --xyzzy; see --help"),
        (["--max_steps", "2.5"], "invalid int value: '2.5'"),
        (["--restart", "perhaps"], "Truthy value expected"),
        (["stray"], "stray"),
        (["--config"], "--config needs a recipe"),
        (["--config", "absent.yaml"], "no recipe at absent.yaml"),
        (RECIPE + "learning_rat: 1\n", "unknown key 'learning_rat' in {path}; did you mean learning_rate"),
        (RECIPE + "eps: {norm: linf}\n", "'eps' in {path} is nested: recipes are flat"),
        (RECIPE + "kl_direction: backward\n", "invalid choice: 'backward'"),
        ("- method: hpt\n", "{path} must be a flat list of `key: value` lines, it is a list"),
        ("", "it is a NoneType"),
        ("method: [hpt\n", "{path} is not YAML: "),
        ("method: hpt\n", "the following arguments are required: --dataset, --model"),
        (RECIPE + "eps: 2/255\neps: 4/255\n", "{path}: 'eps' stands more than once"),
        (RECIPE + "templates:\n- a photo: {}\n", "'templates' in {path}: got "),
    ],
    ids=lambda v: " ".join(v).replace(RECIPE, "") if isinstance(v, list) else v[-30:],
)
def test_what_does_not_fit_is_refused(given, says, tmp_path):
    with pytest.raises(RecipeError) as error:
        read(tmp_path, text=given) if isinstance(given, str) else read(tmp_path, *given)
    assert says.format(path=tmp_path / "recipe.yaml") in str(error.value)


def schedule(tmp_path, *flags, steps_per_epoch=10):
    _, method, training = read(tmp_path, *flags)
    return training.resolve(build_schedule(method), steps_per_epoch)


def test_epochs_become_steps(tmp_path):
    flags = "--num_train_epochs 4 --ga_epochs 1.5 --learning_rate 0.02 --restart true"
    whole = schedule(tmp_path, *flags.split())
    first, second = whole.phases
    told = [(p.objective.name, p.steps, p.learning_rate) for p in whole.phases]
    assert told == [("ga", 15, 2e-5), ("hpt", 40, 0.02)]
    assert (whole.interval, first.ema, second.pull, second.restart) == (10, 0.9, 0.5, True)
    assert schedule(tmp_path, "--interval", "3").interval == 3 and not schedule(tmp_path).phases[1].restart
    for total in (2, 3, 7, 20, 1000):  # max_steps shrinks both stages
        steps = [p.steps for p in schedule(tmp_path, "--max_steps", str(total), "--num_train_epochs", "3").phases]
        assert sum(steps) == total and steps[0] == max(1, round(total / 4))
    assert [p.steps for p in schedule(tmp_path, "--max_steps", "1", "--method", "tecoa").phases] == [1]


def test_options_of_the_method_reach_every_phase(tmp_path):
    flags = "--kl_direction reverse --student_temperature 2 --teacher_temperature 3 --attack_on proxy"
    flags += " --warmup_steps 4 --attack_loss kl --average_last 0.5 --final_pull true"
    made = schedule(tmp_path, *flags.split())
    for phase in made.phases:
        kl = phase.objective.divergence
        assert (kl.direction, kl.student_temperature, kl.teacher_temperature) == ("reverse", 2.0, 3.0)
        assert (phase.objective.attack_on, phase.objective.attack.name) == ("proxy", "kl")
    assert [(p.average_last, p.final_pull) for p in made.phases] == [(None, False), (0.5, True)]
    assert [p.warmup_steps for p in made.phases] == [0, 4], "the ramp is the second stage's"
    with pytest.raises(ValueError, match="'proxy' where tecoa has one"):
        schedule(tmp_path, "--attack_on", "proxy", "--method", "tecoa")


@pytest.mark.parametrize(
    ("flags", "steps", "size"),
    [
        ([], 2, 8 / 255),  # the whole radius
        (["--attack_step_size", "2/255", "--attack_steps", "5"], 5, 2 / 255),
        (["--attack_step_size", "1/4eps"], 2, 2 / 255),
        (["--attack_step_size", "300", "--norm", "l2"], 2, 300),
        (["--attack_random_start", "false"], 2, 8 / 255),
    ],
)
def test_a_step_of_the_attack_is_a_fraction_of_the_pixels_or_of_the_radius(flags, steps, size, tmp_path):
    attack = build_attack(read(tmp_path, "--eps", "8/255", *flags)[1])
    images, seen = torch.full((1, 3, 2, 2), 0.5), []

    def loss(x):
        seen.append(x.detach())
        return x.flatten(1).sum(1)

    attack(loss, images, torch.tensor([1]), seed=0, round=0)
    assert torch.equal(seen[0], images) == ("false" in flags)
    assert len(seen) == steps and attack.threat.norm == ("l2" if "l2" in flags else "linf")
    assert (attack.threat.radius if attack.step_size is None else attack.step_size) == pytest.approx(size, abs=1e-7)


def test_what_evaluate_writes(tmp_path, student_path, capsys):
    data, out = write_image_folder(tmp_path / "data", make_images(10)), tmp_path / "scores"
    more = f"--dataset {data} --output_dir {out} --attack_steps 3 --limit 7 --probe 3"
    evaluate.main(["--model", student_path, *more.split()])
    said, report = capsys.readouterr(), (out / "report.md").read_text()
    assert len(list((out / "results").glob("*.json"))) == 1 and (out / "report.html").is_file()
    assert "n = 7" in said.err and said.out == report + "\n" and report.startswith(f"# {Path(student_path).name}\n")
    assert "\n## pgd-3, linf 1/255, protocol “input”, 7 images a set\n\n| data set" in report


def test_each_attack_at_each_radius_is_a_score_of_each_set_once(tmp_path, student_path):
    data = [write_image_folder(tmp_path / name, make_images(5)) for name in ("one", "two")]
    asked = "--attack pgd cw pgd --eps 2/255 1/255 --attack_steps 1 --probe 0 --seed 3"
    argv = ["--model", student_path, "--output_dir", str(tmp_path / "o"), "--dataset", *data, *asked.split()]
    scores = evaluate.run(*parse((EvaluateArguments,), argv))
    told = [(s.attack, s.eps, s.dataset, s.seed, s.verdict) for s in scores]
    wanted = [(a, e, d) for a in ("pgd-1", "cw-1") for e in ("2/255", "1/255") for d in ("one", "two")]
    assert told == [(*one, 3, "unchecked") for one in wanted]
    assert sorted(read_results(tmp_path / "o" / "results"), key=repr) == sorted(scores, key=repr)


def test_several_models_are_measured_in_one_command_and_compared(tmp_path, student_path, trained, capsys):
    """That each result is what the model alone gives is shown in tests/test_api.py."""
    data, ours = write_image_folder(tmp_path / "data", make_images(12)), str(tmp_path / "ours")
    trained.save_pretrained(ours)
    asked = f"--dataset {data} --attack_steps 2 --eps 8/255 --probe 0 --output_dir {tmp_path / 'both'}"
    evaluate.main(["--model", ours, student_path, *asked.split()])
    said, found = capsys.readouterr(), read_results(tmp_path / "both" / "results")
    assert {r.model for r in found} == {ours, student_path} and found[0].ends != found[1].ends
    assert "clean, paired" in said.out and "reference" in said.out and f"{ours}, data: clean" in said.err
    with pytest.raises(RecipeError, match="--model_revision: got it for 2 models"):
        evaluate.run(*parse((EvaluateArguments,), ["--model", "a", "b", "--model_revision", "main"]))
