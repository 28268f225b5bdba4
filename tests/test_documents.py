"""Every command line in the documents and recipes parses, some run, and every file and anchor that is named exists."""

from __future__ import annotations

import argparse
import contextlib
import importlib
import json
import os
import re
import runpy
import shlex
import shutil
import subprocess
import sys
from pathlib import Path
from unittest import mock

import pytest
import yaml
from accelerate.commands.launch import launch_command_parser
from conftest import contents, write_image_folder
from markdown.extensions.toc import slugify
from torch.distributed.run import get_args_parser

import hpt_hf
from hpt_hf import cli
from hpt_hf.cli import COMMANDS
from hpt_hf.commands.recipes import find_recipe
from hpt_hf.data.zero_shot_sets import SETS
from hpt_hf.lab.datasets import WEIGHTS, lab_images
from hpt_hf.models.families import FAMILIES
from hpt_hf.training import config

ROOT = Path(__file__).parent.parent
DOCUMENTS = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
COMMAND = re.compile(r"(?:\bhpt-hf |\brecipes/|\bhpt_hf\.commands\.)(\w+)(?:\.py)?(?= --| [\w./]+| *$)(.*)")
# Of a longer text only what follows these at the beginning is a command line.
BEGINS = re.compile(r"(?:`|    |# command: +|\t)(?:python|accelerate launch|torchrun|hpt-hf|make|\$\(RUN\) -m) ?.*")
FENCED = re.compile(r"^```(?:bash|sh|shell|console)\n(.*?)^```", re.MULTILINE | re.DOTALL)
BENCHMARK = re.compile(r"python (benchmarks/\w+\.py)(.*)")
LAUNCHER = re.compile(r"(accelerate launch|torchrun) (.*)")
TARGET = re.compile(r"^[` ]*make ([\w-]+)")
NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))


def text_of(file: Path) -> str:
    """What a reader sees, commands in fences indented as the others are; of a notebook its text."""
    text = file.read_text(encoding="utf-8")
    if file.suffix == ".ipynb":
        cells = json.loads(text)["cells"]
        return "\n\n".join("".join(c["source"]) for c in cells if c["cell_type"] == "markdown")
    return FENCED.sub(lambda match: re.sub("^", "    ", match[1], flags=re.MULTILINE), text)


def lines_of(*files: Path) -> list[str]:
    begun = (line for file in files for line in BEGINS.findall(text_of(file)))
    return list(dict.fromkeys(line.split("` ")[0].split("`,")[0].rstrip("`.,)") for line in begun))


# Of README, documents and notebooks; then also of recipes' headers and the Makefile.
WRITTEN = lines_of(*DOCUMENTS, *NOTEBOOKS)
EVERYWHERE = [*WRITTEN, *lines_of(ROOT / "Makefile", *sorted((ROOT / "recipes").rglob("*.yaml")))]


def found(pattern: re.Pattern, lines: list[str]) -> list[tuple[str, str]]:
    return list(dict.fromkeys(match.groups() for line in lines if (match := pattern.search(line))))


LINES = found(COMMAND, EVERYWHERE)


class Parsed(Exception):
    pass


def stop_after(parser):
    def parse(*args, **kwargs):
        parser(*args, **kwargs)
        raise Parsed

    return parse


@pytest.mark.parametrize(("command", "rest"), LINES, ids=lambda part: part.strip()[:60])
def test_a_command_line_parses(command, rest, monkeypatch):
    monkeypatch.chdir(ROOT)
    assert command in COMMANDS
    if not rest.strip() or rest.strip().startswith("#"):  # a mention
        return
    monkeypatch.setattr(config, "get_available_reporting_integrations", lambda: config.TRACKERS)
    module = importlib.import_module(f"hpt_hf.commands.{command}")
    monkeypatch.setattr(module, "parse", stop_after(module.parse))
    rest = re.sub(r"RECIPE|(?<=--config )…", "recipes/quickstart.yaml", rest).replace(" …", "")
    argv = shlex.split(rest, comments=True)
    if command in ("train", "estimate"):
        argv += ["--use_cpu", "true", *(["--output_dir", "out"] if "--output_dir" not in argv else [])]
    with pytest.raises(Parsed):
        module.main(argv)


@pytest.mark.parametrize(("script", "rest"), found(BENCHMARK, EVERYWHERE), ids=lambda part: part.strip()[:60])
def test_a_benchmarks_line_parses(script, rest, monkeypatch):
    monkeypatch.setattr(argparse.ArgumentParser, "parse_args", stop_after(argparse.ArgumentParser.parse_args))
    monkeypatch.setattr(sys, "argv", [script, *shlex.split(rest, comments=True)])
    with pytest.raises(Parsed):
        runpy.run_path(str(ROOT / script), run_name="__main__")


