"""The notebooks run as they stand, in small; they store no outputs, and open where their badge says."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))
OFFLINE = {"HPT_SMOKE": "1", "HF_HUB_OFFLINE": "1", "MPLBACKEND": "Agg", "OMP_NUM_THREADS": "1"}
# What a cell must have printed, or left in its folder.
LEAVES = {
    "quickstart": ("against vanilla: clean", ["my_model/config.json", "my_model/README.md"]),
    "robust_clip_on_my_folder": ("chosen: ", ["my_model/config.json", "my_front/front.svg", "my_evaluation/results"]),
}


def cells(notebook: Path, kind: str) -> list[dict]:
    return [c for c in json.loads(notebook.read_text(encoding="utf-8"))["cells"] if c["cell_type"] == kind]


def test_each_notebook_is_proved():
    assert {n.stem for n in NOTEBOOKS} == LEAVES.keys()


@pytest.mark.parametrize("notebook", NOTEBOOKS, ids=lambda path: path.stem)
def test_a_notebook_runs_from_its_first_cell_to_its_last(notebook, tmp_path):
    here = [c for c in cells(notebook, "code") if "colab" not in c["metadata"].get("tags", [])]
    code = "\n\n".join("".join(cell["source"]) for cell in here)
    env = os.environ | OFFLINE | {"PYTHONPATH": str(ROOT)}
    ran = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, env=env, capture_output=True, text=True)
    assert ran.returncode == 0, ran.stderr[-3000:]
    printed, left = LEAVES[notebook.stem]
    assert printed in ran.stdout and "95%" in ran.stdout
    assert [name for name in left if not (tmp_path / name).exists()] == []


@pytest.mark.parametrize("notebook", NOTEBOOKS, ids=lambda path: path.stem)
def test_a_notebook_stores_no_outputs_and_its_badge_opens_it(notebook):
    assert all(c["outputs"] == [] and c["execution_count"] is None for c in cells(notebook, "code"))
    first = "".join(cells(notebook, "markdown")[0]["source"])
    assert f"colab.research.google.com/github/you/hpt_hf/blob/main/notebooks/{notebook.name})" in first
    assert sum("%pip" in "".join(c["source"]) for c in cells(notebook, "code")) == 1
