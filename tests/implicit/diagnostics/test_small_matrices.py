"""Spectral radius and Jacobian penalty of small matrices against their closed forms."""

import math

import pytest
import torch

from implicit.diagnostics import jacobian_penalty, spectral_radius

F64 = torch.float64


def rotation(degrees):
    a = math.radians(degrees)
    return 0.9 * torch.tensor([[math.cos(a), -math.sin(a)], [math.sin(a), math.cos(a)]], dtype=F64)


@pytest.mark.parametrize(
    ("matrix", "radius", "quotient"),
    [
        (rotation(90), 0.9, 0.0),
        (rotation(60), 0.9, 0.45),
        (torch.diag(torch.tensor([0.9, -0.9], dtype=F64)), 0.9, None),
        (torch.zeros(2, 2, dtype=F64), 0.0, None),
    ],
    ids=["a quarter turn", "complex pair", "two signs", "nothing"],
)
def test_the_spectral_radius_is_no_rayleigh_quotient(matrix, radius, quotient):
    """v^T J v / v^T v of a power iteration is none of these, or depends on where it starts, or is 0 / 0."""
    v = torch.linalg.matrix_power(matrix, 50) @ torch.tensor([0.6, 0.8], dtype=F64)
    if quotient is not None:
        assert float(v @ matrix @ v / (v @ v)) == pytest.approx(quotient, abs=1e-12)
    z = torch.ones(2, 2, dtype=F64)
    for seed in range(3):
        rng = torch.Generator().manual_seed(seed)
        found = spectral_radius(lambda z: z @ matrix.T, z, generator=rng)
        assert found.tolist() == pytest.approx([radius] * 2, abs=1e-12) and not found.requires_grad
    assert not z.requires_grad


def test_the_jacobian_penalty_of_every_sample_and_of_a_map_that_ignores_z():
    """A number a sample, that a weight of any kind multiplies on any device; 0 and no NaN where J is 0."""
    scale = torch.tensor([[0.5], [2.0], [0.0]], dtype=F64, requires_grad=True)
    z = torch.ones(3, 4, dtype=F64)
    penalty = jacobian_penalty(lambda z: scale * z, z, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(penalty.detach(), scale.detach().square()[:, 0])
    (gradient,) = torch.autograd.grad((0.1 * penalty).sum(), scale)
    torch.testing.assert_close(gradient, 0.2 * scale.detach())
    assert not z.requires_grad and z.grad is None
