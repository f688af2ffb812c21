"""No gradient of a weight is lost, wherever the map holds the weight."""

import collections
import threading
from typing import Any

import pytest
import torch
from torch import Tensor

from implicit import (
    IFT,
    JFB,
    SHINE,
    AndersonGS,
    Broyden,
    Neumann,
    Phantom,
    Reversible,
    Unrolled,
    fixed_point,
)
from tests.implicit.grads.tanh_layer import F64, SOLVE, TIGHT, ZERO, X, named, weight

EXACT = (
    IFT(stop=SOLVE),
    JFB(80),
    Phantom(160),
    Neumann(80),
    SHINE(refine=80),
    Reversible(anchor=8),
    Unrolled(),
    Unrolled(checkpoint=True),
)
exact = named(*EXACT)


def gradient(f: Any, w: Tensor, grad: Any, **options: Any) -> Tensor:
    value = fixed_point(f, ZERO, grad=grad, stop=TIGHT, **options).value
    return torch.autograd.grad(value.pow(2).sum(), w)[0]


def unrolled(f: Any, w: Tensor, steps: int = 120) -> Tensor:
    z = ZERO
    for _ in range(steps):
        z = f(z)
    return torch.autograd.grad(z.pow(2).sum(), w)[0]


class Product(torch.autograd.Function):
    """z W^T with a view inside, which no torch function mode sees."""

    @staticmethod
    def forward(ctx: Any, z: Tensor, w: Tensor) -> Tensor:
        ctx.save_for_backward(z, w)
        return z @ w.T

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor]:
        z, w = ctx.saved_tensors
        return grads[0] @ w, grads[0].T @ z


class ListOf(list):
    """A subclass of list."""


Pair = collections.namedtuple("Pair", "a b")


def maps(w: Tensor) -> dict[str, Any]:
    """Maps that use w where it is hard to find."""
    pair, several = Pair(w, 2 * w), ListOf([w, 2 * w])

    def under_no_grad(z: Tensor) -> Tensor:
        with torch.no_grad():
            scale = 1 / (1 + w.T.norm())
        return torch.tanh(scale * z @ w.T + X)

    return {
        "custom function": lambda z: torch.tanh(Product.apply(z, w) + X),
        "custom function and openly": lambda z: torch.tanh(0.5 * Product.apply(z, w) + 0.5 * z @ w.T + X),
        "namedtuple": lambda z: torch.tanh(z @ (torch.stack(pair).mean(0) / 1.5).T + X),
        "list subclass": lambda z: torch.tanh(z @ (torch.stack(several).mean(0) / 1.5).T + X),
        "view under no_grad": under_no_grad,
    }


@exact
@pytest.mark.parametrize("kind", list(maps(weight())))
def test_no_gradient_is_lost(grad, kind):
    w = weight()
    solver = Broyden() if isinstance(grad, SHINE) else AndersonGS()
    torch.testing.assert_close(
        gradient(maps(w)[kind], w, grad, solver=solver), unrolled(maps(w)[kind], w), rtol=1e-7, atol=1e-9
    )


@named(IFT(stop=SOLVE), Reversible(anchor=8), JFB(80))
def test_a_weight_that_was_computed_in_another_thread(grad):
    w = weight()
    h = w
    for _ in range(50):  # sequence numbers of autograd are counted per thread
        h = h + 0.0

    def f(z):
        return torch.tanh(0.5 * z @ h.T + 0.5 * z @ w.T + X)

    found: list[Tensor] = []
    thread = threading.Thread(target=lambda: found.append(gradient(f, w, grad)))
    thread.start()
    thread.join()
    torch.testing.assert_close(found[0], unrolled(f, w), rtol=1e-7, atol=1e-9)


def test_second_derivatives_through_a_namedtuple():
    def twice(value, w):
        (first,) = torch.autograd.grad(value.pow(2).sum(), w, create_graph=True)
        return torch.autograd.grad(first.sum(), w)[0]

    w = weight()
    f, z = maps(w)["namedtuple"], ZERO
    for _ in range(120):
        z = f(z)
    value = fixed_point(maps(w)["namedtuple"], ZERO, grad=EXACT[0], stop=TIGHT).value
    torch.testing.assert_close(twice(value, w), twice(z, w), rtol=1e-7, atol=1e-9)


@named(IFT(), JFB(5), Phantom(), Neumann(), SHINE(), Reversible(), Unrolled())
@pytest.mark.parametrize("in_args", [True, False])
def test_a_sparse_weight(grad, in_args):
    w = (0.2 * torch.eye(5, dtype=F64)).to_sparse().requires_grad_()

    def f(z, w=w):
        return torch.tanh(torch.sparse.mm(w, z.T).T + X)

    solver = Broyden() if isinstance(grad, SHINE) else AndersonGS()
    args = (w,) if in_args else ()
    (got,) = torch.autograd.grad(fixed_point(f, ZERO, *args, grad=grad, solver=solver).value.sum(), w)
    dense = w.detach().to_dense().requires_grad_()
    z = ZERO
    for _ in range(60):
        z = torch.tanh((dense @ z.T).T + X)
    (true,) = torch.autograd.grad(z.sum(), dense)
    near = 1e-3 if isinstance(grad, IFT | Reversible | Unrolled) else 0.8
    assert (got.to_dense() - true).diagonal().norm() < near * true.diagonal().norm()
