"""Overhead of a solver on a CUDA device: eager beside torchdeq, and with the whole solve captured in a CUDA graph.

python -m benchmarks.solvers.gpu     writes benchmarks/results/gpu_solvers.json

f = tanh(z W + b), and every solve has 30 evaluations. An eager solve with a tolerance waits for the device at every
evaluation; a fixed count does not wait, and can be captured. "over copying": the time of a captured solve without f,
divided by that of copying as many bytes as its operators read and write.
"""

import argparse
import statistics
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from benchmarks.diffusion.steps import captured
from benchmarks.harness import RESULTS, OperatorCounter, paired, provenance, write_result
from benchmarks.solvers.overhead import EVALS, TRAFFIC_SHAPES, contenders, layer
from implicit import Anderson, AndersonGS, Broyden, Picard, Stop, iterate

FIXED = {
    "implicit plain": Picard(),
    "implicit Anderson": Anderson(6, safeguard=False),
    "implicit AndersonGS": AndersonGS(6, safeguard=False),
    "implicit Broyden": Broyden(30, safeguard=False),
}
"""Solvers whose fixed count is captured."""
Run = Callable[[], Any]


def eager(shape: str, repeats: int) -> list[dict[str, Any]]:
    """Time of each solve of EVALS evaluations with a tolerance, divided by that of the bare loop."""
    runs = contenders(*layer(*TRAFFIC_SHAPES[shape], device="cuda"))
    with torch.no_grad():
        times = paired(runs, repeats, "cuda")
    return [{"state": shape, "solver": name, **_row(times[name], times["bare"])} for name in runs if name != "bare"]


def in_graphs(shape: str, repeats: int) -> list[dict[str, Any]]:
    """Time of each captured fixed count of EVALS evaluations, divided by that of the captured bare loop."""
    f, z0 = layer(*TRAFFIC_SHAPES[shape], device="cuda")
    bare = contenders(f, z0)["bare"]
    stop = Stop(rtol=0, atol=0, max_evals=EVALS)
    runs: dict[str, Run] = {"bare": bare}
    runs |= {name: lambda solver=solver: iterate(f, z0, solver, stop) for name, solver in FIXED.items()}
    with torch.no_grad():
        moved = {name: _bytes(run) for name, run in runs.items()}
        graphs = {name: captured(run) for name, run in runs.items()}
        for name in FIXED:
            graphs[f"copy for {name}"] = captured(_copies(moved[name] - moved["bare"]))
        times = paired(graphs, repeats, "cuda")
    rows = []
    for name in FIXED:
        pairs = zip(times["bare"], times[name], times[f"copy for {name}"], strict=True)
        over = statistics.median((whole - base) / copy for base, whole, copy in pairs)
        rows.append(
            {"state": shape, "solver": name, **_row(times[name], times["bare"]), "over copying": round(over, 2)}
        )
    return rows


def _bytes(run: Run) -> int:
    with OperatorCounter() as counter:
        run()
    return counter.bytes


def _copies(moved: int) -> Run:
    """EVALS copies, which read and write `moved` bytes together."""
    source = torch.zeros(max(1, moved // (8 * EVALS)), device="cuda")
    target = torch.empty_like(source)

    def copy() -> None:
        for _ in range(EVALS):
            target.copy_(source)

    return copy


def _row(times: list[float], bare: list[float]) -> dict[str, float]:
    return {
        "ms per evaluation": round(1e3 * statistics.median(times) / EVALS, 4),
        "over the bare loop": round(statistics.median(a / b for a, b in zip(times, bare, strict=True)), 2),
    }


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=RESULTS / "gpu_solvers.json", help="result file")
    parser.add_argument("--repeats", type=int, default=15)
    options = parser.parse_args(arguments)
    if not torch.cuda.is_available():
        parser.error("this benchmark needs a CUDA device, and there is none here.")
    tables: dict[str, Any] = {}
    for name, measure in (("eager, with a tolerance", eager), ("a fixed count in a CUDA graph", in_graphs)):
        rows = [row for shape in TRAFFIC_SHAPES for row in measure(shape, options.repeats)]
        tables[name] = provenance("cuda", "torchdeq") | {"repeats": options.repeats, "rows": rows}
        write_result(options.out, {"command": "python -m benchmarks.solvers.gpu", "tables": tables})


if __name__ == "__main__":
    main()
