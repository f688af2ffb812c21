"""The result file of a study, as the chapters read it."""

import json
import statistics
from pathlib import Path
from typing import Any

from benchmarks.report.formatting import NOTHING

_HASTY = 2.0  # distances above this are those of networks that have far to go


def read(path: Path) -> dict[str, Any]:
    """What a result file holds; nothing where it was not measured.

    Raises:
        SystemExit: the file is none of ours.
    """
    if not path.exists():
        return {}
    try:
        found = json.loads(path.read_text())
    except ValueError as error:
        raise SystemExit(f"{path} is not whole ({error}): restore it, or delete it to have it not measured.") from None
    if not isinstance(found, dict):
        raise SystemExit(f"{path} is no result file: restore it, or delete it to have it not measured.")
    return found


class Study:
    """The records of one study, `None` wherever something was not measured."""

    def __init__(self, results: Path, name: str) -> None:
        path = results / f"experiment_{name}.json"
        self.file, self.name = path.name, name
        self.found: dict[str, Any] = read(path)

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
        floor = "; ".join(f"{name} {score['frechet']:.2f}" for name, score in real.items())
        return (
            f"`{self.file}`: {self.found['command']}, {self.found['device']}, torch {self.found['versions']['torch']}, "
            f"commit {self.found['commit']}; {self._complete()}, "
            f"{self.found['training_cpu_seconds']} s of CPU time for each network, "
            f"{self.found['samples']} samples a score. Fréchet distance of real digits: {floor}.{hasty}"
        )

    def _complete(self) -> str:
        """How many networks were trained of those that the seeds ask for, and which seeds these are."""
        from benchmarks.experiments.run import study

        seeds = sorted({int(name.rsplit(", seed ", 1)[1]) for name in self.found["cells"]})
        wanted = len(seeds) * len(study(self.name).cells(self.found["scale"]))
        which = f"seed{'s' if len(seeds) > 1 else ''} {', '.join(map(str, seeds))}"
        return f"{len(self.found['cells'])} of {wanted} networks, {which}"
