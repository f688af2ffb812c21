"""Products with the Jacobian of f at a point, without ever forming it.

Setting: J = df/dz at z, (N, N) for every sample, where f and z are seen as (B, N) matrices of real numbers.
"""

from collections.abc import Callable
from typing import Any

import torch

from implicit.evaluation import FlatMap
from implicit.pytree import Flat, Layout, Map, State


def pullback(f: Map, z: State, args: tuple[Any, ...], batch_dims: int) -> tuple[Layout, Flat, Callable[[Flat], Flat]]:
    """(layout, f(z), v -> J^T v): one evaluation of f, then one vector-Jacobian product a call.

    The graph is built on a private copy of z, whatever mode the caller is in, and no gradient is accumulated anywhere.
    """
    layout = Layout.of(z, batch_dims)
    with torch.inference_mode(False), torch.enable_grad():
        x = layout.pack(z).detach().clone().requires_grad_()
        y = FlatMap(f, args, layout)(x)

    def act(v: Flat) -> Flat:
        if not y.requires_grad:
            return torch.zeros_like(v)
        (pulled,) = torch.autograd.grad(y, x, v.to(y.dtype), retain_graph=True, allow_unused=True)
        return torch.zeros_like(v) if pulled is None else pulled

    return layout, y.detach(), act
