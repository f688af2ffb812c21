"""Solves inside torch.func transforms (grad, vjp, jvp, jacrev, jacfwd, vmap and their compositions).

Setting: z* = F(z*, theta), J = dF/dz at z*. Derivatives of the solve are linear solves, and theirs are linear solves:

    dz* = (I - J)^-1 dF/dtheta dtheta              forward
    u   = (I - J^T)^-1 g,   dtheta = u^T dF/dtheta  backward

so three `autograd.Function`s give derivatives of any order: `_Search` finds z* and has no derivative, `_Attach` is the
identity at z* with the derivatives above, and `TransposableSolve` solves with J or J^T; its derivatives are such solves
again. Under vmap each function folds the mapped axis into the batch. The innermost call of each function has plain
tensors, whose numbers the host may read.
"""

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from implicit.autodiff.closure_convert import THREAD, UNTRACED, ClosureTracer, closure_convert, own_view
from implicit.autodiff.failed_samples import failed, finite, without
from implicit.autodiff.jvp import functional_jvp
from implicit.autodiff.reachable_modules import with_parameters_of_now
from implicit.autodiff.transposable_solve import Jacobian, Pure, TransposableSolve, mapped
from implicit.autodiff.vjp import functional_vjp
from implicit.evaluation import FlatMap
from implicit.iterate import iterate
from implicit.linear.adjoint_solve import LinearSolve
from implicit.options import Problem, SolveOptions
from implicit.pytree import Layout, map_tensors, tensors
from implicit.solution import Solution
from implicit.solvers.base import AbstractSolver
from implicit.stopping import Stop
from implicit.torch_internals import (
    Allocations,
    autograd_vmap_level,
    forward_levels,
    forward_mode_active,
    has_derivative,
    not_compiled,
    transforms_active,
)


def active() -> bool:
    """Whether a torch.func transform or a forward-mode level is on."""
    return transforms_active() or forward_mode_active()


def refuse_transforms(estimator: object) -> None:
    """Refuse an estimator that does not work inside torch.func.

    Raises:
        NotImplementedError: a transform is on.
    """
    if active():
        name = type(estimator).__name__
        raise NotImplementedError(
            f"{name} works with ordinary backward passes, not inside torch.func transforms or forward mode: use IFT, "
            "JFB or Phantom there."
        )


@dataclass(frozen=True)
class Solved:
    """A solution without derivatives, and its map F(z, *theta) as a pure function of all tensors it depends on."""

    solution: Solution
    layout: Layout
    pure: Pure
    theta: tuple[Tensor, ...]
    image: Tensor  # `recomputation.summary` of F at the value, to compare a second evaluation with
    lost: Tensor | None = None  # (B, 1) samples of which F is a constant, since f is not finite at their value

    def attach(self, linear_solve: LinearSolve) -> Tensor:
        """The value, a (B, N) matrix, with the derivatives of the fixed point."""
        z = self.layout.pack(self.solution.value)
        value = _Attach.apply(self.pure, linear_solve, z, self.image, *self.theta)
        return value if self.lost is None else torch.where(self.lost, z, value)


def solve(
    problem: Problem, solver: AbstractSolver[Any], stop: Stop, options: SolveOptions, *, attached: bool = False
) -> Solved:
    """Solve inside a transform; with `attached` the caller will call `Solved.attach`.

    Raises:
        NotImplementedError: forward mode over forward mode, or an option that does not work inside transforms.
        RuntimeError: f uses a tensor that another thread has made; or, with `attached`, f closes over a tensor with a
            derivative that closure conversion cannot find.
    """
    if forward_levels() > 1:  # PyTorch runs the jvp of an autograd.Function without the outer level, which gives 0
        raise NotImplementedError(
            "Forward mode over forward mode (jvp of jvp, jacfwd of jacfwd) is not possible through a fixed point: "
            "use reverse mode for one of the two, for example torch.func.hessian or jacrev(jacfwd(...))."
        )
    if attached and autograd_vmap_level():
        raise NotImplementedError(
            "torch.autograd.functional.jacobian(strategy='forward-mode') is not possible through IFT, since its vmap "
            "has no rules for the operators of a solve: use torch.func.jacfwd, or strategy='reverse-mode'."
        )
    _refuse_options(options)
    layout = Layout.of(problem.z0, options.batch_dims)
    pure, theta = _purify(problem, layout, attached)
    task = _Task(pure, layout, solver, stop, options, attached)
    value, residual, result, evals, image = _Search.apply(task, layout.pack(problem.z0).detach(), *theta)
    solution = Solution(value=layout.unpack(value), residual=residual, result=result, evals=evals + 1)
    if attached and not stop.has_tolerance and failed(~image.isfinite(), stop):
        return _without_failed(problem, solution, layout, options)
    return Solved(solution, layout, pure, theta, image)


