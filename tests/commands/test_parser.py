"""Proves that a recipe is read as typed text, that the command line wins, and that a mistake costs one line and leaves nothing behind."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import make_images, relabelled, write_image_folder

from hpt_hf.commands import evaluate, train
from hpt_hf.commands.common import dataset_spec
from hpt_hf.commands.evaluate import EvaluateArguments
from hpt_hf.commands.parser import RecipeError, parse
from hpt_hf.commands.train import DataArguments, MethodArguments, build_attack, build_schedule
from hpt_hf.evaluation.result import read_results
from hpt_hf.training.config import HPTConfig

ROOT = Path(__file__).parent.parent.parent
TYPES = (DataArguments, MethodArguments, HPTConfig)
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


def recipe(tmp_path, text: str = RECIPE) -> str:
    (tmp_path / "recipe.yaml").write_text(text)
    return str(tmp_path / "recipe.yaml")


def read(tmp_path, *flags: str, text: str = RECIPE):
    return parse(TYPES, ["--config", recipe(tmp_path, text), *flags])


# --- what a recipe becomes -------------------------------------------------------------------------------------------------


def test_a_recipe_becomes_dataclasses(tmp_path):
    data, method, training = read(tmp_path)
    assert (data.dataset, data.classes, data.on_corrupt) == ("pictures/", ["cat", "red car", "7"], "error")
    assert (method.method, method.restart, method.ga_learning_rate, method.eps) == ("hpt_gpd", False, None, "1/255")
    assert training.learning_rate == 2e-5 and isinstance(training.learning_rate, float), (
        "YAML alone keeps 2e-5 a string"
    )
    assert training.use_cpu is True


def test_defaults_are_the_authors_optimizer_and_not_transformers(tmp_path):
    _, _, training = read(tmp_path)
    assert (str(training.optim.value), training.optim_args, training.max_grad_norm) == ("sgd", "momentum=0.9", 0.0)
    assert (training.weight_decay, training.report_to, training.dataloader_drop_last) == (0.0, [], True)


def test_the_command_line_wins_wherever_it_stands(tmp_path):
    for argv in (
        ["--config", recipe(tmp_path), "--learning_rate", "3e-4"],
        ["--learning_rate=3e-4", "--config", recipe(tmp_path)],
    ):
        _, method, training = parse(TYPES, [*argv, "--restart", "true", "--method", "hpt"])
        assert (training.learning_rate, method.restart, method.method) == (3e-4, True, "hpt")
    assert read(tmp_path, "--classes", "a", "b")[0].classes == ["a", "b"], "a list is replaced and not added to"


def test_config_with_an_equals_sign_and_two_recipes(tmp_path):
    (tmp_path / "other.yaml").write_text("learning_rate: 1e-3\n")
    training = parse(TYPES, [f"--config={recipe(tmp_path)}", "--config", str(tmp_path / "other.yaml")])[2]
    assert training.learning_rate == 1e-3, "the later recipe wins"


# --- what is refused ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("flags", "says"),
    [
        (["--learning_rat", "1"], "unknown key --learning_rat; did you mean learning_rate"),
        (["--prox", "p"], "unknown key --prox"),  # argparse alone would take it for --proxy
        (["--evaluation_strategy", "no"], "unknown key --evaluation_strategy; did you mean eval_strategy"),
        (["--xyzzy=1"], "unknown key --xyzzy; see --help"),
        (["--on_corrupt", "ignore"], "invalid choice: 'ignore'"),
        (["--norm", "l1"], "invalid choice: 'l1'"),
        (["--learning_rate", "fast"], "invalid float value: 'fast'"),
        (["--max_steps", "2.5"], "invalid int value: '2.5'"),
        (["--restart", "perhaps"], "Truthy value expected"),
        (["stray"], "stray"),
        (["--config"], "--config needs a recipe"),
    ],
    ids=lambda v: " ".join(v) if isinstance(v, list) else "",
)
def test_a_flag_that_does_not_fit_is_refused(flags, says, tmp_path):
    with pytest.raises(RecipeError) as error:
        read(tmp_path, *flags)
    assert says in str(error.value)


@pytest.mark.parametrize(
    ("text", "says"),
    [
        (RECIPE + "learning_rat: 1\n", "unknown key 'learning_rat' in {path}; did you mean learning_rate"),
        (RECIPE + "eps: {norm: linf}\n", "'eps' in {path} is nested: recipes are flat"),
        (RECIPE + "kl_direction: backward\n", "invalid choice: 'backward'"),
        ("- method: hpt\n", "{path} must be a flat list of `key: value` lines, it is a list"),
        ("just words", "it is a str"),
        ("", "it is a NoneType"),
        ("method: [hpt\n", "{path} is not YAML: "),
        ("method: hpt\n", "the following arguments are required: --dataset, --model"),
        (RECIPE + "3: 4\n", "unknown key '3' in {path}"),
        (RECIPE + "eps: 2/255\neps: 4/255\n", "{path}: 'eps' stands more than once"),
        (RECIPE + "templates:\n- a photo: {}\n", "'templates' in {path}: got "),
    ],
    ids=["typo", "nested", "choice", "list", "words", "empty", "not_yaml", "incomplete", "number", "twice", "map"],
)
def test_a_recipe_that_does_not_fit_is_refused(text, says, tmp_path):
    with pytest.raises(RecipeError) as error:
        read(tmp_path, text=text)
    assert says.format(path=tmp_path / "recipe.yaml") in str(error.value)


def test_text_of_a_recipe_stays_as_it_is_written(tmp_path):
    names = ["no", "yes", "on", "007", "1:30", "null", "1e3", "0x1F", "2024-01-01", "~", ".5", "1_000"]
    data, *_ = read(tmp_path, text=RECIPE.replace("[cat, red car, 7]", f"[{', '.join(names)}]"))
    assert data.classes == names


def test_a_recipe_that_is_not_there_is_refused(tmp_path):
    with pytest.raises(RecipeError, match=r"no recipe at .*absent.yaml"):
        parse(TYPES, ["--config", str(tmp_path / "absent.yaml")])


# --- from epochs to steps ---------------------------------------------------------------------------------------------------


def schedule(tmp_path, *flags, steps_per_epoch=10):
    _, method, training = read(tmp_path, *flags)
    return training.resolve(build_schedule(method), steps_per_epoch)


def test_epochs_become_steps(tmp_path):
    whole = schedule(
        tmp_path, "--num_train_epochs", "4", "--ga_epochs", "1.5", "--learning_rate", "0.02", "--restart", "true"
    )
    first, second = whole.phases
    assert [(p.objective.name, p.steps, p.learning_rate) for p in whole.phases] == [
        ("ga", 15, 2e-5),
        ("hpt", 40, 0.02),
    ]
    assert (whole.interval, first.ema, second.pull, second.restart) == (10, 0.9, 0.5, True)
    assert schedule(tmp_path, "--interval", "3").interval == 3 and not schedule(tmp_path).phases[1].restart


def test_max_steps_shrinks_both_stages_and_two_is_the_least(tmp_path):
    assert [p.steps for p in schedule(tmp_path, "--max_steps", "2").phases] == [1, 1]
    for total in (3, 7, 20, 1000):
        steps = [p.steps for p in schedule(tmp_path, "--max_steps", str(total), "--num_train_epochs", "3").phases]
        assert sum(steps) == total and steps[0] == max(1, round(total / 4))
    with pytest.raises(ValueError, match="max_steps: got 1, expected at least 2"):
        schedule(tmp_path, "--max_steps", "1")
    assert [p.steps for p in schedule(tmp_path, "--max_steps", "1", "--method", "tecoa").phases] == [1]


def test_options_of_the_method_reach_every_phase(tmp_path):
    made = schedule(
        tmp_path,
        *("--kl_direction", "reverse", "--student_temperature", "2", "--attack_on", "proxy", "--warmup_steps", "4"),
        *("--teacher_temperature", "3", "--attack_loss", "kl", "--average_last", "0.5", "--final_pull", "true"),
    )
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
        (["--attack_step_size", "1.25 eps", "--attack_steps", "1"], 1, 10 / 255),
        (["--attack_step_size", "1/4eps"], 2, 2 / 255),
        (["--attack_step_size", "300", "--norm", "l2"], 2, 300),
        (["--attack_random_start", "false"], 2, 8 / 255),
    ],
)
def test_a_step_of_the_attack_is_a_fraction_of_the_pixels_or_of_the_radius(flags, steps, size, tmp_path):
    attack = build_attack(read(tmp_path, "--eps", "8/255", *flags)[1])
    images, gradient = torch.full((1, 3, 2, 2), 0.5), torch.ones(1, 3, 2, 2)
    seen = []
    attack(
        lambda x: seen.append(x.detach()) or (x * gradient).flatten(1).sum(1),
        images,
        torch.tensor([1]),
        seed=0,
        round=0,
    )
    assert torch.equal(seen[0], images) == ("false" in flags or attack.threat.radius == 0)
    assert len(seen) == steps and attack.threat.norm == ("l2" if "l2" in flags else "linf")
    assert (attack.threat.radius if attack.step_size is None else attack.step_size) == pytest.approx(size, abs=1e-7)


@pytest.mark.parametrize(
    ("flags", "says"),
    [
        (["--attack_steps", "0"], "attack_steps: got 0, expected at least 1"),
        (["--attack_steps", "-2"], "attack_steps: got -2, expected at least 1"),
        (["--attack_step_size", "0"], "attack_step_size: got '0', expected more than 0"),
        (["--attack_step_size", "0 eps"], "attack_step_size: got '0 eps', expected more than 0"),
        (["--attack_step_size", "2"], "attack_step_size: got '2'.* did you mean '2/255'"),
        (["--attack_step_size=-1/255"], "attack_step_size: got '-1/255', expected a fraction"),
        (["--attack_step_size", "eps"], "attack_step_size: got 'eps', expected a fraction"),
        (["--attack_step_size", "two eps"], "attack_step_size: got 'two eps', expected a fraction"),
        (["--eps", "8"], "Fix: '8/255'"),
    ],
)
def test_an_attack_that_would_not_move_or_would_leave_the_pixels_is_refused(flags, says, tmp_path):
    with pytest.raises(ValueError, match=says):
        build_attack(read(tmp_path, *flags)[1])


def test_classes_are_named_once(tmp_path):
    (tmp_path / "names.txt").write_text("cat\n  red car \n\n")
    data = read(tmp_path, "--classes_file", str(tmp_path / "names.txt"))[0]
    with pytest.raises(RecipeError, match="both --classes and --classes_file"):
        dataset_spec(data, "x", "train")
    data.classes = None
    assert dataset_spec(data, "x", "train").classes == ("cat", "red car")


# --- the mains, as a user meets them ------------------------------------------------------------------------------------------


@pytest.fixture
def good(tmp_path, student_path, proxy_path):
    """A command line that trains; each test below spoils one thing of it."""
    data = write_image_folder(tmp_path / "data", make_images(16))
    return {
        "method": "hpt_gpd",
        "dataset": data,
        "model": student_path,
        "proxy": proxy_path,
        "eps": "8/255",
        "max_steps": "2",
        "learning_rate": "1e-3",
        "per_device_train_batch_size": "8",
        "use_cpu": "true",
        "disable_tqdm": "true",
        "output_dir": str(tmp_path / "out"),
    }


def flags(settings: dict[str, str]) -> list[str]:
    return [part for key, value in settings.items() for part in (f"--{key}", value)]


def corrupt(folder: Path) -> None:
    picture = sorted(folder.rglob("*.png"))[3]
    picture.write_bytes(picture.read_bytes()[:100])


def one_line(stderr: str) -> str:
    """The one line a mistake costs, apart from warnings of libraries on the way."""
    assert "Traceback" not in stderr, stderr
    lines = [line for line in stderr.splitlines() if line.startswith("hpt-hf ")]
    assert len(lines) == 1 and stderr.rstrip().endswith(lines[0]), stderr
    return lines[0]


def test_an_epoch_has_as_many_steps_as_the_trainers_own(good, tmp_path):
    """Eleven micro-batches in fours: the epoch's third step has three, and one epoch is the whole of it."""
    settings = good | {
        "dataset": write_image_folder(tmp_path / "more", make_images(22)),
        "method": "hpt",
        "learning_rate": "1e-5",
    }
    settings |= {
        "per_device_train_batch_size": "2",
        "gradient_accumulation_steps": "4",
        "num_train_epochs": "2",
        "max_steps": "-1",
    }
    record = train.run(*parse(TYPES, flags(settings)))
    assert (record["steps"], record["trainer"].state.epoch) == (6, 2.0)


