"""Test that autograd records the map that was solved: the residual of its evaluation at the solution is as small.

Setting: z is the value of a solve with a tolerance, of residual ||f(z) - z||, evaluated without a graph. An estimator
evaluates f at z once more, and autograd records it. If f is another map by then, or depends on
`torch.is_grad_enabled()`, the gradient would be that of a map of which z is no fixed point. Its residual at z shows it:

    ||f(z) - z||  >  10 tolerance + sqrt(eps) ||f(z)||     for a sample that has CONVERGED

The second term allows for other kernels, which PyTorch may choose for an evaluation that autograd records. Noise in f,
such as dropout, is no other map: f is evaluated again then, and must give the recorded value without drawing random
numbers. The norms are read on the CPU only, outside of torch.func and of compiled graphs.
"""

import numpy as np
import torch

from implicit.autodiff.autocast import rounding
from implicit.evaluation import FlatMap
from implicit.loop.observation import compare, fetch
from implicit.loop.repeated_points import differs
from implicit.options import Problem
from implicit.pytree import Flat, Layout
from implicit.solution import Result, Solution
from implicit.solvers.base import Point
from implicit.stopping import Criterion, Stop
from implicit.torch_internals import host_readable

_FACTOR = 10.0  # the recorded evaluation may miss the tolerance by this factor
OTHER_MAP = (
    "f is another map where autograd records it than in the solve: at the solution, the evaluation that autograd "
    "records has a residual far above the tolerance that the solve has met there. f depends on "
    "torch.is_grad_enabled(), or something that it reads has changed while it was solved, such as a counter or an "
    "attribute of a module: make the map the same in every call, and pass what changes to fixed_point through `args`."
)


def require_solved_map(problem: Problem, solved: Solution, z: Flat, image: Flat, stop: Stop, layout: Layout) -> int:
    """Compare `image`, the recorded value of f at z, the packed value of `solved`, with the tolerance met there.

    Returns:
        Evaluations of f: 0, or 1 where the residual is too large.

    Raises:
        RuntimeError: f is another map than the one that was solved.
    """
    first = solved.scale
    if not stop.has_tolerance or first is None or not host_readable(z, image, first, solved.result):
        return 0
    rows, point = np.arange(len(z)), Point(z.detach(), image.detach())
    criterion = Criterion(stop, layout, first=first.numpy())
    with torch.no_grad():
        r, size, tolerance = compare(criterion, point, fetch(criterion, point).arrived(), rows)
    allowed = _FACTOR * tolerance + rounding(problem.f, layout) ** 0.5 * size
    if not ((solved.result == Result.CONVERGED).numpy() & (r > allowed)).any():
        return 0
    before = torch.get_rng_state()
    with torch.enable_grad():
        again = FlatMap(problem.f, problem.args, layout)(z.detach().requires_grad_()).detach()
    if torch.equal(before, torch.get_rng_state()) and not differs(criterion, again, point.fz):
        raise RuntimeError(OTHER_MAP)
    return 1
