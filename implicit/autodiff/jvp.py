"""Products J v with the Jacobian of y = f(x): by forward mode, or as the transpose of v -> J^T v (`vjp.py`).

w -> J^T w is linear in w, so its vector-Jacobian product with v is J v. This route needs a second derivative of f
instead of a derivative in forward mode.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from implicit.autodiff.vjp import functional_vjp, pullback
from implicit.pytree import Flat


def forward_jvp(f: Callable[[Any], Flat], z: Any, tangent: Any) -> tuple[Flat, Flat]:
    """(f(z), J tangent) by forward mode, for a tensor z or a tuple of tensors.

    Attention runs its math kernel, the only kernel with forward-mode derivatives.

    Raises:
        RuntimeError: an operator of f has no forward mode.
    """
    with _math_attention():
        return torch.func.jvp(f, (z,), (tangent,))[:2]


def pushforward(y: Flat, x: Flat) -> Callable[[Flat], Flat]:
    """v -> (dy/dx) v from the graph of y, which must be twice differentiable; zero if y does not depend on x."""
    w = torch.zeros_like(y, requires_grad=True)
    return pullback(pullback(y, x, create_graph=True)(w), w)


def double_backward_jvp(f: Callable[[Flat], Flat], z: Flat, tangent: Flat) -> tuple[Flat, Flat]:
    """(f(z), J tangent) by two vector-Jacobian products."""
    with torch.enable_grad(), _math_attention():
        x = z.detach().requires_grad_()
        out = f(x)
        product = pushforward(out, x)(tangent)
    return out.detach(), product


def functional_jvp(f: Callable[..., Tensor], at: tuple[Tensor, ...], moves: tuple[Tensor | None, ...]) -> Tensor:
    """df(at) applied to the tangents `moves` inside a transform; a tangent of None is zero.

    The product is taken in forward mode or, if an operator of f lacks it, by two vector-Jacobian products.
    """
    numbers = (t.is_floating_point() or t.is_complex() for t in at)
    moved = {i: move for i, (move, able) in enumerate(zip(moves, numbers, strict=True)) if able and move is not None}
    if not moved:
        return torch.zeros_like(f(*at))

    def of_numbers(t: tuple[Tensor, ...]) -> Tensor:
        given = dict(zip(moved, t, strict=True))
        return f(*(given.get(i, constant) for i, constant in enumerate(at)))

    try:
        return forward_jvp(of_numbers, tuple(at[i] for i in moved), tuple(moved.values()))[1]
    except (NotImplementedError, RuntimeError):
        pass  # each operator without a forward mode raises an error of its own
    out = f(*at)

    def paired(w: Tensor) -> Any:
        found = functional_vjp(f, at, w, [i in moved for i in range(len(at))])
        return sum((found[i] * move).sum() for i, move in moved.items())

    return torch.func.grad(paired)(torch.zeros_like(out))


def _math_attention() -> Any:
    """Scaled dot-product attention by its math kernel alone, as a context."""
    from torch.nn.attention import SDPBackend, sdpa_kernel

    return sdpa_kernel(SDPBackend.MATH)
