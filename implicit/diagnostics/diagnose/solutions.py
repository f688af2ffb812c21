"""Findings about the solution: a start that is the solution, a tolerance below rounding, attraction."""

import torch
from jaxtyping import Bool
from torch import Tensor

from implicit.diagnostics.diagnose.condition import Condition, Finding
from implicit.diagnostics.diagnose.map_checks import normal, size_or
from implicit.diagnostics.diagnose.solver_trials import SolverTrials, Trial, relative
from implicit.evaluation import FlatMap
from implicit.pytree import Flat, Layout, State, norm
from implicit.solution import Result
from implicit.solvers import Picard
from implicit.stopping import Norm, Stop

PLAIN = 300  # evaluations of plain iteration from a point beside the solution
_BESIDE = 1e-3  # relative distance of that point
_STAYS = 1.1  # the solution attracts if the iteration ends within this multiple of the distance
_DIRECTIONS = 3  # number of directions in which second differences of f are taken
_SHORTER = 0.2  # length of their steps, as a share of the residual
_LARGE = 0.4  # a second difference above this share of the residual shows that the residual is rounding
SMALL = 1e-2  # largest residual, relative to the state, that can be rounding
_NEAR, _CLOSE = 1e-3, 2e-3  # the solution is the start up to the first relative distance; up to the second, uncertain


def at_start(z0: State, answer: Trial, layout: Layout, kind: Norm) -> list[Finding]:
    """Whether the solution is the start."""
    assert answer.solution is not None
    start, z = layout.pack(z0), layout.pack(answer.solution.value)
    size = torch.maximum(norm(start), norm(z))
    moved = torch.where(size > 0, norm(z - start) / size, 0.0)
    ended = answer.solution.result.to(moved.device) != Result.NONFINITE
    near, close = max(_NEAR, layout.eps), max(_CLOSE, layout.eps)
    mask = (moved <= close) & ended & (relative(answer.solution, layout, kind) <= close)
    if not bool(mask.any()):
        return []
    worst = float(moved[mask].max())
    evidence = f"the answer is within {worst:.1e} of its norm of z0"
    return [Finding.of(Condition.STARTS_AT_EQUILIBRIUM, evidence, mask, worst <= near)]


def attracted(trials: SolverTrials, z: Flat, scale: Flat) -> Bool[Tensor, " B"]:
    """Whether plain iteration from a point beside the solution z comes nearer to it, or stays where it is."""
    layout = trials.layout
    beside = layout.round(z + _BESIDE * size_or(z, scale, layout) * normal(z, seed=5))
    stop = Stop(rtol=0.0, atol=0.0, max_evals=min(PLAIN, trials.budget.remaining))
    trial = trials.run(Picard(), stop, layout.unpack(beside))
    if trial.solution is None:
        return torch.zeros_like(z[:, 0], dtype=torch.bool)
    end = layout.pack(trial.solution.value)
    return norm(end - z) <= _STAYS * norm(beside - z) + 10 * layout.eps * norm(z)


def below_rounding(stop: Stop, best: Trial, deep: Trial, f: FlatMap, remaining: int) -> list[Finding]:
    """Whether the tolerance is below the rounding error of f(z) - z, by the state's dtype or by f's own arithmetic."""
    assert best.solution is not None and deep.solution is not None
    layout = f.layout
    if stop.atol == 0 and stop.rtol < layout.eps:
        evidence = f"rtol {stop.rtol:.1e} is below the rounding error {layout.eps:.1e} of the state's dtype"
        return [Finding(Condition.BELOW_ROUNDING, evidence, tuple(range(len(deep.row.evals) or 1)))]
    stalled = best.solution.result == Result.STALLED
    short = ~(best.solution.converged | stalled)
    if bool(short.any()) and remaining > 2 * _DIRECTIONS:
        stalled |= short & _rounds(f, layout.pack(deep.solution.value))
    if not bool(stalled.any()):
        return []
    evidence = f"rtol {stop.rtol:.1e}, and residuals end at {deep.row.residual:.1e} of ||z||"
    return [Finding.of(Condition.BELOW_ROUNDING, evidence, stalled)]


def _rounds(f: FlatMap, z: Flat) -> Bool[Tensor, " B"]:
    """Whether the residual r = f(z) - z is the rounding error of f: second differences of f over steps shorter than r.

    If f is differentiable they are of the order ||r||^2; where f rounds they are as large as r.
    """
    fz = f(z)
    residual, most = norm(fz - z), torch.zeros_like(z[:, 0])
    for seed in range(_DIRECTIONS):
        d = normal(z, seed=20 + seed)
        step = _SHORTER * (residual / norm(d)).unsqueeze(1) * d
        most = torch.maximum(most, norm(f(z + step) - 2 * fz + f(z - step)).nan_to_num(nan=0.0))
    return (most >= _LARGE * residual) & (residual <= SMALL * norm(z)) & (residual > 0)
