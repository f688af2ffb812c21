"""Stochastic Jacobian-free backpropagation: random numbers of iterations without and with a graph."""

from dataclasses import dataclass, replace
from typing import Any

import torch

from implicit.argument_types import check_fields
from implicit.autodiff.detached_solve import solve_detached
from implicit.autodiff.tracked_steps import track, unsolved
from implicit.grads.base import AbstractGrad
from implicit.grads.jfb import JFB
from implicit.options import Problem, SolveOptions
from implicit.solution import Solution
from implicit.solvers.base import AbstractSolver, check_at_least
from implicit.stopping import Stop
from implicit.torch_internals import fake_tensors_paused, inside_backward


@dataclass(frozen=True)
class StochasticJFB(AbstractGrad):
    """Draw n ~ U{0..N} and m ~ U{1..M}; take n solver steps without a graph, then apply f m times with a graph.

        z_n = solver^n(z0),   z_{n+1} = f(z_n), ..., z_{n+m} = f(z_{n+m-1});   backpropagate through the last m only.

    The series from J^m on is dropped, as by ``JFB(m)``. The draw is the budget: tolerances and `Stop.max_evals` have no
    effect. With n = 0 the starting state gets a gradient. Memory: m evaluations of f (the n free ones store nothing).
    Cost: n + m evaluations and m vector-Jacobian products. When to use: to train a layer that will later be solved with
    any number of iterations.

    Source: Bai and Melas-Kyriazi, "Fixed Point Diffusion Models", CVPR 2024, arXiv 2401.08741, Algorithm 1.

    Args:
        N: largest number of iterations without a graph, >= 0.
        M: largest number of iterations with a graph, >= 1.
        generator: CPU generator of the draws, the only state of the estimator. Give the same seed to all ranks of a
            distributed run so that all take the same number of steps. None: PyTorch's global generator.
    """

    N: int = 12
    M: int = 12
    generator: torch.Generator | None = None

    def __post_init__(self) -> None:
        check_fields(self)
        check_at_least(self, 0, "N")
        check_at_least(self, 1, "M")

    def for_evaluation(self) -> JFB:
        """The 1-step gradient, which leaves the budget to `Stop`."""
        return JFB()

    def draw(self) -> tuple[int, int]:
        """The next (n, m).

        Raises:
            RuntimeError: within a backward pass, where activation checkpointing runs the forward pass again and a
                generator of its own would draw other numbers.
        """
        if self.generator is not None and inside_backward():
            raise RuntimeError(
                "StochasticJFB(generator=...) inside torch.utils.checkpoint would draw another (n, m) when the forward "
                "pass is run again: leave generator=None, whose state checkpoint restores, or checkpoint f instead."
            )
        device = "cpu" if self.generator is None else self.generator.device  # whatever torch.set_default_device says
        with fake_tensors_paused():
            n = torch.randint(0, self.N + 1, (), generator=self.generator, device=device)
            m = torch.randint(1, self.M + 1, (), generator=self.generator, device=device)
            return int(n), int(m)

    def __call__(
        self, problem: Problem, solver: AbstractSolver[Any], stop: Stop, options: SolveOptions = SolveOptions()
    ) -> Solution:
        if stop.when is not None:
            raise ValueError("StochasticJFB draws the number of iterations: leave Stop.when unset, or use JFB.")
        n, m = self.draw()
        free = replace(stop, rtol=0, atol=0, max_evals=max(n, 1))
        solved = solve_detached(problem, solver, free, options) if n else unsolved(problem, options)
        return track(problem, solved, free, options, steps=m)
