"""Which solver, window and tolerance: candidates run on the user's problem with one stopping criterion."""

import math
import warnings
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from implicit.diagnostics.diagnose.budget import Budget, BudgetSpent
from implicit.diagnostics.gradient_bias import label
from implicit.fixed_point import fixed_point
from implicit.options import Problem
from implicit.pytree import Layout, PerSample, State, norm
from implicit.solution import Result, Solution
from implicit.solvers import Anderson, AndersonGS, Broyden, Multisecant, NewtonKrylov, Picard
from implicit.solvers.base import AbstractSolver
from implicit.stopping import Norm, Stop

# simplest first, since `best` takes the first one that is fast enough
CANDIDATES: tuple[AbstractSolver[Any], ...] = (
    Picard(),
    Picard(0.5),
    AndersonGS(memory=5),
    AndersonGS(),
    Anderson(),
    Broyden(),
    NewtonKrylov(),
    Multisecant(),
)
_WORTH = 1.1  # a solver is fast enough if it takes at most this multiple of the fewest evaluations, plus one
_PATIENT = 100  # smallest budget of evaluations of a candidate
UNFINISHED = "not finished: the budget is spent"
TOLERANCES = tuple(10.0**-k for k in range(1, 14))


@dataclass(frozen=True, eq=False)
class SolverRow:
    """One solver on the batch.

    Attributes:
        solver: the solver.
        converged: number of samples that met the tolerance.
        samples: number of samples; 0 if there is no result.
        evals: (B,) evaluations of f for each sample, products of NewtonKrylov included.
        residual: the largest ||f(z) - z|| / ||z|| of a sample at the value returned.
        ends: number of samples by the name of their `Result`.
        trace: (evaluations, B) residuals; NaN once a sample has finished.
        tolerances: (rtol, evaluations until every sample met rtol) for every rtol in `TOLERANCES` that was met.
        note: the reason if there is no result.
    """

    solver: AbstractSolver[Any]
    converged: int
    samples: int
    evals: Float[Tensor, " B"] | Tensor
    residual: float
    ends: tuple[tuple[str, int], ...]
    trace: Float[Tensor, "evaluations B"] | None
    tolerances: tuple[tuple[float, int], ...] = ()
    note: str = ""

    @property
    def name(self) -> str:
        """The solver's class with the settings that are not defaults."""
        return label(self.solver)

    @property
    def most(self) -> int:
        """Evaluations until the last sample had finished, which is the cost of the batch."""
        return int(self.evals.max()) if len(self.evals) else 0


@dataclass(frozen=True, eq=False)
class Trial:
    """A row and its solution; the solution is None if f or the solver raised or the budget was spent."""

    row: SolverRow
    solution: Solution | None


@dataclass(frozen=True, eq=False)
class SolverTrials:
    """Solves of one problem by several solvers, within a budget."""

    problem: Problem
    layout: Layout
    budget: Budget

    def run(self, solver: AbstractSolver[Any], stop: Stop, z0: State = None) -> Trial:
        """One solve with its trace and without gradients, from z0 or the problem's start; a failure becomes a note."""
        f, start = self.budget.plain(self.problem.f), self.problem.z0 if z0 is None else z0
        try:
            with torch.no_grad(), warnings.catch_warnings():
                warnings.simplefilter("ignore", RuntimeWarning)  # the warning of coupling, reported as a finding
                solution = fixed_point(
                    f,
                    start,
                    *self.problem.args,
                    solver=solver,
                    stop=stop,
                    batch_dims=self.layout.batch_dims,
                    trace=True,
                )
        except BudgetSpent:
            return Trial(_failed(solver, UNFINISHED), None)
        except (RuntimeError, TypeError) as error:  # such as NewtonKrylov on an f without derivatives
            return Trial(_failed(solver, f"{type(error).__name__}: {error}"), None)
        codes = [Result(code).name for code in solution.result.tolist()]
        row = SolverRow(
            solver=solver,
            converged=codes.count(Result.CONVERGED.name),
            samples=len(codes),
            evals=solution.evals.cpu(),
            residual=float(relative(solution, self.layout, stop.norm).max()),
            ends=tuple((name, codes.count(name)) for name in dict.fromkeys(codes)),
            trace=None if solution.trace is None else solution.trace.cpu(),
            tolerances=_tolerances(solution, self.layout, stop.norm),
        )
        return Trial(row, solution)

    def candidates(self, solvers: Sequence[AbstractSolver[Any]], stop: Stop) -> list[Trial]:
        """Every candidate from z0; a candidate for which the budget does not suffice has a row with that note."""
        patient = replace(stop, max_evals=max(stop.max_evals, _PATIENT))
        return [self.run(solver, patient) for solver in solvers]


def attainable(layout: Layout) -> float:
    """A relative residual that a solve reaches in the state's dtype."""
    return min(100 * layout.eps, max(4 * layout.eps, 1e-4))


def _failed(solver: AbstractSolver[Any], note: str) -> SolverRow:
    none = torch.zeros(0, dtype=torch.int64, device="cpu")
    return SolverRow(solver, 0, 0, none, math.nan, (), None, note=note)


def relative(solution: Solution, layout: Layout, kind: Norm) -> PerSample:
    """(B,) ||f(z) - z|| / max(||z||, ||f(z) - z||, sqrt(eps) ||f(z0)||) at the value returned, in the solve's norm."""
    if kind == "leaf" and len(layout.widths) > 1:  # the solve's residuals are relative to ||f(z)||
        return solution.residual.nan_to_num(nan=torch.inf)
    size = torch.maximum(_size(solution, layout, kind), solution.residual)
    if solution.scale is not None:
        first = solution.scale if solution.scale.ndim == 1 else solution.scale.amax(dim=1)
        size = torch.maximum(size, first.to(size) * layout.eps**0.5)
    return (solution.residual / size.clamp_min(torch.finfo(size.dtype).tiny)).nan_to_num(nan=torch.inf)


def best(trials: Sequence[Trial]) -> Trial | None:
    """The trial with the most converged samples, then the fewest evaluations, or a simpler solver of about as many.

    If no solver converged a sample: the trial with the smallest residual.
    """
    done = [t for t in trials if t.solution is not None]
    if not done:
        return None
    most = max(t.row.converged for t in done)
    if most == 0:
        return min(done, key=lambda t: t.row.residual)
    able = [t for t in done if t.row.converged == most]
    least = min(t.row.most for t in able)
    return next(t for t in able if t.row.most <= _WORTH * least + 1)


def _size(solution: Solution, layout: Layout, kind: Norm) -> PerSample:
    """(B,) size of the value in the norm of the solve; 1 where its residuals are relative ones."""
    z = layout.pack(solution.value)
    if kind == "max":
        return z.abs().amax(dim=1)
    if kind == "leaf" and len(layout.widths) > 1:
        return torch.ones_like(z[:, 0])
    return norm(z) / (z.shape[1] ** 0.5 if kind == "rms" else 1.0)


def _tolerances(solution: Solution, layout: Layout, kind: Norm) -> tuple[tuple[float, int], ...]:
    """(rtol, evaluations until every sample met rtol), from the trace."""
    size = _size(solution, layout, kind).cpu()
    if solution.trace is None or not bool((size > 0).all()):
        return ()
    smallest = (solution.trace.cpu() / size).nan_to_num(nan=torch.inf).cummin(dim=0).values
    found = []
    for rtol in TOLERANCES:
        met = (smallest <= rtol).all(dim=1)
        if not bool(met.any()):
            break
        found.append((rtol, int(met.int().argmax()) + 1))
    return tuple(found)