BAD = {
    "no data": ({"dataset": "/nowhere/pictures"}, "no data at /nowhere/pictures"),
    "no model": ({"model": "/nowhere/clip"}, "no model at /nowhere/clip"),
    "model not on the Hub": ({"model": "nobody/no-such-clip"}, "nobody/no-such-clip"),
    "data not on the Hub": ({"dataset": "nobody/no-such-pictures"}, "nobody/no-such-pictures"),
    "eps": ({"eps": "8"}, "Fix: '8/255'"),
    "eps word": ({"eps": "small"}, "eps='small': expected a finite number"),
    "unknown key": ({"learning_rat": "1"}, "did you mean learning_rate"),
    "rate": ({"learning_rate": "-1"}, "expected a number of more than 0"),
    "too few": ({"per_device_train_batch_size": "64"}, "16 training images do not fill one batch of 64"),
    "no proxy": ({"proxy": None}, "hpt_gpd learns from a proxy"),
    "held out": ({"held_out": "1.0"}, "held_out=1.0: expected a share of at least 0 and below 1"),
    "template": ({"templates": "a photo"}, "'{}' exactly once"),
    "ema": ({"ema": "9"}, "ema: got 9.0, expected a ratio between 0 and 1"),
}


@pytest.mark.parametrize("case", BAD)
def test_a_mistake_costs_one_line_and_makes_no_folder(case, good, capsys):
    changes, says = BAD[case]
    settings = {k: v for k, v in (good | changes).items() if v is not None}
    with pytest.raises(SystemExit) as stop:
        train.main(flags(settings))
    message = str(stop.value.code)
    assert message.startswith("hpt-hf train: ") and says in message and "\n" not in message
    assert not Path(good["output_dir"]).exists()


