"""A fixed point as a differentiable function of what its map closes over, outside of `torch.func`.

Setting: z* = phi(z*), where phi closes over tensors theta, and J = dphi/dz at z*. y = phi(z*) is evaluated once with a
graph. An autograd function returns z* itself, and its backward pass sends a vector u into y, from where autograd finds
every theta by itself:

    `attach`                 u = g + J^T u, the implicit function theorem; differentiable to any order
    `attach_approximately`   u = rule(v -> J^T v, g), an estimate of it

No hook is set and nothing is stored on a module.

Second derivatives: u^T dphi/dtheta depends on z* too, and the graph of y, which was built at a detached z*, does not
contain that. When the gradient is to be differentiated, phi is evaluated again as an explicit function of z* and theta
(by closure conversion) at the attached z*, and the products are taken there. u itself is the fixed point of
psi(u) = g + J^T u and is attached by the same function, which gives every order.

A map that is evaluated again has to be the map that was solved: f may read an attribute or a loop variable that has
changed since. Its residual at z* is compared with that of the forward pass, and a difference raises.
"""

import warnings
from collections.abc import Callable, Iterable
from typing import Any, TypeAlias

import torch
from torch import Tensor
from torch.autograd.graph import get_gradient_edge

from implicit.autodiff.batched import each_cotangent
from implicit.autodiff.closure_convert import ClosureTracer, closure_convert, has_untraced_leaf, own_view, tensors
from implicit.autodiff.vjp import Barrier, edge, pullback, vjp
from implicit.linear.adjoint_solve import LinearSolve
from implicit.options import Problem
from implicit.pytree import Flat, PerSample, State, norm
from implicit.recomputation import CHANGED
from implicit.torch_internals import not_compiled

Product: TypeAlias = Callable[[Flat], Flat]
"""v -> J^T v."""
Rule: TypeAlias = Callable[[Product, Flat], Flat]
"""(v -> J^T v, g) -> u, an estimate of (I - J^T)^-1 g."""

_NEAR = 8  # nodes between a learned start and its parameter
_ROUNDING = 1e3  # differences of that many rounding errors are those of another order of operations


@not_compiled  # dynamo does not trace the modes of closure conversion
def attach(phi: Callable[[Flat], Flat], z: Flat, solve: LinearSolve) -> tuple[Flat, Flat]:
    """(z, phi(z)): z, a fixed point of phi, as a differentiable function of all that phi closes over."""
    with torch.enable_grad():
        x = Barrier.apply(z.detach().requires_grad_())
        tracer = ClosureTracer((x,))
        with tracer:
            y = phi(x)
        image, theta = y.detach(), tracer.tensors
        if not theta and not has_untraced_leaf(y, (x,)):
            return z.detach(), image
        explicit = _uncompiled(closure_convert(phi, theta))
        views = map(own_view, theta)
        return _FixedPoint.apply(y, x, z.detach(), explicit, solve, _hooked(), _residual(image, z), *views), image


def attach_approximately(phi: Callable[[Flat], Flat], z: Flat, rule: Rule, eps: float) -> tuple[Flat, Flat]:
    """(z, phi(z)): z, a fixed point of phi, whose gradient reaches all that phi closes over by way of `rule`."""
    with torch.enable_grad():
        x = Barrier.apply(z.detach().requires_grad_())
        y = phi(x)
    image = y.detach()
    if not y.requires_grad or not has_untraced_leaf(y, (x,)):
        return z.detach(), image
    return _Approximate.apply(y, x, z.detach(), phi if _hooked() else None, rule, eps, _residual(image, z)), image


class _FixedPoint(torch.autograd.Function):
    """z, with the gradient of the fixed point of y = phi(x, *theta) at x = z."""

    @staticmethod
    def forward(
        ctx: Any,
        y: Tensor,
        x: Tensor,
        z: Tensor,
        phi: Callable[..., Flat],
        solve: LinearSolve,
        hooked: bool,
        residual: PerSample,
        *theta: Tensor,
    ) -> Tensor:
        # The memory of z with a version counter of its own: the graph of f may have saved z, and a write into the
        # value has to be noticed. It is, since the value is saved.
        value = z.data
        ctx.phi, ctx.solve, ctx.hooked = phi, solve, hooked
        ctx.y, ctx.x = edge(y), edge(x)  # not the tensors: memory that nothing else needs is freed
        ctx.save_for_backward(value, residual, *theta)
        return value

    @staticmethod
    @each_cotangent
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (g,) = grads
        value, residual, *theta = ctx.saved_tensors
        # u = g + J^T u, with products out of the graph of y
        product = pullback(ctx.y, ctx.x)
        if ctx.hooked:
            # theta keeps requires_grad: a checkpoint inside f counts the tensors that its two evaluations save
            product = _evaluated_again(lambda x: ctx.phi(x, *theta), value, residual, ctx.solve.eps)
        u = ctx.solve(product, g)
        if not torch.is_grad_enabled():
            return (u, *[None] * (6 + len(theta)))

        # The gradient will be differentiated: it becomes a function of g, z* and theta.
        def psi(v: Flat, g: Flat, value: Flat, *theta: Tensor) -> Flat:
            point = value.view_as(value)
            return g + pullback(edge(ctx.phi(point, *theta)), edge(point), create_graph=True)(v)

        u = _attach_explicit(psi, u, ctx.solve, (g, value, *theta))
        # u^T dphi/dtheta at views of z* and theta: partial derivatives, even where one tensor depends on another
        point, *stands = map(own_view, (value, *theta))
        again = ctx.phi(point, *stands)
        require_same_map(again, value, residual, ctx.solve.eps)
        if has_untraced_leaf(again, (point, *stands)):
            raise RuntimeError(_UNTRACED)
        return (*[None] * 7, *vjp(again, stands, u, create_graph=True))


