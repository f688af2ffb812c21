"""Solvers of the core beside their peers."""

import json
from pathlib import Path

from .wording import NOTHING, table


def chapter(results: Path, images: Path) -> str:
    path = results / "solvers.json"
    head = "## Solvers of the core beside their peers"
    if not path.exists():
        return f"{head}\n\n`solvers.json`: {NOTHING}."
    found = json.loads(path.read_text())
    precisions = list(found["summary"])
    names = list(found["summary"][precisions[0]])
    counts = table(
        ("solver", *precisions), ((n, *(found["summary"][p].get(n, NOTHING) for p in precisions)) for n in names)
    )
    times = found["CPU time, bare loop = 1"]
    around = table(
        ("CPU time, bare loop = 1", *times),
        ((n, *(str(times[s][n]) for s in times)) for n in next(iter(times.values()))),
    )
    return "\n\n".join(
        (
            head,
            counts,
            around,
            f"`solvers.json`: {found['device']}, torch {found['versions']['torch']}, commit "
            f"{found['commits']['evaluations']}. Evaluations of f on fourteen problems, at most 300 on each.",
        )
    )
