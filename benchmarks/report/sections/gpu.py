"""Measurements on a GPU."""

from pathlib import Path

from benchmarks.report.formatting import NOTHING
from benchmarks.report.sections.costs import tables


def section(results: Path, images: Path) -> str:
    found = [path for path in sorted(results.glob("*.json")) if "cuda" in path.stem or "gpu" in path.stem]
    parts = [part for path in found for part in (f"### `{path.name}`", *tables(path))]
    return "\n\n".join(["## On a GPU", *(parts or [f"Training memory and block passes at XL/2: {NOTHING}."])])
