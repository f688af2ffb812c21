"""Findings about the solution: several fixed points, a start that is the solution, a tolerance below rounding."""

import torch
from torch import Tensor

from implicit.diagnostics.diagnose.condition import Condition, Finding
from implicit.diagnostics.diagnose.map_checks import normal, root_mean_square
from implicit.diagnostics.diagnose.solver_trials import SolverTrials, Trial, relative
from implicit.pytree import Layout, PerSample, State, norm
from implicit.solution import Result
from implicit.stopping import Stop

_PAIRS = 2  # pairs of opposite starts
_EACH = 150  # largest number of evaluations from one start
COST = 2 * _PAIRS * (_EACH + 5)  # largest number of evaluations from all starts
_APART = 1e-2  # two answers differ if their relative distance exceeds this and their error
_NEAR, _CLOSE = 1e-3, 1e-2  # the solution is the start up to the first relative distance; up to the second, uncertain


def several(trials: SolverTrials, stop: Stop, first: Trial, gap: PerSample | None) -> list[Finding]:
    """Solve from other starts, in pairs on opposite sides of z0, and compare the answers.

    Each solve is to a hundredth of the tolerance, as far as rounding permits. Two answers differ if their relative
    distance exceeds `_APART` plus ten times the error that their residuals allow, residual / min |1 - lambda|.
    """
    assert first.solution is not None
    layout, budget, solver = trials.layout, trials.budget, first.row.solver
    rtol = max(0.01 * stop.rtol, 100 * layout.eps)
    stop = Stop(rtol=rtol, atol=0.01 * stop.atol, norm=stop.norm, max_evals=_EACH)
    start, answer = layout.pack(trials.problem.z0), layout.pack(first.solution.value)
    scale = 2 * (root_mean_square(answer) + root_mean_square(answer - start))
    scale = torch.where(scale > 0, scale, 1.0).unsqueeze(1)
    gap = torch.ones_like(scale[:, 0]) if gap is None else gap.to(answer).clamp_min(layout.eps)
    most, seen = torch.zeros_like(scale[:, 0]), 0
    for pair in range(_PAIRS):
        for sign in (1.0, -1.0):
            if budget.remaining < _EACH + 5:
                break
            other = start + sign * scale * normal(start, 10 + pair)
            trial = trials.run(solver, stop, layout.unpack(other))
            if trial.solution is None:
                continue
            seen += 1
            two = layout.pack(trial.solution.value)
            size = torch.maximum(norm(answer), norm(two)).clamp_min(torch.finfo(two.dtype).tiny)
            size = torch.where(size > layout.eps**0.5 * scale[:, 0], size, scale[:, 0])
            error = 10 * (relative(trial.solution, layout) + relative(first.solution, layout)) / gap
            both = trial.solution.converged & first.solution.converged
            apart = torch.where(both, norm(two - answer) / size / (_APART + error), 0.0)
            most = torch.maximum(most, apart.nan_to_num(nan=0.0))
    mask = most > 1
    if not bool(mask.any()):
        return []
    evidence = f"{seen} other starts gave answers {float(most.max()) * _APART:.2g} of their norm away"
    return [Finding.of(Condition.SEVERAL_FIXED_POINTS, evidence, mask, bool((most[mask] > 5).all()))]


def at_start(z0: State, answer: Trial, layout: Layout) -> list[Finding]:
    """Whether the solution is the start."""
    assert answer.solution is not None
    start, z = layout.pack(z0), layout.pack(answer.solution.value)
    size = torch.maximum(norm(start), norm(z))
    moved = torch.where(size > 0, norm(z - start) / size, 0.0)
    ended = answer.solution.result.to(moved.device) != Result.NONFINITE
    mask = (moved <= _CLOSE) & ended & (relative(answer.solution, layout) <= _CLOSE)
    if not bool(mask.any()):
        return []
    worst = float(moved[mask].max())
    evidence = f"the answer is within {worst:.1e} of its norm of z0"
    return [Finding.of(Condition.STARTS_AT_EQUILIBRIUM, evidence, mask, worst <= _NEAR)]


def below_rounding(stop: Stop, codes: Tensor, deep: Trial, layout: Layout) -> list[Finding]:
    """Whether the tolerance is below the rounding error of f(z) - z."""
    if stop.atol == 0 and stop.rtol < layout.eps:
        evidence = f"rtol {stop.rtol:.1e} is below the rounding error {layout.eps:.1e} of the state's dtype"
        return [Finding(Condition.BELOW_ROUNDING, evidence, tuple(range(len(deep.row.evals) or 1)))]
    stalled = codes.cpu() == Result.STALLED
    if not bool(stalled.any()):
        return []
    evidence = f"rtol {stop.rtol:.1e}, and residuals end at {deep.row.residual:.1e} of ||z||"
    return [Finding.of(Condition.BELOW_ROUNDING, evidence, stalled)]
