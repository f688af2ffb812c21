"""Solvers beside their peers: evaluations on the fourteen problems, CPU time around f, operators, memory.

python -m benchmarks.solvers.evaluations                       writes results/solvers.json and prints a summary
python -m benchmarks.solvers.evaluations --parts evaluations   measures that part again and keeps the others

Rows of jaxopt and optimistix come from results/peers_jax.json (`peers_jax.py` writes it, in an environment of its own).
"""

import argparse
import json
import multiprocessing
import platform
import statistics
import subprocess
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from importlib.metadata import version
from pathlib import Path
from typing import Any

import scipy
import torch
from scipy import optimize
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torchdeq.solver import anderson_solver, broyden_solver, fixed_point_iter

from implicit import Anderson, AndersonGS, Broyden, NewtonKrylov, Picard, Stop, iterate
from implicit.testing import Problem, problems

OURS = {
    "Picard": Picard(),
    "Anderson(5)": Anderson(),
    "Anderson(30)": Anderson(30),
    "AndersonGS (default)": AndersonGS(),
    "AndersonGS(60)": AndersonGS(60),
    "Broyden(20)": Broyden(),
    "Broyden(60)": Broyden(60),
    "NewtonKrylov": NewtonKrylov(),
}
PEERS = {"plain": fixed_point_iter, "Anderson": anderson_solver, "Broyden": broyden_solver}
BUDGET = 300


def ours(solver) -> Callable[[Problem, float], torch.Tensor]:
    def run(p, rtol):
        return iterate(p, p.z0, solver, Stop(rtol=rtol, atol=0, max_evals=BUDGET), args=p.args).value

    return run


def theirs(function) -> Callable[[Problem, float], torch.Tensor]:
    def run(p, rtol):
        return function(lambda z: p(z, *p.args), p.z0, max_iter=BUDGET, tol=rtol, stop_mode="rel")[0]

    return run


def scipys(method) -> Callable[[Problem, float], torch.Tensor]:
    """One system of all samples, as scipy knows no batches; full steps from J = -I: its best settings for z = f(z)."""

    def run(p, rtol):
        def g(x):
            z = torch.from_numpy(x.copy()).to(p.z0).reshape(p.z0.shape)
            if p.calls >= BUDGET or float(p.residual(z).max()) <= rtol:
                raise Reached(z)
            return (p(z, *p.args) - z).double().numpy().ravel()

        options = {"maxiter": BUDGET, "fatol": 1e-300, "line_search": None, "jac_options": {"alpha": 1.0}}
        try:
            answer = optimize.root(g, p.z0.double().numpy().ravel(), method=method, options=options).x
        except Reached as reached:
            return reached.z
        return torch.from_numpy(answer).to(p.z0).reshape(p.z0.shape)

    return run


class Reached(Exception):
    """A point within the tolerance, or the end of the budget."""

    def __init__(self, z):
        self.z = z


def evaluations(dtype, rtol) -> dict[str, dict[str, int | str]]:
    """Solver -> problem -> evaluations of f, or the residual where it failed."""
    runs = {f"implicit {name}": ours(s) for name, s in OURS.items()}
    runs |= {f"torchdeq {name}": theirs(s) for name, s in PEERS.items()}
    runs |= {f"scipy {m}": scipys(m) for m in ("anderson", "broyden1", "broyden2")}
    table: dict[str, dict[str, int | str]] = {}
    for name, run in runs.items():
        table[name] = {}
        for p in problems(dtype):
            try:
                with torch.no_grad():
                    value = run(p, rtol)
                worst = float(p.residual(value).max())
                good = worst <= 1.2 * rtol and p.calls <= BUDGET + 1
                table[name][p.name] = p.calls if good else f"failed at {worst:.0e}"
            except Exception as error:
                table[name][p.name] = f"failed: {type(error).__name__}"
    return table


def summary(table) -> dict[str, str]:
    lines = {}
    for name, row in table.items():
        solved = [n for n in row.values() if isinstance(n, int)]
        lines[name] = f"{len(solved)} of {len(row)}, {sum(solved)} evaluations"
    packages = sorted({name.split()[0] for name in table})
    for label, members in [(who, [who]) for who in packages] + [("peers", [w for w in packages if w != "implicit"])]:
        rows = [row for name, row in table.items() if name.split()[0] in members]
        best = [min((r[p] for r in rows if isinstance(r[p], int)), default=None) for p in rows[0]]
        lines[f"{label}, best by problem"] = f"{sum(b is not None for b in best)} solved, {sum(b or 0 for b in best)}"
    return lines


# ---- around f


SHAPES = {"(1, 64)": (1, 64, 64), "(32, 1024)": (32, 1024, 1024), "(8, 294912)": (8, 294912, 1024)}
EVALS = 30
REPEATS = {"(1, 64)": 201, "(32, 1024)": 41, "(8, 294912)": 5}


def layer(batch, numbers, width):
    rng = torch.Generator().manual_seed(0)
    w = 0.5 * torch.linalg.qr(torch.randn(width, width, generator=rng))[0]
    return lambda z: torch.tanh(z.reshape(-1, width) @ w + 0.1).view(batch, numbers), torch.zeros(batch, numbers)


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
    return runs


