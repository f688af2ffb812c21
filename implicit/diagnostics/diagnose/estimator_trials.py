"""Which gradient estimator to take: bias, time and memory of each, as far as the budget suffices."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial

import torch

from implicit.diagnostics.diagnose.budget import Budget, BudgetSpent
from implicit.diagnostics.gradient_bias import BiasRow, labeled, row
from implicit.diagnostics.gradient_problem import GradientProblem
from implicit.diagnostics.profiling import Measured, measure, paced
from implicit.diagnostics.reference_gradient import exact_gradient
from implicit.grads import IFT, JFB, SHINE, AbstractGrad, Neumann, Phantom, Unrolled
from implicit.pytree import State

_DENSE = 64  # for samples of at most so many numbers the exact gradient comes from a dense solve
_FASTER = 0.8  # another estimator than IFT is chosen if it takes at most this share of IFT's time
_MEMORY = 1.1  # and at most this share of IFT's bytes, held and at the peak


@dataclass(frozen=True)
class EstimatorTable:
    """Rows of the measured estimators, how the exact gradient was found, and which rows are missing and why."""

    rows: tuple[BiasRow, ...] = ()
    truth: str = ""
    missing: str = ""


def default_estimators() -> list[AbstractGrad]:
    """The default candidates; the most used come first, since the budget may end before the last."""
    return [IFT(), JFB(), Phantom(), Neumann(), JFB(5), SHINE(), Unrolled()]


def try_estimators(
    problem: GradientProblem,
    answer: State,
    estimators: Sequence[AbstractGrad],
    repeats: int,
    evals: int,
    budget: Budget,
) -> EstimatorTable:
    """Measure every estimator.

    Args:
        problem: the map, the loss and the tensors to differentiate for.
        answer: the solution, from which the solve for the exact gradient starts.
        estimators: the estimators to measure.
        repeats: rounds of timing.
        evals: number of evaluations of a forward solve.
        budget: the budget of all evaluations and products.
    """
    if not problem.wanted:
        return EstimatorTable(missing="nothing that f uses requires gradients")
    if not estimators:
        return EstimatorTable(missing="no estimators were given")
    f, layout = problem.problem.f, problem.layout
    counted = replace(problem.problem, f=budget.watch(f), z0=answer)
    try:
        truth, kind = exact_gradient(counted, problem.wanted, problem.loss, problem.solver, layout, dense=_DENSE)
    except torch.OutOfMemoryError:
        raise
    except (BudgetSpent, RuntimeError) as error:  # NotConverged, or PyTorch's error for an f without a derivative
        return EstimatorTable(missing=f"the exact gradient was not found ({error})")
    if not bool(truth.norm() > 0):
        return EstimatorTable(missing="the exact gradient is 0")
    taken: dict[str, Measured] = {}
    for name, grad in labeled(estimators).items():
        if budget.remaining <= evals:
            break
        taken[name] = measure(partial(problem.forward, grad), f, problem.wanted, counter=budget)
    times = _times(problem, labeled(estimators), taken, repeats, evals, budget)
    rows = [row(name, [one], truth, times.get(name, math.nan)) for name, one in taken.items()]
    left = [name for name in labeled(estimators) if name not in taken]
    left = left or (["times"] if repeats and not times else [])
    return EstimatorTable(tuple(rows), kind, f"{', '.join(left)}, for lack of budget" if left else "")


def _times(
    problem: GradientProblem,
    estimators: dict[str, AbstractGrad],
    taken: dict[str, Measured],
    repeats: int,
    evals: int,
    budget: Budget,
) -> dict[str, float]:
    """Time of each estimator as a ratio to the forward solve, in as many rounds as the budget allows."""
    good = [name for name, one in taken.items() if one.gradient is not None]
    each = evals + 2 + sum(taken[name].evals + taken[name].products for name in good)
    repeats = min(repeats, budget.remaining // each - 1)
    if repeats < 1 or not good:
        return {}
    budget.count(products=each * (repeats + 1))
    runs: dict[str, Callable[[], object]] = {"": problem.solve}
    for name in good:
        runs[name] = partial(problem.gradient, estimators[name])
    seconds = paced(runs, repeats, problem.layout.device)
    return {name: seconds[name] / seconds[""] if seconds[""] else math.nan for name in good}


def choose(table: EstimatorTable, error: float) -> tuple[str, str]:
    """(label of the estimator to take, the reason): IFT, unless a faster estimator has at most the relative `error`."""
    rows = {r.name: r for r in table.rows if not math.isnan(r.error)}
    if "IFT" not in rows:
        good = [r for r in rows.values() if r.error <= error]
        if not good:
            return "IFT", "IFT is the exact gradient" + (f"; {table.missing}" if table.missing else "")
        least = min(good, key=lambda r: (r.time if not math.isnan(r.time) else math.inf, r.products))
        return least.name, f"{least.name} has a relative error of {least.error:.1e}"
    exact = rows["IFT"]
    able = [r for r in rows.values() if r.error <= max(error, exact.error) and r.time <= _FASTER * exact.time]
    able = [r for r in able if r.peak <= _MEMORY * exact.peak and r.saved <= _MEMORY * exact.saved]
    if able:
        least = min(able, key=lambda r: r.time)
        return least.name, (
            f"{least.name} has a relative error of {least.error:.1e}, within {error:.0e}, at {least.time:.2f} times "
            f"the forward solve; IFT takes {exact.time:.2f} times"
        )
    others = [r for r in rows.values() if r.error > error]
    reason = f"IFT has a relative error of {exact.error:.1e}" + (
        f" at {exact.time:.2f} times the forward solve" if not math.isnan(exact.time) else ""
    )
    if others:
        near = min(others, key=lambda r: r.error)
        reason += f"; {near.name} has {near.error:.1e}"
        reason += f" at {near.time:.2f} times" if not math.isnan(near.time) else ""
    return "IFT", reason
