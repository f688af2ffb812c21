"""Backpropagation through every iteration of the solver."""

from dataclasses import dataclass
from typing import Any

from torch.utils.checkpoint import checkpoint

from implicit.grads.base import AbstractGrad
from implicit.iterate import Loop, Map, Stop, iterate
from implicit.solution import Solution
from implicit.solvers.base import AbstractSolver
from implicit.state import State


@dataclass(frozen=True)
class Unrolled(AbstractGrad):
    """Record the whole solve, solver and all, and backpropagate through it.

        dL/dtheta = g^T dz_n/dtheta,     z_n = f(solver^{n-1}(z0))

    Drops nothing: exact for the number of iterations taken, whether or not they converged; the starting state gets a
    gradient, and derivatives of any order are right. The value is f(z) of the last judged z, so that even a solve that
    starts at its answer depends on f's parameters. Memory: every evaluation of f and the solver's steps between them;
    with `checkpoint` the solver's steps and one evaluation. Cost: n vector-Jacobian products, and with `checkpoint` n
    evaluations more. When to use: as the truth to compare with, and where few iterations are trained as a network of
    that depth.

    Source: Griewank and Walther, "Algorithm 799: revolve", ACM TOMS 26(1), 2000 (checkpointing).

    Args:
        checkpoint: keep only the input of every evaluation of f and evaluate f again in the backward pass. Longer
            segments than one evaluation would hold several evaluations of f at a time to save one state each, a loss
            wherever an evaluation stores more states than the solve has iterations.
    """

    checkpoint: bool = False

    def __call__(
        self,
        f: Map,
        z0: State,
        args: tuple[Any, ...],
        solver: AbstractSolver[Any],
        stop: Stop,
        loop: Loop = Loop(),
    ) -> Solution:
        if not self.checkpoint:
            return iterate(f, z0, solver, stop, args=args, loop=loop, image=True)

        def again(z: State, *args: Any) -> State:
            return checkpoint(f, z, *args, use_reentrant=False)

        return iterate(again, z0, solver, stop, args=args, loop=loop, image=True)
