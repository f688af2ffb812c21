"""Jacobian-free backpropagation: the 1-step gradient."""

from dataclasses import dataclass
from typing import Any

from implicit.argument_types import check_fields
from implicit.autodiff.detached_solve import solve_detached
from implicit.autodiff.tracked_steps import track
from implicit.grads.base import AbstractGrad
from implicit.options import Problem, SolveOptions
from implicit.solution import Solution
from implicit.solvers.base import AbstractSolver, check_at_least
from implicit.stopping import Stop


@dataclass(frozen=True)
class JFB(AbstractGrad):
    """Solve without a graph, then apply f `steps` more times with a graph and backpropagate through these.

        dL/dtheta ~ g^T sum_{i < steps} J^i df/dtheta            (steps = 1: the inverse is dropped)

    Also called the 1-step, phantom or inexact gradient. A descent direction if f is a contraction that is well
    conditioned; its bias grows with the spectral radius of J. Memory: `steps` evaluations of f, whatever the length
    of the solve. Cost: `steps` evaluations and as many vector-Jacobian products. The starting state gets no gradient.
    When to use: if training can afford the graph of one evaluation only. Relative errors of 0.30, 0.43 and 0.82 were
    measured at spectral radius 0.32, 0.55 and 0.94: run `implicit.diagnostics.gradient_bias` first.

    Source: Fung et al., "JFB: Jacobian-Free Backpropagation for Implicit Networks", AAAI 2022, arXiv 2103.12803.

    Args:
        steps: number of evaluations with a graph, >= 1.
    """

    steps: int = 1

    def __post_init__(self) -> None:
        check_fields(self)
        check_at_least(self, 1, "steps")

    def __call__(
        self, problem: Problem, solver: AbstractSolver[Any], stop: Stop, options: SolveOptions = SolveOptions()
    ) -> Solution:
        solved = solve_detached(problem, solver, stop, options)
        return track(problem, solved, stop, options, steps=self.steps)
