"""The guide's example runs, and is the file that it names."""

import subprocess
import sys
from pathlib import Path

DOCS = Path(__file__).parents[1] / "docs"


def test_the_example_in_the_guide_runs():
    code = (DOCS / "solvers.md").read_text().split("```python\n")[1].split("```")[0]
    assert code.strip() in (DOCS / "deq_mlp.py").read_text()
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert "converged 100.0%" in out
