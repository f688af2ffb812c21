"""Our solvers on published problems, compared with published counts.

python -m benchmarks.solvers.published                        measures all problems, writes results/published.json
                                                              and docs/published.md
python -m benchmarks.solvers.published --tables Systems R     measures these again and keeps the others; --problems and
                                                              --solvers restrict it further

A run counts calls of f and, separately, Jacobian-vector products, up to the first point that meets the published
stopping test. A call of f that also computes a product counts as a call and a product.
"""

import argparse
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import mpmath
import torch
from torch import Tensor
from torch.autograd import forward_ad

import implicit
from benchmarks.harness import provenance, read_result, write_result
from benchmarks.problems import Problem, published_maps, systems
from benchmarks.problems.acceleration.simulation_codes import sirius
from benchmarks.report.published import page
from benchmarks.solvers.published_figures import KINSOL, R_PACKAGE, SPEED_MAPPING, SYSTEMS, Figures
from implicit import AbstractSolver, Anderson, AndersonGS, BadBroyden, Broyden, NewtonKrylov, Picard, Stop

ROOT = Path(__file__).parents[2]
RESULT = ROOT / "benchmarks/results/published.json"
PAGE = ROOT / "docs/published.md"
TABLES: dict[str, Figures] = {"KINSOL": KINSOL, "R": R_PACKAGE, "SpeedMapping": SPEED_MAPPING, "Systems": SYSTEMS}
CLASSICAL: dict[str, AbstractSolver[Any]] = {
    "Anderson(5)": Anderson(),
    "Anderson(30)": Anderson(30),
    "Broyden": Broyden(),
    "BadBroyden": BadBroyden(),
    "NewtonKrylov": NewtonKrylov(),
    "Picard": Picard(),
}
OURS: dict[str, AbstractSolver[Any] | None] = {"default": None, "AndersonGS": AndersonGS(), **CLASSICAL}


class Passed(Exception):
    """The published stopping test is met, which ends the solve."""


@dataclass
class Counted:
    """A problem's map; it counts calls and products, and raises `Passed` at the published stopping test."""

    problem: Problem
    calls: int = 0
    products: int = 0
    smallest: float = float("inf")

    def __call__(self, z: Tensor, *args: Tensor) -> Tensor:
        self.calls += 1
        self.products += forward_ad.unpack_dual(z).tangent is not None or z.requires_grad
        fz = self.problem.f(z, *args)
        primal, image = (forward_ad.unpack_dual(t).primal.detach() for t in (z, fz))
        excess = float(self.problem.excess(primal, image).max())
        self.smallest = min(self.smallest, excess)
        if excess <= 1 and (self.problem.accept is None or self.problem.accept(primal)):
            raise Passed
        return fz


def run(problem: Problem, solver: AbstractSolver[Any] | None, budget: int) -> dict[str, Any]:
    """Calls and products until the published test is met, or the result of the solve.

    Args:
        problem: the problem.
        solver: the solver; None: the default of `fixed_point`.
        budget: largest number of evaluations.
    """
    counted = Counted(problem)
    start = time.process_time()
    # a tolerance slightly below the published one, so that `Counted` ends the solve
    stop = Stop(rtol=0.99 * problem.rtol, atol=0.99 * problem.atol, max_evals=budget)
    with torch.no_grad():
        try:
            if solver is None:
                end = implicit.fixed_point(counted, problem.z0, *problem.args, stop=stop)
            else:
                end = implicit.fixed_point(counted, problem.z0, *problem.args, solver=solver, stop=stop)
            ended = implicit.Result(int(end.result.max())).name
        except Passed:
            ended = "passed"
    row: dict[str, Any] = {"solved": ended == "passed", "calls": counted.calls, "products": counted.products}
    if ended != "passed":
        row |= {"result": ended, "residual over tolerance": float(f"{counted.smallest:.2e}")}
    return row | {"seconds": round(time.process_time() - start, 2)}


def problems(table: str) -> dict[str, Problem]:
    """The problems of a published table that are available here, by their names in the table."""
    if table == "Systems":
        return {p.name: p for p in systems(1e-7)}
    rows = TABLES[table].rows
    name = "R package" if table == "R" else "FixedPointTestProblems" if table == "SpeedMapping" else "SUNDIALS"
    return {p.name: p for p in published_maps() if p.name in rows and p.source.startswith(name)}


