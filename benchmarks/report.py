"""docs/report.md and its figures, from the result files alone: `python -m benchmarks.report`.

One function per section and result file. A file that is missing, or a cell that is missing in it, reads "not measured".
"""

import argparse
import json
import statistics
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from apps.diffusion.config import Config
from benchmarks import figures

ROOT = Path(__file__).parents[1]
NOTHING = "not measured"
_HASTY = 2.0  # distances above this are those of networks that have far to go
_UNTRAINED = 5.0  # and above this their pictures show few digits
Section = Callable[[Path, Path], str]


class Study:
    """The records of one study, `None` wherever something was not measured."""

    def __init__(self, results: Path, name: str) -> None:
        path = results / f"study_{name}.json"
        self.file = path.name
        self.found: dict[str, Any] = json.loads(path.read_text()) if path.exists() else {}

    def values(self, cell: str, way: str, what: str) -> list[float]:
        """One number per seed; what a run cost in training is found under the way ""."""
        parts = [c for name, c in self.found.get("cells", {}).items() if name.rsplit(", seed ", 1)[0] == cell]
        parts = [c["samples"].get(way, {}) if way else c["training"] for c in parts]
        return [p[what] for p in parts if what in p]

    def mean(self, cell: str, way: str, what: str) -> float | None:
        values = self.values(cell, way, what)
        return statistics.fmean(values) if values else None

    def cells(self) -> list[str]:
        return list(dict.fromkeys(name.rsplit(", seed ", 1)[0] for name in self.found.get("cells", {})))

    def ways(self, cell: str) -> list[str]:
        """The ways in which a cell was sampled."""
        first = next((c for n, c in self.found.get("cells", {}).items() if n.startswith(f"{cell}, seed")), None)
        return list(first["samples"]) if first else []

    def source(self) -> str:
        """Where the numbers come from, in a line."""
        if not self.found:
            return f"`{self.file}`: {NOTHING}."
        real = self.found["real"]
        means = [self.mean(cell, way, "frechet") for cell in self.cells() for way in self.ways(cell)]
        best = min((m for m in means if m is not None), default=0.0)
        hasty = (
            f" The best distance here is {best:.1f}: networks trained so briefly tell who learns fastest, not who ends "
            "best."
            if best > _HASTY
            else ""
        )
        floor = ", ".join(f"{name} {score['frechet']:.2f}" for name, score in real.items())
        return (
            f"`{self.file}`: {self.found['command']}, {self.found['device']}, torch {self.found['versions']['torch']}, "
            f"commit {self.found['commit']}; {self.found['training_cpu_seconds']} s of CPU time for each network, "
            f"{self.found['samples']} samples a score. Fréchet distance of real digits: {floor}.{hasty}"
        )


def told(values: list[float], digits: int = 2, factor: float = 1.0) -> str:
    """Mean and standard deviation over seeds, and their number where it is not three."""
    if not values:
        return NOTHING
    values = [factor * v for v in values]
    text = f"{statistics.fmean(values):.{digits}f}"
    if len(values) > 1:
        text += f" ± {statistics.stdev(values):.{digits}f}"
    return text if len(values) == 3 else f"{text} ({len(values)} seed{'s' if len(values) > 1 else ''})"


def table(head: Iterable[str], rows: Iterable[Iterable[str]]) -> str:
    """A Markdown table."""
    head = list(head)
    lines = [head, ["---"] * len(head), *map(list, rows)]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def verdict(claim: str, better: list[float], worse: list[float]) -> str:
    """Whether `better` is the smaller of two sets of distances, and by more than their spread."""
    if not better or not worse:
        return f"*{claim}*: {NOTHING}."
    gain = statistics.fmean(worse) - statistics.fmean(better)
    if min(len(better), len(worse)) < 2:
        word = "**undecided**, one seed has no spread"
    elif min(map(statistics.fmean, (better, worse))) > _UNTRAINED:
        word = "**undecided**, neither has learnt to draw digits in this time"
    elif abs(gain) <= max(map(statistics.stdev, (better, worse))):
        word = "**within the spread of seeds**"
    else:
        word = "**yes**" if gain > 0 else "**no, the reverse**"
    return f"*{claim}*: {word} (Fréchet distance {told(better)} against {told(worse)})."


