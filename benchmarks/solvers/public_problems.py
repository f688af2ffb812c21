"""Our solvers on public collections: evaluations until every sample meets the tolerance, in both precisions.

python -m benchmarks.solvers.public_problems                        writes results/public_problems.json
python -m benchmarks.solvers.public_problems --solvers Broyden      measures these again and keeps the others

The maps are `benchmarks.problems.acceleration` (relative tolerance 1e-8 in float64, 1e-4 in float32), the systems those
of `benchmarks.problems.systems` (absolute tolerance 1e-8). A count is the number of calls of f; a call with a
Jacobian-vector product counts as one. A problem is solved if all samples converge within the budget. CONVERGED is a
false claim if the residual in float64 exceeds the tolerance by more than rounding.
"""

import argparse
import warnings
from typing import Any

import torch

from benchmarks.harness import RESULTS, provenance, read_result, write_result
from benchmarks.problems import Problem, acceleration, systems
from benchmarks.solvers.published import CLASSICAL
from implicit import AbstractSolver, AndersonGS, Multisecant, Stop, fixed_point

RESULT = RESULTS / "public_problems.json"
BUDGET = 700
OURS: dict[str, AbstractSolver[Any]] = {
    "Multisecant (default)": Multisecant(),
    "AndersonGS": AndersonGS(),
    **CLASSICAL,
}


def collections() -> dict[str, list[Problem]]:
    """Name -> problems."""
    single = [p.to(torch.float32) for p in acceleration(1e-4)]
    return {"maps, float64": acceleration(), "maps, float32": single, "systems, float64": systems()}


def run(problem: Problem, solver: AbstractSolver[Any]) -> dict[str, Any]:
    """The number of calls of f, whether all samples converged, and whether a claim of convergence is false."""
    calls = 0

    def counted(z: torch.Tensor, *args: torch.Tensor) -> torch.Tensor:
        nonlocal calls
        calls += 1
        return problem.f(z, *args)

    stop = Stop(rtol=problem.rtol, atol=problem.atol, max_evals=BUDGET)
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        found = fixed_point(counted, problem.z0, *problem.args, solver=solver, stop=stop)
    excess = problem.residual(found.value)[found.converged]
    slack = 1.001 if problem.z0.dtype == torch.float64 else 1.5
    return {
        "solved": bool(found.converged.all()),
        "calls": calls,
        "false": bool((excess > slack).any()),
    }


def main() -> None:
    """Measure and write the result file."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--solvers", nargs="*", choices=list(OURS), default=list(OURS), help="which solvers")
    options = parser.parse_args()
    torch.set_num_threads(1)
    result = read_result(RESULT)
    for label in options.solvers:
        for name, problems in collections().items():
            rows = {p.name: run(p, OURS[label]) for p in problems}
            solved = [row["calls"] for row in rows.values() if row["solved"]]
            total = {"problems": len(rows), "solved": len(solved), "evaluations": sum(solved)}
            total["false claims"] = sum(row["false"] for row in rows.values())
            print(label, name, total, flush=True)
            entry = provenance("cpu") | {"budget": BUDGET, "total": total, "rows": rows}
            result.setdefault(name, {})[label] = entry
            write_result(RESULT, result)


if __name__ == "__main__":
    main()
