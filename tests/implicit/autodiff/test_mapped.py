"""What vmap maps over a solve: states of one number, integers that a transform inside f takes."""

import pytest
import torch
from torch.func import grad, vmap

from implicit import IFT, JFB, Stop, fixed_point
from tests.helpers import F64

TIGHT = Stop(rtol=1e-13, max_evals=200)
EXACT = IFT(stop=TIGHT)
WEIGHT = 0.2 * torch.randn(3, 3, generator=torch.Generator().manual_seed(0), dtype=F64)


@pytest.mark.parametrize("estimator", [EXACT, JFB(60)])
def test_a_state_of_one_number_is_mapped(estimator):
    def root(a):
        z0 = torch.zeros((), dtype=F64)
        return fixed_point(lambda z: torch.cos(a * z), z0, batch_dims=0, stop=TIGHT, grad=estimator).value

    a = torch.tensor([0.2, 0.5, 0.8], dtype=F64)
    z = vmap(root)(a)
    torch.testing.assert_close(z, torch.cos(a * z), rtol=1e-9, atol=1e-10)
    slope = -z * torch.sin(a * z) / (1 + a * torch.sin(a * z))
    torch.testing.assert_close(vmap(grad(root))(a), slope, rtol=1e-8, atol=1e-9)


@pytest.mark.parametrize("estimator", [EXACT, JFB(60)])
def test_mapped_integers_in_args_reach_a_transform_inside_f(estimator):
    def step(z, w, orders):
        return vmap(lambda row, order: torch.tanh(w @ row[order] + 1))(z, orders)

    def slope(w, orders):
        def loss(w):
            z0 = torch.zeros(2, 3, dtype=F64)
            return fixed_point(step, z0, w, orders, stop=TIGHT, grad=estimator).value.pow(3).sum()

        return grad(loss)(w)

    orders = torch.tensor([[[0, 1, 2], [2, 1, 0]], [[1, 2, 0], [0, 2, 1]]])
    expected = torch.stack([slope(WEIGHT, order) for order in orders])
    torch.testing.assert_close(vmap(slope, (None, 0))(WEIGHT, orders), expected, rtol=1e-8, atol=1e-9)
