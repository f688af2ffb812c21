"""Solves inside torch.func transforms (grad, vjp, jvp, jacrev, jacfwd, vmap and their compositions).

Setting: z* = F(z*, theta), J = dF/dz at z*. Derivatives of the solve are linear solves, and theirs are linear solves:

    dz* = (I - J)^-1 dF/dtheta dtheta              forward
    u   = (I - J^T)^-1 g,   dtheta = u^T dF/dtheta  backward

so three `autograd.Function`s close the algebra: `_Search` finds z* and has no derivative, `_Attach` is the identity at
z* with the derivatives above, `_Linear` solves with J or J^T and differentiates into itself. Under vmap each turns
the mapped axis into more batch.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from implicit.autodiff.closure_convert import Outside, explicit
from implicit.autodiff.no_grad import constant
from implicit.evaluation import FlatMap
from implicit.iterate import iterate
from implicit.linear.adjoint_solve import LinearSolve
from implicit.options import SolveOptions
from implicit.pytree import Layout, Map, State
from implicit.solution import Solution
from implicit.solvers.base import AbstractSolver
from implicit.stopping import Stop

Pure = Callable[..., Tensor]


def active() -> bool:
    """Whether a torch.func transform or a forward-mode level is on."""
    return torch._C._are_functorch_transforms_active() or torch.autograd.forward_ad._current_level >= 0


def search(
    f: Map, z0: State, args: tuple[Any, ...], solver: AbstractSolver[Any], stop: Stop, options: SolveOptions
) -> Solution:
    """The solution without derivatives, inside or outside of a transform."""
    if active():
        return solve(f, z0, args, solver, stop, options)[0]
    with constant():
        return iterate(f, z0, solver, stop, args=args, options=options)


def solve(
    f: Map, z0: State, args: tuple[Any, ...], solver: AbstractSolver[Any], stop: Stop, options: SolveOptions
) -> tuple[Solution, Layout, Pure, tuple[Tensor, ...]]:
    """The solution without derivatives, and F(z, *theta) as a pure function of all tensors it depends on.

    Raises:
        NotImplementedError: forward mode over forward mode.
    """
    _refuse_forward_over_forward()
    layout = Layout.of(z0, options.batch_dims)
    pure, theta = _purify(f, z0, args, layout)
    value, residual, result, evals = _Search.apply(pure, solver, stop, layout.pack(z0).detach(), *theta)
    solution = Solution(value=layout.unpack(value), residual=residual, result=result, evals=evals + 1)
    return solution, layout, pure, theta


def _refuse_forward_over_forward() -> None:
    """PyTorch runs the jvp of an autograd.Function without the outer forward level, and would return zeros."""
    functorch = torch._C._functorch  # pyright: ignore[reportAttributeAccessIssue]: no stub in PyTorch
    levels = functorch.get_interpreter_stack() or []
    if sum(level.key() == functorch.TransformType.Jvp for level in levels) > 1:
        raise NotImplementedError(
            "Forward mode over forward mode (jvp of jvp, jacfwd of jacfwd) is not possible through a fixed point: "
            "use reverse mode for one of the two, for example torch.func.hessian or jacrev(jacfwd(...))."
        )


def attach(pure: Pure, z: Tensor, theta: tuple[Tensor, ...], config: LinearSolve) -> Tensor:
    """z with the derivatives of the fixed point of `pure`."""
    return _Attach.apply(pure, config, z, *theta)


def _purify(f: Map, z0: State, args: tuple[Any, ...], layout: Layout) -> tuple[Pure, tuple[Tensor, ...]]:
    """f as F(z, *theta): theta are the tensors in args and, found by watching f run once, those it closes over.

    f runs on views: a tensor that it closes over may be z0 or stand in args too, and is another argument then.
    """
    slots, given = _tensors_of(args)
    views = tuple(t.view_as(t) for t in given)
    z = layout.pack(z0)
    z = z.view_as(z)
    seen = Outside()
    with seen:
        FlatMap(f, slots(views), layout)(z)
    ids = {id(t) for t in (z, *views)}
    closed = tuple(t for t in seen.tensors if id(t) not in ids)

    def pure(z: Tensor, *theta: Tensor) -> Tensor:
        filled = slots(theta[: len(given)])
        return explicit(FlatMap(f, filled, layout), closed)(z, *theta[len(given) :])

    return pure, (*given, *closed)


def _tensors_of(args: tuple[Any, ...]) -> tuple[Callable[[tuple[Tensor, ...]], tuple[Any, ...]], tuple[Tensor, ...]]:
    """The floating-point tensors in args, and how to put others in their place."""
    found: list[Tensor] = []

    def take(thing: Any) -> Any:
        if isinstance(thing, Tensor) and (thing.is_floating_point() or thing.is_complex()):
            found.append(thing)
            return _Slot(len(found) - 1)
        if type(thing) in (tuple, list):
            return type(thing)(take(part) for part in thing)
        if type(thing) is dict:
            return {key: take(part) for key, part in thing.items()}
        return thing

    plan = take(args)

    def fill(thing: Any, tensors: tuple[Tensor, ...]) -> Any:
        if isinstance(thing, _Slot):
            return tensors[thing.index]
        if type(thing) in (tuple, list):
            return type(thing)(fill(part, tensors) for part in thing)
        if type(thing) is dict:
            return {key: fill(part, tensors) for key, part in thing.items()}
        return thing

    return lambda tensors: fill(plan, tensors), tuple(found)


@dataclass(frozen=True)
class _Slot:
    index: int


def _fold(pure: Pure, size: int, dims: tuple[int | None, ...]) -> Pure:
    """`pure` over `size` problems at once, their batches laid end to end."""

    def folded(z: Tensor, *theta: Tensor) -> Tensor:
        many = torch.func.vmap(pure, in_dims=(0, *dims), out_dims=0, randomness="different")
        return many(z.unflatten(0, (size, -1)), *theta).flatten(0, 1)

    return folded


def _front(t: Tensor, dim: int | None) -> Tensor:
    return t if dim is None else t.movedim(dim, 0)


def _flat(t: Tensor, dim: int | None, size: int) -> Tensor:
    """(size B, N) from a mapped or unmapped (B, N); cloned, since expanded tensors alias their memory."""
    full = t.unsqueeze(0).expand(size, *t.shape) if dim is None else t.movedim(dim, 0)
    return full.flatten(0, 1).clone()


def _axes(dims: tuple[int | None, ...]) -> tuple[int | None, ...]:
    return tuple(None if d is None else 0 for d in dims)


class _Search(torch.autograd.Function):
    """z*, its residual, result and evaluations; constants to every derivative."""

    @staticmethod
    def forward(pure: Pure, solver: AbstractSolver[Any], stop: Stop, z0: Tensor, *theta: Tensor) -> tuple[Tensor, ...]:
        with torch.no_grad():
            found = iterate(pure, z0, solver, stop, args=theta)
        return found.value, found.residual, found.result, found.evals

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
        pure, solver, stop, z0, *theta = args
        size, dims = info.batch_size, in_dims[4:]
        theta = tuple(_front(t, d) for t, d in zip(theta, dims, strict=True))
        pure = _fold(pure, size, _axes(dims))
        found = _Search.apply(pure, solver, stop, _flat(z0, in_dims[3], size), *theta)
        return tuple(t.unflatten(0, (size, -1)) for t in found), (0, 0, 0, 0)


class _Attach(torch.autograd.Function):
    """z* as a function of theta."""

    @staticmethod
    def forward(pure: Pure, config: LinearSolve, z: Tensor, *theta: Tensor) -> Tensor:
        return z.clone()

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        ctx.pure, ctx.config, _, *theta = inputs
        ctx.save_for_backward(output, *theta)
        ctx.save_for_forward(output, *theta)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> tuple[Any, ...]:
        z, *theta = ctx.saved_tensors
        u = _Linear.apply(_Adjoint(ctx.pure), ctx.config, grads[0], z, *theta)
        pull = torch.func.vjp(lambda *t: ctx.pure(z, *t), *theta)[1]
        return None, None, None, *pull(u)

    @staticmethod
    def jvp(ctx: Any, *tangents: Any) -> Tensor:
        z, *theta = ctx.saved_tensors
        moves = tuple(_tangent(t, d) for t, d in zip(theta, tangents[3:], strict=True))
        push = _push(lambda *t: ctx.pure(z, *t), tuple(theta), moves)
        return _Linear.apply(_Direct(ctx.pure), ctx.config, push, z, *theta)

    @staticmethod
    def vmap(info: Any, in_dims: tuple[Any, ...], *args: Any) -> tuple[Tensor, int]:
        pure, config, z, *theta = args
        size, dims = info.batch_size, in_dims[3:]
        theta = tuple(_front(t, d) for t, d in zip(theta, dims, strict=True))
        pure = _fold(pure, size, _axes(dims))
        value = _Attach.apply(pure, config, _flat(z, in_dims[2], size), *theta)
        return value.unflatten(0, (size, -1)), 0


@dataclass(frozen=True)
class _Direct:
    """v -> J v, J = dF/dz."""

    pure: Pure

    def __call__(self, v: Tensor, z: Tensor, *theta: Tensor) -> Tensor:
        return _push(lambda x: self.pure(x, *theta), (z,), (v,))

    def adjoint(self) -> "_Adjoint":
        return _Adjoint(self.pure)

    def fold(self, size: int, dims: tuple[int | None, ...]) -> "_Direct":
        return _Direct(_fold(self.pure, size, dims))


@dataclass(frozen=True)
class _Adjoint:
    """v -> J^T v."""

    pure: Pure

    def __call__(self, v: Tensor, z: Tensor, *theta: Tensor) -> Tensor:
        pull = torch.func.vjp(lambda x: self.pure(x, *theta), z)[1]
        return pull(v)[0]

    def adjoint(self) -> _Direct:
        return _Direct(self.pure)

    def fold(self, size: int, dims: tuple[int | None, ...]) -> "_Adjoint":
        return _Adjoint(_fold(self.pure, size, dims))


class _Linear(torch.autograd.Function):
    """u = b + A u, for A = J or J^T at (z, theta)."""

    @staticmethod
    def forward(act: Any, config: LinearSolve, b: Tensor, z: Tensor, *theta: Tensor) -> Tensor:
        return config(lambda u: act(u, z, *theta), b)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        ctx.act, ctx.config, _, z, *theta = inputs
        ctx.save_for_backward(output, z, *theta)
        ctx.save_for_forward(output, z, *theta)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> tuple[Any, ...]:
        u, *at = ctx.saved_tensors
        w = _Linear.apply(ctx.act.adjoint(), ctx.config, grads[0], *at)
        pull = torch.func.vjp(lambda *t: ctx.act(u, *t), *at)[1]
        return None, None, w, *pull(w)

    @staticmethod
    def jvp(ctx: Any, *tangents: Any) -> Tensor:
        u, *at = ctx.saved_tensors
        moves = tuple(_tangent(t, d) for t, d in zip(at, tangents[3:], strict=True))
        b = _push(lambda *t: ctx.act(u, *t), tuple(at), moves)
        return _Linear.apply(ctx.act, ctx.config, b if tangents[2] is None else b + tangents[2], *at)

    @staticmethod
    def vmap(info: Any, in_dims: tuple[Any, ...], *args: Any) -> tuple[Tensor, int]:
        act, config, b, z, *theta = args
        size, dims = info.batch_size, in_dims[4:]
        theta = tuple(_front(t, d) for t, d in zip(theta, dims, strict=True))
        b, z = _flat(b, in_dims[2], size), _flat(z, in_dims[3], size)
        u = _Linear.apply(act.fold(size, _axes(dims)), config, b, z, *theta)
        return u.unflatten(0, (size, -1)), 0


def _tangent(t: Tensor, move: Tensor | None) -> Tensor:
    return torch.zeros_like(t) if move is None else move


def _push(f: Callable[..., Tensor], at: tuple[Tensor, ...], moves: tuple[Tensor, ...]) -> Tensor:
    """df(at) moves: by forward mode or, where an operator of f has none, by two vector-Jacobian products."""
    if not at:
        return torch.zeros_like(f())
    try:
        return torch.func.jvp(f, at, moves)[1]
    except (NotImplementedError, RuntimeError) as error:
        if "forward" not in str(error).lower():
            raise
    out, pull = torch.func.vjp(f, *at)[:2]
    push = torch.func.vjp(pull, torch.zeros_like(out))[1]
    return push(moves)[0]