@pytest.mark.parametrize(("launcher", "rest"), found(LAUNCHER, EVERYWHERE), ids=lambda part: part.strip()[:60])
def test_a_launchers_own_flags_parse(launcher, rest):
    parser = launch_command_parser() if launcher == "accelerate launch" else get_args_parser()
    words = shlex.split(rest.replace("…", ""), comments=True)
    args = parser.parse_args(words if any(w.endswith(".py") for w in words) else [*words, "recipes/train.py"])
    assert (ROOT / args.training_script).is_file()
    assert (ROOT / (getattr(args, "config_file", None) or "")).exists()


def test_every_target_of_make_is_there():
    targets = set(re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    named = {match[1] for line in WRITTEN if (match := TARGET.search(line))}
    assert len(named) >= 8 and named - targets == set()


def test_the_search_found_the_command_lines():
    assert len(LINES) >= 40 and {"train", "evaluate", "push", "convert", "transfer"} <= {c for c, _ in LINES}
    assert len(found(BENCHMARK, WRITTEN)) >= 6 and len(found(LAUNCHER, EVERYWHERE)) >= 20


HERE = ("outputs", "recipes", "benchmarks", "examples", "docs", "hpt_hf", "data", "my_images", "W")


def elsewhere(rest: str) -> bool:
    """Does a line need the Hub, or what is not here? Hub ids, sets that are downloaded, recipes of a Hub's CLIP."""
    for word in shlex.split(rest, comments=True):
        recipe = find_recipe(word)
        if recipe and re.search(r"^model: (?!lab:)", recipe.read_text(), re.MULTILINE):
            return True
        owner, _, name = word.partition("/")
        hub_id = re.fullmatch(r"[\w.-]*[a-z][\w.-]*", name) and owner.isidentifier() and owner not in HERE
        if word in SETS or word == "FOLDER" or (hub_id and recipe is None):
            return True
    return False


TRAIN = "--max_steps 2 --ga_epochs 1 --warmup_steps 1 --per_device_train_batch_size 8 --use_cpu true"
MEASURE = "--limit 8 --attack_steps 2"
FEW = 352  # two images of each letter, drawn once a process
SHORTER = {  # what makes a command end in seconds
    "train": TRAIN,
    "estimate": f"{TRAIN} --probe_steps 1",
    "sweep": f"{TRAIN} --learning_rate 1e-3 1e-2 --seed 0 --measure_on lab:digits --limit 8 --measure_attack_steps 2",
    "evaluate": f"{MEASURE} --probe 0",
    "transfer": MEASURE,
    "interpolate": f"{MEASURE} --weights 0 1",
    "pretrain": "--max_steps 1 --batch_size 8",
}


def plain(rest: str) -> str:
    """A command's flags without the comment behind them."""
    return shlex.join(shlex.split(rest, comments=True))


WHOLE = [(c, plain(rest)) for c, rest in found(COMMAND, WRITTEN)]
# `.ci/run` runs the quickstart; trackers are no dependency; the rest are mentions.
RUN = [(c, rest) for c, rest in WHOLE if "--report_to" not in rest and c != "quickstart" and not elsewhere(rest)]
RUN = [(c, rest) for c, rest in RUN if "outputs" in rest or "--output_dir" in rest or "--model " in rest]


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """What the documents' reader has by then: images, two models, results."""
    place = tmp_path_factory.mktemp("place")
    images = lab_images("digits", 60, faces="train")
    write_image_folder(place / "my_images", images)
    images.data.select_columns(["image", "label"]).to_parquet(place / "birds.parquet")
    (place / "names.txt").write_text("\n".join(images.classes))
    for name in ("zoo", "examples", "recipes"):
        (place / name).symlink_to(ROOT / name)
    with contextlib.chdir(place), mock.patch("hpt_hf.commands.common.LAB_TRAINING_SIZE", FEW):
        cli.main(["train", *f"--config own_images --dataset my_images/ --output_dir outputs/my_model {TRAIN}".split()])
        cli.main(["train", *f"--config quickstart --output_dir m {TRAIN}".split()])
        for name in ("other", "tecoa", "hpt_gpd/seed0", "hpt_gpd/seed1", "quickstart/model"):
            shutil.copytree("m", f"outputs/{name}")
        for name in ("my_model", "tecoa", "hpt_gpd/seed0", "hpt_gpd/seed1"):
            asked = f"--model outputs/{name} --dataset lab:digits --output_dir outputs/{name} {MEASURE} --probe 0"
            cli.main(["evaluate", *asked.split()])
        shutil.copytree("outputs/tecoa", "outputs/evaluation")
        shutil.copytree(WEIGHTS / "proxy", "W/first")
        shutil.copytree(WEIGHTS / "student", "outputs/my_clip")
        config = json.loads(Path("outputs/my_clip/config.json").read_text())
        Path("outputs/my_clip/config.json").write_text(json.dumps(config | {"model_type": "my_clip"}))
    return place


@pytest.mark.parametrize(("command", "rest"), RUN, ids=lambda part: part[:70])
@mock.patch("hpt_hf.commands.common.LAB_TRAINING_SIZE", FEW)
@mock.patch.dict(FAMILIES)
def test_a_line_of_the_documents_runs(command, rest, place, tmp_path, monkeypatch):
    shutil.copytree(place, tmp_path / "here", symlinks=True)
    monkeypatch.chdir(tmp_path / "here")
    words = [word.replace("RECIPE", "quickstart") for word in shlex.split(rest) if word != "…"]
    before = contents(Path())
    try:
        cli.main([command, *words, *SHORTER.get(command, "").split()])
    except SystemExit as left:
        assert not left.code
    assert contents(Path()) != before or command in ("verify", "estimate")


def test_a_line_that_does_not_run_says_what_it_needs():
    """`FOLDER` is the user's own data; `make smoke` runs the quickstart."""
    blocks = [line for file in DOCUMENTS for line in re.findall(r"^    (?:hpt-hf|accelerate).*", text_of(file), re.M)]
    asked = [(line, match) for line in blocks if (match := COMMAND.search(line)) and match[1] != "quickstart"]
    left = [line for line, m in asked if (m[1], plain(m[2])) not in RUN]
    assert len(left) >= 8 and [line for line in left if "# needs" not in line and "FOLDER" not in line] == []


def test_help_names_every_command_that_the_documents_use(capsys):
    cli.main(["--help"])
    told = capsys.readouterr().out
    assert [command for command, _ in WHOLE if f"\n  {command} " not in told] == []


def slugs(file: Path) -> set[str]:
    """The anchors of a file's headings, where GitHub and the site make the same ones: a link must hold on both."""
    titles = re.findall(r"^#+ (.*)", text_of(file), re.MULTILINE)
    titles = [re.sub(r"[`*]|\[([^]]*)\]\([^)]*\)", r"\1", title) for title in titles]
    on_github = {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}
    return on_github & {slugify(title, "-") for title in titles}


@pytest.mark.parametrize("document", [*DOCUMENTS, *NOTEBOOKS], ids=lambda path: path.name)
def test_every_link_inside_leads_somewhere(document):
    links = re.findall(r"\]\((?!https?:|mailto:)([^)\s#]*)(?:#([^)\s]*))?\)", text_of(document))
    for path, anchor in links:
        target = document.parent / path if path else document
        assert target.exists(), f"{document.name}: {path}"
        assert not anchor or anchor in slugs(target), f"{document.name}: {path}#{anchor}"


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)
def test_a_document_names_files_that_exist(document):
    text = document.read_text(encoding="utf-8")
    named = re.findall(r"(?<![\w/.-])(?:hpt_hf|recipes|tests|benchmarks|docs)/[\w./-]*\w", text)
    assert [name for name in named if not (ROOT / name).exists()] == []


