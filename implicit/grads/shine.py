"""SHINE: the approximate inverse that a quasi-Newton solver built in the forward pass, used in the backward pass.

Setting: a solver's step is z' = z + H r with H ~ (I - J)^-1. The backward pass needs u = (I - J^T)^-1 g ~ H^T g, and

    Broyden    H = I + sum_i u_i v_i^T                H^T g = g + sum_i v_i (u_i^T g)
    Anderson   H = I - dF G^-1 dR^T                   H^T g = g - dR G^-1 dF^T g,     G = dR^T dR with its ridge
"""

from collections.abc import Callable
from dataclasses import dataclass, fields, is_dataclass, replace
from typing import Any

import torch
from jaxtyping import Bool
from torch import Tensor

from implicit.argument_types import check_fields
from implicit.autodiff.autocast import rounding
from implicit.autodiff.detached_solve import solve_detached
from implicit.autodiff.failed_samples import attach_finite
from implicit.autodiff.functorch import refuse_transforms
from implicit.autodiff.implicit_diff import attach_approximately, warn_learned_start
from implicit.evaluation import FlatMap
from implicit.grads.base import AbstractGrad
from implicit.options import Problem, SolveOptions
from implicit.pytree import Flat, Layout, map_tensors, norm
from implicit.solution import Solution
from implicit.solvers.base import AbstractSolver, Point, check_at_least
from implicit.stopping import Stop


@dataclass(frozen=True)
class SHINE(AbstractGrad):
    """Solve without a graph, evaluate f once with a graph, and multiply g by the forward solver's inverse estimate.

        u = H^T g,     dL/dtheta ~ u^T df/dtheta;     u = g for a sample with ||H^T g|| > fallback ||g||

    H fits J along the path of the forward solve, and not along g. `refine` steps u <- g + J^T u start from H^T g, and
    each multiplies the error by about rho(J). Relative error of the gradient in float64, Broyden(50) to 1e-8, by the
    number of products v^T J (in brackets: `Neumann` with as many products):

        layer (spectral radius)   0             1             2             5
        tanh (0.32)               0.22 (0.33)   0.05 (0.10)   0.01 (0.03)   0.000 (0.001)
        convolution (0.52)        0.33 (0.48)   0.12 (0.24)   0.05 (0.12)   0.003 (0.013)
        adaLN (0.55)              0.29 (0.32)   0.09 (0.17)   0.06 (0.07)   0.007 (0.014)
        tanh (0.94)               0.78 (0.78)   0.59 (0.59)   0.53 (0.54)   0.31 (0.31)

    On the last layer u falls back to g: without `fallback` the error is 0.57 at 0 products. Memory: one evaluation of
    f, and until the backward pass the solver's history, which its `memory` bounds. Cost: one evaluation, `refine`
    products v^T J and one v^T df/dtheta. The starting state gets no gradient. Second derivatives are
    those of this formula at constant z* and H. When to use: with Broyden and many evaluations forward, if the backward
    pass must cost next to nothing. With ``refine=1`` SHINE is about as accurate as `Neumann` with two products.

    Source: Ramzi et al., "SHINE: SHaring the INverse Estimate from the forward pass for bi-level optimization and
    implicit models", ICLR 2022, arXiv 2106.00553, section 2 and the fallback of section 3.

    Args:
        refine: number of steps u <- g + J^T u after the estimate, >= 0.
        fallback: largest ||H^T g|| / ||g|| of a sample before its u falls back to g; None: u is always H^T g.
    """

    refine: int = 0
    fallback: float | None = 1.3

    def __post_init__(self) -> None:
        check_fields(self)
        check_at_least(self, 0, "refine")
        if self.fallback is not None and not self.fallback > 0:
            raise ValueError(f"SHINE.fallback must be positive or None, got {self.fallback}.")

    def __call__(
        self, problem: Problem, solver: AbstractSolver[Any], stop: Stop, options: SolveOptions = SolveOptions()
    ) -> Solution:
        if type(solver).inverse_transpose is AbstractSolver.inverse_transpose:
            raise ValueError(
                f"SHINE uses the inverse estimate that the solver builds up, and {solver!r} has none: pass a solver "
                "that defines inverse_transpose, such as solver=Broyden()."
            )
        refuse_transforms(self)
        # The solve, without a graph; the solver state of a sample remains as it was when the sample finished. Gradients
        # off or on, the solver is the same, so that the value is. A fixed count finishes no sample before the end
        layout = Layout.of(problem.z0, options.batch_dims)
        frozen = _Frozen(solver) if stop.has_tolerance else None
        if frozen is not None and options.state is not None:
            options = replace(options, state=frozen.wrap(options.state, layout.pack(problem.z0)))
        if not torch.is_grad_enabled():
            solved = solve_detached(problem, frozen or solver, stop, options)
            return replace(solved, state=solved.state.state if frozen and options.keep_state else solved.state)
        solved = solve_detached(problem, frozen or solver, stop, replace(options, keep_state=True, compact=False))
        # y = f(z*) with a graph; `state` is bound below, before the backward pass reads it
        z, eps = layout.pack(solved.value), rounding(problem.f, layout)

        def attach(f: FlatMap, z: Flat) -> tuple[Flat, Flat]:
            return attach_approximately(f, z, lambda act, g: self._estimate(solver, state, act, g), eps)

        value, image, evals = attach_finite(attach, problem, z, stop, layout)
        warn_learned_start(problem, value)
        # The secant to z* itself, which the loop did not add. Only a converged sample ended at the point that the
        # solver proposed; the value of any other sample is another point, to which the solver has no secant
        state = solved.state
        if frozen is not None:
            with torch.no_grad():
                last = replace(state, z=torch.where(solved.converged.unsqueeze(1), state.z, z))
                state = frozen.step(Point(z, image), last)[-1].state
        return replace(
            solved,
            value=layout.unpack(value),
            evals=solved.evals + evals,
            state=state if options.keep_state else None,
        )

    def _estimate(self, solver: AbstractSolver[Any], state: Any, act: Callable[[Flat], Flat], g: Flat) -> Flat:
        # u = H^T g, or g if ||H^T g|| exceeds the fallback
        estimate = solver.inverse_transpose(state, g)
        u = g if estimate is None else estimate
        if self.fallback is not None:
            u = torch.where((norm(u) <= self.fallback * norm(g)).unsqueeze(1), u, g)
        # fixed-point steps u <- g + J^T u
        for _ in range(self.refine):
            u = g + act(u)
        return u


