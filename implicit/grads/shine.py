"""SHINE: the inverse that a quasi-Newton solver has built up forward, used once more backward.

Setting: a solver's step is z' = z + H r with H ~ (I - J)^-1. The backward pass wants u = (I - J^T)^-1 g ~ H^T g, and

    Broyden    H = I + sum_i u_i v_i^T                H^T g = g + sum_i v_i (u_i^T g)
    Anderson   H = I - dF G^-1 dR^T                   H^T g = g - dR G^-1 dF^T g,     G = dR^T dR with its ridge
"""

from collections.abc import Callable
from dataclasses import dataclass, fields, is_dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from implicit.autodiff.approximate import attach_approximately, refuse_transforms
from implicit.autodiff.no_grad import constant
from implicit.evaluation import FlatMap
from implicit.grads.base import AbstractGrad
from implicit.iterate import iterate
from implicit.options import SolveOptions
from implicit.pytree import Flat, Layout, Map, State, map_tensors, norm
from implicit.solution import Solution
from implicit.solvers.anderson import Anderson
from implicit.solvers.anderson_gs import AndersonGS
from implicit.solvers.bad_broyden import BadBroyden
from implicit.solvers.base import AbstractSolver, Evaluator, Point
from implicit.solvers.broyden import Broyden
from implicit.solvers.history_buffer import HistoryBuffer
from implicit.stopping import Stop


@dataclass(frozen=True)
class SHINE(AbstractGrad):
    """Solve without a graph, evaluate f once with one, and multiply by the forward solver's own inverse estimate.

        u = H^T g,     dL/dtheta ~ u^T df/dtheta;     u = g for a sample with ||H^T g|| > fallback ||g||

    Drops what the forward solve has not learnt of J: it knows secants along its own path, not the direction g. `refine`
    steps u <- g + J^T u start from there and remove error by rho(J) each. Relative error of the gradient in float64,
    Broyden(50) to 1e-8, by products v^T J (`Neumann` of as many in brackets):

        layer (spectral radius)   0             1             2             5
        tanh (0.32)               0.22 (0.33)   0.05 (0.10)   0.01 (0.03)   0.000 (0.001)
        convolution (0.52)        0.33 (0.48)   0.12 (0.24)   0.05 (0.12)   0.003 (0.013)
        adaLN (0.55)              0.29 (0.32)   0.09 (0.17)   0.06 (0.07)   0.007 (0.014)
        tanh (0.94)               0.78 (0.78)   0.59 (0.59)   0.53 (0.54)   0.31 (0.31)

    On the last layer the fallback is what is seen: without it 0.57 at no product. Memory: one evaluation of f, and the
    solver's history until the backward pass: bounded by its `memory`. Cost: one evaluation, `refine` products v^T J
    and one v^T df/dtheta. The starting state gets no gradient. When to use: Broyden forward, many evaluations, and a
    backward pass that must cost next to nothing; with ``refine=1`` it is worth about two terms of the series.

    Source: Ramzi et al., "SHINE: SHaring the INverse Estimate from the forward pass for bi-level optimization and
    implicit models", ICLR 2022, arXiv 2106.00553, section 2 and the fallback of section 3.

    Args:
        refine: fixed-point steps on top of the estimate, >= 0.
        fallback: largest ||H^T g|| / ||g|| of a sample before its u falls back to g; None never falls back.
    """

    refine: int = 0
    fallback: float | None = 1.3

    def __post_init__(self) -> None:
        if self.refine < 0:
            raise ValueError(f"SHINE.refine must be at least 0, got {self.refine}.")
        if self.fallback is not None and not self.fallback > 0:
            raise ValueError(f"SHINE.fallback must be positive or None, got {self.fallback}.")

    def __call__(
        self,
        f: Map,
        z0: State,
        args: tuple[Any, ...],
        solver: AbstractSolver[Any],
        stop: Stop,
        options: SolveOptions = SolveOptions(),
    ) -> Solution:
        if not isinstance(solver, Anderson | AndersonGS | BadBroyden | Broyden):
            raise ValueError(
                f"SHINE reuses the inverse that Broyden or Anderson builds up, and {solver!r} builds none: pass "
                "solver=Broyden()."
            )
        refuse_transforms(self)
        if not torch.is_grad_enabled():
            return iterate(f, z0, solver, stop, args=args, options=options)
        with constant():
            keep = replace(
                options, keep_state=True, compact=False, state=_wrapped(options.state, z0, options.batch_dims)
            )
            solved = iterate(f, z0, _Frozen(solver), stop, args=args, options=keep)
        layout = Layout.of(solved.value, options.batch_dims)
        packed, z = FlatMap(f, args, layout), layout.pack(solved.value)
        images: list[Flat] = []

        def phi(z: Flat) -> Flat:
            fz = packed(z)
            images.append(fz.detach())
            return fz

        value = attach_approximately(phi, z, lambda act, g: self._estimate(inverse, act, g))
        with torch.no_grad():  # the answer's own secant, which the loop had no more use for
            proposed = solved.converged.unsqueeze(1)  # any other answer is not the point that the solver asked for
            state = replace(solved.state, z=torch.where(proposed, solved.state.z, z))
            _, frozen = _Frozen(solver).step(packed, Point(z, images[0]), state)
        memory = frozen.memory
        inverse = partial(solver.inverse_transpose, memory)
        return replace(
            solved,
            value=layout.unpack(value),
            evals=solved.evals + 1,
            state=memory if options.keep_state else None,
        )

    def _estimate(self, inverse: Callable[[Flat], Flat], act: Callable[[Flat], Flat], g: Flat) -> Flat:
        u = inverse(g)
        if self.fallback is not None:
            u = torch.where((norm(u) <= self.fallback * norm(g)).unsqueeze(1), u, g)
        for _ in range(self.refine):
            u = g + act(u)
        return u


