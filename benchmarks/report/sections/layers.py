"""Explicit blocks around the fixed point."""

from pathlib import Path

from benchmarks.experiments.outer_blocks import PAIRS
from benchmarks.report.formatting import DIGITS_ALONE, NOTHING, mean_and_deviation, table
from benchmarks.report.results import Study
from benchmarks.report.significance import verdict


def section(results: Path, images: Path) -> str:
    study = Study(results, "outer-blocks")
    names = {pair: f"pre={pair[0]} post={pair[1]}" for pair in PAIRS}
    rows = [
        (
            f"{pair[0]} before, {pair[1]} behind",
            mean_and_deviation(study.values(name, "20 x 10", "frechet")),
            mean_and_deviation(study.values(name, "20 x 10", "accuracy"), 1, 100),
            f"{study.mean(name, '', 'parameters'):,.0f}" if study.found else NOTHING,
            mean_and_deviation(study.values(name, "", "steps"), 0),
        )
        for pair, name in names.items()
    ]
    more, one = (study.values(names[pair], "20 x 10", "frechet") for pair in ((3, 3), (1, 1)))
    return "\n\n".join(
        (
            "## Explicit blocks around the fixed point",
            table(("blocks", "Fréchet distance", "right label, %", "parameters", "steps"), rows),
            DIGITS_ALONE,
            verdict("Three and three beat one and one", more, one),
            study.source(),
        )
    )
