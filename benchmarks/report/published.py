"""Writes docs/published.md, numbers published by other projects compared with ours, from results/published.json."""

from typing import Any

from benchmarks.solvers.published_figures import KINSOL, R_PACKAGE, SIRIUS, SPEED_MAPPING, SYSTEMS, Figures

TABLES: dict[str, Figures] = {"KINSOL": KINSOL, "R": R_PACKAGE, "SpeedMapping": SPEED_MAPPING, "Systems": SYSTEMS}
HEAD = """# Published numbers beside ours

Problems that others publish, written from their equations (`benchmarks/problems/`), solved by every solver of
`implicit` with its default settings, in float64. `python -m benchmarks.solvers.published` measures and writes this
page. Rows where `implicit` is behind stay rows.

A count of ours is the number of calls of f up to the first point that meets the published stopping test. `a + b` is a
calls of which b carry a Jacobian-vector product along. A dash is a solve that did not meet the test within the budget
(5000 calls; 3000 for states of 1000 numbers or more; 400 for NewtonKrylov), or that ended at a point which the problem
does not accept: a perceptron's weights grown until its steps are lost in rounding, as the R package's authors report
too. "default" is `implicit.fixed_point(f, z0)` as it is. Picard's counts check the problems: they equal the published
counts of plain iteration row by row, but for the modified perceptron, whose iterates depend on the order of additions.
"""
MISSING = {
    "Wang, proportional hazards": "its data are files of the suite, which are not copied here",
    "Lange ancestry": "its data come from a generator that is not portable",
    "Lid-driven cavity": "52 812 unknowns and some 5000 evaluations are more than this page spends",
}


def cell(outcome: dict[str, Any]) -> str:
    """A run as the text of a table cell: its calls and products, or a dash."""
    if not outcome["solved"]:
        return "-"
    return f"{outcome['calls']} + {outcome['products']}" if outcome["products"] else str(outcome["calls"])


def work(outcome: dict[str, Any]) -> int | None:
    """The sum of calls and products of a run; None if the run failed."""
    return outcome["calls"] + outcome["products"] if outcome["solved"] else None


def verdict(ours: int | None, theirs: int | None) -> str:
    """The verdict on a row: the default solver's count compared with that of the best rival."""
    if ours is None:
        return "neither" if theirs is None else "behind"
    if theirs is None or ours < theirs:
        return "ahead"
    return "equal" if ours == theirs else "behind"


def best(counts: list[int | None]) -> int | None:
    """The smallest count."""
    return min((c for c in counts if c is not None), default=None)


def compared(figures: Figures, rows: dict[str, Any]) -> dict[str, str]:
    """Problem -> verdict on the default solver, compared with the best rival."""
    out = {}
    for problem, ours in rows.items():
        theirs = figures.rows[problem]
        out[problem] = verdict(work(ours["default"]), best([theirs.get(name) for name in figures.rival]))
    return out


def _markdown(header: list[str], rows: list[list[str]]) -> str:
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def _figure(counts: dict[str, int | None], method: str) -> str:
    if method not in counts:
        return ""
    return "-" if counts[method] is None else str(counts[method])


def section(figures: Figures, table: dict[str, Any]) -> str:
    """A published table with our columns, and a summary of the comparison."""
    rows = table["rows"]
    theirs = list(dict.fromkeys(name for counts in figures.rows.values() for name in counts))
    ours = list(dict.fromkeys(name for row in rows.values() for name in row))
    verdicts = compared(figures, rows)
    body = []
    for problem, counts in figures.rows.items():
        left = [problem, *(_figure(counts, name) for name in theirs)]
        if problem in rows:
            body.append(
                [
                    *left,
                    *(cell(rows[problem][name]) if name in rows[problem] else "" for name in ours),
                    verdicts[problem],
                ]
            )
        else:
            body.append([*left, *[""] * len(ours), "not posed"])
    solved = {name: [row[name] for row in rows.values() if name in row] for name in ours}
    sums = [["Solved", *(f"{sum(c.get(n) is not None for c in figures.rows.values())}" for n in theirs)]]
    sums[0] += [f"{sum(o['solved'] for o in solved[name])} of {len(solved[name])}" for name in ours] + [""]
    header = ["problem", *theirs, *(f"**{name}**" for name in ours), f"default against {' / '.join(figures.rival)}"]
    count = {word: list(verdicts.values()).count(word) for word in ("ahead", "equal", "behind")}
    behind = [name for name, word in verdicts.items() if word == "behind"]
    summary = f"The default is ahead on {count['ahead']}, equal on {count['equal']} and behind on {count['behind']}"
    summary += f" of {len(rows)}" + (f": {', '.join(behind)}." if behind else ".")
    missing = [f"{name}: {MISSING[name]}." for name in figures.rows if name not in rows and name in MISSING]
    commits = ", ".join(sorted({outcome["commit"] for row in rows.values() for outcome in row.values()}))
    where = f"Ours: {table['device']}, torch {table['versions']['torch']}, implicit at commit {commits}."
    parts = [f"## {figures.title}", f"Source: {figures.source}. {figures.counting}", _markdown(header, body + sums)]
    parts += [summary] + ([" ".join(["Not posed here.", *missing])] if missing else []) + [where]
    return "\n\n".join(parts)


def _sirius(result: dict[str, Any]) -> str:
    rows = [
        [
            str(i),
            f"{a:.15g}",
            f"{b:.15g}",
            c,
            *(f"{abs(x / float(c) - 1):.0e}" for x in (a, b)),
            f"{abs(b / a - 1):.0e}",
        ]
        for i, (a, b, c) in enumerate(zip(SIRIUS, result["residuals"], result["exact"], strict=True))
    ]
    text = (
        "The linear test of SIRIUS's Anderson mixer (electronic-structure/SIRIUS, pull request 584): 100 unknowns, "
        "history 4, mixing 0.15. Ours: `Anderson(4, damping=0.85, ridge=1e-300)`; norms of the residual. Exact: the "
        "same method in arithmetic of 50 digits; the last difference is rounding in both codes, larger in SIRIUS's."
    )
    header = ["iteration", "SIRIUS", "ours", "exact", "error of SIRIUS", "error of ours", "difference"]
    return "\n\n".join(["## SIRIUS, digit for digit", text, _markdown(header, rows)])


def page(result: dict[str, Any]) -> str:
    """The page's text."""
    parts = [HEAD.rstrip(), _sirius(result["sirius"])]
    parts += [section(TABLES[name], table) for name, table in result["tables"].items()]
    return "\n\n".join(parts) + "\n"
