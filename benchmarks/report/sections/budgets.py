"""FPDM against DiT at equal training time and equal sampling budgets."""

from pathlib import Path

from benchmarks.experiments.sampling import BUDGETS, DEPTH
from benchmarks.report import figures
from benchmarks.report.formatting import NOTHING, mean_and_deviation, table
from benchmarks.report.results import Study
from benchmarks.report.significance import decision

KINDS = {"block passes": "{} block passes", "MACs": "MACs of {} blocks"}
ABOUT = (
    "An FPDM step of k iterations costs 2 + k block passes. An iteration takes more MACs than a block, so in the "
    "lower half of the table FPDM and DiT have the same MACs instead. FPDM's number of steps is the best of 1, 2, 3, "
    "5, 10, 20 and 40 by these scores, which favors FPDM slightly; for the DiT the budget determines the number of "
    "steps. The paper's budgets of 140, 280 and 560 block passes are 5, 10 and 20 steps of the paper's DiT; with the "
    "DiT here, so many steps cost 30, 60 and 120 block passes."
)


def section(results: Path, images: Path) -> str:
    study = Study(results, "sampling")
    figures.budgets({kind: _curves(study, kind) for kind in KINDS}, images / "report_budgets.png")
    size = [f"{study.mean(name, '', 'parameters') or 0:,.0f}" for name in ("FPDM", "DiT")]
    sizes = f"FPDM has {size[0]} parameters, the DiT of six blocks {size[1]}. " if study.found else ""
    rows = [_row(study, kind, budget) for kind in KINDS for budget in BUDGETS]
    return "\n\n".join(
        (
            "## FPDM and DiT at equal training time and equal sampling budgets",
            "![Fréchet distance against the sampling budget](images/report_budgets.png)",
            sizes + ABOUT,
            table(("budget", "FPDM, best split", "of", "DiT", "of", "FPDM beats DiT"), rows),
            _summary(rows),
            study.source(),
        )
    )


def _splits(study: Study, kind: str, budget: int) -> dict[int, list[float]]:
    """Number of steps -> Fréchet distances over seeds."""
    start = KINDS[kind].format(budget) + ", "
    ways = (way for way in study.ways("FPDM") if way.startswith(start))
    return {_steps(way): study.values("FPDM", way, "frechet") for way in ways}


def _steps(way: str) -> int:
    return int(way.rsplit(", ", 1)[1].split()[0])


def _plain(study: Study, budget: int) -> list[float]:
    return study.values("DiT", f"{budget} block passes, {budget // DEPTH} steps", "frechet")


def _row(study: Study, kind: str, budget: int) -> tuple[str, ...]:
    splits = {steps: values for steps, values in _splits(study, kind, budget).items() if values}
    best = min(splits, key=lambda steps: sum(splits[steps]) / len(splits[steps]), default=None)
    ours, plain = splits[best] if best else [], _plain(study, budget)
    word = decision(ours, plain)
    return (
        KINDS[kind].format(budget),
        mean_and_deviation(ours),
        _count(best),
        mean_and_deviation(plain),
        _count(budget // DEPTH),
        word,
    )


def _count(steps: int | None) -> str:
    return f"{steps} step{'s' if steps > 1 else ''}" if steps else NOTHING


def _summary(rows: list[tuple[str, ...]]) -> str:
    """The budgets at which each network has the smaller distance."""
    words = {"FPDM is ahead": "**yes", "the DiT is ahead": "**no", "neither is": ("**within", "**undecided")}
    found = {who: [row[0] for row in rows if row[-1].startswith(word)] for who, word in words.items()}
    return "The paper: *FPDM beats DiT where sampling is limited*. Here: " + (
        "; ".join(f"{who} at {', '.join(at) or 'no budget'}" for who, at in found.items()) + "."
        if any(found.values())
        else f"{NOTHING}."
    )


def _curves(study: Study, kind: str) -> dict[str, list[tuple[int, list[float]]]]:
    """The curves of the figure: distances by budget for the DiT, and for each number of steps of FPDM."""
    curves = {"DiT, 6 blocks a step": [(budget, _plain(study, budget)) for budget in BUDGETS]}
    for budget in BUDGETS:
        for steps, values in sorted(_splits(study, kind, budget).items()):
            curves.setdefault(f"FPDM, {_count(steps)}", []).append((budget, values))
    return curves
