"""Products with one evaluation of f, out of its graph."""

from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import GradientEdge, get_gradient_edge

from implicit.pytree import Flat


class Cut(torch.autograd.Function):
    """Identity that stops the engine: products with J are taken on demand, not accumulated in a leaf."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> None:
        return None


def edge(t: Tensor) -> GradientEdge | None:
    """Where t stands in the graph."""
    return get_gradient_edge(t) if t.requires_grad else None


def pull(y: GradientEdge | None, x: GradientEdge | None, v: Flat, create_graph: bool = False) -> Flat:
    """v^T dy/dx."""
    if y is None or x is None:
        return torch.zeros_like(v)
    (pulled,) = torch.autograd.grad(y, x, v, retain_graph=True, create_graph=create_graph, allow_unused=True)
    return torch.zeros_like(v) if pulled is None else pulled
