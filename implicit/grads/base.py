"""What a gradient estimator is: it owns the solve, and decides what autograd sees of it.

Setting: z* = f(z*, theta), J = df/dz and df/dtheta both at z*. With g = dL/dz*, the exact gradient is

    dL/dtheta = u^T df/dtheta,     u = g + J^T u                 (implicit function theorem)

and every estimator is a way to find, shorten or avoid the solve for u.
"""

import abc
from typing import Any

import torch

from implicit.evaluation import FlatMap
from implicit.options import SolveOptions
from implicit.pytree import Flat, Layout, Map, PerSample, State, norm
from implicit.solution import Result, Solution
from implicit.solvers.base import AbstractSolver
from implicit.stopping import Stop


class AbstractGrad(abc.ABC):
    """Subclasses are frozen dataclasses whose fields are their configuration.

    The value of the solution must be the same number with and without a graph.
    """

    @abc.abstractmethod
    def __call__(
        self,
        f: Map,
        z0: State,
        args: tuple[Any, ...],
        solver: AbstractSolver[Any],
        stop: Stop,
        options: SolveOptions = SolveOptions(),
    ) -> Solution:
        """Solve z = f(z, *args) from z0 and attach the value to the graph as this estimator does."""

    def settled(self) -> "AbstractGrad":
        """The estimator to use where an `eval_stop` is to decide: itself, unless its own budget would ignore that."""
        return self


def track(
    f: Map, args: tuple[Any, ...], options: SolveOptions, solved: Solution, steps: int, damping: float = 0.0
) -> Solution:
    """Take z' = damping z + (1 - damping) f(z) `steps` more times from the value of `solved`.

    Recorded by autograd if it is on. A sample whose steps are not finite keeps the value it had.
    """
    layout = Layout.of(solved.value, options.batch_dims)
    apply = FlatMap(f, args, layout)
    start = layout.pack(solved.value)
    z, residual = start, torch.zeros_like(solved.residual)
    for _ in range(steps):
        fz = apply(z)
        with torch.no_grad():
            residual = norm(fz - z)
        z = torch.lerp(fz, z, damping) if damping else fz
    return _close(solved, layout, start, z, residual, steps)


def _close(solved: Solution, layout: Layout, start: Flat, value: Flat, residual: PerSample, steps: int) -> Solution:
    with torch.no_grad():
        finite = torch.isfinite(residual)
        keep = finite | (solved.result == Result.NONFINITE)
        result = torch.where(keep, solved.result, int(Result.NONFINITE)).to(solved.result.dtype)
    return Solution(
        value=layout.unpack(torch.where(finite.unsqueeze(1), value, start.detach())),
        residual=residual,
        result=result,
        evals=solved.evals + steps,
        trace=solved.trace,
        state=solved.state,
    )


def unsolved(z0: State, options: SolveOptions) -> Solution:
    """The solution of a solve that has not begun: z0 itself, still in the graph."""
    layout = Layout.of(z0, options.batch_dims)
    rows = layout.pack(z0).shape[0]
    blank = torch.zeros(rows, dtype=torch.int64, device=layout.device)
    return Solution(
        value=z0,
        residual=torch.full((rows,), torch.inf, dtype=layout.dtype, device=layout.device),
        result=torch.full((rows,), int(Result.MAX_EVALS), dtype=torch.int8, device=layout.device),
        evals=blank,
    )
