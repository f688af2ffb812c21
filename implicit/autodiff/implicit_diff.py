"""Putting a fixed point into the graph, differentiable to any order.

Setting: z* = phi(z*), where phi closes over tensors theta. y = phi(z*) is evaluated once with a graph. `_Identity`
returns z* itself, and its backward pass sends

    u = g + J^T u,     J = dphi/dz at z*

into y instead of g; from there autograd finds every theta by itself. No hook is set and nothing is stored on a module.

Second derivatives: u^T dphi/dtheta depends on z* too, and y's own graph, which was built at a detached z*, cannot say
so. When the gradient is to be differentiated, phi is evaluated again as an explicit function of z* and theta (found by
watching phi run), at the *attached* z*, and the products are taken there. u itself is a fixed point, of
psi(u) = g + J^T u, and is attached by the same function; so the recursion gives every order.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from implicit.autodiff.closure_convert import Outside, explicit, unseen
from implicit.autodiff.vjp import Cut, edge, pull
from implicit.linear.adjoint_solve import LinearSolve
from implicit.pytree import Flat


@torch.compiler.disable(recursive=True)  # dynamo cannot watch phi run
def attach(phi: Callable[[Flat], Flat], z: Flat, solve: LinearSolve) -> Flat:
    """z, a fixed point of phi, as a differentiable function of all that phi closes over."""
    with torch.enable_grad():
        seen = Outside()
        x = Cut.apply(z.detach().requires_grad_())
        with seen:
            y = phi(x)
        if not seen.tensors and not unseen(y, (x,)):
            return z.detach()
        again = explicit(phi, seen.tensors)
        return _Identity.apply(y, x, z.detach(), again, solve, *(t.view_as(t) for t in seen.tensors))


def _attach_explicit(phi: Callable[..., Flat], z: Flat, solve: LinearSolve, theta: tuple[Tensor, ...]) -> Flat:
    """The same for a phi(z, *theta) that closes over nothing."""
    x = Cut.apply(z.detach().requires_grad_())
    return _Identity.apply(phi(x, *theta), x, z.detach(), phi, solve, *theta)


_UNSEEN = (
    "Second derivatives through IFT need every tensor that f closes over, and one is used where it cannot be seen "
    "(in a compiled function or a custom autograd.Function): pass it to fixed_point through `args`."
)


class _Identity(torch.autograd.Function):
    """z, with the gradient of the fixed point of y = phi(x, *theta) at x = z."""

    @staticmethod
    def forward(
        ctx: Any,
        y: Tensor,
        x: Tensor,
        z: Tensor,
        phi: Callable[..., Flat],
        solve: LinearSolve,
        *theta: Tensor,
    ) -> Tensor:
        # z's memory under a version of its own: f's graph may have kept z, so that a write into the value has to be
        # noticed, which it is, as the value is saved
        value = z.data
        ctx.phi, ctx.solve = phi, solve
        ctx.y, ctx.x = edge(y), edge(x)  # not the tensors: what nobody else needs is freed
        ctx.save_for_backward(value, *theta)
        return value

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (g,) = grads
        value, *theta = ctx.saved_tensors
        u = ctx.solve(lambda v: pull(ctx.y, ctx.x, v), g)
        if not torch.is_grad_enabled():
            return (u, *[None] * (4 + len(theta)))

        # This gradient will be differentiated again: it becomes a function of g, z* and theta.
        def psi(v: Flat, g: Flat, value: Flat, *theta: Tensor) -> Flat:
            point = value.view_as(value)
            return g + pull(edge(ctx.phi(point, *theta)), edge(point), v, create_graph=True)

        u = _attach_explicit(psi, u, ctx.solve, (g, value, *theta))
        # Fresh views: derivatives with respect to them are partial, even if one tensor depends on another.
        point, *stands = (t.view_as(t) for t in (value, *theta))
        again = ctx.phi(point, *stands)
        if unseen(again, (point, *stands)):
            raise RuntimeError(_UNSEEN)
        wanted = [t for t in stands if t.requires_grad]
        pulled = iter(_grad(again, wanted, u))
        return (None, None, None, None, None, *(next(pulled) if t.requires_grad else None for t in stands))


def _grad(y: Tensor, inputs: list[Tensor], v: Flat) -> tuple[Tensor | None, ...]:
    if not inputs or not y.requires_grad:
        return (None,) * len(inputs)
    return torch.autograd.grad(y, inputs, v, create_graph=True, allow_unused=True)
