"""Solves with a fixed count, eager and compiled by torch.compile, compared with jaxopt.

    python -m benchmarks.solvers.compiled --jax peers/bin/python      writes benchmarks/results/compiled.json

The state has the shape (1, 64), so that nearly all time of an eager solve is spent in Python. Measured is the CPU time
per evaluation, with 30 evaluations of f and one thread, of our solvers eager and compiled to one graph by inductor, and
of torchdeq, which cannot be compiled. jaxopt's jitted solvers alternate with them, in the environment of `--jax` (see
`peers_jax.py`). The graph contains every evaluation of f, and calls of one region for the steps of a solver with a
history. One more row, plain iteration to a tolerance by torch.while_loop, shows the cost of a loop without Python.
"""

import argparse
import json
import statistics
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch._higher_order_ops import while_loop

from benchmarks.harness import RESULTS, provenance, seconds, write_result
from benchmarks.solvers.overhead import EVALS, PEERS, SHAPES, layer
from implicit import Anderson, AndersonGS, Broyden, Multisecant, Picard, Stop, iterate
from implicit.pytree import norm

ROUNDS = 3
OURS = {
    "Picard": Picard(),
    "Anderson(5)": Anderson(5, safeguard=False),
    "AndersonGS(5)": AndersonGS(5, safeguard=False),
    "Broyden(5)": Broyden(5, safeguard=False),
    "Broyden(30)": Broyden(30, safeguard=False),
    "Multisecant(5)": Multisecant(5, safeguard=False),
}


def spent(run: Callable[[], Any], blocks: int = 10, solves: int = 20) -> float:
    """Microseconds of CPU for each evaluation; a block of solves is timed at once, as the clock may be coarse."""

    def block() -> None:
        for _ in range(solves):
            run()

    return statistics.median(seconds(block) for _ in range(blocks)) / solves / EVALS * 1e6


def to_tolerance(f: Callable[[Tensor], Tensor]) -> Callable[[Tensor, Tensor, Tensor], Tensor]:
    """Plain iteration to a tolerance in one graph, by torch.while_loop."""

    def unfinished(count, z, fz, done, rtol, budget):
        return (count < budget) & ~done.all()

    def again(count, z, fz, done, rtol, budget):
        z = torch.where(done, z, fz)
        fz = torch.where(done, fz, f(z))
        done = done | (norm(fz - z) <= rtol * norm(fz)).unsqueeze(1)
        return count + 1, z, fz, done, rtol.clone(), budget.clone()

    def solve(z, rtol, budget):
        fz = f(z)
        done = (norm(fz - z) <= rtol * norm(fz)).unsqueeze(1)
        return while_loop(unfinished, again, (torch.ones_like(budget), z, fz, done, rtol, budget))[1]

    return solve


def contenders() -> tuple[dict[str, Callable[[], Any]], dict[str, float]]:
    """The solves to time, by name, and the seconds that compiling them took."""
    f, z0 = layer(*SHAPES["(1, 64)"])
    stop = Stop(rtol=0, atol=0, max_evals=EVALS)
    runs: dict[str, Callable[[], Any]] = {}
    waited: dict[str, float] = {}

    def bare(z):
        for _ in range(EVALS):
            z = f(z)
        return z

    solves = {"bare loop": bare}
    for name, solver in OURS.items():
        solves[name] = lambda z, solver=solver: iterate(f, z, solver, stop).value
    torch.compile(f)(z0)  # inductor's start belongs to no row
    for name, solve in solves.items():
        compiled = torch.compile(solve, fullgraph=True)
        start = time.perf_counter()
        torch.testing.assert_close(compiled(z0), solve(z0), rtol=0, atol=1e-5)
        waited[name] = round(time.perf_counter() - start, 1)
        runs[f"implicit {name}"] = lambda solve=solve: solve(z0)
        runs[f"implicit {name}, compiled"] = lambda compiled=compiled: compiled(z0)
    whole = torch.compile(to_tolerance(f), fullgraph=True)
    limits = torch.zeros(()), torch.tensor(EVALS)
    start = time.perf_counter()
    whole(z0, *limits)
    waited["plain iteration to a tolerance, while_loop"] = round(time.perf_counter() - start, 1)
    runs["plain iteration to a tolerance, while_loop, compiled"] = lambda: whole(z0, *limits)
    for name, solve in PEERS.items():
        runs[f"torchdeq {name}"] = lambda solve=solve: solve(f, z0, max_iter=EVALS, tol=0.0, stop_mode="rel")
    return runs, waited


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--jax", type=Path, help="the Python of an environment with jax and jaxopt; none: left out")
    parser.add_argument("--out", type=Path, default=RESULTS / "compiled.json")
    options = parser.parse_args()
    torch.set_num_threads(1)
    where = provenance("cpu", "torchdeq")
    versions = where["versions"]
    with torch.no_grad():
        runs, waited = contenders()
        times: dict[str, list[float]] = {}
        for _ in range(ROUNDS):
            for name, run in runs.items():
                times.setdefault(name, []).append(spent(run))
            if options.jax is not None:
                command = [str(options.jax), str(Path(__file__).with_name("compiled_jax.py"))]
                found = json.loads(subprocess.run(command, capture_output=True, text=True, check=True).stdout)
                versions |= found["versions"]
                waited |= {f"jaxopt {name}": seconds for name, seconds in found["waited"].items()}
                for name, value in found["spent"].items():
                    times.setdefault(f"jaxopt {name}, jitted", []).append(value)
    result = {
        **where,
        "state": "(1, 64)",
        "evaluations": EVALS,
        "microseconds of CPU for each evaluation": {n: round(statistics.median(t), 1) for n, t in times.items()},
        "seconds to compile": waited,
    }
    write_result(options.out, result)
    print(json.dumps(result, indent=1))


if __name__ == "__main__":
    main()
