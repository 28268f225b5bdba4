"""`--help` is read from the source: every flag stands there once, and nothing heavy is imported for it."""

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
    shown = re.findall(r"^  --(\w+) ", capsys.readouterr().out, re.MULTILINE)
    module = importlib.import_module(f"hpt_hf.commands.{command}")
    kinds = [k for k in vars(module).values() if is_dataclass(k) and k.__module__ == module.__name__]
    own = {f.name for kind in kinds if kind.__name__.endswith("Arguments") for f in fields(kind)}
    assert own and own <= set(shown) and len(shown) == len(set(shown))


def test_the_methods_defaults_stand_where_transformers_has_others(capsys):
    cli.main(["train", "--help"])
    (rate,) = re.findall(r"^  --learning_rate .*", capsys.readouterr().out, re.MULTILINE)
    assert "5e-05" not in rate


def test_help_imports_nothing_heavy():
    code = "import sys; from hpt_hf import cli; cli.main(['train', '--help']); sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True).returncode == 0