def test_a_corrupt_picture_costs_one_line_and_no_training(good, tmp_path, capsys):
    corrupt(tmp_path / "data")
    with pytest.raises(SystemExit) as stop:
        train.main(flags(good))
    message = str(stop.value.code)
    assert (
        "cannot be read" in message and "file " in message and "--on_corrupt skip" in message and "\n" not in message
    )
    assert not list(Path(good["output_dir"]).rglob("*.*")), "nothing half-made is left that looks like a result"
    train.main(flags(good | {"on_corrupt": "skip"}))
    assert (Path(good["output_dir"]) / "model.safetensors").is_file()


def test_resuming_what_never_began_begins_and_says_so(good, caplog):
    """Whoever restarts a run in a loop need not look whether it lived to its first checkpoint."""
    train.main(flags(good | {"resume_from_checkpoint": "true", "max_steps": "2"}))
    assert "nothing to resume" in caplog.text and "it begins at the beginning" in caplog.text
    assert (Path(good["output_dir"]) / "model.safetensors").is_file()


EVALUATE = {
    "nothing to evaluate": ([], "say what to evaluate on"),
    "both": (["--dataset", "x", "--suite", "lab"], "one of them"),
    "no data": (["--dataset", "/nowhere/pictures"], "no data at /nowhere/pictures"),
    "limit": (["--dataset", "x", "--limit", "0"], "--limit: got 0"),
    "batch size": (["--dataset", "x", "--batch_size", "0"], "--batch_size: got 0"),
    "probe": (["--dataset", "x", "--probe", "-1"], "--probe: got -1, expected at least 0 images"),
    "eps": (["--dataset", "x", "--eps", "1/255", "4"], "Fix: '4/255'"),
    "attack": (
        ["--dataset", "x", "--attack", "apgd"],
        "no attack is called 'apgd'; did you mean pgd or apgd-t or apgd-ce?",
    ),
    "second attack": (
        ["--dataset", "x", "--attack", "pgd", "sqare"],
        "no attack is called 'sqare'; did you mean square?",
    ),
    "steps": (["--dataset", "x", "--attack_steps", "0"], "steps=0: expected at least 1"),
    "protocol": (["--dataset", "x", "--protocol", "full"], "invalid choice: 'full'"),
    "old flag": (["--dataset", "x", "--resolution", "native"], "unknown key --resolution"),
    "set": (["--dataset", "cifar11"], "no set of that name; did you mean cifar10 or cifar100"),
    "no set near": (["--dataset", "zzzz"], "there are cifar10, cifar100, "),
    "task": (["--dataset", "lab:digit"], "the lab has no task 'digit'; it has digits"),
    "real": (["--dataset", "real:digits"], "real:digits lies in a folder of real images: give it with --data_dir"),
    "classes of a set": (
        ["--dataset", "pets", "--classes", "a", "b"],
        "its own classes and prompts: leave out --classes",
    ),
    "more of a set": (
        ["--suite", "zero-shot-17", "--templates", "{}", "--label_column", "y"],
        "cifar10 comes with its own classes and prompts: leave out --templates, --label_column",
    ),
    "classes of a task": (
        ["--dataset", "lab:digits", "--classes", "a", "b"],
        "lab:digits comes with its own classes and prompts",
    ),
    "target": (["--dataset", "lab:dice", "lab:digits", "--target", "zz"], "'zz' is none of the 6 classes of lab:dice"),
    "target of an attack": (
        ["--dataset", "x", "--attack", "standard", "--target", "a"],
        "no attack towards a target is called",
    ),
}


