"""Solvers of the core compared with other libraries."""

from pathlib import Path
from typing import Any

from benchmarks.harness import read_result
from benchmarks.report.formatting import NOTHING, table


def section(results: Path, images: Path) -> str:
    path = results / "solvers.json"
    head = "## Solvers of the core beside their peers"
    if not path.exists():
        return f"{head}\n\n`solvers.json`: {NOTHING}."
    found = read_result(path)
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
            "Compared with torchdeq: time in addition to the bare loop and number of operators, both divided by "
            "torchdeq's; states held by both.",
            beside_torchdeq(found),
            *_traffic(found),
            _compiled(results / "compiled.json"),
            f"`solvers.json`: {found['device']}, torch {found['versions']['torch']}, commit "
            f"{found['commits']['evaluations']}. Evaluations of f on fourteen problems, at most 300 on each.",
        )
    )


def _compiled(path: Path) -> str:
    found = read_result(path)
    if not found:
        return f"`{path.name}`: {NOTHING}."
    versions = ", ".join(f"{name} {number}" for name, number in found["versions"].items())
    return (
        f"A fixed count of {found['evaluations']} evaluations at {found['state']}, compiled to one graph:\n\n"
        f"{compiled(found)}\n\n`{path.name}`: {found['device']}, {versions}, commit {found['commit']}."
    )


def compiled(found: dict[str, Any]) -> str:
    """A table of the times of eager and compiled solves, fastest first, and of the time of compiling."""
    times, waited = found["microseconds of CPU for each evaluation"], found["seconds to compile"]
    key = {name: name.removeprefix("implicit ").removesuffix(", compiled").removesuffix(", jitted") for name in times}
    rows = (
        (name, f"{times[name]:.1f}", str(waited[key[name]]) if name.endswith(("compiled", "jitted")) else "-")
        for name in sorted(times, key=times.__getitem__)
    )
    return table(("solve", "microseconds of CPU each", "seconds to compile"), rows)


def public(found: dict[str, Any]) -> str:
    """A table of problems solved and evaluations, of our solvers on public collections."""
    solvers = list(next(iter(found.values())))
    sizes = [next(iter(rows.values()))["total"]["problems"] for rows in found.values()]
    head = ["solver", *(f"{size} {name}" for size, name in zip(sizes, found, strict=True))]

    def cell(total: dict[str, int]) -> str:
        return f"{total['solved']} solved, {total['evaluations']} evaluations"

    return table(head, ([solver, *(cell(rows[solver]["total"]) for rows in found.values())] for solver in solvers))


def contractions(found: dict[str, Any]) -> str:
    """A table of the cases in which the default solver needs more evaluations than plain iteration, by family."""
    rows = (
        (family, row["cases"], row["over"], row["plain"], row["default"]) for family, row in found["families"].items()
    )
    head = ("contractions", "cases", f"over {found['allowed']} times plain iteration", "plain, evaluations", "default")
    return table(head, ((family, *(str(number) for number in numbers)) for family, *numbers in rows))


def counts(found: dict[str, Any]) -> str:
    """A table of the numbers of problems solved and of evaluations, summed over problems."""
    precisions = list(found["summary"])
    names = found["summary"][precisions[0]]
    rows = ((n, *(found["summary"][p].get(n, NOTHING) for p in precisions)) for n in names)
    return table(("solver", *precisions), rows)


def beside_torchdeq(found: dict[str, Any]) -> str:
    """A table of our solvers compared with torchdeq's: ratio of the times in addition to the bare loop, ratio of the
    numbers of operators, and states held by both.
    """
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


def _traffic(found: dict[str, Any]) -> tuple[str, ...]:
    if "bytes moved" not in found:
        return ()
    return (
        "Bytes that the operators of a solver (without those of f) read and write per evaluation, in units of the "
        "batch's state, and the solver's time divided by that of copying as many bytes in the same run:",
        traffic(found),
    )


def traffic(found: dict[str, Any]) -> str:
    """A table of the states that a solver moves per evaluation, and of its time divided by that of copying them."""
    shapes = found["bytes moved"]
    rows = (
        (name, *(f"{s[name]['states moved']:g}, {s[name]['time over copying']:.2f}" for s in shapes.values()))
        for name in next(iter(shapes.values()))
    )
    return table(("states moved, time over copying", *shapes), rows)
