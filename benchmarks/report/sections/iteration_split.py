"""N and M of S-JFB: iterations without and with a graph."""

import statistics
from pathlib import Path

from benchmarks.experiments.iteration_split import FREE, TRACKED
from benchmarks.report.formatting import DIGITS_ALONE, NOTHING, mean_and_deviation, table
from benchmarks.report.results import Study
from benchmarks.report.significance import verdict


def section(results: Path, images: Path) -> str:
    study = Study(results, "iteration-split")
    cell = {(n, m): study.values(f"N={n} M={m}", "20 x 10", "frechet") for n in FREE for m in TRACKED}
    rows = [(f"N = {n}", *(mean_and_deviation(cell[n, m]) for m in TRACKED)) for n in FREE]
    measured = {key: statistics.fmean(values) for key, values in cell.items() if values}
    best = min(measured, key=lambda key: measured[key], default=None)
    line = f"Best mean: N = {best[0]}, M = {best[1]}." if best else f"Best: {NOTHING}."
    return "\n\n".join(
        (
            "## Iterations without and with a graph: N and M of S-JFB",
            table(("Fréchet distance", *(f"M = {m}" for m in TRACKED)), rows),
            line,
            DIGITS_ALONE,
            "The paper: " + verdict("N = M = 12 beats N = M = 3", cell[12, 12], cell[3, 3]),
            study.source(),
        )
    )
