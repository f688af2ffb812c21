"""FPDM compared with DiTs of several depths, at equal training time, parameters and memory, for several budgets."""

from collections.abc import Iterable
from pathlib import Path
from statistics import fmean

from benchmarks.experiments.depth import DEPTHS, DITS, LENGTHS, STEPS, VELOCITY, cells, settings
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
"""Title of a comparison -> (sampling setting of FPDM, sampling setting of the DiTs)."""
PAPER = 28
"""Number of blocks of the paper's baseline."""
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
    "Networks predict the image, as the presets do; in *digits, velocity*, which compares settings of FPDM, they "
    "predict the velocity. All networks of a task have the same hidden size, training time and optimizer. FPDM (N, "
    "M) is trained by S-JFB with at most N iterations without and M with a graph; in *contractive* rows the "
    "recurrent weights are initialized with 0. FPDM takes 3 iterations per timestep at 5 steps, and 10 at 20 steps. "
    "`step, MiB` is the peak of activations, gradients and temporaries of a training step. The paper's baseline has "
    "28 blocks."
)


def section(results: Path, images: Path) -> str:
    """Tables for each task and training time, the best network of each, and the verdicts."""
    study = Study(results, "depth")
    figures.depth(_curves(study), images / "report_depth.png")
    parts = ["## Depth", "![Fréchet distance against training time](images/report_depth.png)", ABOUT]
    for task in LENGTHS:
        found = [cell for cell in cells("full") if cell.name.startswith(f"{task}: ")]
        parts.append(f"**{task}, {(found[0].config.max_time or 0) / 60:g} CPU minutes**")
        parts.append(table(HEAD, [_row(study, cell.name) for cell in found]))
    parts.append(
        "**Best networks.** For each task, the best FPDM is compared with the best DiT, both chosen by these scores. "
        "At 20 steps the best FPDM is also compared with the DiT with the most similar number of parameters, and "
        "with the largest DiT whose training step takes no more memory than FPDM's."
    )
    head = ("task", "compared", "FPDM", "DiT", "of", "FPDM beats it")
    parts.append(table(head, _winners(study)) if study.found else NOTHING)
    parts += verdicts(study)
    return "\n\n".join((*parts, study.source()))


def _row(study: Study, name: str) -> tuple[str, ...]:
    """The row of one network; `not measured` where its training did not finish."""
    parameters, peak = study.mean(name, "", "parameters"), study.mean(name, "", "step_peak_bytes")
    if not parameters:
        return name.split(": ")[1], NOTHING, *([""] * (len(HEAD) - 2))
    return (
        name.split(": ")[1],
        f"{parameters:,.0f}",
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
        pairs = {label: (*ways, _best(study, task, DITS, ways[1])) for label, ways in BUDGETS.items()}
        pairs |= {label: ("20 steps", "20 steps", name) for label, name in _matched(study, task).items()}
        for label, (way, its_way, rival) in pairs.items():
            ours = study.values(f"{task}: {_best(study, task, settings(task), way)}", way, "frechet")
            theirs = study.values(f"{task}: {rival}", its_way, "frechet")
            if ours and theirs:
                cells = (
                    mean_and_deviation(ours),
                    mean_and_deviation(theirs),
                    rival,
                    decision(ours, theirs, task=_data(task)),
                )
                rows.append((task, label, *cells))
    return rows


def _matched(study: Study, task: str) -> dict[str, str]:
    """For the FPDM that is best at 20 steps: the DiT with the most similar number of parameters, and the largest DiT
    that needs no more memory.
    """
    facts, best = ("parameters", "step_peak_bytes"), _best(study, task, settings(task), "20 steps")
    ours = [study.mean(f"{task}: {best}", "", fact) for fact in facts]
    theirs = {name: [study.mean(f"{task}: {name}", "", fact) for fact in facts] for name in DITS}
    known = {name: (count, peak) for name, (count, peak) in theirs.items() if count and peak}
    count, peak = ours
    if not known or not count or not peak:
        return {}
    found = {"equal parameters": min(known, key=lambda name: abs(known[name][0] - count))}
    within = [name for name, (_, other) in known.items() if other <= peak]
    return found | ({"at most its memory": within[-1]} if within else {})


def _best(study: Study, task: str, names: Iterable[str], way: str) -> str:
    """The network with the smallest mean distance."""
    found = {name: study.values(f"{task}: {name}", way, "frechet") for name in names}
    known = [name for name, values in found.items() if values]
    return min(known, key=lambda name: fmean(found[name]), default=NOTHING)


def verdicts(study: Study) -> list[str]:
    """Verdicts on FPDM against DiT, for the depth of the paper's baseline and for the other depths."""
    lines = []
    for task in LENGTHS:
        best = _best(study, task, settings(task), "20 steps")
        ours = study.values(f"{task}: {best}", "20 steps", "frechet")
        for depth in reversed(DEPTHS) if ours else ():
            theirs = study.values(f"{task}: DiT {depth}", "20 steps", "frechet")
            claim = f"FPDM beats a DiT of {depth} blocks at equal training time ({task})"
            source = "The paper" if depth == PAPER else "Beyond the paper"
            lines.append(f"{source}: {verdict(claim, ours, theirs, task=_data(task))}")
    return lines or [f"The paper: *FPDM beats a DiT of 28 blocks at equal training time*: {NOTHING}."]


def _data(task: str) -> str:
    """The images of a task: digits or mnist."""
    return task.split(",")[0]


def _curves(study: Study) -> dict[str, figures.Curves]:
    """Distances at 20 steps on digits and on mnist, by CPU minutes of training, for each network."""
    curves: dict[str, figures.Curves] = {"digits": {}, "mnist": {}}
    for cell in cells("full"):
        task, name = cell.name.split(": ")
        if task != VELOCITY:
            values = study.values(cell.name, "20 steps", "frechet")
            points = curves[cell.config.data.source].setdefault(name.removesuffix(", contractive"), {})
            points[(cell.config.max_time or 0) / 60] = values
    return curves
