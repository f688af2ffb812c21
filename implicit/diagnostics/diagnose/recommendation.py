"""From findings and measurements to one recommendation with its reasons."""

import math
from collections.abc import Sequence
from dataclasses import replace

from implicit.diagnostics.diagnose.condition import Condition, Finding
from implicit.diagnostics.diagnose.estimator_trials import EstimatorTable, choose
from implicit.diagnostics.diagnose.report import Recommendation
from implicit.diagnostics.diagnose.solver_trials import SolverRow
from implicit.diagnostics.gradient_bias import labeled
from implicit.grads import IFT, AbstractGrad
from implicit.pytree import Layout
from implicit.solvers import Multisecant, Picard
from implicit.stopping import Stop

_SLACK = 2  # ratio of the recommended max_evals to the evaluations that were measured
_ABOVE = 10.0  # ratio of the recommended rtol to the smallest relative residual


def recommend(
    findings: Sequence[Finding],
    best: SolverRow | None,
    rows: Sequence[SolverRow],
    stop: Stop,
    floor: float,
    table: EstimatorTable,
    estimators: Sequence[AbstractGrad],
    error: float,
    layout: Layout,
) -> Recommendation:
    """The solver with the fewest evaluations, a tolerance that can be met, and the estimator by bias and time.

    Args:
        findings: the conditions that were found.
        best: the row of the best solver; None if no solver could be run.
        rows: the rows of all solvers.
        stop: the stopping criterion of the caller.
        floor: the smallest relative residual that was reached.
        table: bias and time of the estimators.
        estimators: the candidates.
        error: largest accepted relative error of a gradient.
        layout: the layout of the state.
    """
    conditions = {finding.condition for finding in findings}
    reasons = [f.condition.advice for f in findings if f.condition in _FIRST]
    solver = Multisecant() if best is None else best.solver
    reasons.append(_solver_reason(best, rows))
    stop, why = _tolerance(stop, best, max(floor, layout.eps), Condition.BELOW_ROUNDING in conditions)
    reasons += [why] if why else []
    name, why = choose(table, error)
    grad = labeled(estimators).get(name, IFT())
    reasons.append(why + ".")
    reasons += [f.condition.advice for f in findings if f.condition not in _FIRST]
    return Recommendation(solver, stop, grad, layout.batch_dims, tuple(dict.fromkeys(reasons)))


# conditions whose advice comes before the solver, since f or the call has to be changed first
_FIRST = (Condition.NONFINITE, Condition.NOISY, Condition.COUPLED, Condition.STARTS_AT_EQUILIBRIUM)


def _solver_reason(row: SolverRow | None, rows: Sequence[SolverRow]) -> str:
    if row is None:
        return "No solver could be run; the solver is the default."
    if row.converged == 0:
        return (
            f"No solver met the tolerance for any sample; {row.name} came closest, to a relative residual of "
            f"{row.residual:.1e}."
        )
    whole = f"{row.converged} of {row.samples} samples"
    reason = f"{row.name} converged {whole} in {row.most} evaluations"
    plain = next((r for r in rows if r.solver == Picard() and r is not row and r.samples), None)
    if plain is not None:
        how = f"took {plain.most}" if plain.converged == plain.samples else f"converged {plain.converged} samples"
        reason += f"; plain iteration {how}"
    return reason + "."


def _tolerance(stop: Stop, row: SolverRow | None, floor: float, below: bool) -> tuple[Stop, str]:
    """The user's tolerance, or `_ABOVE` times the smallest residual if that is larger; and a sufficient budget."""
    why = ""
    if below and math.isfinite(floor):
        rtol = float(f"{max(stop.rtol, _ABOVE * floor):.0e}")
        why = f"rtol={rtol:g} is {_ABOVE:.0f} times the smallest relative residual, or rounding error, of {floor:.1e}."
        stop = replace(stop, rtol=rtol)
    if row is not None and row.converged:
        stop = replace(stop, max_evals=max(stop.max_evals, _SLACK * row.most))
    return stop, why
