"""Gradient estimators of the core beside torchdeq's."""

from pathlib import Path

from benchmarks.report.formatting import NOTHING
from benchmarks.report.gradients import tables
from benchmarks.report.results import read


def chapter(results: Path, images: Path) -> str:
    path, head = results / "gradients.json", "## Gradient estimators of the core beside torchdeq's"
    if not path.exists():
        return f"{head}\n\n`gradients.json`: {NOTHING}."
    return f"{head}\n\n{tables(read(path))}\n\n`gradients.json`."
