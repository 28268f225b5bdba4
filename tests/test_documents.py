"""Every command line in the documents and recipes parses, and every file that the documents name exists."""

from __future__ import annotations

import importlib
import os
import re
import shlex
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest
import yaml

import hpt_hf

ROOT = Path(__file__).parent.parent
DOCUMENTS = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
COMMAND = re.compile(r"(?:\bhpt-hf |\brecipes/|\bhpt_hf\.commands\.)(\w+)(?:\.py)?(?= --| [\w./]+| *$)(.*)")
# Of a longer text only what follows these at the beginning is a command line.
BEGINS = re.compile(r"(?:`|    |# command: +|\t)(?:python|accelerate launch|torchrun|hpt-hf|\$\(RUN\) -m) ?.*")


def command_lines() -> list[tuple[str, str]]:
    """(command, its arguments), of README, documents, recipes' headers and the Makefile."""
    found = {}
    for file in (*DOCUMENTS, ROOT / "Makefile", *sorted((ROOT / "recipes").rglob("*.yaml"))):
        for line in BEGINS.findall(file.read_text(encoding="utf-8")):
            if match := COMMAND.search(line.split("` ")[0].split("`,")[0].rstrip("`.,)")):
                found[match.groups()] = file
    return list(found)


LINES = command_lines()


class Parsed(Exception):
    pass


@pytest.mark.parametrize(("command", "rest"), LINES, ids=lambda part: part.strip()[:60])
def test_a_command_line_parses(command, rest, monkeypatch):
    monkeypatch.chdir(ROOT)
    module = importlib.import_module(f"hpt_hf.commands.{command}")

    def stop_after(parser):
        def parse(*args, **kwargs):
            parser(*args, **kwargs)
            raise Parsed

        return parse

    monkeypatch.setattr(module, "parse", stop_after(module.parse))
    rest = re.sub(r"RECIPE|(?<=--config )…", "recipes/quickstart.yaml", rest).replace(" …", "")
    argv = shlex.split(rest, comments=True)
    if command in ("train", "estimate"):
        argv += ["--use_cpu", "true", *(["--output_dir", "out"] if "--output_dir" not in argv else [])]
    with pytest.raises(Parsed):
        module.main(argv)


def test_the_search_found_the_command_lines():
    assert len(LINES) >= 40 and {"train", "evaluate", "push", "convert", "transfer"} <= {c for c, _ in LINES}


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)
def test_a_document_names_files_that_exist(document):
    text = document.read_text(encoding="utf-8")
    named = re.findall(r"(?<![\w/.-])(?:hpt_hf|recipes|tests|benchmarks|docs)/[\w./-]*\w", text)
    named += [f"{document.parent}/{link}" for link in re.findall(r"\]\((?!http)([^)#]+)", text)]
    assert [name for name in named if not (ROOT / name).exists()] == []


def test_the_site_builds_without_a_warning_and_has_every_page(tmp_path):
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "--site-dir", str(tmp_path)]
    built = subprocess.run(
        command, cwd=ROOT, capture_output=True, text=True, env=os.environ | {"NO_MKDOCS_2_WARNING": "1"}
    )
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


def test_the_page_on_reliability_counts_the_tests_cases():
    rows = re.findall(r"`(tests/\S+)`.*\| (\d+) \|", (ROOT / "docs" / "reliability.md").read_text())
    assert len(rows) >= 20
    files = sorted({name.split("::")[0] for name, _ in rows})
    command = [sys.executable, "-m", "pytest", "--collect-only", "-q", "-m", "slow or not slow", *files]
    found = subprocess.run(command, cwd=ROOT, capture_output=True, text=True).stdout.splitlines()
    counted = Counter(line.split("[")[0] for line in found)
    assert {name: int(count) for name, count in rows} == {name: counted[name] for name, _ in rows}
