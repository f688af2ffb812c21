"""The unrolled phantom gradient: a few damped steps at the solution."""

from dataclasses import dataclass
from typing import Any

from implicit.argument_types import check_fields
from implicit.autodiff.detached_solve import solve_detached
from implicit.autodiff.tracked_steps import track
from implicit.grads.base import AbstractGrad
from implicit.options import Problem, SolveOptions
from implicit.solution import Solution
from implicit.solvers.base import AbstractSolver, check_at_least, check_share
from implicit.stopping import Stop


@dataclass(frozen=True)
class Phantom(AbstractGrad):
    """Solve without a graph, then take `steps` damped steps with a graph and backpropagate through these.

        z' = d z + (1 - d) f(z)
        dL/dtheta ~ (1 - d) g^T sum_{i < steps} ((1 - d) J + d I)^i df/dtheta            (d = damping)

    The rest of the series is dropped. Damping makes the series converge if the eigenvalues of J have negative real or
    large imaginary parts, and slows its convergence otherwise; for J = 0 the gradient is 1 - d^steps times the exact
    one. ``Phantom(steps, 0)`` is ``JFB(steps)``. Memory: `steps` evaluations of f. Cost: `steps` evaluations and as
    many vector-Jacobian products. The starting state gets no gradient. When to use: if the exact gradient is too
    expensive and ``JFB(1)`` too inaccurate; `implicit.diagnostics.gradient_bias` measures both.

    Source: Geng et al., "On Training Implicit Models", NeurIPS 2021, arXiv 2111.05177, equation 12 (their lambda is
    1 - damping).

    Args:
        steps: number of damped steps with a graph, >= 1.
        damping: share of the old iterate kept, in [0, 1).
    """

    steps: int = 5
    damping: float = 0.5

    def __post_init__(self) -> None:
        check_fields(self)
        check_at_least(self, 1, "steps")
        check_share(self, "damping")

    def __call__(
        self, problem: Problem, solver: AbstractSolver[Any], stop: Stop, options: SolveOptions = SolveOptions()
    ) -> Solution:
        solved = solve_detached(problem, solver, stop, options)
        return track(problem, solved, stop, options, steps=self.steps, damping=self.damping)
