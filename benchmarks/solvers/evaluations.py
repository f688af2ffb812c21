"""Solvers compared with other libraries: evaluations on fourteen problems, overhead in CPU time, operators, memory,
bytes.

python -m benchmarks.solvers.evaluations                       writes results/solvers.json and prints a summary
python -m benchmarks.solvers.evaluations --parts evaluations   measures one part again and keeps the others

Rows of jaxopt and optimistix come from results/peers_jax.json (`peers_jax.py` writes it, in an environment of its own).
"""

import argparse
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from scipy import optimize

from benchmarks.harness import RESULTS, provenance, read_result, write_result
from benchmarks.solvers.overhead import PEERS, memory, operators, overhead, traffic
from implicit import Anderson, AndersonGS, Broyden, Multisecant, NewtonKrylov, Picard, Stop, iterate
from implicit.testing import Problem, problems

OURS = {
    "Picard": Picard(),
    "Anderson(5)": Anderson(),
    "Anderson(30)": Anderson(30),
    "Multisecant (default)": Multisecant(),
    "AndersonGS": AndersonGS(),
    "AndersonGS(60)": AndersonGS(60),
    "Broyden(20)": Broyden(),
    "Broyden(60)": Broyden(60),
    "NewtonKrylov": NewtonKrylov(),
}
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
    """scipy's solver on one system of all samples, since scipy has no batches, with full steps from J = -I, its best
    settings for z = f(z).
    """

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
    """A point meets the tolerance, or the budget of evaluations is spent."""

    def __init__(self, z):
        self.z = z


def evaluations(dtype, rtol) -> dict[str, dict[str, int | str]]:
    """Solver -> problem -> evaluations of f, or the residual if the solver failed."""
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


def from_jax() -> dict[str, dict[str, dict[str, int | str]]]:
    """The rows of jaxopt and optimistix, if they have been measured."""
    return read_result(RESULTS / "peers_jax.json").get("evaluations", {})


def counted() -> dict[str, dict[str, dict[str, int | str]]]:
    wanted = {"float64 to 1e-10": (torch.float64, 1e-10), "float32 to 1e-5": (torch.float32, 1e-5)}
    return {name: evaluations(*what) for name, what in wanted.items()}


PARTS: dict[str, tuple[str, Callable[[], Any]]] = {
    "evaluations": ("evaluations", counted),
    "operators": ("operators per evaluation", operators),
    "memory": ("states held", memory),
    "time": ("CPU time, bare loop = 1", overhead),
    "traffic": ("bytes moved", traffic),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=RESULTS / "solvers.json", help="result file")
    parser.add_argument("--parts", nargs="+", choices=list(PARTS), default=list(PARTS), help="parts to measure again")
    options = parser.parse_args()
    torch.set_num_threads(1)
    result = read_result(options.out)
    now = provenance("cpu", "torchdeq", "scipy")
    result |= {"device": now["device"], "versions": now["versions"], "budget": BUDGET}
    result.setdefault("commits", {})
    for part in options.parts:
        name, measure = PARTS[part]
        result[name] = measure()
        result["commits"][name] = now["commit"]
    for name, rows in from_jax().items():
        result.get("evaluations", {}).get(name, {}).update(rows)
    result["summary"] = {name: summary(table) for name, table in result.get("evaluations", {}).items()}
    write_result(options.out, result)
    print(json.dumps({k: v for k, v in result.items() if k != "evaluations"}, indent=1))


if __name__ == "__main__":
    main()
