"""Gradient estimators of the core compared with torchdeq's."""

from pathlib import Path

from benchmarks.harness import read_result
from benchmarks.report.formatting import NOTHING
from benchmarks.report.gradients import tables


def section(results: Path, images: Path) -> str:
    path, head = results / "gradients.json", "## Gradient estimators of the core beside torchdeq's"
    if not path.exists():
        return f"{head}\n\n`gradients.json`: {NOTHING}."
    return f"{head}\n\n{tables(read_result(path))}\n\n`gradients.json`."
