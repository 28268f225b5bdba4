"""`--help` is read from the source: every flag stands there once, explained, and nothing heavy is imported for it."""

from __future__ import annotations

import importlib
import re
import subprocess
import sys
from dataclasses import fields, is_dataclass

import pytest

from hpt_hf import cli


@pytest.mark.parametrize("command", cli.COMMANDS)
def test_every_flag_of_a_command_stands_in_its_help_once(command, capsys):
    cli.main([command, "--help"])
    said = capsys.readouterr().out
    shown = re.findall(r"^  --(\w+) ", said, re.MULTILINE)
    module = importlib.import_module(f"hpt_hf.commands.{command}")
    kinds = [k for k in vars(module).values() if is_dataclass(k) and k.__module__ == module.__name__]
    own = {f.name: f.metadata for kind in kinds if kind.__name__.endswith("Arguments") for f in fields(kind)}
    assert own and own.keys() <= set(shown) and len(shown) == len(set(shown))
    assert all(m["help"] in " ".join(said.split()) for m in own.values() if "help" in m)


def test_the_methods_defaults_stand_where_transformers_has_others(capsys):
    cli.main(["train", "--help"])
    (rate,) = re.findall(r"^  --learning_rate .*", capsys.readouterr().out, re.MULTILINE)
    assert "5e-05" not in rate


def test_help_imports_nothing_heavy():
    code = "import sys; from hpt_hf import cli; cli.main(['train', '--help']); sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True).returncode == 0
