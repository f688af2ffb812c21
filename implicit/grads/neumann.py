"""The truncated Neumann series of the inverse, by vector-Jacobian products alone."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch

from implicit.argument_types import check_fields
from implicit.autodiff.autocast import rounding
from implicit.autodiff.detached_solve import solve_detached
from implicit.autodiff.failed_samples import attach_finite
from implicit.autodiff.functorch import refuse_transforms
from implicit.autodiff.implicit_diff import attach_approximately, warn_learned_start
from implicit.autodiff.solved_map import require_solved_map
from implicit.grads.base import AbstractGrad
from implicit.options import Problem, SolveOptions
from implicit.pytree import Flat, Layout
from implicit.solution import Solution
from implicit.solvers.base import AbstractSolver, check_at_least
from implicit.stopping import Stop


@dataclass(frozen=True)
class Neumann(AbstractGrad):
    """Solve without a graph, evaluate f once with a graph, and sum the first terms of the series when backpropagating.

        u = sum_{i < terms} (J^T)^i g,     dL/dtheta ~ u^T df/dtheta

    The terms from J^terms on are dropped: relative error about rho(J)^terms. ``Neumann(1)`` is ``JFB(1)``;
    ``Neumann(k)`` at an exact fixed point is ``JFB(k)`` in the memory of one evaluation. The sum diverges with `terms`
    if rho(J) > 1. Memory: one evaluation of f. Cost: one evaluation and `terms` vector-Jacobian products. The starting
    state gets no gradient. Second derivatives are those of this formula at a constant z*, which leaves out the
    dependence of z* on theta: use `IFT` for them. When to use: for a known, small bias at a fixed cost, with no solve
    that could fail.

    Source: Geng et al., "On Training Implicit Models", NeurIPS 2021, arXiv 2111.05177, section 3.2 (Neumann-series
    phantom gradient).

    Args:
        terms: number of terms of the series, >= 1.
    """

    terms: int = 5

    def __post_init__(self) -> None:
        check_fields(self)
        check_at_least(self, 1, "terms")

    def __call__(
        self, problem: Problem, solver: AbstractSolver[Any], stop: Stop, options: SolveOptions = SolveOptions()
    ) -> Solution:
        refuse_transforms(self)
        solved = solve_detached(problem, solver, stop, options)
        if not torch.is_grad_enabled():
            return solved
        layout = Layout.of(solved.value, options.batch_dims)
        eps = rounding(problem.f, layout)
        z = layout.pack(solved.value)
        value, image, evals = attach_finite(
            lambda f, z: attach_approximately(f, z, self._series, eps), problem, z, stop, layout
        )
        evals += require_solved_map(problem, solved, z, image, stop, layout)
        warn_learned_start(problem, value)
        return replace(solved, value=layout.unpack(value), evals=solved.evals + evals)

    def _series(self, act: Callable[[Flat], Flat], g: Flat) -> Flat:
        term, u = g, g
        for _ in range(self.terms - 1):
            term = act(term)
            u = u + term
        return u
