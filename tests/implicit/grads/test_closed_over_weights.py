"""No gradient of a weight is lost, wherever the map holds the weight."""

import collections
import threading
import warnings
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.utils import parametrize

from implicit import (
    IFT,
    JFB,
    SHINE,
    AndersonGS,
    Broyden,
    Neumann,
    NewtonKrylov,
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


class Scaled(nn.Module):
    """A parametrization with an attribute."""

    scale: Any = 1.0

    def forward(self, w: Tensor) -> Tensor:
        return self.scale * w


def parametrized(scale: Scaled) -> nn.Linear:
    layer = nn.Linear(5, 5, bias=False, dtype=F64)
    parametrize.register_parametrization(layer, "weight", scale)
    return layer


def one_template(w: Tensor) -> Any:
    template, name = parametrized(Scaled()), "parametrizations.weight.original"

    def f(z: Tensor) -> Tensor:
        for own in (w, 0.5 * w.T):
            z = torch.tanh(functional_call(template, {name: own}, (z,)) + X)
        return z

    return f


def scale_of_state(w: Tensor) -> Any:
    scale = Scaled()
    layer = parametrized(scale)
    layer.requires_grad_(False)

    def f(z: Tensor) -> Tensor:
        scale.scale = torch.cos(0.3 * z.sum())
        return torch.tanh(0.5 * z @ w.T + 0.3 * layer(z) + X)

    return f


def modules_of_one_call(w: Tensor) -> Any:
    def f(z: Tensor) -> Tensor:
        for value in (0.9, 0.4):
            scale = Scaled()
            scale.scale = value
            layer = parametrized(scale)
            with torch.no_grad():
                layer.get_parameter("parametrizations.weight.original").copy_(torch.eye(5))
            z = torch.tanh(layer(z) @ w.T + X)
        return z

    return f


@named(IFT(stop=SOLVE), Reversible(anchor=8), Unrolled())
@pytest.mark.parametrize("kind", [one_template, scale_of_state, modules_of_one_call], ids=lambda kind: kind.__name__)
def test_a_parametrization_that_is_another_within_one_evaluation(grad, kind):
    torch.manual_seed(0)
    w = weight()
    f = kind(w)
    got = gradient(f, w, grad, solver=AndersonGS(), batch_dims=0)
    torch.testing.assert_close(got, unrolled(f, w), rtol=1e-7, atol=1e-9)


def test_an_error_in_a_parametrization_leaves_the_hooks_on_saved_tensors_on():
    scale = Scaled()
    layer = parametrized(scale)
    scale.scale = "no number"
    with torch.autograd.graph.save_on_cpu(), pytest.raises(TypeError):
        fixed_point(layer, ZERO)


@named(IFT(stop=SOLVE), Reversible(anchor=8), Unrolled(checkpoint=True))
def test_a_lazy_module_is_initialized_by_its_first_evaluation(grad):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        layer = nn.LazyLinear(5, dtype=F64)

    def f(z: Tensor) -> Tensor:
        return 0.6 * torch.tanh(layer(z) + X)

    torch.manual_seed(0)
    value = fixed_point(f, ZERO, grad=grad, stop=TIGHT, solver=AndersonGS()).value
    got = torch.autograd.grad(value.pow(2).sum(), layer.weight)[0]
    torch.testing.assert_close(got, unrolled(f, layer.weight), rtol=1e-7, atol=1e-9)


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


def test_a_compressed_sparse_weight_under_newton_krylov():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        w = (0.2 * torch.eye(5, dtype=F64)).to_sparse_csr().requires_grad_()

    def f(z: Tensor) -> Tensor:
        return torch.tanh((w @ z.T).T + X)

    value = fixed_point(f, ZERO, solver=NewtonKrylov(), stop=TIGHT).check().value
    (got,) = torch.autograd.grad(value.sum(), w)
    true = ((1 - value**2) / (1 - 0.2 * (1 - value**2)) * value).sum(0)
    torch.testing.assert_close(got.to_dense().diagonal(), true.detach(), rtol=1e-7, atol=1e-9)