@pytest.mark.parametrize("case", EVALUATE)
def test_a_mistake_in_evaluation_costs_one_line_and_makes_no_folder(case, tmp_path, student_path):
    more, says = EVALUATE[case]
    with pytest.raises(SystemExit) as stop:
        evaluate.main(["--model", student_path, "--output_dir", str(tmp_path / "scores"), *more])
    assert says in str(stop.value.code) and str(stop.value.code).startswith("hpt-hf evaluate: ")
    assert "\n" not in str(stop.value.code) and not (tmp_path / "scores").exists()


def test_all_sets_are_opened_before_the_first_is_attacked(tmp_path, student_path):
    data = write_image_folder(tmp_path / "data", make_images(10))
    with pytest.raises(SystemExit, match="no data at /nowhere"):
        evaluate.main(
            ["--model", student_path, "--output_dir", str(tmp_path / "scores"), "--dataset", data, "/nowhere"]
        )
    assert not (tmp_path / "scores").exists()


def test_evaluate_arguments_and_what_it_writes(tmp_path, student_path, capsys):
    data = write_image_folder(tmp_path / "data", make_images(10))
    evaluate.main(
        [
            "--model",
            student_path,
            "--output_dir",
            str(tmp_path / "scores"),
            "--dataset",
            data,
            "--attack_steps",
            "3",
            "--limit",
            "7",
            "--probe",
            "3",
        ]
    )
    assert (
        len(list((tmp_path / "scores" / "results").glob("*.json"))) == 1
        and (tmp_path / "scores" / "report.md").is_file()
    )
    out = capsys.readouterr()
    report = (tmp_path / "scores" / "report.md").read_text()
    assert "n = 7" in out.err and out.out == report + "\n" and report.startswith(f"# {Path(student_path).name}\n")
    assert (
        "\n## pgd-3, linf 1/255, protocol “input”, 7 images a set\n\n| data set" in report
        and (tmp_path / "scores" / "report.html").is_file()
    )
    (args,) = parse((EvaluateArguments,), ["--model", "m", "--output_dir", "o"])
    assert (args.attack, args.eps, args.attack_steps, args.protocol, args.seed) == (
        ["pgd"],
        ["1/255"],
        None,
        "input",
        0,
    )


