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
_POINTS = 8  # number of points where second differences of f are taken
_LENGTHS = (0.2, 2.0, 20.0)  # the lengths of their steps, as multiples of the residual
_FINE = 1e-5  # residuals up to this share of the state have steps longer than themselves
_LARGE = 2.0  # a second difference is rounding if it exceeds this multiple of the step times the slope, or of the step
_LONG = 1e-3  # length of the step for the slope, as a share of the state
ROUNDING = 1 + _POINTS * (3 + 2 * len(_LENGTHS))  # evaluations of the test
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
    short = unmet(stop, best, deep, layout)
    if bool(short.any()) and remaining >= ROUNDING:
        stalled |= short & _rounds(f, layout.pack(deep.solution.value))
    if not bool(stalled.any()):
        return []
    ends = float(relative(deep.solution, layout, stop.norm).to(stalled.device)[stalled].max())
    evidence = f"rtol {stop.rtol:.1e}, and residuals end at {ends:.1e} of ||z||"
    return [Finding.of(Condition.BELOW_ROUNDING, evidence, stalled)]


def unmet(stop: Stop, best: Trial, deep: Trial, layout: Layout) -> Bool[Tensor, " B"]:
    """The samples whose solves ended by their budget, and whose residual has not met rtol down to rounding error."""
    assert best.solution is not None and deep.solution is not None
    ended = best.solution.converged | (best.solution.result == Result.STALLED)
    return ~ended & (relative(deep.solution, layout, stop.norm) > stop.rtol).to(ended.device)


def _rounds(f: FlatMap, z: Flat) -> Bool[Tensor, " B"]:
    """Whether the residual r = f(z) - z is the rounding error of f: second differences of f over short steps h.

    They are at most h times the sum of two slopes, and where f rounds they do not become smaller with h. The slope is
    that over a longer step, or 1. The points are as far from z as r is long: if f rounds its argument, z itself may be
    on its grid, and f equal around it.
    """
    residual, size, most = norm(f(z) - z), norm(z), torch.zeros_like(z[:, 0])
    for seed in range(_POINTS):
        away, d = (x / norm(x).unsqueeze(1) for x in (normal(z, seed=20 + seed), normal(z, seed=40 + seed)))
        point = z + residual.unsqueeze(1) * away
        image, long = f(point), _LONG * size
        ahead, behind = (f(point + sign * long.unsqueeze(1) * d) for sign in (1, -1))
        slope = torch.maximum(norm(ahead - image), norm(image - behind)) / long
        for times in _LENGTHS:
            length = times * residual
            step = length.unsqueeze(1) * d
            second = norm(f(point + step) - 2 * image + f(point - step)) / (length * slope.clamp_min(1))
            seen = second.nan_to_num(nan=0.0, posinf=0.0)
            most = torch.maximum(most, torch.where((times < 1) | (residual <= _FINE * size), seen, 0.0))
    return (most >= _LARGE) & (residual <= SMALL * size) & (residual > 0)
