"""Phantom: damped steps written by hand, its closed form, and its two limits."""

import pytest
import torch

from implicit import JFB, Phantom, Stop, fixed_point
from tests.layers import F64, dense_gradient, flat, layer, off

TIGHT = Stop(rtol=1e-12, atol=0, max_evals=200)


def gradient(f, x, g, grad):
    x = x.detach().requires_grad_()
    z = fixed_point(f, torch.zeros_like(x), x, grad=grad, stop=TIGHT).value
    return flat(torch.autograd.grad((z * g).sum(), (*f.parameters(), x)))


def test_by_hand():
    f, x = layer("adaln")
    x.requires_grad_()
    value = fixed_point(f, torch.zeros_like(x), x, grad=Phantom(3, 0.3), stop=TIGHT).value
    with torch.no_grad():
        z = fixed_point(f, torch.zeros_like(x), x, stop=TIGHT).value
    assert torch.equal(value, z)  # the value is that of the solve, the gradient that of the steps
    for _ in range(3):
        z = 0.3 * z + 0.7 * f(z, x)
    g = torch.linspace(-1, 2, x.numel(), dtype=x.dtype).view_as(x)
    got, true = (flat(torch.autograd.grad((g * v).sum(), (*f.parameters(), x))) for v in (value, z))
    assert off(got, true) < 1e-13


def test_closed_form():
    """A linear map z' = A z + x: the gradient of x is (1 - d) sum_i ((1 - d) A^T + d I)^i g."""
    a = torch.tensor([[0.1, 0.7], [-0.7, 0.2]], dtype=F64)
    x, g = torch.tensor([[1.0, 2.0]], dtype=F64, requires_grad=True), torch.tensor([[1.0, -1.0]], dtype=F64)
    z = fixed_point(lambda z, x: z @ a.T + x, torch.zeros_like(x), x, grad=Phantom(4, 0.5), stop=TIGHT).value
    (got,) = torch.autograd.grad(z, x, g)
    step = 0.5 * a.T + 0.5 * torch.eye(2, dtype=F64)
    true = 0.5 * torch.stack([torch.linalg.matrix_power(step, i) for i in range(4)]).sum(0) @ g[0]
    torch.testing.assert_close(got[0], true)


def test_limits():
    f, x = layer("easy")
    g = torch.ones_like(x)
    assert torch.equal(gradient(f, x, g, Phantom(3, 0.0)), gradient(f, x, g, JFB(3)))
    assert off(gradient(f, x, g, Phantom(80, 0.5)), dense_gradient(f, x, g)) < 1e-9


@pytest.mark.parametrize(("steps", "damping", "field"), [(0, 0.5, "steps"), (1, 1.0, "damping"), (1, -0.1, "damping")])
def test_impossible_configurations(steps, damping, field):
    with pytest.raises(ValueError, match=rf"Phantom\.{field}"):
        Phantom(steps, damping)