def test_each_attack_at_each_radius_is_a_score_of_each_set_once(tmp_path, student_path, capsys):
    data = [write_image_folder(tmp_path / name, make_images(5)) for name in ("one", "two")]
    asked = [
        "--attack",
        "pgd",
        "cw",
        "pgd",
        "--eps",
        "2/255",
        "1/255",
        "--attack_steps",
        "1",
        "--probe",
        "0",
        "--seed",
        "3",
    ]
    scores = evaluate.run(
        parse(
            (EvaluateArguments,),
            ["--model", student_path, "--output_dir", str(tmp_path / "o"), "--dataset", *data, *asked],
        )[0]
    )
    told = [(s.attack, s.eps, s.dataset, s.seed, s.verdict) for s in scores]
    assert told == [
        (a, e, d, 3, "unchecked") for a in ("pgd-1", "cw-1") for e in ("2/255", "1/255") for d in ("one", "two")
    ]
    assert sorted(read_results(tmp_path / "o" / "results"), key=repr) == sorted(scores, key=repr)


def test_a_target_that_the_last_set_lacks_stops_before_the_first_is_attacked(tmp_path, student_path, monkeypatch):
    data = [
        write_image_folder(tmp_path / name, pictures) for name, pictures in (("one", make_images(5)), ("two", few()))
    ]
    monkeypatch.setattr(evaluate, "evaluate", lambda *_, **__: pytest.fail("an attack ran"))
    with pytest.raises(SystemExit, match="'cat' is none of the 2 classes of two"):
        evaluate.main(
            ["--model", student_path, "--output_dir", str(tmp_path / "o"), "--dataset", *data, "--target", "cat"]
        )
    assert not (tmp_path / "o").exists()