def measure(problem: Problem, solvers: list[str]) -> dict[str, dict[str, Any]]:
    """Solver -> outcome."""
    budget = 5000 if problem.z0.shape[1] < 1000 else 3000
    out = {}
    for label in solvers:
        solver = OURS[label]
        out[label] = run(problem, solver, min(budget, 400) if isinstance(solver, NewtonKrylov) else budget)
    return out


def update(result: dict[str, Any], table: str, problem: str, outcomes: dict[str, dict[str, Any]]) -> None:
    """Put the outcomes of one problem into the result, in the order of the tables, with the commit of each outcome."""
    where = provenance("cpu")
    tables = result.setdefault("tables", {})
    rows = tables.get(table, {}).get("rows", {})
    for outcome in outcomes.values():
        outcome["commit"] = where["commit"]
    row = rows.get(problem, {}) | outcomes
    rows[problem] = {label: row[label] for label in OURS if label in row}
    tables[table] = where | {"rows": {name: rows[name] for name in TABLES[table].rows if name in rows}}
    result["tables"] = {name: tables[name] for name in TABLES if name in tables}


def sirius_residuals(count: int = 5) -> list[float]:
    """Residual norms of Anderson with history 4 and mixing 0.15 on SIRIUS's problem."""
    problem = sirius()
    stop = Stop(rtol=0, atol=0, max_evals=count)
    solver = Anderson(4, damping=0.85, ridge=1e-300)
    with torch.no_grad():
        trace = implicit.fixed_point(problem.f, problem.z0, solver=solver, stop=stop, trace=True).trace
    assert trace is not None
    return [float(r) for r in trace[:, 0]]


def exact_residuals(count: int = 5, history: int = 4, beta: float = 0.15, n: int = 100) -> list[str]:
    """The residual norms of `sirius_residuals` to 16 digits, from arithmetic with 50 digits and normal equations."""
    with mpmath.workdps(50):
        diagonal = mpmath.matrix([2 + mpmath.mpf(1) / i for i in range(1, n + 1)])
        x, norms = mpmath.zeros(n, 1), []
        points, residuals = [], []
        for _ in range(count):
            r = mpmath.matrix([(d - 1) * (a - 1) for d, a in zip(diagonal, x, strict=True)])
            norms.append(mpmath.nstr(mpmath.norm(r), 16))
            points, residuals = [*points, x][-history - 1 :], [*residuals, r][-history - 1 :]
            x = x + mpmath.mpf(str(beta)) * r
            m = len(points) - 1
            if m:
                # gamma minimizes ||r - dR gamma||; the step is beta r - (dX + beta dR) gamma
                dx = [points[i + 1] - points[i] for i in range(m)]
                dr = [residuals[i + 1] - residuals[i] for i in range(m)]
                gram = mpmath.matrix([[mpmath.fdot(a, b) for b in dr] for a in dr])
                gamma = mpmath.lu_solve(gram, mpmath.matrix([mpmath.fdot(a, r) for a in dr]))
                for c, a, b in zip(gamma, dx, dr, strict=True):
                    x = x - c * (a + mpmath.mpf(str(beta)) * b)
        return norms


def main() -> None:
    """Measure, write the result file and the page."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tables", nargs="*", choices=list(TABLES), default=list(TABLES), help="what to measure")
    parser.add_argument("--solvers", nargs="*", choices=list(OURS), default=list(OURS), help="with which solvers")
    parser.add_argument("--problems", nargs="*", help="names of problems in these tables; default: all")
    parser.add_argument("--page", action="store_true", help="write the page from the result file, measure nothing")
    options = parser.parse_args()
    torch.set_num_threads(1)
    result = read_result(RESULT)
    if not options.page:
        result["sirius"] = provenance("cpu") | {"residuals": sirius_residuals(), "exact": exact_residuals()}
        for table in options.tables:
            for name, problem in problems(table).items():
                if options.problems is None or name in options.problems:
                    outcomes = measure(problem, options.solvers)
                    print(name, {k: v["calls"] if v["solved"] else "-" for k, v in outcomes.items()}, flush=True)
                    update(result, table, name, outcomes)
                    write_result(RESULT, result)
    PAGE.write_text(page(result))


if __name__ == "__main__":
    main()