def claims(results: Path, images: Path) -> str:
    """The two headline numbers that are no matter of training."""
    path, parts = results / "diffusion.json", ["## Size and memory"]
    known = json.loads(path.read_text())["tables"] if path.exists() else {}
    sizes = {row["network"]: row["parameters"] for row in known.get("parameters", {}).get("rows", [])}
    fewer = f"{100 * (1 - sizes['FPDM XL/2'] / sizes['DiT XL/2']):.1f} %" if sizes else NOTHING
    parts.append(f"The paper: *87 % fewer parameters at XL/2*: counted, {fewer} fewer.")
    steps = {row["step"]: row.get("peak MiB", {}) for row in known.get("against the plain step", {}).get("rows", [])}
    ours = steps.get("training, (n, m) = (6, 6)", {}).get("ours")
    dit = next((peak["DiT"] for peak in steps.values() if "DiT" in peak), None)
    less = f"{100 * (1 - ours / dit):.0f} % less" if ours and dit else NOTHING
    parts.append(
        f"The paper: *60 % less training memory at XL/2*: {NOTHING} at that size. At hidden size 256 the tensors alive "
        f"in a step of (6, 6), weights and their gradients apart, take {less} than those of a DiT of 28 blocks."
    )
    parts.append("`diffusion.json`; the tables are under *What FPDM costs*.")
    return "\n\n".join(parts)


def estimators(results: Path, images: Path) -> str:
    from benchmarks.studies.estimators import GRADS

    study = Study(results, "estimators")
    rows = [
        (
            name,
            told(study.values(name, "20 x 10", "frechet")),
            told(study.values(name, "20 x 10", "accuracy"), 1, 100),
            told(study.values(name, "", "steps"), 0),
            told(study.values(name, "", "loss"), 3),
        )
        for name in GRADS
    ]
    distances = {name: study.values(name, "20 x 10", "frechet") for name in GRADS}
    stop = Config().stop
    solve = (
        f"IFT, JFB, Phantom, Reversible and Unrolled solve to a relative residual of {stop.rtol:g} in at most "
        f"{stop.max_evals} evaluations of the naive iteration; S-JFB draws its own. Equal time means fewer steps "
        "where a step costs more: the column `steps` says how many were made."
    )
    figures.estimators(distances, images / "report_estimators.png")
    return "\n\n".join(
        (
            "## Gradient estimators at equal training time",
            "![Fréchet distance by estimator](images/report_estimators.png)",
            solve,
            table(("estimator", "Fréchet distance", "right label, %", "steps", "last loss"), rows),
            "The paper: " + verdict("S-JFB beats JFB", distances["S-JFB(6, 3)"], distances["JFB"]),
            verdict("The exact gradient beats S-JFB", distances["IFT"], distances["S-JFB(6, 3)"]),
            study.source(),
        )
    )


def free_and_tracked(results: Path, images: Path) -> str:
    from benchmarks.studies.free_and_tracked import FREE, TRACKED

    study = Study(results, "free-and-tracked")
    cell = {(n, m): study.values(f"N={n} M={m}", "20 x 10", "frechet") for n in FREE for m in TRACKED}
    rows = [(f"N = {n}", *(told(cell[n, m]) for m in TRACKED)) for n in FREE]
    measured = {key: statistics.fmean(values) for key, values in cell.items() if values}
    best = min(measured, key=lambda key: measured[key], default=None)
    line = f"Best mean: N = {best[0]}, M = {best[1]}." if best else f"Best: {NOTHING}."
    return "\n\n".join(
        (
            "## How many iterations without and with a graph",
            table(("Fréchet distance", *(f"M = {m}" for m in TRACKED)), rows),
            line,
            "The paper: " + verdict("N = M = 12 beats N = M = 3", cell[12, 12], cell[3, 3]),
            study.source(),
        )
    )


def layers(results: Path, images: Path) -> str:
    from benchmarks.studies.layers import PAIRS

    study = Study(results, "layers")
    names = {pair: f"pre={pair[0]} post={pair[1]}" for pair in PAIRS}
    rows = [
        (
            f"{pair[0]} before, {pair[1]} behind",
            told(study.values(name, "20 x 10", "frechet")),
            told(study.values(name, "20 x 10", "accuracy"), 1, 100),
            f"{study.mean(name, '', 'parameters'):,.0f}" if study.found else NOTHING,
            told(study.values(name, "", "steps"), 0),
        )
        for pair, name in names.items()
    ]
    more, one = (study.values(names[pair], "20 x 10", "frechet") for pair in ((3, 3), (1, 1)))
    return "\n\n".join(
        (
            "## Explicit blocks around the fixed point",
            table(("blocks", "Fréchet distance", "right label, %", "parameters", "steps"), rows),
            verdict("Three and three beat one and one", more, one),
            study.source(),
        )
    )


