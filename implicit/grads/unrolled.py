"""Backpropagation through every iteration of the solver."""

from dataclasses import dataclass
from typing import Any

from implicit.grads.base import AbstractGrad
from implicit.iterate import Loop, Map, Stop, iterate
from implicit.solution import Solution
from implicit.solvers.base import AbstractSolver
from implicit.state import State


@dataclass(frozen=True)
class Unrolled(AbstractGrad):
    """Record the whole solve, solver and all, and backpropagate through it.

    Exact for the number of iterations taken, whether or not they converged; the starting state gets a gradient.
    Memory and backward cost grow with the number of evaluations. The value is f(z) of the last judged z, so that even
    a solve that starts at its answer depends on f's parameters.
    """

    def __call__(
        self,
        f: Map,
        z0: State,
        args: tuple[Any, ...],
        solver: AbstractSolver[Any],
        stop: Stop,
        loop: Loop = Loop(),
    ) -> Solution:
        return iterate(f, z0, solver, stop, args=args, loop=loop, image=True)
