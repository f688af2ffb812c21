"""IFT to any order: gradcheck, third derivatives, and a loss on forces."""

import pytest
import torch
from torch.autograd import gradcheck, gradgradcheck
from torch.nn.attention import SDPBackend, sdpa_kernel

from implicit import IFT, Stop, fixed_point
from tests.layers import F64, cotangent, flat, layer, off

TIGHT = Stop(rtol=1e-13, atol=0, max_evals=400)


def small():
    """f closes over w and takes x; sizes for finite differences."""
    w = (0.3 * cotangent(torch.zeros(2, 2, dtype=F64), 2)).requires_grad_()
    x = cotangent(torch.zeros(2, 2, dtype=F64), 3).requires_grad_()
    return w, x


EXACT = IFT(stop=Stop(rtol=1e-13, atol=0, max_evals=100), on_failure="ignore")


def by_closure(w, x):
    return fixed_point(lambda z: torch.tanh(z @ w) + x, torch.zeros_like(x), grad=EXACT, stop=TIGHT).value


def by_args(w, x):
    return fixed_point(lambda z, w, x: torch.tanh(z @ w) + x, torch.zeros_like(x), w, x, grad=EXACT, stop=TIGHT).value


@pytest.mark.parametrize("solve", [by_closure, by_args])
@pytest.mark.parametrize("check", [gradcheck, gradgradcheck])
def test_finite_differences(check, solve):
    assert check(solve, small())


@pytest.mark.parametrize("solve", [by_closure, by_args])
def test_third_derivatives_against_unrolling(solve):
    def third(run):
        w, x = small()
        d = total = run(w, x).sin().sum()
        for _ in range(3):
            (d,) = torch.autograd.grad(total, w, create_graph=True)
            total = d.sin().sum()
        return d.detach()

    def unrolled(w, x):
        z = torch.zeros_like(x)
        for _ in range(80):
            z = torch.tanh(z @ w) + x
        return z

    assert off(third(solve), third(unrolled)) < 1e-8


def test_an_energy_model_trained_on_forces():
    """E(x) = sum z*(x)^2; force = -dE/dx; its loss is differentiated with respect to the parameters."""

    def loss_gradient(solve):
        f, x = layer("adaln")
        x.requires_grad_()
        energy = solve(f, x).square().sum()
        (slope,) = torch.autograd.grad(energy, x, create_graph=True)
        loss = (-slope - cotangent(x)).square().mean()
        return flat(torch.autograd.grad(loss, tuple(f.parameters())))

    def unrolled(f, x):
        z = torch.zeros_like(x)
        for _ in range(120):
            z = f(z, x)
        return z

    def by_args(f, x):
        return fixed_point(f, torch.zeros_like(x), x, stop=TIGHT, grad=EXACT).value

    def closed_over(f, x):
        return fixed_point(lambda z: f(z, x), torch.zeros_like(x), stop=TIGHT, grad=EXACT).value

    with sdpa_kernel(SDPBackend.MATH):  # the only one that torch can differentiate twice
        got, closed, true = map(loss_gradient, (by_args, closed_over, unrolled))
    assert off(got, true) < 1e-8 and off(closed, true) < 1e-8


def test_a_jacobian_of_rounding_errors_alone_is_that_of_an_unchanged_map():
    """Groups of two numbers are normalized to -1 and 1: J is a difference of numbers that cancel."""
    w, x = small()

    def f(z):
        return 0.3 * torch.tanh(torch.nn.functional.group_norm(z @ w + x, 1)) + x * w.sum()

    def second(solve):
        first = torch.autograd.grad(solve().pow(3).sum(), (w, x), create_graph=True)
        return torch.autograd.grad(sum(t.sin().sum() for t in first), (w, x))

    z = torch.zeros_like(x)
    found = second(lambda: fixed_point(f, z, stop=TIGHT, grad=EXACT).value)
    expected = second(lambda: f(f(f(z))))  # exact after a step, as f(z) does not depend on the sizes in z
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-6)
