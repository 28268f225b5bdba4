"""The figures in the documents are those of the results files: nobody types a number."""

from __future__ import annotations

import json
from pathlib import Path

from hpt_hf.lab.quickstart import result_table

ROOT = Path(__file__).parent.parent


def test_readme_and_results_show_the_quickstarts_own_table():
    summary = json.loads((ROOT / "docs" / "results" / "quickstart.json").read_text())
    assert summary["smoke"] is False and len(summary["tasks"]) >= 12
    lines = result_table(summary).splitlines()
    assert len(lines) == 2 + 5
    for document in ("README.md", "docs/results.md"):
        text = (ROOT / document).read_text().splitlines()
        assert [line for line in lines if line not in text] == [], document
