"""The guide's example runs, and is the file that it names."""

import json
import subprocess
import sys
from pathlib import Path

from benchmarks.report import build as report

DOCS = Path(__file__).parents[2] / "docs"


def test_the_example_in_the_guide_runs():
    code = (DOCS / "solvers.md").read_text().split("```python\n")[1].split("```")[0]
    assert code.strip() in (DOCS / "deq_mlp.py").read_text()
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert "converged 100.0%" in out


def test_the_guide_shows_the_numbers_that_were_measured(tmp_path):
    page = tmp_path / "solvers.md"
    page.write_text((DOCS / "solvers.md").read_text())
    result = Path(report.__file__).parents[1] / "results" / "solvers.json"
    report.guide(result, page)
    assert page.read_text() == (DOCS / "solvers.md").read_text()
    found = json.loads(result.read_text())
    found["summary"]["float64 to 1e-10"]["implicit AndersonGS (default)"] = "13 of 14, 999 evaluations"
    (tmp_path / "other.json").write_text(json.dumps(found))
    report.guide(tmp_path / "other.json", page)
    assert "13 of 14, 999 evaluations" in page.read_text()
