"""Time of forward and backward of every estimator on an adaLN block, at the same forward solve (`pytest benchmarks`).

`extra_info` holds the relative error of the parameter gradient against a tight IFT in float64.
"""

import pytest
import torch
from torch import nn

from implicit import (
    IFT,
    JFB,
    SHINE,
    Anderson,
    Broyden,
    Neumann,
    Phantom,
    Picard,
    Reversible,
    StochasticJFB,
    Stop,
    Unrolled,
    fixed_point,
)

STOP = Stop(rtol=1e-5, atol=0, max_evals=60)
CASES = {
    "forward only": (None, Anderson()),
    "IFT": (IFT(), Anderson()),
    "JFB": (JFB(), Anderson()),
    "S-JFB": (StochasticJFB(generator=torch.Generator().manual_seed(0)), Picard()),
    "Phantom": (Phantom(), Anderson()),
    "Neumann": (Neumann(), Anderson()),
    "SHINE": (SHINE(), Broyden()),
    "Reversible": (Reversible(on_drift="ignore"), Picard()),
    "Unrolled": (Unrolled(), Anderson()),
}


class Block(nn.Module):
    """h = z + attention(norm z); z' = 0.5 tanh(h + mlp(norm h)) + x."""

    def __init__(self, width=64):
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.up, self.down = nn.Linear(width, 2 * width), nn.Linear(2 * width, width)
        with torch.no_grad():
            for p in self.parameters():
                p.copy_(0.4 * torch.randn(p.shape, generator=generator) / p.shape[-1] ** 0.5)

    def forward(self, z, x):
        q, k, v = self.qkv(nn.functional.layer_norm(z, z.shape[-1:], eps=1.0)).chunk(3, dim=-1)
        h = z + self.out(nn.functional.scaled_dot_product_attention(q, k, v))
        h = h + self.down(nn.functional.gelu(self.up(nn.functional.layer_norm(h, h.shape[-1:], eps=1.0))))
        return 0.5 * torch.tanh(h) + x


def gradient(block, x, grad, solver, stop):
    if grad is None:
        with torch.no_grad():
            return fixed_point(block, torch.zeros_like(x), x, solver=solver, stop=stop).value
    value = fixed_point(block, torch.zeros_like(x), x, solver=solver, grad=grad, stop=stop).value
    return torch.cat([g.flatten() for g in torch.autograd.grad(value.square().mean(), list(block.parameters()))])


@pytest.mark.parametrize("name", CASES)
def test_estimator(name, benchmark):
    block, x = Block(), torch.randn(8, 32, 64, generator=torch.Generator().manual_seed(1))
    grad, solver = CASES[name]
    result = benchmark(gradient, block, x, grad, solver, STOP)
    assert result.isfinite().all()
    if grad is None:
        return
    tight = Stop(rtol=1e-12, atol=0, max_evals=300)
    truth = gradient(block.double(), x.double(), IFT(), Anderson(), tight)
    error = float((result - truth).norm() / truth.norm())
    benchmark.extra_info["relative error"] = error
    if name == "IFT":
        assert error < 1e-4