def budgets(results: Path, images: Path) -> str:
    from benchmarks.studies.sampling import BUDGETS

    study = Study(results, "sampling")
    rows, lines, curves = [], [], {}
    for kind in ("block passes", "MACs"):
        prefix = {b: f"{b} block passes," if kind == "block passes" else f"MACs of {b} blocks," for b in BUDGETS}
        for budget in BUDGETS:
            plain = study.values("DiT", f"{budget} block passes, {budget // 6} steps", "frechet")
            ways = [way for way in study.ways("FPDM") if way.startswith(prefix[budget])]
            best = min(ways, key=lambda way: study.mean("FPDM", way, "frechet") or 1e9, default=None)
            ours = study.values("FPDM", best, "frechet") if best else []
            split = best.rsplit(", ", 1)[1] if best else NOTHING
            rows.append((f"{prefix[budget][:-1]}", told(ours), split, told(plain), f"{budget // 6} steps"))
            lines.append("- " + verdict(f"FPDM beats DiT at {prefix[budget][:-1]}", ours, plain))
            for way in ways:
                steps = int(way.rsplit(", ", 1)[1].split()[0])
                curves.setdefault((kind, steps), []).append((budget, study.values("FPDM", way, "frechet")))
            curves.setdefault((kind, "DiT"), []).append((budget, plain))
    figures.budgets(curves, images / "report_budgets.png")
    size = [f"{study.mean(name, '', 'parameters') or 0:,.0f}" for name in ("FPDM", "DiT")]
    return "\n\n".join(
        (
            "## FPDM and DiT at equal training time and equal sampling budgets",
            "![Fréchet distance against the sampling budget](images/report_budgets.png)",
            f"FPDM has {size[0]} parameters, the DiT of six blocks {size[1]}. An FPDM step of k iterations costs 2 + k "
            "block passes; an iteration costs more MACs than a block, so the lower half of the table gives both the "
            "MACs of the DiT. The split of steps is the best of 5, 10, 20 and 40, chosen on these scores.",
            table(("budget", "FPDM, best split", "of", "DiT", "of"), rows),
            "\n".join(lines),
            study.source(),
        )
    )


def reuse(results: Path, images: Path) -> str:
    from benchmarks.studies.sampling import STARTS

    study, counts = Study(results, "sampling"), (1, 2, 3, 5, 10)
    found = {
        name: {k: study.values("FPDM", f"{name} start, {k} iterations", "frechet") for k in counts} for name in STARTS
    }
    rows = [(name, *(told(found[name][k]) for k in counts)) for name in STARTS]
    figures.reuse(found, images / "report_reuse.png")
    return "\n\n".join(
        (
            "## Starting from the previous timestep's solution",
            "![Fréchet distance against iterations per step, by start](images/report_reuse.png)",
            table(("start, 20 steps", *(f"{k} iteration{'s' if k > 1 else ''}" for k in counts)), rows),
            "The paper: " + verdict("Reuse helps at one iteration a step", found["reused"][1], found["fresh"][1]),
            verdict("One iteration with reuse beats ten without", found["reused"][1], found["fresh"][10]),
            study.source(),
        )
    )


def allocation(results: Path, images: Path) -> str:
    study = Study(results, "sampling")
    ways = [f"{shape}, 60 in all" for shape in ("constant", "increasing", "decreasing")]
    ways += [f"tolerance {rtol}" for rtol in (0.3, 0.1, 0.03)]
    rows = [
        (
            way + (", reused start" if way.startswith("tolerance") else ""),
            told(study.values("FPDM", way, "evaluations"), 1),
            told(study.values("FPDM", way, "frechet")),
            told(study.values("FPDM", way, "accuracy"), 1, 100),
        )
        for way in ways
    ]
    distances = {way: study.values("FPDM", way, "frechet") for way in ways}
    return "\n\n".join(
        (
            "## Where to spend iterations",
            table(("20 steps", "iterations in all", "Fréchet distance", "right label, %"), rows),
            "The paper: " + verdict("Increasing beats constant", distances[ways[1]], distances[ways[0]]),
            verdict("Decreasing beats constant", distances[ways[2]], distances[ways[0]]),
            study.source(),
        )
    )


def solvers(results: Path, images: Path) -> str:
    from benchmarks.studies.sampling import SOLVERS

    study, counts = Study(results, "sampling"), (2, 4, 8, 16)
    found = {
        name: {
            k: [
                study.values("FPDM", f"{name}, {k} evaluations", what)
                for what in ("residual", "frechet", "cpu_seconds")
            ]
            for k in counts
        }
        for name in SOLVERS
    }
    residual = lambda v: f"{statistics.fmean(v):.1e}" if v else NOTHING  # noqa: E731
    rows = [(name, *(f"{residual(found[name][k][0])}; {told(found[name][k][1])}" for k in counts)) for name in SOLVERS]
    figures.solvers(found, images / "report_solvers.png")
    return "\n\n".join(
        (
            "## Solvers in sampling",
            "![Residual and Fréchet distance against evaluations](images/report_solvers.png)",
            "Median relative residual; Fréchet distance. Twenty steps, fresh starts.",
            table(("solver", *(f"{k} evaluations" for k in counts)), rows),
            verdict(
                "Anderson beats the naive iteration at 4 evaluations", found["Anderson"][4][1], found["Picard"][4][1]
            ),
            study.source(),
        )
    )


