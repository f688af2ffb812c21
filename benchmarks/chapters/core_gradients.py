"""Gradient estimators of the core beside torchdeq's."""

from pathlib import Path

from benchmarks.report_gradients import tables

from .records import read
from .wording import NOTHING


def chapter(results: Path, images: Path) -> str:
    path, head = results / "gradients.json", "## Gradient estimators of the core beside torchdeq's"
    if not path.exists():
        return f"{head}\n\n`gradients.json`: {NOTHING}."
    return f"{head}\n\n{tables(read(path))}\n\n`gradients.json`."
