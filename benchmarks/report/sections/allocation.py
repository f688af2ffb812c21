"""Allocation of iterations over timesteps."""

from pathlib import Path

from benchmarks.report.formatting import mean_and_deviation, table
from benchmarks.report.results import Study
from benchmarks.report.significance import verdict


def section(results: Path, images: Path) -> str:
    study = Study(results, "sampling")
    ways = [f"{shape}, 60 in all" for shape in ("constant", "increasing", "decreasing")]
    ways += [f"tolerance {rtol}" for rtol in (0.3, 0.1, 0.03)]
    rows = [
        (
            way + (", reused start" if way.startswith("tolerance") else ""),
            mean_and_deviation(study.values("FPDM", way, "evaluations"), 1),
            mean_and_deviation(study.values("FPDM", way, "frechet")),
            mean_and_deviation(study.values("FPDM", way, "accuracy"), 1, 100),
        )
        for way in ways
    ]
    distances = {way: study.values("FPDM", way, "frechet") for way in ways}
    return "\n\n".join(
        (
            "## Allocation of iterations over timesteps",
            table(("20 steps", "iterations in all", "Fréchet distance", "right label, %"), rows),
            "The paper: " + verdict("Increasing beats constant", distances[ways[1]], distances[ways[0]], paired=True),
            verdict("Decreasing beats constant", distances[ways[2]], distances[ways[0]], paired=True),
            study.source(),
        )
    )
