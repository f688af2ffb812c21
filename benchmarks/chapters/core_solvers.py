"""Solvers of the core beside their peers."""

from pathlib import Path
from typing import Any

from .records import read
from .wording import NOTHING, table


def chapter(results: Path, images: Path) -> str:
    path = results / "solvers.json"
    head = "## Solvers of the core beside their peers"
    if not path.exists():
        return f"{head}\n\n`solvers.json`: {NOTHING}."
    found = read(path)
    times = found["CPU time, bare loop = 1"]
    around = table(
        ("CPU time, bare loop = 1", *times),
        ((n, *(str(times[s][n]) for s in times)) for n in next(iter(times.values()))),
    )
    return "\n\n".join(
        (
            head,
            counts(found),
            around,
            "Beside torchdeq: time over the bare loop's, and operators, as shares of torchdeq's; states held by both.",
            beside_torchdeq(found),
            f"`solvers.json`: {found['device']}, torch {found['versions']['torch']}, commit "
            f"{found['commits']['evaluations']}. Evaluations of f on fourteen problems, at most 300 on each.",
        )
    )


def counts(found: dict[str, Any]) -> str:
    """Problems solved and evaluations in sum."""
    precisions = list(found["summary"])
    names = found["summary"][precisions[0]]
    rows = ((n, *(found["summary"][p].get(n, NOTHING) for p in precisions)) for n in names)
    return table(("solver", *precisions), rows)


def beside_torchdeq(found: dict[str, Any]) -> str:
    """What each solver adds to the bare loop, over what torchdeq's adds; operators likewise; states held by both."""
    times, operators, held = (
        found[part] for part in ("CPU time, bare loop = 1", "operators per evaluation", "states held")
    )
    rows = []
    for name in ("plain", "Anderson", "Broyden"):
        ours, theirs = f"implicit {name}", f"torchdeq {name}"
        shares = (f"{(t[ours] - 1) / (t[theirs] - 1):.2f}" for t in times.values())
        rows.append((name, *shares, f"{operators[ours] / operators[theirs]:.2f}", f"{held[ours]:g} / {held[theirs]:g}"))
    shapes = (f"overhead at {shape}" for shape in times)
    return table(("solver", *shapes, "operators", "states held"), rows)