def paired(shape: str, name: str) -> float:
    """CPU time of EVALS evaluations over that of the bare loop z = f(z), in turns; the median."""
    torch.set_num_threads(1)
    runs, ratios = contenders(*layer(*SHAPES[shape])), []
    for _ in range(REPEATS[shape]):
        spent = []
        for run in (runs["bare"], runs[name]):
            start = time.process_time()
            run()
            spent.append(time.process_time() - start)
        ratios.append(spent[1] / spent[0])
    return round(statistics.median(ratios), 2)


def overhead() -> dict[str, dict[str, float]]:
    """`paired` of every contender, each in a process of its own: what one leaves in the allocator slows the next."""
    table = {}
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(1, mp_context=context, max_tasks_per_child=1) as pool:
        for shape in SHAPES:
            table[shape] = {name: pool.submit(paired, shape, name).result() for name in contenders(*layer(1, 64, 64))}
    return table


VIEWS = {
    "view",
    "unsqueeze",
    "squeeze",
    "select",
    "slice",
    "transpose",
    "t",
    "expand",
    "detach",
    "_unsafe_view",
}
VIEWS |= {"alias", "as_strided", "permute", "unbind", "diagonal", "split", "split_with_sizes"}


class Counter(TorchDispatchMode):
    """Counts operators outside views, and the copies to the host that wait."""

    def __init__(self):
        super().__init__()
        self.operators = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.operators += func.overloadpacket.__name__ not in VIEWS
        return func(*args, **(kwargs or {}))


def operators() -> dict[str, float]:
    """Operators per evaluation outside views, f's own (3) not counted; as on a GPU, where nothing is left to numpy."""
    f, z0 = layer(1, 64, 64)
    counts = {}
    for name, run in contenders(f, z0).items():
        with torch.no_grad(), Counter() as counter:  # under which solvers leave nothing to numpy
            run()
        counts[name] = round(counter.operators / EVALS - 3, 1)
    return counts


class Peak(TorchDispatchMode):
    """Largest number of bytes of tensors alive at once."""

    def __init__(self):
        super().__init__()
        self.alive, self.peak = {}, 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        import weakref

        out = func(*args, **(kwargs or {}))
        for t in tree_leaves(out):
            if isinstance(t, torch.Tensor):
                store = t.untyped_storage()
                key = store._cdata
                if key not in self.alive:
                    self.alive[key] = store.nbytes()
                    weakref.finalize(store, self.alive.pop, key, None)
        self.peak = max(self.peak, sum(self.alive.values()))
        return out


def memory() -> dict[str, float]:
    """States held at the peak, f's own temporaries included."""
    f, z0 = layer(4, 65536, 64)
    held = {}
    for name, run in contenders(f, z0).items():
        with torch.no_grad(), Peak() as peak:
            run()
        held[name] = round(peak.peak / (z0.numel() * 4), 1) + 1  # and z0
    return held


RESULTS = Path(__file__).parents[1] / "results"


def from_jax() -> dict[str, dict[str, dict[str, int | str]]]:
    """The rows of jaxopt and optimistix, where they have been measured."""
    file = RESULTS / "peers_jax.json"
    return json.loads(file.read_text())["evaluations"] if file.exists() else {}


def counted() -> dict[str, dict[str, dict[str, int | str]]]:
    wanted = {"float64 to 1e-10": (torch.float64, 1e-10), "float32 to 1e-5": (torch.float32, 1e-5)}
    return {name: evaluations(*what) for name, what in wanted.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=RESULTS / "solvers.json")
    parts = {
        "evaluations": ("evaluations", counted),
        "operators": ("operators per evaluation", operators),
        "memory": ("states held", memory),
        "time": ("CPU time, bare loop = 1", overhead),
    }
    parser.add_argument("--parts", nargs="+", choices=list(parts), default=list(parts))
    options = parser.parse_args()
    torch.set_num_threads(1)
    git = ["git", "rev-parse", "--short", "HEAD"]
    commit = subprocess.run(git, capture_output=True, text=True, check=True).stdout.strip()
    result = json.loads(options.out.read_text()) if options.out.exists() else {}
    result["device"] = f"{platform.machine()} CPU, 1 thread"
    result["versions"] = {"torch": torch.__version__, "torchdeq": version("torchdeq"), "scipy": scipy.__version__}
    result["budget"] = BUDGET
    result.setdefault("commits", {})
    for part in options.parts:
        name, measure = parts[part]
        result[name] = measure()
        result["commits"][name] = commit
    for name, rows in from_jax().items():
        result["evaluations"][name].update(rows)
    result["summary"] = {name: summary(table) for name, table in result["evaluations"].items()}
    options.out.parent.mkdir(parents=True, exist_ok=True)
    options.out.write_text(json.dumps(result, indent=1) + "\n")
    print(json.dumps({k: v for k, v in result.items() if k != "evaluations"}, indent=1))


if __name__ == "__main__":
    main()