def _attach_explicit(phi: Callable[..., Flat], z: Flat, solve: LinearSolve, theta: tuple[Tensor, ...]) -> Flat:
    """The fixed point z of phi(z, *theta), which closes over nothing, as a differentiable function of theta."""
    x = Barrier.apply(z.detach().requires_grad_())
    y = phi(x, *theta)
    return _FixedPoint.apply(y, x, z.detach(), phi, solve, False, _residual(y.detach(), z), *theta)


class _Approximate(torch.autograd.Function):
    """z, with a gradient that reaches y = phi(x) through `rule`."""

    @staticmethod
    def forward(
        ctx: Any,
        y: Tensor,
        x: Tensor,
        z: Tensor,
        phi: Callable[[Flat], Flat] | None,
        rule: Rule,
        eps: float,
        residual: PerSample,
    ) -> Tensor:
        ctx.rule, ctx.y, ctx.x, ctx.phi, ctx.eps = rule, edge(y), edge(x), phi, eps
        if phi is not None:
            ctx.save_for_backward(z, residual)
        return z.clone()

    @staticmethod
    @each_cotangent
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        recorded = torch.is_grad_enabled()
        product = pullback(ctx.y, ctx.x, create_graph=recorded)
        if ctx.phi is not None and not recorded:
            z, residual = ctx.saved_tensors
            product = _evaluated_again(ctx.phi, z, residual, ctx.eps)
        return (ctx.rule(product, grads[0]), *[None] * 6)


def warn_learned_start(problem: Problem, value: State) -> None:
    """Warn where the starting state is made from a parameter that `value` gives no gradient.

    The graph of the starting state is searched to a small depth: a start that is learned is near its parameter.
    """
    learned = _parameters(tensors(problem.z0), most=_NEAR)
    if learned and not learned <= _parameters(tensors(value)):
        warnings.warn(
            "The starting state z0 is a parameter, or made from one, and this estimator gives it no gradient: the "
            "solution does not depend on where the solve begins. Pass z0.detach() if that is meant; Unrolled and "
            "Reversible differentiate the iterations, the start included.",
            RuntimeWarning,
            stacklevel=4,
        )


def _parameters(roots: Iterable[Tensor], most: int | None = None) -> set[int]:
    """The identities of the parameters in the graph of some tensors, from at most so many nodes."""
    found: set[int] = set()
    todo: list[Any] = []
    for t in roots:
        if t.requires_grad:
            todo.append(get_gradient_edge(t).node)
    done: set[Any] = set()
    while todo and (most is None or len(done) < most):
        node = todo.pop()
        if node is None or node in done:
            continue
        done.add(node)
        if isinstance(getattr(node, "variable", None), torch.nn.Parameter):
            found.add(id(node.variable))
        todo += [following for following, _ in node.next_functions]
    return found


def _hooked() -> bool:
    """Whether saved tensors are packed by hooks: checkpointing, offloading.

    Each product would unpack them anew, which under `torch.utils.checkpoint` evaluates everything within it again.
    """
    return torch._C._autograd._top_saved_tensors_default_hooks(True) is not None  # pyright: ignore[reportAttributeAccessIssue]: no stub


def _evaluated_again(phi: Callable[[Flat], Flat], z: Flat, residual: PerSample, eps: float) -> Product:
    """v -> J^T v from a second evaluation of phi at z, whose graph is packed by no hook."""
    with torch.enable_grad():
        x = z.detach().requires_grad_()
        y = _uncompiled(phi)(x)
    require_same_map(y, z, residual, eps)
    return pullback(y, x)


def _residual(image: Flat, z: Flat) -> PerSample:
    with torch.no_grad():
        return norm(image - z)


def require_same_map(again: Flat, z: Flat, residual: PerSample, eps: float) -> None:
    """Compare phi(z) of a second evaluation, whose relative rounding error is eps, with the residual of the first.

    Raises:
        RuntimeError: phi is another map than it was.
    """
    with torch.no_grad():
        again = again.detach()
        off = (_residual(again, z) - residual).abs()
        rounding = max(eps, torch.finfo(again.dtype).eps) * (norm(again) + norm(z))
        if bool((off > _ROUNDING * rounding).any()):
            raise RuntimeError(CHANGED)


def _uncompiled(phi: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """phi without torch.compile inside: a compiled block would be compiled anew for every substitution mode."""
    uncompiled: Any = not_compiled(phi)
    return uncompiled


_UNTRACED = (
    "Second derivatives through IFT need every tensor that f closes over, and one is used where it is not visible (in "
    "another thread, or in a custom operator): pass it to fixed_point through `args`."
)
