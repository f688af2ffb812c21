"""Warm starts: the solve at a timestep starts from the previous timestep's solution."""

from pathlib import Path

from benchmarks.experiments.sampling import STARTS
from benchmarks.report import figures
from benchmarks.report.formatting import mean_and_deviation, table
from benchmarks.report.results import Study
from benchmarks.report.significance import verdict


def section(results: Path, images: Path) -> str:
    study, counts = Study(results, "sampling"), (1, 2, 3, 5, 10)
    found = {
        name: {k: study.values("FPDM", f"{name} start, {k} iterations", "frechet") for k in counts} for name in STARTS
    }
    rows = [(name, *(mean_and_deviation(found[name][k]) for k in counts)) for name in STARTS]
    figures.reuse(found, images / "report_reuse.png")
    return "\n\n".join(
        (
            "## Warm start from the previous timestep's solution",
            "![Fréchet distance against iterations per step, by start](images/report_reuse.png)",
            table(("start, 20 steps", *(f"{k} iteration{'s' if k > 1 else ''}" for k in counts)), rows),
            "The paper: "
            + verdict("Reuse helps at one iteration a step", found["reused"][1], found["fresh"][1], paired=True),
            verdict("One iteration with reuse beats ten without", found["reused"][1], found["fresh"][10], paired=True),
            study.source(),
        )
    )