@dataclass(frozen=True)
class _FrozenState:
    memory: Any
    z: Flat


@dataclass(frozen=True)
class _Frozen(AbstractSolver[_FrozenState]):
    """A solver that leaves the memory of a sample alone once the loop holds that sample.

    The solver itself would overwrite its history, which it needs no more, by differences of zero.
    """

    solver: AbstractSolver[Any]

    def init(self, point: Point) -> _FrozenState:
        return _FrozenState(self.solver.init(point), torch.full_like(point.z, torch.nan))

    def resume(self, point: Point, memory: _FrozenState) -> _FrozenState:
        return _FrozenState(self.solver.resume(point, memory.memory), memory.z)

    def step(self, f: Evaluator, point: Point, memory: _FrozenState) -> tuple[Flat, _FrozenState]:
        held = torch.nonzero((point.z == memory.z).all(dim=1)).flatten()
        before = map_tensors(lambda t: t[held], memory.memory) if len(held) else None
        z, after = self.solver.step(f, point, memory.memory)
        if before is not None:
            after = _restore(after, before, held)
        return z, _FrozenState(after, point.z)


def _wrapped(state: Any, z0: State, batch_dims: int) -> _FrozenState | None:
    if state is None:
        return None
    flat = Layout.of(z0, batch_dims).pack(z0)
    return _FrozenState(state, torch.full_like(flat, torch.nan))


def _restore(after: Any, before: Any, held: Tensor) -> Any:
    """`after` with the history of the held samples as it was; the history may have grown since."""
    if isinstance(after, HistoryBuffer):
        for new, old in zip(after.blocks, before.blocks, strict=False):
            new[held] = old
    elif isinstance(after, Tensor):
        if after.ndim == 3:
            after[held] = before
    elif is_dataclass(after):
        for field in fields(after):
            _restore(getattr(after, field.name), getattr(before, field.name), held)
    return after
