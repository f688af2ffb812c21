"""Distance between sets of real digits: the scale of a meaningful difference."""

from pathlib import Path
from typing import Any

from benchmarks.harness import read_result
from benchmarks.report.formatting import NOTHING, table

HEAD = "## Distance between sets of real digits"


def section(results: Path, images: Path) -> str:
    path = results / "real_data_distance.json"
    if not path.exists():
        return f"{HEAD}\n\n`real_data_distance.json`: {NOTHING}."
    found = read_result(path)
    drawn, small, held_out = (
        found[key] for key in ("as many as a score has samples", "as many as are held out", "held out")
    )
    rows = [
        (f"{drawn['images']} training digits", _draws(drawn)),
        (f"{small['images']} training digits", _draws(small)),
        (f"{held_out['images']} held-out digits, all there are", f"{held_out['frechet']:.2f}"),
    ]
    return "\n\n".join(
        (
            HEAD,
            f"Every score below is of {drawn['images']} samples, {drawn['images'] // 10} of each class. The distance "
            "of a random set of as many real digits is above 0 too, and no network is expected to have a smaller "
            f"distance. Two such sets differ by about {drawn['frechet spread'] * 2**0.5:.2f}; the spread over seeds "
            "includes this difference.",
            table(("real digits, against all training digits", "Fréchet distance"), rows),
            f"`real_data_distance.json`: {found['command']}, "
            f"{found['device']}, torch {found['versions']['torch']}, commit "
            f"{found['commit']}.",
        )
    )


def _draws(part: dict[str, Any]) -> str:
    return f"{part['frechet']:.2f} ± {part['frechet spread']:.2f} over {part['draws']} draws"