def _without_failed(problem: Problem, solution: Solution, layout: Layout, options: SolveOptions) -> Solved:
    """The solution of a fixed count, with a constant F for the samples whose f is not finite at their value."""
    value = layout.pack(solution.value)
    with torch.no_grad():
        lost = ~finite(FlatMap(problem.f, problem.args, layout)(value))
    rest = without(problem, lost[:, 0], options.batch_dims)
    pure, theta = _purify(rest, layout, True)
    image = _Search.apply(_Image(pure), value.detach(), *theta)[-1]
    solution = replace(solution, evals=solution.evals + 3)
    return Solved(solution, layout, pure, theta, image, lost)


def refuse_threads(problem: Problem, layout: Layout) -> None:
    """Evaluate f once and refuse an f that computes in other threads, before a transform differentiates f.

    Raises:
        RuntimeError: f uses a tensor that another thread has made.
    """
    with torch.no_grad():
        _purify(problem, layout, attached=False)


def _refuse_options(options: SolveOptions) -> None:
    """Refuse options whose results have no fixed shape, and `compact`, which cuts the tensors in args."""
    given = {name: getattr(options, name) for name in ("trace", "keep_state", "compact")}
    for name, on in {**given, "state": options.state is not None}.items():
        if on:
            raise NotImplementedError(
                f"{name} is not possible inside a torch.func transform or forward mode: leave it unset there."
            )


@not_compiled  # dynamo does not trace the modes of closure conversion
def _purify(problem: Problem, layout: Layout, attached: bool) -> tuple[Pure, tuple[Tensor, ...]]:
    """f as F(z, *theta): theta are the tensors in args and, by closure conversion, those that f closes over.

    f runs on views of z0 and args: if f also closes over one of these tensors, that use is a separate argument. The
    traced tensors are constants in this run, so the result has a derivative only if f uses a tensor untraced.
    """
    f, args = with_parameters_of_now(problem.f), problem.args
    given = tensors(args)
    views = tuple(own_view(t.detach()) for t in given)
    z = own_view(layout.pack(problem.z0).detach())
    with Allocations() as allocations, ClosureTracer((z, *views), constant=True, allocations=allocations) as tracer:
        y = FlatMap(f, _filled(args, views), layout)(z).clone()  # cloned, so that the tracer records f's result
    if tracer.from_other_threads:
        raise RuntimeError(THREAD)
    if attached and (tracer.lost or has_derivative(y)):
        raise RuntimeError(UNTRACED)
    closed = tracer.tensors

    def pure(z: Tensor, *theta: Tensor) -> Tensor:
        flat = FlatMap(f, _filled(args, theta[: len(given)]), layout)
        return closure_convert(flat, closed)(z, *theta[len(given) :])

    theta = (*given, *closed)
    return Pure(not_compiled(pure), layout.widths, tuple(map(has_derivative, theta))), theta


def _filled(args: tuple[Any, ...], others: tuple[Tensor, ...]) -> tuple[Any, ...]:
    """args with `others` in place of their tensors; calls no tensor method, which would be traced."""
    rest = iter(others)
    return map_tensors(lambda t: next(rest), args)