@dataclass(frozen=True)
class _FrozenState:
    """The state of the wrapped solver, and the z of its last step; z is NaN before the first step and after a reset."""

    state: Any
    z: Flat


@dataclass(frozen=True)
class _Frozen(AbstractSolver[_FrozenState]):
    """A wrapped solver that keeps the state of a sample as it was when the loop froze the sample.

    The solver itself would overwrite the history of a frozen sample by differences of zero. The safeguard settings are
    those of the solver, so the iterates are the same.
    """

    solver: AbstractSolver[Any]

    @property
    def patience(self) -> int:
        return self.solver.patience

    def stall_after(self, numbers: int) -> int:
        return self.solver.stall_after(numbers)

    @property
    def has_cautious_stage(self) -> bool:
        return self.solver.has_cautious_stage

    def wrap(self, state: Any, z: Flat) -> _FrozenState:
        """The state of the solver, with no sample frozen."""
        return _FrozenState(state, torch.full_like(z, torch.nan))

    def init(self, point: Point) -> _FrozenState:
        return self.wrap(self.solver.init(point), point.z)

    def resume(self, point: Point, state: _FrozenState) -> _FrozenState:
        return _FrozenState(self.solver.resume(point, state.state), state.z)

    def restart(self, point: Point, state: _FrozenState, mask: Bool[Tensor, "B 1"]) -> _FrozenState:
        # a sample reset to its best iterate may be at the z of the last step, and must not count as frozen
        return _FrozenState(self.solver.restart(point, state.state, mask), state.z.masked_fill(mask, torch.nan))

    def retreat(
        self, point: Point, failed: Point, state: _FrozenState, mask: Bool[Tensor, "B 1"], cautious: Bool[Tensor, "B 1"]
    ) -> _FrozenState:
        after = self.solver.retreat(point, failed, state.state, mask, cautious)
        return _FrozenState(after, state.z.masked_fill(mask, torch.nan))

    def step(self, point: Point, state: _FrozenState) -> tuple[Flat, Flat | None, _FrozenState]:
        # frozen samples are at the z of the last step; their rows are copied, since histories are written in place
        same = (point.z == state.z).all(dim=1)
        held = torch.nonzero(same).flatten()
        size = len(point.z)
        before = map_tensors(lambda t: t[held] if t.shape[:1] == (size,) else t, state.state) if len(held) else None
        z, tangent, after = self.solver.step(point, state.state)
        if before is not None:
            # a solver never writes to the tensors of the point, so these need no restoring
            own = {t.untyped_storage().data_ptr() for t in (point.z, point.fz, point.r)}
            _restore(after, before, held, size, own)
        return z, tangent, _FrozenState(after, point.z)


def _restore(after: Any, before: Any, held: Tensor, size: int, own: set[int]) -> None:
    """Write the rows `before` of the frozen samples back into the state, whose histories may have grown."""
    if isinstance(after, Tensor):
        if isinstance(before, Tensor) and after.shape[:1] == (size,) and after.untyped_storage().data_ptr() not in own:
            after[held] = before
    elif is_dataclass(after):
        for field in fields(after):
            _restore(getattr(after, field.name), getattr(before, field.name), held, size, own)
    elif isinstance(after, dict):
        for key in before:
            _restore(after[key], before[key], held, size, own)
    elif isinstance(after, tuple | list):
        for new, old in zip(after, before, strict=False):
            _restore(new, old, held, size, own)
