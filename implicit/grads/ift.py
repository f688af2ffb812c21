"""The exact gradient, by the implicit function theorem.

u = g + J^T u,     dL/dtheta = u^T df/dtheta,     J = df/dz at z*
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor

from implicit.argument_types import check_fields
from implicit.autodiff.autocast import rounding
from implicit.autodiff.detached_solve import solve_detached
from implicit.autodiff.failed_samples import attach_finite
from implicit.autodiff.functorch import active, solve
from implicit.autodiff.implicit_diff import attach, warn_learned_start
from implicit.autodiff.solved_map import require_solved_map
from implicit.grads.base import AbstractGrad
from implicit.linear.adjoint_solve import LinearSolve
from implicit.linear.gmres import GMRES
from implicit.options import Problem, SolveOptions
from implicit.pytree import Flat, Layout, Map, State, leaves
from implicit.solution import Adjoint, Solution
from implicit.solvers.base import AbstractSolver, check_one_of
from implicit.stopping import Stop
from implicit.torch_internals import tree_leaves


@dataclass(frozen=True)
class IFT(AbstractGrad):
    """Exact gradient of the fixed point: one linear solve in the backward pass, by vector-Jacobian products.

    No term is dropped: the error of the gradient is that of the two solves, about their relative residual times
    ||(I - J)^-1||. The linear solve divides g by a power of two per sample, so a loss times 1e-8 gives the same
    gradient times 1e-8. The starting state gets no gradient. Differentiable to any order, and by `torch.func`.

    Each sample is a system of its own. If f couples the samples (batch normalization in training mode, a mean over the
    batch), the linear solve detects this and solves the whole batch as one system, with a warning: pass
    ``batch_dims=0``.

    Memory: one evaluation of f; in the backward pass a handful of states if the layer contracts well, one state per
    product if not, or if a sample has fewer than 1024 numbers (`GMRES`). Cost: one evaluation, k products v^T J and one
    v^T df/dtheta. The equation is linear, and GMRES needs the fewest products of all methods for a given residual: k
    was 12 at spectral radius 0.32, 20 at 0.55 and 44 at 0.94, for a residual of 1e-6.

    When to use: by default. If k products are too expensive, `implicit.diagnostics.gradient_bias` measures the error of
    the cheaper estimators.

    Source: Bai et al., "Deep Equilibrium Models", NeurIPS 2019, arXiv 1909.01377.

    Args:
        solver: solver of the linear system; None takes ``GMRES()``. Any solver of fixed points works too.
        stop: stopping criterion of the linear solve; None takes a relative residual of 1e-6 in float32, 1e-10 in
            float64 and four rounding errors in narrower dtypes (autocast included), at most 200 products.
        on_failure: action if the linear solve does not converge: "warn", "raise" `NotConverged` or "ignore".
        report: called with the `Solution` of every linear solve.
        preconditioner: linear function P with P g ~ (I - J^T)^-1 g, on states in the structure of the starting state,
            each sample by itself. The solve is for w with u = P w, and its residual is that of u. With a good P it
            takes fewer products; with a poor P the gradient is the same. Three applications of P and one host read in
            each backward pass test whether it is linear; where it is not, it is left out, with a warning.

    Example:
        The u of one training step as the first guess of the next (`Adjoint`)::

            adjoint = implicit.Adjoint()
            for x, y in batches:
                solution = deq(z0, x, adjoint=adjoint)
                loss(solution.value, y).backward()
                adjoint = solution.adjoint
    """

    solver: AbstractSolver[Any] | GMRES | None = None
    stop: Stop | None = None
    on_failure: Literal["warn", "raise", "ignore"] = "warn"
    report: Callable[[Solution], None] | None = None
    preconditioner: Callable[[State], State] | None = None

    def __post_init__(self) -> None:
        check_fields(self)
        check_one_of(self, "on_failure", "warn", "raise", "ignore")

    def __call__(
        self, problem: Problem, solver: AbstractSolver[Any], stop: Stop, options: SolveOptions = SolveOptions()
    ) -> Solution:
        if active():
            self._refuse_hints(options)
            inside = solve(problem, solver, stop, options, attached=True)
            value = inside.attach(self._linear_solve(problem.f, inside.layout))
            return replace(inside.solution, value=inside.layout.unpack(value))
        solved = solve_detached(problem, solver, stop, options)
        kept = None if options.adjoint is None else Adjoint(options.adjoint.value)
        solved = replace(solved, adjoint=kept)
        if not torch.is_grad_enabled():
            return solved
        layout = Layout.of(solved.value, options.batch_dims)
        linear, z = self._with_hints(self._linear_solve(problem.f, layout), layout, kept), layout.pack(solved.value)
        value, image, evals = attach_finite(lambda f, z: attach(f, z, linear), problem, z, stop, layout)
        evals += require_solved_map(problem, solved, z, image, stop, layout)
        warn_learned_start(problem, value)
        return replace(solved, value=layout.unpack(value), evals=solved.evals + evals)

    def _refuse_hints(self, options: SolveOptions) -> None:
        """Refuse a guess and a preconditioner in a transform, which solves with J and with J^T at several levels."""
        if options.adjoint is not None or self.preconditioner is not None:
            raise NotImplementedError(
                "adjoint and IFT.preconditioner work with ordinary backward passes, not inside torch.func transforms "
                "or forward mode: leave them unset there."
            )

    def _with_hints(self, solve: LinearSolve, layout: Layout, kept: Adjoint | None) -> LinearSolve:
        """The linear solve with the preconditioner, and with the guess in `kept`, in which the solve stores u."""
        precondition = self.preconditioner
        if precondition is not None:
            solve = replace(solve, preconditioner=partial(_preconditioned, precondition, layout))
        if kept is None:
            return solve
        guess = None if kept.value is None else layout.pack(_like_state(kept.value, layout)).detach()

        def keep(u: Flat) -> None:
            kept.value = layout.unpack(u)

        return replace(solve, guess=guess, keep=keep)

    def _linear_solve(self, f: Map, layout: Layout) -> LinearSolve:
        eps = rounding(f, layout)
        rtol = 1e-10 if eps < 1e-12 else 1e-6 if eps < 1e-6 else 4 * eps
        return LinearSolve(
            solver=self.solver or GMRES(),
            stop=self.stop or Stop(rtol=rtol, atol=0, max_evals=200),
            on_failure=self.on_failure,
            report=self.report,
            eps=eps,
        )


def _like_state(guess: State, layout: Layout) -> State:
    """`guess`, the value of an `Adjoint`.

    Raises:
        ValueError: it has not the structure, shapes and device of the state.
    """
    want = [tuple(t.shape) for t in leaves(layout.like)]
    try:
        found = leaves(guess, layout.like)
    except ValueError:
        found = None
    got = f"a {type(guess).__name__}" if found is None else [tuple(t.shape) for t in found]
    if found is None or got != want or any(t.device != layout.device for t in found):
        raise ValueError(
            f"adjoint must be like the state, tensors of shapes {want} on {layout.device}, got {got}: pass the adjoint "
            "of the same samples, or implicit.Adjoint()."
        )
    return guess


def _preconditioned(precondition: Callable[[State], State], layout: Layout, g: Flat) -> Flat:
    """P g on (B, N) matrices.

    Raises:
        ValueError: the result has another structure or shape than the state.
    """
    out = precondition(layout.unpack(g.clone()))  # a copy, since P may work in place
    try:
        flat = layout.pack(out)
    except (AttributeError, LookupError, TypeError, ValueError, RuntimeError):
        flat = None
    if flat is None or flat.shape != g.shape:
        raise ValueError(
            f"IFT.preconditioner must return tensors in the structure and shapes of the state, {_shapes(layout.like)}, "
            f"got {_shapes(out)}."
        )
    return flat


def _shapes(state: Any) -> str:
    return str([tuple(t.shape) for t in tree_leaves(state) if isinstance(t, Tensor)] or type(state).__name__)
