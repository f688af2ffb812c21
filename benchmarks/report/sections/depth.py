"""FPDM beside DiTs of several depths, at equal training time, parameters and memory, and over sampling budgets."""

from collections.abc import Iterable
from pathlib import Path
from statistics import fmean

from benchmarks.experiments.depth import DEPTHS, LENGTHS, SETTINGS, STEPS, cells
from benchmarks.report import figures
from benchmarks.report.formatting import NOTHING, mean_and_deviation, table
from benchmarks.report.results import Study
from benchmarks.report.significance import decision, verdict

BUDGETS = {
    "20 steps, FPDM 10 iterations": ("20 steps", "20 steps"),
    "5 steps, FPDM 3 iterations": ("5 steps", "5 steps"),
    **{f"{b} block passes": (f"{b} block passes", f"{b} block passes") for b in STEPS},
    **{f"MACs of {b} blocks": (f"{b} blocks' MACs", f"{b} block passes") for b in STEPS},
}
"""Sampling settings that are compared: that of FPDM, and that of the DiTs."""
DITS = tuple(f"DiT {depth}" for depth in DEPTHS)
HEAD = (
    "network",
    "parameters",
    "step, MiB",
    "steps",
    "5 steps",
    "20 steps",
    "right label, %",
    "20 steps of 1 iteration",
)
ABOUT = (
    "A hidden size, a training time and an optimizer are shared by all networks of a task. FPDM (N, M) is trained by "
    "S-JFB with at most N iterations without and M with a graph; contractive: the recurrent weights start at 0. At 5 "
    "steps FPDM takes 3 iterations, at 20 steps 10. `step, MiB` is the peak of activations, gradients and temporaries "
    "of a training step. The paper's baseline has 28 blocks."
)


def section(results: Path, images: Path) -> str:
    """Tables for each task and training time, the best network of each, and the verdicts."""
    study = Study(results, "depth")
    figures.depth(_curves(study), images / "report_depth.png")
    parts = ["## Depth", "![Fréchet distance against training time](images/report_depth.png)", ABOUT]
    for task in LENGTHS:
        names = [cell.name for cell in cells("full") if cell.name.startswith(f"{task}: ")]
        seconds = next(cell.config.max_time for cell in cells("full") if cell.name == names[0])
        parts.append(f"**{task}, {(seconds or 0) / 60:g} CPU minutes**")
        parts.append(table(HEAD, [_row(study, name) for name in names]))
    parts.append("**Who wins where.** The best FPDM setting against the best DiT, each chosen on these scores.")
    head = ("task", "sampling", "best FPDM", "of", "best DiT", "of", "FPDM beats it")
    parts.append(table(head, _winners(study)) if study.found else NOTHING)
    parts += [f"The paper: {line}" for line in verdicts(study)]
    return "\n\n".join((*parts, study.source()))


def _row(study: Study, name: str) -> tuple[str, ...]:
    """The row of one network; `not measured` where its training did not finish."""
    parameters, peak = study.mean(name, "", "parameters"), study.mean(name, "", "step_peak_bytes")
    return (
        name.split(": ")[1],
        f"{parameters:,.0f}" if parameters else NOTHING,
        f"{peak / 2**20:.1f}" if peak else NOTHING,
        mean_and_deviation(study.values(name, "", "steps"), 0),
        mean_and_deviation(study.values(name, "5 steps", "frechet")),
        mean_and_deviation(study.values(name, "20 steps", "frechet")),
        mean_and_deviation(study.values(name, "20 steps", "accuracy"), 1, 100),
        "-" if "DiT" in name else mean_and_deviation(study.values(name, "20 x 1", "frechet")),
    )


def _winners(study: Study) -> list[tuple[str, ...]]:
    rows = []
    for task in LENGTHS:
        for label, (ours, theirs) in BUDGETS.items():
            best, found = _best(study, task, SETTINGS, ours)
            rival, distance = _best(study, task, DITS, theirs)
            if not found or not distance:
                continue
            row = (task, label, mean_and_deviation(found), best, mean_and_deviation(distance), rival)
            rows.append((*row, decision(found, distance)))
    return rows


def _best(study: Study, task: str, names: Iterable[str], way: str) -> tuple[str, list[float]]:
    """The network with the smallest mean distance, and its distances."""
    found = {name: study.values(f"{task}: {name}", way, "frechet") for name in names}
    known = {name: values for name, values in found.items() if values}
    if not known:
        return NOTHING, []
    best = min(known, key=lambda name: fmean(known[name]))
    return best, known[best]


def verdicts(study: Study) -> list[str]:
    """The paper's comparison against the depth that it names, and against the others."""
    lines = []
    for task in LENGTHS:
        best, ours = _best(study, task, SETTINGS, "20 steps")
        for depth in reversed(DEPTHS) if ours else ():
            theirs = study.values(f"{task}: DiT {depth}", "20 steps", "frechet")
            lines.append(
                verdict(f"FPDM beats a DiT of {depth} blocks at equal training time ({task}, {best})", ours, theirs)
            )
    return lines or [f"*FPDM beats a DiT of 28 blocks at equal training time*: {NOTHING}."]


def _curves(study: Study) -> dict[str, dict[float, list[float]]]:
    """Distances at 20 steps on digits, by CPU minutes of training, for each network."""
    curves: dict[str, dict[float, list[float]]] = {}
    for cell in cells("full"):
        task, name = cell.name.split(": ")
        if task.startswith("digits"):
            values = study.values(cell.name, "20 steps", "frechet")
            curves.setdefault(name, {})[(cell.config.max_time or 0) / 60] = values
    return curves
