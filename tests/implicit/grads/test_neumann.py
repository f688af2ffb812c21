"""Neumann: the series with a dense Jacobian, the equal gradient of JFB, and the rate of convergence."""

from itertools import pairwise

import pytest
import torch

from implicit import JFB, Neumann, Stop, fixed_point
from tests.layers import dense_gradient, dense_solution, flat, jacobian, layer, off

TIGHT = Stop(rtol=1e-13, atol=0, max_evals=300)


def gradient(f, x, g, grad):
    x = x.detach().requires_grad_()
    z = fixed_point(f, torch.zeros_like(x), x, grad=grad, stop=TIGHT).value
    return flat(torch.autograd.grad((z * g).sum(), (*f.parameters(), x)))


@pytest.mark.parametrize("name", ["easy", "adaln", "hard"])
@pytest.mark.parametrize("terms", [1, 4])
def test_against_the_dense_series_and_against_jfb(name, terms):
    f, x = layer(name)
    g = torch.randn(x.shape, generator=torch.Generator().manual_seed(2), dtype=x.dtype)
    z = dense_solution(f, x)
    j = jacobian(f, z, x)
    series = sum(torch.linalg.matrix_power(j.mT, i) for i in range(terms)) @ g.flatten(1).unsqueeze(2)
    y = x.detach().requires_grad_()
    true = flat(torch.autograd.grad(f(z, y), (*f.parameters(), y), series.view_as(z)))
    got = gradient(f, x, g, Neumann(terms))
    assert off(got, true) < 1e-9
    assert off(got, gradient(f, x, g, JFB(terms))) < 1e-9


def test_the_error_falls_by_the_spectral_radius_per_term():
    f, x = layer("easy")
    g = torch.ones_like(x)
    true = dense_gradient(f, x, g)
    errors = [off(gradient(f, x, g, Neumann(k)), true) for k in (4, 8, 12)]
    for a, b in pairwise(errors):
        assert 0.32**4 / 4 < b / a < 0.32**4 * 4


def test_second_derivatives_are_those_of_the_formula_at_a_fixed_point():
    f, x = layer("easy")
    x.requires_grad_()
    z = fixed_point(f, torch.zeros_like(x), x, grad=Neumann(2), stop=TIGHT).value
    (slope,) = torch.autograd.grad(z.sum(), x, create_graph=True)
    (got,) = torch.autograd.grad(slope.square().sum(), f.weight)
    point = z.detach().requires_grad_()
    y, g = f(point, x), torch.ones_like(x)
    (pulled,) = torch.autograd.grad(y, point, g, create_graph=True)
    (slope,) = torch.autograd.grad(y, x, g + pulled, create_graph=True)
    (true,) = torch.autograd.grad(slope.square().sum(), f.weight)
    torch.testing.assert_close(got, true)


def test_no_terms_are_refused():
    with pytest.raises(ValueError, match=r"Neumann\.terms"):
        Neumann(0)
