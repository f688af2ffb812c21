"""Products v^T J with the Jacobian J = dy/dx of one evaluation y = f(x), taken from the graph of y.

`vjp` is the only function that calls `torch.autograd.grad` for such a product. Products J v are in `jvp.py`.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import GradientEdge, get_gradient_edge

from implicit.pytree import Flat


def edge(t: Tensor) -> GradientEdge | None:
    """The gradient edge of t in the graph, which does not keep t itself alive."""
    return get_gradient_edge(t) if t.requires_grad else None


def vjp(
    y: Tensor | GradientEdge | None,
    inputs: Sequence[Tensor | GradientEdge | None],
    v: Tensor,
    *,
    create_graph: bool = False,
) -> tuple[Tensor | None, ...]:
    """v^T dy/dinput for every input, None for an input that y does not depend on. The graph of y is kept."""
    wanted: list[Any] = [t for t in inputs if isinstance(t, GradientEdge) or (t is not None and t.requires_grad)]
    if y is None or (isinstance(y, Tensor) and not y.requires_grad) or not wanted:
        return (None,) * len(inputs)
    of: Any = y
    found = iter(torch.autograd.grad(of, wanted, v, retain_graph=True, create_graph=create_graph, allow_unused=True))
    kept = {id(t) for t in wanted}
    return tuple(next(found) if id(t) in kept else None for t in inputs)


def pullback(
    y: Tensor | GradientEdge | None, x: Tensor | GradientEdge | None, *, create_graph: bool = False
) -> Callable[[Flat], Flat]:
    """v -> v^T dy/dx, zero if y does not depend on x."""

    def act(v: Flat) -> Flat:
        (product,) = vjp(y, (x,), v, create_graph=create_graph)
        return torch.zeros_like(v) if product is None else product

    return act


def functional_vjp(
    f: Callable[..., Tensor], at: tuple[Tensor, ...], v: Tensor, wanted: Sequence[bool]
) -> tuple[Any, ...]:
    """v^T df(at) inside a transform, taken before `torch.func.grad` ends its level, as a solve within f requires.

    None for an argument that is not `wanted`, such as integers, or the statistics of BatchNorm.
    """
    numbers = tuple(i for i, needed in enumerate(wanted) if needed)
    if not numbers:
        return (None,) * len(at)
    found = dict(zip(numbers, torch.func.grad(lambda *t: (f(*t) * v).sum(), argnums=numbers)(*at), strict=True))
    return tuple(found.get(i) for i in range(len(at)))


def linearize(f: Callable[[Flat], Flat], z: Flat) -> tuple[Flat, Callable[[Flat], Flat]]:
    """(f(z), v -> v^T df/dz): one evaluation of f, then one product per call.

    The graph is built on a private copy of z, also under no_grad and in inference mode, and no gradient is accumulated.
    """
    with torch.inference_mode(False), torch.enable_grad():
        x = z.detach().clone().requires_grad_()
        y = f(x)
    product = pullback(y, x)
    return y.detach(), lambda v: product(v.to(y.dtype))
