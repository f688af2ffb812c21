"""Putting a fixed point into the graph with an approximate inverse in the backward pass.

Setting: z* = phi(z*), J = dphi/dz at z*. y = phi(z*) is evaluated once with a graph; `_Approximate` returns z* itself
and sends u = rule(v -> J^T v, g) into y. Differentiated again, the estimate is that of its formula at a fixed z*.
"""

from collections.abc import Callable
from typing import Any, TypeAlias

import torch
from torch import Tensor

from implicit.autodiff.closure_convert import unseen
from implicit.autodiff.functorch import active
from implicit.autodiff.vjp import Cut, edge, pull
from implicit.pytree import Flat

Rule: TypeAlias = Callable[[Callable[[Flat], Flat], Flat], Flat]
"""(v -> J^T v, g) -> u, an estimate of (I - J^T)^-1 g."""


def refuse_transforms(estimator: object) -> None:
    """Say that an estimator does not work inside torch.func.

    Raises:
        NotImplementedError: a transform is on.
    """
    if active():
        name = type(estimator).__name__
        raise NotImplementedError(
            f"{name} works with ordinary backward passes, not inside torch.func transforms or forward mode: use IFT, "
            "JFB or Phantom there."
        )


def attach_approximately(phi: Callable[[Flat], Flat], z: Flat, rule: Rule) -> Flat:
    """z, a fixed point of phi, whose gradient reaches all that phi closes over by way of `rule`."""
    x = Cut.apply(z.detach().requires_grad_())
    y = phi(x)
    return _Approximate.apply(y, x, z.detach(), rule) if y.requires_grad and unseen(y, (x,)) else z.detach()


class _Approximate(torch.autograd.Function):
    """z, with a gradient that reaches y = phi(x) through `rule`."""

    @staticmethod
    def forward(ctx: Any, y: Tensor, x: Tensor, z: Tensor, rule: Rule) -> Tensor:
        ctx.rule, ctx.y, ctx.x = rule, edge(y), edge(x)  # not the tensors: what nobody else needs is freed
        return z.clone()

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        again = torch.is_grad_enabled()
        return ctx.rule(lambda v: pull(ctx.y, ctx.x, v, create_graph=again), grads[0]), None, None, None
