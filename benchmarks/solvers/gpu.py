"""Overhead of a solver on a CUDA device, beside torchdeq: time of a solve divided by that of the bare loop z <- f(z).

python -m benchmarks.solvers.gpu     writes benchmarks/results/gpu_solvers.json

f = tanh(z W + b), and every solve has 30 evaluations and a tolerance, for which the host waits at every evaluation.
"""

import statistics
from typing import Any

import torch

from benchmarks.harness import RESULTS, gpu_options, paired, provenance, write_result
from benchmarks.solvers.overhead import EVALS, TRAFFIC_SHAPES, contenders, layer


def eager(shape: str, repeats: int) -> list[dict[str, Any]]:
    """One row for each solver, ours and torchdeq's."""
    runs = contenders(*layer(*TRAFFIC_SHAPES[shape], device="cuda"))
    with torch.no_grad():
        times = paired(runs, repeats, "cuda")
    return [
        {
            "state": shape,
            "solver": name,
            "ms per evaluation": round(1e3 * statistics.median(times[name]) / EVALS, 4),
            "over the bare loop": round(
                statistics.median(a / b for a, b in zip(times[name], times["bare"], strict=True)), 2
            ),
        }
        for name in runs
        if name != "bare"
    ]


def main(arguments: list[str] | None = None) -> None:
    options = gpu_options(__doc__, RESULTS / "gpu_solvers.json", 15, arguments)
    rows = [row for shape in TRAFFIC_SHAPES for row in eager(shape, options.repeats)]
    about = provenance("cuda", "torchdeq") | {"repeats": options.repeats, "rows": rows}
    tables = {"eager, with a tolerance": about}
    write_result(options.out, {"command": "python -m benchmarks.solvers.gpu", "tables": tables})


if __name__ == "__main__":
    main()
