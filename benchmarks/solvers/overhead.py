"""Overhead of a solver, its cost without f, for our solvers and torchdeq's: CPU time, operators and states held.

f = tanh(z W + b), and every solve has 30 evaluations without gradients, as estimators run a solve. Times are divided by
that of the bare loop z <- f(z).
`evaluations.py` writes the result file.
"""

import multiprocessing
import statistics
from collections.abc import Callable, Iterable
from concurrent.futures import ProcessPoolExecutor
from typing import Any

import torch
from torchdeq.solver import anderson_solver, broyden_solver, fixed_point_iter

from benchmarks.harness import MemoryTracker, OperatorCounter, paired, ratio
from implicit import Anderson, AndersonGS, Broyden, Multisecant, Picard, Stop, iterate

PEERS = {"plain": fixed_point_iter, "Anderson": anderson_solver, "Broyden": broyden_solver}
SHAPES = {"(1, 64)": (1, 64, 64), "(32, 1024)": (32, 1024, 1024), "(8, 294912)": (8, 294912, 1024)}
EVALS = 30
REPEATS = {"(1, 64)": 201, "(32, 1024)": 41, "(8, 294912)": 5}


def layer(batch, numbers, width, device="cpu"):
    rng = torch.Generator().manual_seed(0)
    w = 0.5 * torch.linalg.qr(torch.randn(width, width, generator=rng))[0].to(device)
    z0 = torch.zeros(batch, numbers, device=device)
    return lambda z: torch.tanh(z.reshape(-1, width) @ w + 0.1).view(batch, numbers), z0


def contenders(f, z0):
    tight = dict(max_iter=EVALS, tol=0.0, stop_mode="rel")

    def bare():
        z = z0
        for _ in range(EVALS):
            z = f(z)

    pairs = {
        "plain": Picard(),
        "Anderson": Anderson(6, safeguard=False),
        "Broyden": Broyden(30, safeguard=False),
    }
    runs: dict[str, Callable[[], Any]] = {"bare": bare}
    for name, solver in pairs.items():
        stop = Stop(rtol=1e-30, atol=0, max_evals=EVALS)
        runs[f"implicit {name}"] = lambda solver=solver, stop=stop: iterate(f, z0, solver, stop)
        runs[f"torchdeq {name}"] = lambda name=name: PEERS[name](f, z0, **tight)
    stop = Stop(rtol=1e-30, atol=0, max_evals=EVALS)
    runs["implicit AndersonGS"] = lambda: iterate(f, z0, AndersonGS(6, safeguard=False), stop)
    runs["implicit Multisecant"] = lambda: iterate(f, z0, Multisecant(6, safeguard=False), stop)
    return runs


def over_bare(shape: str, name: str) -> float:
    """CPU time of a solve with EVALS evaluations divided by that of the bare loop z <- f(z), the median of alternating
    pairs.
    """
    torch.set_num_threads(1)
    runs = contenders(*layer(*SHAPES[shape]))
    with torch.no_grad():
        times = paired({"bare": runs["bare"], "contender": runs[name]}, REPEATS[shape])
    return round(ratio(times, "contender", "bare")["median"], 2)


def overhead() -> dict[str, dict[str, float]]:
    """`over_bare` of every contender."""
    return each_apart(over_bare, SHAPES, list(contenders(*layer(1, 64, 64))))


def each_apart(measure: Callable[[str, str], Any], shapes: Iterable[str], names: list[str]) -> dict[str, Any]:
    """`measure` of every shape and name, each in a separate process, because the allocator's state slows later ones."""
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(1, mp_context=context, max_tasks_per_child=1) as pool:
        return {shape: {name: pool.submit(measure, shape, name).result() for name in names} for shape in shapes}


def operators() -> dict[str, float]:
    """Operators per evaluation, without views and without the three operators of f."""
    f, z0 = layer(1, 64, 64)
    counts = {}
    for name, run in contenders(f, z0).items():
        with torch.no_grad(), OperatorCounter() as counter:
            run()
        counts[name] = round(counter.count / EVALS - 3, 1)
    return counts


TRAFFIC_SHAPES = {"(32, 1024)": (32, 1024, 1024), "(8, 65536)": (8, 65536, 1024), "(8, 294912)": (8, 294912, 1024)}


def traffic_of(shape: str, name: str) -> dict[str, float]:
    """For one contender: the states that it reads and writes per evaluation, without f, and its time divided by that of
    copying as many bytes.

    A copy reads half of the bytes and writes the other half. Runs of contender, bare loop and copy alternate.
    """
    torch.set_num_threads(1)
    f, z0 = layer(*TRAFFIC_SHAPES[shape])
    runs = contenders(f, z0)
    moved = {}
    for one in ("bare", name):
        with torch.no_grad(), OperatorCounter() as counter:
            runs[one]()
        moved[one] = counter.bytes
    own = (moved[name] - moved["bare"]) / EVALS
    source = torch.zeros(int(own) // 8)
    target = torch.empty_like(source)

    def copy():
        for _ in range(EVALS):
            target.copy_(source)

    repeats = {"(32, 1024)": 31, "(8, 65536)": 7, "(8, 294912)": 5}[shape]
    with torch.no_grad():
        times = paired({"bare": runs["bare"], "contender": runs[name], "copy": copy}, repeats)
    ratios = [(c - b) / k for b, c, k in zip(times["bare"], times["contender"], times["copy"], strict=True)]
    return {
        "states moved": round(own / (z0.numel() * z0.element_size()), 1),
        "time over copying": round(statistics.median(ratios), 2),
    }


def traffic() -> dict[str, dict[str, dict[str, float]]]:
    """`traffic_of` every contender but the bare loop."""
    return each_apart(traffic_of, TRAFFIC_SHAPES, [name for name in contenders(*layer(1, 64, 64)) if name != "bare"])


def memory() -> dict[str, float]:
    """Peak memory in states, including z0 and the temporaries of f."""
    f, z0 = layer(4, 65536, 64)
    held = {}
    for name, run in contenders(f, z0).items():
        with torch.no_grad(), MemoryTracker() as tracker:
            run()
        held[name] = round(tracker.peak / (z0.numel() * 4), 1) + 1
    return held
