"""Measurements on a GPU."""

from pathlib import Path

from benchmarks.harness import read_result
from benchmarks.report.formatting import NOTHING, short, table


def section(results: Path, images: Path) -> str:
    found = _files(results)
    parts = [part for path in found for part in (f"### `{path.name}`", *_tables(path))]
    return "\n\n".join(["## On a GPU", *(parts or [f"Training memory and block passes at XL/2: {NOTHING}."])])


def where(results: Path) -> str:
    """Where the report has measurements on a GPU, as text."""
    return "see *On a GPU*" if _files(results) else NOTHING


def _files(results: Path) -> list[Path]:
    return [path for path in sorted(results.glob("*.json")) if "cuda" in path.stem or "gpu" in path.stem]


def _tables(path: Path) -> list[str]:
    """All tables of a result file, with device, versions and commit."""
    known, parts = read_result(path), []
    for name, found in known.get("tables", {}).items():
        keys = list(dict.fromkeys(key for row in found["rows"] for key in row))
        about = f"{found['device']}, torch {found['versions']['torch']}, commit {found['commit']}"
        parts.append(f"**{name.capitalize()}** (`{known['command']}`, {about})")
        parts.append(table(keys, ([short(row.get(key, "")) for key in keys] for row in found["rows"])))
    return [*parts, f"Machine: {known['machine']}."] if "machine" in known else parts
