"""Cost of training and sampling steps of FPDM and DiT."""

from pathlib import Path

from benchmarks.harness import read_result
from benchmarks.report.formatting import NOTHING, short, table


def section(results: Path, images: Path) -> str:
    return "\n\n".join(["## Cost of training and sampling steps", *tables(results / "diffusion.json")])


def tables(path: Path) -> list[str]:
    """The tables of `benchmarks.diffusion.run`, with device and commit."""
    parts: list[str] = []
    known = read_result(path).get("tables", {})
    for name in ("against the plain step", "around the block", "sampling step", "training step", "parameters"):
        found = known.get(name)
        parts.append(f"**{name.capitalize()}**" + ("" if found else f": {NOTHING}."))
        if found:
            keys = list(dict.fromkeys(key for row in found["rows"] for key in row))
            parts.append(table(keys, ([short(row.get(key, "")) for key in keys] for row in found["rows"])))
            parts.append(f"`{path.name}`: {found['device']}, commit {found['commit']}.")
    return parts
