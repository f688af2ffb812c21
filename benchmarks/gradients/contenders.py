"""Gradient estimators, ours and torchdeq's, behind one call: ``loss = contender(f, z0, x)``.

Forward, all run plain iteration to the same relative residual, so that what differs is the gradient; those named
otherwise use the solver in their name. Backward, everyone keeps the defaults of its library unless the name says so.
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
    """One of `implicit`'s estimators."""

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
        """Whose forward solve without gradients the time is divided by."""
        return f"implicit {type(self.solver).__name__}"


@dataclass(frozen=True)
class Theirs:
    """torchdeq, a fresh module each time: its hook is kept on the module."""

    options: tuple[tuple[str, Any], ...]
    forward: str = "torchdeq fixed_point_iter"

    def value(self, f: Map, z0: Tensor, x: Tensor) -> Tensor:
        """The solution, in the graph."""
        return get_deq(**THEIR_STOP, **dict(self.options))(lambda z: f(z, x), z0)[0][-1]

    def solve(self, f: Map, z0: Tensor, x: Tensor) -> Tensor:
        """The solution alone, in evaluation mode."""
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
    """The forward solves that times are divided by, without gradients and without an evaluation for them."""

    def plain(contender: Ours | Theirs) -> Callable[[], Tensor]:
        def run() -> Tensor:
            with torch.no_grad():
                return contender.solve(f, z0, x)

        return run

    return {contender.forward: plain(contender) for contender in CONTENDERS.values()}
