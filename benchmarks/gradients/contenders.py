"""Gradient estimators of `implicit` and torchdeq with one interface: ``contender.value(f, z0, x)`` is the solution.

In the forward pass all contenders run plain iteration to the same relative residual, so that only the gradients differ;
a contender with a solver in its name uses that solver. In the backward pass each contender has the defaults of its
library, except for the options in its name.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torchdeq import get_deq

from implicit import (
    IFT,
    JFB,
    SHINE,
    AbstractGrad,
    AndersonGS,
    Broyden,
    Neumann,
    Phantom,
    Picard,
    Reversible,
    StochasticJFB,
    Stop,
    Unrolled,
    fixed_point,
)
from implicit.solvers import AbstractSolver

Map = Callable[[Tensor, Tensor], Tensor]
RTOL, BUDGET = 1e-6, 400
PLAIN = Picard()
STOP = Stop(rtol=RTOL, atol=0, max_evals=BUDGET)
THEIR_STOP = dict(f_solver="fixed_point_iter", f_max_iter=BUDGET, f_tol=RTOL, f_stop_mode="rel")


@dataclass(frozen=True)
class Ours:
    """An estimator of `implicit`."""

    grad: AbstractGrad
    solver: AbstractSolver[Any] = PLAIN

    def value(self, f: Map, z0: Tensor, x: Tensor) -> Tensor:
        """The solution, in the graph."""
        return fixed_point(f, z0, x, grad=self.grad, solver=self.solver, stop=STOP).value

    def solve(self, f: Map, z0: Tensor, x: Tensor) -> Tensor:
        """The solution alone."""
        return fixed_point(f, z0, x, grad=IFT(), solver=self.solver, stop=STOP).value

    @property
    def forward(self) -> str:
        """Name of the forward solve without gradients by whose time this contender's time is divided."""
        return f"implicit {type(self.solver).__name__}"


@dataclass(frozen=True)
class Theirs:
    """An estimator of torchdeq. Each call makes a new module, because torchdeq stores a hook on the module."""

    options: tuple[tuple[str, Any], ...]
    forward: str = "torchdeq fixed_point_iter"

    def value(self, f: Map, z0: Tensor, x: Tensor) -> Tensor:
        """The solution, in the graph."""
        return get_deq(**THEIR_STOP, **dict(self.options))(lambda z: f(z, x), z0)[0][-1]

    def solve(self, f: Map, z0: Tensor, x: Tensor) -> Tensor:
        """The solution without a graph, in evaluation mode."""
        return get_deq(**THEIR_STOP).eval()(lambda z: f(z, x), z0)[0][-1]


def theirs(**options: Any) -> Theirs:
    return Theirs(tuple(options.items()))


TIGHT = dict(b_tol=1e-6, b_stop_mode="rel", b_max_iter=200)
CONTENDERS: dict[str, Ours | Theirs] = {
    "IFT": Ours(IFT()),
    "IFT, AndersonGS forward": Ours(IFT(), AndersonGS()),
    "JFB": Ours(JFB()),
    "JFB(5)": Ours(JFB(5)),
    "StochasticJFB": Ours(StochasticJFB(generator=torch.Generator().manual_seed(0))),
    "Phantom": Ours(Phantom()),
    "Neumann": Ours(Neumann()),
    "SHINE, Broyden forward": Ours(SHINE(), Broyden()),
    "Reversible": Ours(Reversible()),
    "Unrolled": Ours(Unrolled()),
    "Unrolled, checkpointed": Ours(Unrolled(checkpoint=True)),
    "torchdeq ift": theirs(ift=True),
    "torchdeq hook_ift": theirs(hook_ift=True),
    "torchdeq ift, rel 1e-6": theirs(ift=True, **TIGHT),
    "torchdeq ift, Anderson rel 1e-6": theirs(ift=True, b_solver="anderson", **TIGHT),
    "torchdeq ift, Broyden rel 1e-6": theirs(ift=True, b_solver="broyden", **TIGHT),
    "torchdeq phantom, 1 step": theirs(grad=1),
    "torchdeq phantom, 5 steps, tau 0.5": theirs(grad=5, tau=0.5),
}


def forwards(f: Map, z0: Tensor, x: Tensor) -> dict[str, Callable[[], Tensor]]:
    """The forward solves by whose times other times are divided; they have no gradient and no evaluation for one."""

    def plain(contender: Ours | Theirs) -> Callable[[], Tensor]:
        def run() -> Tensor:
            with torch.no_grad():
                return contender.solve(f, z0, x)

        return run

    return {contender.forward: plain(contender) for contender in CONTENDERS.values()}