def digits(results: Path, images: Path) -> str:
    path = results / "digits.json"
    head = "## The default run"
    if not path.exists():
        return f"{head}\n\n`digits.json`: {NOTHING}."
    found = json.loads(path.read_text())
    rows = []
    for kind in ("fpdm", "dit"):
        runs = [run for name, run in found["runs"].items() if name.startswith(f"{kind} ")]
        rows.append(
            (
                kind.upper() if kind == "fpdm" else "DiT",
                told([r["training"]["parameters"] for r in runs], 0),
                told([r["training"]["steps"] for r in runs], 0),
                told([r["generated"]["accuracy"] for r in runs], 1, 100),
                told([r["generated"]["frechet"] for r in runs]),
            )
        )
    source = f"`digits.json`: {found['command']}, {found['device']}, commit {found['commit'][:7]}."
    return "\n\n".join(
        (head, table(("network", "parameters", "steps", "right label, %", "Fréchet distance"), rows), source)
    )


def core_solvers(results: Path, images: Path) -> str:
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


def costs(results: Path, images: Path) -> str:
    path, parts = results / "diffusion.json", ["## What FPDM costs"]
    known = json.loads(path.read_text())["tables"] if path.exists() else {}
    for name in ("against the plain step", "around the block", "sampling step", "training step", "parameters"):
        found = known.get(name)
        parts.append(f"**{name.capitalize()}**" + ("" if found else f": {NOTHING}."))
        if found:
            keys = list(dict.fromkeys(key for row in found["rows"] for key in row))
            parts.append(table(keys, ([_short(row.get(key, "")) for key in keys] for row in found["rows"])))
            parts.append(f"`diffusion.json`: {found['device']}, commit {found['commit']}.")
    return "\n\n".join(parts)


def _short(value: Any) -> str:
    """A number or a small record, legible in a table."""
    if isinstance(value, dict):
        return ", ".join(f"{key} {_short(one)}" for key, one in value.items())
    return f"{value:.4g}" if isinstance(value, float) else f"{value:,}" if isinstance(value, int) else str(value)


def core_gradients(results: Path, images: Path) -> str:
    from benchmarks.report_gradients import tables

    path, head = results / "gradients.json", "## Gradient estimators of the core beside torchdeq's"
    if not path.exists():
        return f"{head}\n\n`gradients.json`: {NOTHING}."
    return f"{head}\n\n{tables(json.loads(path.read_text()))}\n\n`gradients.json`."


def gpu(results: Path, images: Path) -> str:
    found = [path for path in sorted(results.glob("*.json")) if "cuda" in path.stem or "gpu" in path.stem]
    told_ = "\n".join(f"- `{path.name}`" for path in found) or f"Training memory and block passes at XL/2: {NOTHING}."
    return f"## On a GPU\n\n{told_}"


SECTIONS: tuple[Section, ...] = (
    claims,
    budgets,
    estimators,
    reuse,
    free_and_tracked,
    layers,
    allocation,
    solvers,
    digits,
    costs,
    core_solvers,
    core_gradients,
    gpu,
)


def build(results: Path, out: Path) -> str:
    """The report's text; figures are written beside it, in `images/`."""
    images = out.parent / "images"
    images.mkdir(parents=True, exist_ok=True)
    parts = [section(results, images) for section in SECTIONS]
    head = (
        "# Report\n\nWhat Fixed Point Diffusion Models claim, at the scale of handwritten digits, and what the "
        "core costs. Made by `python -m benchmarks.report` from the files under `benchmarks/results/`, which name "
        "command, device, versions and commit. Numbers are means and standard deviations over three seeds. Training is "
        "budgeted in CPU time of one thread, which other work on the machine disturbs least. Lower Fréchet distances "
        "(features of a digits classifier) are better."
    )
    return "\n\n".join((head, *parts)) + "\n"


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.report", description=__doc__)
    parser.add_argument("--results", type=Path, default=ROOT / "benchmarks" / "results")
    parser.add_argument("--out", type=Path, default=ROOT / "docs" / "report.md")
    options = parser.parse_args(arguments)
    text = build(options.results, options.out)
    options.out.write_text(text)
    print(f"{options.out}: {text.count(NOTHING)} entries {NOTHING}.")


if __name__ == "__main__":
    main()
