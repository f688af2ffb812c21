"""The default run of the command."""

from pathlib import Path

from benchmarks.harness import read_result
from benchmarks.report.formatting import NOTHING, mean_and_deviation, table


def section(results: Path, images: Path) -> str:
    path = results / "digits.json"
    head = "## The default run"
    if not path.exists():
        return f"{head}\n\n`digits.json`: {NOTHING}."
    found = read_result(path)
    rows = []
    for kind in ("fpdm", "dit"):
        runs = [run for name, run in found["runs"].items() if name.startswith(f"{kind} ")]
        rows.append(
            (
                kind.upper() if kind == "fpdm" else "DiT",
                mean_and_deviation([r["training"]["parameters"] for r in runs], 0),
                mean_and_deviation([r["training"]["steps"] for r in runs], 0),
                mean_and_deviation([r["generated"]["accuracy"] for r in runs], 1, 100),
                mean_and_deviation([r["generated"]["frechet"] for r in runs]),
            )
        )
    source = f"`digits.json`: {found['command']}, {found['device']}, commit {found['commit'][:7]}."
    return "\n\n".join(
        (head, table(("network", "parameters", "steps", "right label, %", "Fréchet distance"), rows), source)
    )
