"""Settings of FPDM's training at equal CPU time, three training times."""

from pathlib import Path

from benchmarks.experiments.settings import ITERATIONS, LENGTHS, PRESET, SETTINGS
from benchmarks.report.formatting import NOTHING, mean_and_deviation, table
from benchmarks.report.results import Study
from benchmarks.report.significance import decision

ABOUT = (
    "S-JFB (N, M) trains with at most N iterations without and M with a graph. *contractive*: the recurrent weights "
    "are initialized with 0. *growing*: N and M rise from 1 over the whole training. Networks predict the image. "
    "Fréchet distances of 20 timesteps by DDIM, with 2, 5 and 12 iterations at each. A table names the machine that "
    "trained its networks: a CPU minute is another number of steps on another machine. The last column compares the "
    f"distances at 12 iterations with those of {PRESET}: is the row better?"
)


def section(results: Path, images: Path) -> str:
    study = Study(results, "settings")
    parts = ["## Settings of training", ABOUT]
    head = ("setting", "steps", *(f"{k} iterations" for k in ITERATIONS), "right label, %", "better than the presets'")
    for task in LENGTHS:
        machines = sorted({str(cell["training"].get("machine", NOTHING)) for cell in study.cells_of(task)})
        parts.append(f"**{task}** ({'; '.join(machines) or NOTHING})")
        parts.append(table(head, [_row(study, task, name) for name in SETTINGS]))
    return "\n\n".join((*parts, study.source()))


def _row(study: Study, task: str, name: str) -> tuple[str, ...]:
    cell = f"{task}: {name}"
    many, preset = (study.values(f"{task}: {one}", "20 x 12", "frechet") for one in (name, PRESET))
    return (
        name,
        mean_and_deviation(study.values(cell, "", "steps"), 0),
        *(mean_and_deviation(study.values(cell, f"20 x {k}", "frechet")) for k in ITERATIONS),
        mean_and_deviation(study.values(cell, "20 x 5", "accuracy"), 1, 100),
        "-" if name == PRESET else decision(many, preset, task=task.split(",")[0]),
    )