def few():
    """Pictures of two classes, neither of them a cat."""
    whole = make_images(10)
    return relabelled(whole.select((1, 2, 6, 7)), [0, 1, 0, 1], ("dog", "house"), name="few")


@pytest.mark.multiprocess
def test_the_script_itself_says_one_line_and_fails(good, tmp_path):
    """`recipes/train.py` as a process: exit status, standard error, and no traceback, before training and in the midst of it."""
    cases = {"Fix: '8/255'": good | {"eps": "8"}, "cannot be read": good | {"dataset": str(tmp_path / "damaged")}}
    write_image_folder(tmp_path / "damaged", make_images(16))
    corrupt(tmp_path / "damaged")
    running = {}
    for says, settings in cases.items():
        command = [sys.executable, str(ROOT / "recipes" / "train.py"), *flags(settings)]
        running[says] = subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=os.environ
        )
    for says, process in running.items():
        out, err = process.communicate(timeout=200)
        assert process.returncode == 1 and out == "" and says in one_line(err)
    assert not list((tmp_path / "out").rglob("*"))


def test_a_score_of_another_version_in_the_folder_stops_the_evaluation_before_it_begins(
    tmp_path, student_path, monkeypatch
):
    monkeypatch.setattr(evaluate, "load_model", lambda *_: pytest.fail("nothing may be computed"))
    old = tmp_path / "out" / "scores" / "old.json"
    old.parent.mkdir(parents=True)
    old.write_text('{"robust": 1.0, "versions": {"hpt_hf": "0.0.9"}}')
    with pytest.raises(SystemExit, match="old.json is no result that can be read: missing"):
        evaluate.main(["--model", student_path, "--dataset", "lab:digits", "--output_dir", str(tmp_path / "out")])
    assert [f.name for f in (tmp_path / "out").rglob("*") if f.is_file()] == ["old.json"]
