"""The guide's example is the file that it names, and its numbers are those of the results."""

import json
from pathlib import Path

from benchmarks.report import build as report

DOCS = Path(__file__).parents[2] / "docs"


def test_the_example_is_the_file_that_the_guide_names():
    code = (DOCS / "solvers.md").read_text().split("```python\n")[1].split("```")[0]
    assert "`python docs/deq_mlp.py`" in (DOCS / "solvers.md").read_text()
    assert code.strip() in (DOCS / "deq_mlp.py").read_text()


def test_the_guide_shows_the_numbers_that_were_measured(tmp_path):
    page = tmp_path / "solvers.md"
    page.write_text((DOCS / "solvers.md").read_text())
    result = Path(report.__file__).parents[1] / "results" / "solvers.json"
    report.guide(result, page)
    assert page.read_text() == (DOCS / "solvers.md").read_text()
    found = json.loads(result.read_text())
    found["summary"]["float64 to 1e-10"]["implicit Multisecant (default)"] = "13 of 14, 999 evaluations"
    (tmp_path / "other.json").write_text(json.dumps(found))
    report.guide(tmp_path / "other.json", page)
    assert "13 of 14, 999 evaluations" in page.read_text()
