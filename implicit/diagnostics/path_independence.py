"""Path independence: whether the solution depends on the start of the solve.

Setting: z_1 solves z = f(z, x) from the usual start, z_2 from a distant start, for the same x. The asymptotic alignment
score is their cosine, 1 for a path-independent layer:

    AA = <z_1, z_2> / (||z_1|| ||z_2||)                 per sample

The other start is the solution of *another* sample: a plausible solution, for another input x. Anil et al.,
"Path Independent Equilibrium Models Can Better Exploit Test-Time Computation", NeurIPS 2022, arXiv 2211.09961, found
that a high score goes with generalization to harder problems at test time.
"""

from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from implicit.argument_types import check_arguments
from implicit.fixed_point import fixed_point
from implicit.pytree import Layout, Map, State, norm
from implicit.solution import Solution
from implicit.solvers.base import AbstractSolver
from implicit.solvers.multisecant import Multisecant
from implicit.stopping import Stop


@dataclass(frozen=True, eq=False)
class PathIndependence:
    """Two solves of the same problems from different starts.

    Attributes:
        score: (B,) cosine of the two answers; 1 if they are equal, also if both are zero.
        distance: (B,) ||z_2 - z_1|| / ||z_1||, which depends on differences of length too.
        first, second: the two solves. Read `converged` before the score: answers that have not converged may differ
            for this reason alone.
    """

    score: Float[Tensor, " B"]
    distance: Float[Tensor, " B"]
    first: Solution
    second: Solution

    @property
    def converged(self) -> Bool[Tensor, " B"]:
        """(B,) True where both solves met the tolerance."""
        return self.first.converged & self.second.converged


def path_independence(
    f: Map,
    z0: State,
    *args: Any,
    start: State | None = None,
    solver: AbstractSolver[Any] = Multisecant(),
    stop: Stop = Stop(max_evals=500),
    batch_dims: int = 1,
) -> PathIndependence:
    """Solve z = f(z, *args) from two starts and compare the answers; no gradients.

    Args:
        f: the map f(z, *args).
        z0: the usual start, ``(B, *)`` tensors.
        args: passed on to f.
        start: the other start, like z0. Default: sample b starts at the solution of sample b - 1, sample 0 at that of
            the last one. This is the only diagnostic in which a sample's result depends on another sample.
        solver, stop: as in `fixed_point`; default ``Stop(max_evals=500)``, since the score is about the limit.
        batch_dims: 0 makes the whole state one system; `start` must then be given.

    Raises:
        ValueError: the batch has one sample and `start` is not given, or `fixed_point` would refuse f or z0.
    """
    check_arguments(path_independence, {"f": f})
    layout = Layout.of(z0, batch_dims)
    if start is None and (batch_dims == 0 or layout.pack(z0).shape[0] < 2):
        raise ValueError("With a single system there is no other sample's solution to start from: pass start=.")
    solve = partial(fixed_point, solver=solver, stop=stop, batch_dims=batch_dims)
    with torch.no_grad():
        first = solve(f, z0, *args)
        one = layout.pack(first.value)
        other = layout.unpack(one.roll(1, dims=0)) if start is None else start
        second = solve(f, other, *args)
        two = layout.pack(second.value)
        same = (one == two).all(dim=1)  # two answers of zero have no cosine
        return PathIndependence(
            score=torch.nn.functional.cosine_similarity(one, two, dim=1).masked_fill(same, 1),
            distance=(norm(two - one) / norm(one)).masked_fill(same, 0),
            first=first,
            second=second,
        )
