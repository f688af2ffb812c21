"""Solvers in sampling: residual and quality."""

import statistics
from pathlib import Path

from benchmarks.experiments.sampling import SOLVERS
from benchmarks.report import figures
from benchmarks.report.formatting import NOTHING, mean_and_deviation, table
from benchmarks.report.results import Study
from benchmarks.report.significance import verdict


def section(results: Path, images: Path) -> str:
    study, counts = Study(results, "sampling"), (2, 4, 8, 16)
    found = {
        name: {
            k: [
                study.values("FPDM", f"{name}, {k} evaluations", what)
                for what in ("residual", "frechet", "cpu_seconds")
            ]
            for k in counts
        }
        for name in SOLVERS
    }
    residual = lambda v: f"{statistics.fmean(v):.1e}" if v else NOTHING  # noqa: E731
    rows = [
        (name, *(f"{residual(found[name][k][0])}; {mean_and_deviation(found[name][k][1])}" for k in counts))
        for name in SOLVERS
    ]
    figures.solvers(found, images / "report_solvers.png")
    return "\n\n".join(
        (
            "## Solvers in sampling",
            "![Residual and Fréchet distance against evaluations](images/report_solvers.png)",
            "Median relative residual; Fréchet distance. Twenty steps, fresh starts.",
            table(("solver", *(f"{k} evaluations" for k in counts)), rows),
            verdict(
                "Anderson beats the naive iteration at 4 evaluations",
                found["Anderson"][4][1],
                found["Picard"][4][1],
                paired=True,
            ),
            study.source(),
        )
    )
