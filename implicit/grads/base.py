"""Gradient estimators: an estimator runs the solve and decides which operations autograd records.

Setting: z* = f(z*, theta), J = df/dz and df/dtheta both at z*. With g = dL/dz*, the exact gradient is

    dL/dtheta = u^T df/dtheta,     u = g + J^T u                 (implicit function theorem)

and every estimator solves for u, approximates u or replaces u by a cheaper vector.
"""

import abc
from typing import Any

from implicit.options import Problem, SolveOptions
from implicit.solution import Solution
from implicit.solvers.base import AbstractSolver
from implicit.stopping import Stop


class AbstractGrad(abc.ABC):
    """Subclasses are frozen dataclasses whose fields are their configuration.

    The value, the residual and the result of the solution must be the same with and without a graph.
    """

    @abc.abstractmethod
    def __call__(
        self, problem: Problem, solver: AbstractSolver[Any], stop: Stop, options: SolveOptions = SolveOptions()
    ) -> Solution:
        """Solve the problem and attach the value to the graph as this estimator does."""

    def for_evaluation(self) -> "AbstractGrad":
        """The estimator that `DEQ` uses in evaluation mode, where `Stop` ends the solve.

        The same estimator, unless it sets the number of iterations itself, as `StochasticJFB` does.
        """
        return self
