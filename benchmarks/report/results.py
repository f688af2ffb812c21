"""Reading the result files of experiments."""

import statistics
from pathlib import Path
from typing import Any

from benchmarks.harness import read_result
from benchmarks.report.formatting import NOTHING

_UNFINISHED = 2.0  # if the best Fréchet distance of a study is larger, the report says that training was too short


class Study:
    """The records of one experiment; a value that was not measured is None or an empty list."""

    def __init__(self, results: Path, name: str) -> None:
        path = results / f"experiment_{name}.json"
        self.file, self.name = path.name, name
        self.found: dict[str, Any] = read_result(path)

    def values(self, cell: str, way: str, what: str) -> list[float]:
        """The numbers `what` of a cell and a sampling setting, one per seed; with way "", those of the training run."""
        parts = [c for name, c in self.found.get("cells", {}).items() if name.rsplit(", seed ", 1)[0] == cell]
        parts = [c["samples"].get(way, {}) if way else c["training"] for c in parts]
        return [p[what] for p in parts if what in p]

    def mean(self, cell: str, way: str, what: str) -> float | None:
        values = self.values(cell, way, what)
        return statistics.fmean(values) if values else None

    def cells_of(self, task: str) -> list[dict[str, Any]]:
        """The records of all cells whose names begin with `task`."""
        return [c for name, c in self.found.get("cells", {}).items() if name.startswith(f"{task}: ")]

    def cells(self) -> list[str]:
        return list(dict.fromkeys(name.rsplit(", seed ", 1)[0] for name in self.found.get("cells", {})))

    def ways(self, cell: str) -> list[str]:
        """Names of the sampling settings of a cell."""
        first = next((c for n, c in self.found.get("cells", {}).items() if n.startswith(f"{cell}, seed")), None)
        return list(first["samples"]) if first else []

    def source(self) -> str:
        """The provenance of the numbers, as one line of text."""
        if not self.found:
            return f"`{self.file}`: {NOTHING}."
        real = self.found["real"]
        means = [self.mean(cell, way, "frechet") for cell in self.cells() for way in self.ways(cell)]
        best = min((m for m in means if m is not None), default=0.0)
        unfinished = (
            f" The best distance here is {best:.1f}: training this brief ranks speed of learning, not final quality."
            if best > _UNFINISHED
            else ""
        )
        floor = "; ".join(f"{name} {score['frechet']:.2f}" for name, score in real.items())
        return (
            f"`{self.file}`: {self.found['command']}, {self.found['device']}, torch {self.found['versions']['torch']}, "
            f"commit {self.found['commit']}; {self._complete()}, "
            f"{self._seconds()} s of CPU time for each network, "
            f"{self.found['samples']} samples a score. Fréchet distance of real digits: {floor}.{unfinished}"
        )

    def _seconds(self) -> str:
        """CPU seconds of training as text: one number, or a number for each task."""
        from benchmarks.experiments.run import study

        lengths = {cell.config.max_time for cell in study(self.name).cells(self.found["scale"])}
        return ", ".join(f"{seconds:g}" for seconds in sorted(s for s in lengths if s))

    def _complete(self) -> str:
        """The number of trained networks, the number planned, and the seeds, as text."""
        from benchmarks.experiments.run import study

        seeds = sorted({int(name.rsplit(", seed ", 1)[1]) for name in self.found["cells"]})
        wanted = len(seeds) * len(study(self.name).cells(self.found["scale"]))
        which = f"seed{'s' if len(seeds) > 1 else ''} {', '.join(map(str, seeds))}"
        return f"{len(self.found['cells'])} of {wanted} networks, {which}"