@dataclass(frozen=True)
class _Task:
    """A solve of z = pure(z, *theta), in the state's dtypes, so that tolerance and rounding are those of the state."""

    pure: Pure
    layout: Layout
    solver: AbstractSolver[Any]
    stop: Stop
    options: SolveOptions
    attached: bool

    def __call__(self, z0: Tensor, theta: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        pack, unpack = self.layout.pack, self.layout.unpack
        found = iterate(
            lambda state, *theta: unpack(self.pure(pack(state), *theta)),
            unpack(z0),
            self.solver,
            self.stop,
            args=theta,
            options=self.options,
        )
        value = pack(found.value)
        if not self.attached:
            return value, found.residual, found.result, found.evals, found.residual.unsqueeze(1)
        return value, found.residual, found.result, found.evals + 1, self.pure.first(value, *theta)

    def fold(self, size: int, dims: tuple[int | None, ...]) -> "_Task":
        """`size` such solves in one batch; with ``batch_dims=0`` each whole state becomes a row."""
        whole = self.layout.batch_dims == 0
        shapes = tuple(shape or torch.Size([1]) for shape in self.layout.shapes) if whole else self.layout.shapes
        layout = replace(self.layout, batch_dims=1, plain=self.layout.plain and not whole, shapes=shapes)
        return replace(
            self, pure=self.pure.fold(size, dims), layout=layout, options=replace(self.options, batch_dims=1)
        )


@dataclass(frozen=True)
class _Image:
    """In place of a solve: the summary of F at a given point."""

    pure: Pure

    def __call__(self, z: Tensor, theta: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        none = torch.zeros(len(z), device=z.device)
        return z.clone(), none, none.to(torch.int8), none.to(torch.int64), self.pure.first(z, *theta)

    def fold(self, size: int, dims: tuple[int | None, ...]) -> "_Image":
        """`size` such points in one batch."""
        return _Image(self.pure.fold(size, dims))


class _Search(torch.autograd.Function):
    """(z*, residual, result, evaluations, summary of F at z*), without derivatives."""

    @staticmethod
    def forward(task: _Task | _Image, z0: Tensor, *theta: Tensor) -> tuple[Tensor, ...]:
        with torch.no_grad():
            return task(z0, theta)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        ctx.mark_non_differentiable(*output)
        ctx.arity = len(inputs)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> tuple[None, ...]:
        return (None,) * ctx.arity

    @staticmethod
    def jvp(ctx: Any, *tangents: Any) -> tuple[None, ...]:
        return (None,) * 5

    @staticmethod
    def vmap(info: Any, in_dims: tuple[Any, ...], *args: Any) -> tuple[Any, ...]:
        axes, moved = mapped(info.batch_size, args[1:], in_dims[1:], batched=1)
        found = _Search.apply(args[0].fold(info.batch_size, axes), *moved)
        return tuple(t.unflatten(0, (info.batch_size, -1)) for t in found), (0, 0, 0, 0, 0)


class _Attach(torch.autograd.Function):
    """z*, with the derivatives of the fixed point with respect to theta."""

    @staticmethod
    def forward(pure: Pure, config: LinearSolve, z: Tensor, image: Tensor, *theta: Tensor) -> Tensor:
        return z.clone()

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        ctx.pure, ctx.config, _, image, *theta = inputs
        ctx.set_materialize_grads(False)  # None, not zeros, is the tangent of what has no derivative
        ctx.save_for_backward(output, image, *theta)
        ctx.save_for_forward(output, image, *theta)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> tuple[Any, ...]:
        z, image, *theta = ctx.saved_tensors
        if grads[0] is None:
            return (None,) * (4 + len(theta))
        u = TransposableSolve.apply(Jacobian(ctx.pure, True), ctx.config, grads[0], image, z, *theta)
        wanted = ctx.needs_input_grad[4:]
        return None, None, None, None, *functional_vjp(lambda *t: ctx.pure(z, *t), tuple(theta), u, wanted)

    @staticmethod
    def jvp(ctx: Any, *tangents: Any) -> Tensor:
        z, image, *theta = ctx.saved_tensors
        moved = functional_jvp(lambda *t: ctx.pure(z, *t), tuple(theta), tangents[4:])
        return TransposableSolve.apply(Jacobian(ctx.pure, False), ctx.config, moved, image, z, *theta)

    @staticmethod
    def vmap(info: Any, in_dims: tuple[Any, ...], *args: Any) -> tuple[Tensor, int]:
        axes, moved = mapped(info.batch_size, args[2:], in_dims[2:], batched=2)
        value = _Attach.apply(args[0].fold(info.batch_size, axes), args[1], *moved)
        return value.unflatten(0, (info.batch_size, -1)), 0
