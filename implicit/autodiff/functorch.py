"""Solves inside torch.func transforms (grad, vjp, jvp, jacrev, jacfwd, vmap and their compositions).

Setting: z* = F(z*, theta), J = dF/dz at z*. Derivatives of the solve are linear solves, and theirs are linear solves:

    dz* = (I - J)^-1 dF/dtheta dtheta              forward
    u   = (I - J^T)^-1 g,   dtheta = u^T dF/dtheta  backward

so three `autograd.Function`s close the algebra: `_Search` finds z* and has no derivative, `_Attach` is the identity at
z* with the derivatives above, `_Linear` solves with J or J^T and differentiates into itself. Under vmap each turns
the mapped axis into more batch. The innermost call of each function has plain tensors, on which the host may decide.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from implicit.autodiff.closure_convert import ClosureTracer, closure_convert, own_view, tensors
from implicit.autodiff.implicit_diff import require_same_map
from implicit.autodiff.vjp import linearize, pullback
from implicit.evaluation import FlatMap
from implicit.iterate import iterate
from implicit.linear.adjoint_solve import LinearSolve
from implicit.options import Problem, SolveOptions
from implicit.pytree import Layout, PerSample, State, map_tensors
from implicit.solution import Solution
from implicit.solvers.base import AbstractSolver
from implicit.stopping import Stop
from implicit.torch_internals import not_compiled

Pure = Callable[..., Tensor]


def active() -> bool:
    """Whether a torch.func transform or a forward-mode level is on."""
    return torch._C._are_functorch_transforms_active() or torch.autograd.forward_ad._current_level >= 0


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


def search(problem: Problem, solver: AbstractSolver[Any], stop: Stop, options: SolveOptions) -> Solution:
    """The solution without derivatives, inside or outside of a transform, in memory of its own."""
    if active():
        return solve(problem, solver, stop, options).solution
    with torch.no_grad():
        solved = iterate(problem.f, problem.z0, solver, stop, args=problem.args, options=options)
        return replace(solved, value=_own_memory(solved.value, problem.z0))


def _own_memory(value: State, z0: State) -> State:
    """The value, copied where it is z0 itself: a solve that begins at its answer."""
    if torch.compiler.is_compiling():
        return value
    starts = {t.untyped_storage()._cdata for t in tensors(z0)}
    return map_tensors(lambda t: t.clone() if t.untyped_storage()._cdata in starts else t, value)


@dataclass(frozen=True)
class Solved:
    """A solution without derivatives, and its map F(z, *theta) as a pure function of all tensors it depends on."""

    solution: Solution
    layout: Layout
    pure: Pure
    theta: tuple[Tensor, ...]

    def attach(self, linear_solve: LinearSolve) -> Tensor:
        """The value, a (B, N) matrix, with the derivatives of the fixed point."""
        z = self.layout.pack(self.solution.value)
        return _Attach.apply(self.pure, linear_solve, z, self.solution.residual, *self.theta)


def solve(problem: Problem, solver: AbstractSolver[Any], stop: Stop, options: SolveOptions) -> Solved:
    """Solve inside a transform.

    Raises:
        NotImplementedError: forward mode over forward mode, or an option that a transform cannot give.
    """
    _refuse_forward_over_forward()
    _refuse_options(options)
    layout = Layout.of(problem.z0, options.batch_dims)
    pure, theta = _purify(problem, layout)
    task = _Task(pure, layout, solver, stop, options)
    value, residual, result, evals = _Search.apply(task, layout.pack(problem.z0).detach(), *theta)
    solution = Solution(value=layout.unpack(value), residual=residual, result=result, evals=evals + 1)
    return Solved(solution, layout, pure, theta)


def _refuse_options(options: SolveOptions) -> None:
    """A transform returns tensors of a fixed shape, and sees the tensors in args at its own level."""
    given = {"trace": options.trace, "state": options.state is not None, "keep_state": options.keep_state}
    given["compact"] = bool(options.compact)
    for name, on in given.items():
        if on:
            raise NotImplementedError(
                f"{name} is not possible inside a torch.func transform or forward mode: leave it unset there."
            )


def _refuse_forward_over_forward() -> None:
    """PyTorch runs the jvp of an autograd.Function without the outer forward level, and would return zeros."""
    functorch = torch._C._functorch  # pyright: ignore[reportAttributeAccessIssue]: no stub in PyTorch
    levels = functorch.get_interpreter_stack() or []
    if sum(level.key() == functorch.TransformType.Jvp for level in levels) > 1:
        raise NotImplementedError(
            "Forward mode over forward mode (jvp of jvp, jacfwd of jacfwd) is not possible through a fixed point: "
            "use reverse mode for one of the two, for example torch.func.hessian or jacrev(jacfwd(...))."
        )


@not_compiled  # dynamo does not trace the modes of closure conversion
def _purify(problem: Problem, layout: Layout) -> tuple[Pure, tuple[Tensor, ...]]:
    """f as F(z, *theta): theta are the tensors in args and, by closure conversion, those that f closes over.

    f runs on views: a tensor that it closes over may be z0 or stand in args too, and is another argument then.
    """
    f, args = problem.f, problem.args
    given: list[Tensor] = []

    def collect(t: Tensor) -> Tensor:
        if t.is_floating_point() or t.is_complex():
            given.append(t)
        return t

    map_tensors(collect, args)
    views = tuple(map(own_view, given))
    z = own_view(layout.pack(problem.z0))
    tracer = ClosureTracer((z, *views))
    with tracer:
        FlatMap(f, _filled(args, views), layout)(z)
    closed = tracer.tensors

    def pure(z: Tensor, *theta: Tensor) -> Tensor:
        flat = FlatMap(f, _filled(args, theta[: len(given)]), layout)
        return closure_convert(flat, closed)(z, *theta[len(given) :])

    uncompiled: Any = not_compiled(pure)
    return uncompiled, (*given, *closed)


def _filled(args: tuple[Any, ...], others: tuple[Tensor, ...]) -> tuple[Any, ...]:
    """args with other floating-point tensors in place of theirs."""
    rest = iter(others)
    return map_tensors(lambda t: next(rest) if t.is_floating_point() or t.is_complex() else t, args)


def _fold(pure: Pure, size: int, dims: tuple[int | None, ...]) -> Pure:
    """`pure` over `size` problems at once, their batches laid end to end."""

    def folded(z: Tensor, *theta: Tensor) -> Tensor:
        many = torch.func.vmap(pure, in_dims=(0, *dims), out_dims=0, randomness="different")
        return many(z.unflatten(0, (size, -1)), *theta).flatten(0, 1)

    return folded


@dataclass(frozen=True)
class _Task:
    """A solve of z = pure(z, *theta), in the dtypes of the state, so that tolerance and rounding are its own."""

    pure: Pure
    layout: Layout
    solver: AbstractSolver[Any]
    stop: Stop
    options: SolveOptions

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
        return pack(found.value), found.residual, found.result, found.evals

    def fold(self, size: int, dims: tuple[int | None, ...]) -> "_Task":
        """`size` such solves at once; a whole state that is one system becomes a row."""
        layout = replace(self.layout, batch_dims=1, plain=self.layout.plain and self.layout.batch_dims == 1)
        return replace(
            self, pure=_fold(self.pure, size, dims), layout=layout, options=replace(self.options, batch_dims=1)
        )


def _front(t: Tensor, dim: int | None) -> Tensor:
    return t if dim is None else t.movedim(dim, 0)


def _flat(t: Tensor, dim: int | None, size: int) -> Tensor:
    """(size B, ...) from a mapped or unmapped (B, ...); cloned, since expanded tensors alias their memory."""
    full = t.unsqueeze(0).expand(size, *t.shape) if dim is None else t.movedim(dim, 0)
    return full.flatten(0, 1).clone()


def _axes(dims: tuple[int | None, ...]) -> tuple[int | None, ...]:
    return tuple(None if d is None else 0 for d in dims)


class _Search(torch.autograd.Function):
    """z*, its residual, result and evaluations; constants to every derivative."""

    @staticmethod
    def forward(task: _Task, z0: Tensor, *theta: Tensor) -> tuple[Tensor, ...]:
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
        return (None,) * 4

    @staticmethod
    def vmap(info: Any, in_dims: tuple[Any, ...], *args: Any) -> tuple[Any, ...]:
        task, z0, *theta = args
        size, dims = info.batch_size, in_dims[2:]
        theta = tuple(_front(t, d) for t, d in zip(theta, dims, strict=True))
        found = _Search.apply(task.fold(size, _axes(dims)), _flat(z0, in_dims[1], size), *theta)
        return tuple(t.unflatten(0, (size, -1)) for t in found), (0, 0, 0, 0)


class _Attach(torch.autograd.Function):
    """z* as a function of theta."""

    @staticmethod
    def forward(pure: Pure, config: LinearSolve, z: Tensor, residual: PerSample, *theta: Tensor) -> Tensor:
        return z.clone()

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        ctx.pure, ctx.config, _, residual, *theta = inputs
        ctx.save_for_backward(output, residual, *theta)
        ctx.save_for_forward(output, residual, *theta)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> tuple[Any, ...]:
        z, residual, *theta = ctx.saved_tensors
        u = _Linear.apply(_Adjoint(ctx.pure), ctx.config, grads[0], residual, z, *theta)
        return None, None, None, None, *_pull(lambda *t: ctx.pure(z, *t), tuple(theta), u)

    @staticmethod
    def jvp(ctx: Any, *tangents: Any) -> Tensor:
        z, residual, *theta = ctx.saved_tensors
        moves = tuple(_tangent(t, d) for t, d in zip(theta, tangents[4:], strict=True))
        push = _push(lambda *t: ctx.pure(z, *t), tuple(theta), moves)
        return _Linear.apply(_Direct(ctx.pure), ctx.config, push, residual, z, *theta)

    @staticmethod
    def vmap(info: Any, in_dims: tuple[Any, ...], *args: Any) -> tuple[Tensor, int]:
        pure, config, z, residual, *theta = args
        size, dims = info.batch_size, in_dims[4:]
        theta = tuple(_front(t, d) for t, d in zip(theta, dims, strict=True))
        pure = _fold(pure, size, _axes(dims))
        z, residual = _flat(z, in_dims[2], size), _flat(residual, in_dims[3], size)
        return _Attach.apply(pure, config, z, residual, *theta).unflatten(0, (size, -1)), 0


Product = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class _Adjoint:
    """v -> J^T v, J = dF/dz."""

    pure: Pure

    def __call__(self, v: Tensor, z: Tensor, *theta: Tensor) -> Tensor:
        return _pull(lambda x: self.pure(x, *theta), (z,), v)[0]

    def linearize(self, z: Tensor, theta: tuple[Tensor, ...]) -> tuple[Tensor, Product]:
        """F(z, theta), evaluated once, and v -> J^T v there, for plain tensors."""
        return linearize(lambda x: self.pure(x, *theta), z)

    def adjoint(self) -> "_Direct":
        return _Direct(self.pure)

    def fold(self, size: int, dims: tuple[int | None, ...]) -> "_Adjoint":
        return _Adjoint(_fold(self.pure, size, dims))


@dataclass(frozen=True)
class _Direct:
    """v -> J v."""

    pure: Pure

    def __call__(self, v: Tensor, z: Tensor, *theta: Tensor) -> Tensor:
        return _push(lambda x: self.pure(x, *theta), (z,), (v,))

    def linearize(self, z: Tensor, theta: tuple[Tensor, ...]) -> tuple[Tensor, Product]:
        """F(z, theta) and v -> J v there, for plain tensors.

        J v is the vjp of v -> J^T v, or where F has no second derivative, a jvp that evaluates F anew.
        """
        with torch.inference_mode(False), torch.enable_grad():
            x = z.detach().clone().requires_grad_()
            image = self.pure(x, *(t.detach() for t in theta))
            w = torch.zeros_like(image, requires_grad=True)
            try:
                pulled = pullback(image, x, create_graph=True)(w)
            except (NotImplementedError, RuntimeError):
                return image.detach(), lambda v: self(v, z, *theta)
        return image.detach(), pullback(pulled, w)

    def adjoint(self) -> _Adjoint:
        return _Adjoint(self.pure)

    def fold(self, size: int, dims: tuple[int | None, ...]) -> "_Direct":
        return _Direct(_fold(self.pure, size, dims))


class _Linear(torch.autograd.Function):
    """u = b + A u, for A = J or J^T at (z, theta); `residual` is ||F(z, theta) - z|| as the solve has found it."""

    @staticmethod
    def forward(act: Any, config: LinearSolve, b: Tensor, residual: PerSample, z: Tensor, *theta: Tensor) -> Tensor:
        image, product = act.linearize(z, theta)
        require_same_map(image, z, residual, config.eps)
        return config(product, b)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        ctx.act, ctx.config, _, residual, z, *theta = inputs
        ctx.save_for_backward(output, residual, z, *theta)
        ctx.save_for_forward(output, residual, z, *theta)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> tuple[Any, ...]:
        u, residual, *at = ctx.saved_tensors
        w = _Linear.apply(ctx.act.adjoint(), ctx.config, grads[0], residual, *at)
        return None, None, w, None, *_pull(lambda *t: ctx.act(u, *t), tuple(at), w)

    @staticmethod
    def jvp(ctx: Any, *tangents: Any) -> Tensor:
        u, residual, *at = ctx.saved_tensors
        moves = tuple(_tangent(t, d) for t, d in zip(at, tangents[4:], strict=True))
        b = _push(lambda *t: ctx.act(u, *t), tuple(at), moves)
        return _Linear.apply(ctx.act, ctx.config, b if tangents[2] is None else b + tangents[2], residual, *at)

    @staticmethod
    def vmap(info: Any, in_dims: tuple[Any, ...], *args: Any) -> tuple[Tensor, int]:
        act, config, b, residual, z, *theta = args
        size, dims = info.batch_size, in_dims[5:]
        theta = tuple(_front(t, d) for t, d in zip(theta, dims, strict=True))
        b, residual, z = (_flat(t, d, size) for t, d in zip((b, residual, z), in_dims[2:5], strict=True))
        u = _Linear.apply(act.fold(size, _axes(dims)), config, b, residual, z, *theta)
        return u.unflatten(0, (size, -1)), 0


def _tangent(t: Tensor, move: Tensor | None) -> Tensor:
    return torch.zeros_like(t) if move is None else move


def _pull(f: Callable[..., Tensor], at: tuple[Tensor, ...], v: Tensor) -> tuple[Tensor, ...]:
    """v^T df(at), taken while the level of the transform is alive: a solve within f starts transforms of its own."""
    if not at:
        return ()
    return torch.func.grad(lambda *t: (f(*t) * v).sum(), argnums=tuple(range(len(at))))(*at)


def _push(f: Callable[..., Tensor], at: tuple[Tensor, ...], moves: tuple[Tensor, ...]) -> Tensor:
    """df(at) moves: by forward mode or, where an operator of f has none, by two vector-Jacobian products."""
    if not at:
        return torch.zeros_like(f())
    try:
        return torch.func.jvp(f, at, moves)[1]
    except (NotImplementedError, RuntimeError) as error:
        if "forward" not in str(error).lower():
            raise
    out = f(*at)
    return torch.func.grad(lambda w: sum((a * b).sum() for a, b in zip(_pull(f, at, w), moves, strict=True)))(
        torch.zeros_like(out)
    )
