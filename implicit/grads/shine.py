"""SHINE: the approximate inverse that a quasi-Newton solver built in the forward pass, used in the backward pass.

Setting: a solver's step is z' = z + H r with H ~ (I - J)^-1. The backward pass needs u = (I - J^T)^-1 g ~ H^T g, and

    Broyden    H = I + sum_i u_i v_i^T                H^T g = g + sum_i v_i (u_i^T g)
    Anderson   H = I - dF G^-1 dR^T                   H^T g = g - dR G^-1 dF^T g,     G = dR^T dR with its ridge
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from jaxtyping import Bool, Int
from torch import Tensor

from implicit.argument_types import check_fields
from implicit.autodiff.autocast import rounding
from implicit.autodiff.detached_solve import solve_detached
from implicit.autodiff.failed_samples import attach_finite
from implicit.autodiff.functorch import refuse_transforms
from implicit.autodiff.implicit_diff import attach_approximately, warn_learned_start
from implicit.autodiff.solved_map import require_solved_map
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
    f, and until the backward pass the solver's history, which its `memory` bounds, and once more its rows for samples
    that finish before others or not at all. Cost: one evaluation, `refine` products v^T J and one v^T df/dtheta. The
    starting state gets no gradient. Second derivatives are those of this formula at constant z* and H. When to use:
    with Broyden and many evaluations forward, if the backward pass must cost next to nothing. With ``refine=1`` SHINE
    is about as accurate as `Neumann` with two products.
    `Stop.late` has no effect with a tolerance: a sample that is read late is evaluated beyond its value, and its H
    would depend on its batch-mates. The host waits for the device at every step.

    Source: Ramzi et al., "SHINE: SHaring the INverse Estimate from the forward pass for bi-level optimization and
    implicit models", ICLR 2022, arXiv 2106.00553, section 2 and the fallback of section 3.

    Args:
        refine: number of steps u <- g + J^T u after the estimate, >= 0.
        fallback: largest ||H^T g|| / ||g|| of a sample before its u falls back to g; None: u is H^T g wherever that is
            finite, which it need not be for a sample that failed.
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
        if stop.has_tolerance:  # see `Stop.late` above; without a graph too, so that the value is the same
            stop = replace(stop, late=False)
        if not torch.is_grad_enabled():
            return solve_detached(problem, solver, stop, options)
        # The solve, without a graph. A fixed count finishes no sample before the end
        layout = Layout.of(problem.z0, options.batch_dims)
        kept = _Kept(solver) if stop.has_tolerance else None
        if kept is not None and options.state is not None:
            options = replace(options, state=kept.wrap(options.state, layout.pack(problem.z0)))
        solved = solve_detached(problem, kept or solver, stop, replace(options, keep_state=True, compact=False))
        # y = f(z*) with a graph; `state` is bound below, before the backward pass reads it
        z, eps = layout.pack(solved.value), rounding(problem.f, layout)

        def attach(f: FlatMap, z: Flat) -> tuple[Flat, Flat]:
            return attach_approximately(f, z, lambda act, g: self._estimate(kept or solver, state, act, g), eps)

        value, image, evals = attach_finite(attach, problem, z, stop, layout)
        evals += require_solved_map(problem, solved, z, image, stop, layout)
        warn_learned_start(problem, value)
        # The secant to z* itself, which the loop did not add. Only a converged sample ended at the point that the
        # solver proposed; the value of any other sample is another point, to which the solver has no secant
        state = solved.state
        if kept is not None:
            with torch.no_grad():
                last = replace(state, z=torch.where(solved.converged.unsqueeze(1), state.z, z))
                state = kept.step(Point(z, image), last)[-1]
        return replace(
            solved,
            value=layout.unpack(value),
            evals=solved.evals + evals,
            state=None if not options.keep_state else state.state if kept else state,
        )

    def _estimate(self, solver: AbstractSolver[Any], state: Any, act: Callable[[Flat], Flat], g: Flat) -> Flat:
        # u = H^T g, or g if ||H^T g|| exceeds the fallback or, after a failed solve, H is not finite
        estimate = solver.inverse_transpose(state, g)
        u, limit = g if estimate is None else estimate, torch.inf
        if self.fallback is not None:
            limit = self.fallback * norm(g)
        size = norm(u)
        u = torch.where(((size <= limit) & size.isfinite()).unsqueeze(1), u, g)
        # fixed-point steps u <- g + J^T u
        for _ in range(self.refine):
            u = g + act(u)
        return u


@dataclass(frozen=True)
class _KeptState:
    """The state of the wrapped solver, and copies of its rows for samples that have finished.

    Attributes:
        state: of the wrapped solver, which goes on as without the wrapper.
        z: the z of the last step; NaN before the first step and after a reset.
        finished: samples whose z has not changed since an earlier step.
        copies: (numbers of samples, their rows of the state when they finished); a later copy replaces an earlier one.
    """

    state: Any
    z: Flat
    finished: Bool[Tensor, " B"]
    copies: tuple[tuple[Int[Tensor, " _"], Any], ...] = ()


@dataclass(frozen=True)
class _Kept(AbstractSolver[_KeptState]):
    """A wrapped solver with the inverse estimate that each sample had when the loop froze it.

    The loop goes on with the other samples, and the differences of a frozen sample, which are zero, take the place of
    its pairs in the history. The slots of a history are shared by all samples, so its rows cannot be put back.
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

    def wrap(self, state: Any, z: Flat) -> _KeptState:
        """The state of the solver, with no sample frozen."""
        return _KeptState(state, torch.full_like(z, torch.nan), torch.zeros(len(z), dtype=torch.bool, device=z.device))

    def init(self, point: Point) -> _KeptState:
        return self.wrap(self.solver.init(point), point.z)

    def resume(self, point: Point, state: _KeptState) -> _KeptState:
        return replace(state, state=self.solver.resume(point, state.state))

    def restart(self, point: Point, state: _KeptState, mask: Bool[Tensor, "B 1"]) -> _KeptState:
        return self._running(state, mask, self.solver.restart(point, state.state, mask))

    def retreat(
        self, point: Point, failed: Point, state: _KeptState, mask: Bool[Tensor, "B 1"], cautious: Bool[Tensor, "B 1"]
    ) -> _KeptState:
        return self._running(state, mask, self.solver.retreat(point, failed, state.state, mask, cautious))

    def _running(self, state: _KeptState, mask: Bool[Tensor, "B 1"], after: Any) -> _KeptState:
        # a sample reset to its best iterate may be at the z of the last step, and must not count as frozen
        return replace(state, state=after, z=state.z.masked_fill(mask, torch.nan))

    def step(self, point: Point, state: _KeptState) -> tuple[Flat, Flat | None, _KeptState]:
        # frozen samples are at the z of the last step; their rows are copied once, since histories are written in place
        same, size = (point.z == state.z).all(dim=1), len(point.z)
        rows, copies = torch.nonzero(same & ~state.finished).flatten(), state.copies
        if len(rows):
            before = map_tensors(lambda t: t[rows] if t.shape[:1] == (size,) else t, state.state)
            copies = (*copies, (rows, before))
        z, tangent, after = self.solver.step(point, state.state)
        return z, tangent, _KeptState(after, point.z, same, copies)

    def inverse_transpose(self, state: _KeptState, g: Flat) -> Flat | None:
        """H^T g, for the finished samples with H as it was when they finished."""
        u = self.solver.inverse_transpose(state.state, g)
        u = g if u is None else u
        for rows, copy in state.copies:
            found = self.solver.inverse_transpose(copy, g[rows])
            kept = state.finished[rows].unsqueeze(1)
            u = u.index_copy(0, rows, torch.where(kept, g[rows] if found is None else found, u[rows]))
        return u