def test_the_site_builds_without_a_warning_and_has_every_page(tmp_path):
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "--site-dir", str(tmp_path)]
    env = os.environ | {"NO_MKDOCS_2_WARNING": "1"}
    built = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, env=env)
    assert built.returncode == 0, built.stdout + built.stderr
    pages = {f.stem for f in (ROOT / "docs").glob("*.md")} - {"index"}
    assert pages == {f.parent.name for f in tmp_path.glob("*/index.html")}
    assert "hpt_hf.api.evaluate" in (tmp_path / "api" / "index.html").read_text(encoding="utf-8")
    named = re.findall(r"[\w-]+\.md", (ROOT / "mkdocs.yml").read_text(encoding="utf-8"))
    assert sorted(named) == sorted(f.name for f in (ROOT / "docs").glob("*.md")), "in the navigation, once each"


def test_the_version_is_the_same_everywhere():
    """`CITATION.cff` and the changelog name the one that setup.py gives."""
    version = hpt_hf.__version__
    assert yaml.safe_load((ROOT / "CITATION.cff").read_text())["version"] == version
    assert f"## {version} " in (ROOT / "CHANGELOG.md").read_text()


def test_the_space_and_the_hooks_name_what_is_there():
    hooks = yaml.safe_load((ROOT / ".pre-commit-config.yaml").read_text())["repos"][0]["hooks"]
    assert {hook["id"] for hook in hooks} == {"ruff", "format", "contract"}
    front = yaml.safe_load((ROOT / "space" / "README.md").read_text().split("---")[1])
    assert (ROOT / "space" / front["app_file"]).is_file()


def test_the_page_on_reliability_names_tests_that_exist():
    named = re.findall(r"`(tests/\S+)::(\w+)`", (ROOT / "docs" / "reliability.md").read_text())
    assert len(named) >= 20
    assert [(file, test) for file, test in named if f"def {test}(" not in (ROOT / file).read_text()] == []
