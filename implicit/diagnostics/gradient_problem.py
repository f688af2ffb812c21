"""The problem on which gradients are compared: a map, a loss of its fixed point, and tensors to differentiate for."""

import warnings
from collections.abc import Iterable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from implicit.autodiff.closure_convert import ClosureTracer
from implicit.diagnostics.reference_gradient import Loss
from implicit.fixed_point import fixed_point
from implicit.grads import IFT, AbstractGrad, StochasticJFB
from implicit.options import Problem
from implicit.pytree import Layout, Map, State, leaves, tensors
from implicit.solution import Result, Solution
from implicit.solvers.base import AbstractSolver
from implicit.stopping import Stop


@dataclass(frozen=True, eq=False)
class GradientProblem:
    """A map, how to solve for its fixed point, a loss of the solution's value, and the tensors to differentiate for."""

    problem: Problem
    solver: AbstractSolver[Any]
    stop: Stop
    layout: Layout
    loss: Loss
    wanted: tuple[Tensor, ...]

    @classmethod
    def of(
        cls,
        problem: Problem,
        solver: AbstractSolver[Any],
        stop: Stop,
        layout: Layout,
        loss: Loss | None,
        params: Iterable[Tensor] | None,
    ) -> "GradientProblem":
        """The problem; a missing loss is a random projection, missing tensors are traced in one evaluation of f."""
        wanted = differentiable_tensors(problem) if params is None else tuple(params)
        others = [p for p in wanted if not isinstance(p, Tensor)]
        if others or isinstance(params, Tensor):
            found = type(others[0] if others else params).__name__
            raise TypeError(f"params must be an iterable of tensors, got a {found} in its place.")
        if not all(p.requires_grad for p in wanted):
            raise ValueError("params must be tensors that require gradients: call requires_grad_() on them.")
        return cls(problem, solver, stop, layout, loss or partial(random_projection, layout), wanted)

    def forward(self, grad: AbstractGrad, f: Map) -> Tensor:
        """The loss at a solution attached to the graph by `grad`."""
        solution = self._solved(f, grad)
        if not isinstance(grad, StochasticJFB):  # which draws its budget, and need not converge
            warn_how_it_ended(solution)
        return self.loss(solution.value)

    def solve(self) -> None:
        """The forward solve alone."""
        with torch.no_grad():
            self._solved(self.problem.f, IFT())

    def gradient(self, grad: AbstractGrad) -> None:
        """Forward and backward pass once, to be timed."""
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # warnings were recorded already
            torch.autograd.grad(self.forward(grad, self.problem.f), self.wanted, allow_unused=True)

    def _solved(self, f: Map, grad: AbstractGrad) -> Solution:
        return fixed_point(
            f,
            self.problem.z0,
            *self.problem.args,
            grad=grad,
            solver=self.solver,
            stop=self.stop,
            batch_dims=self.layout.batch_dims,
        )


def require_samples(z0: State, layout: Layout) -> None:
    """Refuse an empty batch.

    Raises:
        ValueError: z0 has no sample.
    """
    if layout.batch_dims and not len(leaves(z0)[0]):
        raise ValueError("z0 has no sample to measure: pass a batch of at least one.")


def warn_how_it_ended(solution: Solution) -> None:
    """Warn (RuntimeWarning) with the `Result` of samples that did not converge."""
    codes = [Result(code).name for code in solution.result.tolist()]
    bad = sorted({code for code in codes if code != Result.CONVERGED.name})
    if bad:
        short = sum(code in bad for code in codes)
        warnings.warn(f"{short} of {len(codes)} samples ended with {', '.join(bad)}.", RuntimeWarning, stacklevel=2)


def differentiable_tensors(problem: Problem) -> tuple[Tensor, ...]:
    """Every tensor that f uses and that requires gradients, traced during one evaluation."""
    tracer = ClosureTracer(tensors(problem.z0))
    with torch.enable_grad(), tracer:
        problem.f(problem.z0, *problem.args)
    return tuple(t for t in tracer.tensors if t.requires_grad)


def random_projection(layout: Layout, value: State) -> Tensor:
    """Mean over the samples of <v, z> / sqrt(N), for a fixed random v."""
    z = layout.pack(value)
    rng = torch.Generator().manual_seed(0)
    v = torch.randn(z.shape, generator=rng, dtype=torch.float64, device=rng.device).to(z.dtype).to(z.device)
    return (v * z).sum(dim=1).mean() / z.shape[1] ** 0.5
