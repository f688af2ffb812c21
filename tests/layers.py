"""Equilibrium layers of a known spectral radius, and the dense truth about their gradients."""

import copy
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

F64 = torch.float64


class Tanh(nn.Module):
    """f(z, x) = tanh(W z + x + b); W = gain * (a fixed random matrix)."""

    def __init__(self, size: int, gain: float, seed: int = 0) -> None:
        super().__init__()
        rng = torch.Generator().manual_seed(seed)
        self.weight = nn.Parameter(torch.randn(size, size, generator=rng, dtype=F64) * gain / size**0.5)
        self.bias = nn.Parameter(0.1 * torch.randn(size, generator=rng, dtype=F64))
        self.x = 0.3 * torch.randn(3, size, generator=rng, dtype=F64)

    def forward(self, z: Tensor, x: Tensor) -> Tensor:
        return torch.tanh(F.linear(z, self.weight, self.bias) + x)


class AdaLN(nn.Module):
    """A transformer block under adaptive layer norm: f(z, x) = x + gate (attention(norm z) + mlp(norm z))."""

    def __init__(self, tokens: int, size: int, gate: float, heads: int = 2, seed: int = 0) -> None:
        super().__init__()
        rng = torch.Generator().manual_seed(seed)

        def draw(*shape: int) -> nn.Parameter:
            return nn.Parameter(torch.randn(*shape, generator=rng, dtype=F64) / shape[-1] ** 0.5)

        self.heads, self.gate = heads, gate
        self.qkv, self.out = draw(3 * size, size), draw(size, size)
        self.up, self.down = draw(4 * size, size), draw(size, 4 * size)
        self.modulation = nn.Parameter(0.2 * torch.randn(4, size, generator=rng, dtype=F64))
        self.x = torch.randn(3, tokens, size, generator=rng, dtype=F64)

    def forward(self, z: Tensor, x: Tensor) -> Tensor:
        shift1, scale1, shift2, scale2 = self.modulation
        h = F.layer_norm(z, z.shape[-1:]) * (1 + scale1) + shift1
        q, k, v = F.linear(h, self.qkv).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        z = x + self.gate * F.linear(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2), self.out)
        h = F.layer_norm(z, z.shape[-1:]) * (1 + scale2) + shift2
        return z + self.gate * F.linear(F.gelu(F.linear(h, self.up)), self.down)


def layer(name: str, dtype: torch.dtype = F64) -> tuple[Any, Tensor]:
    """A layer and its input x, fresh: "easy" (rho 0.32), "adaln" (0.55), "hard" (0.94)."""
    made = {
        "easy": lambda: Tanh(16, GAINS["easy"]),
        "adaln": lambda: AdaLN(4, 8, GAINS["adaln"]),
        "hard": lambda: Tanh(16, GAINS["hard"]),
    }[name]()
    return made.to(dtype), made.x.to(dtype)


GAINS = {"easy": 0.3341, "adaln": 0.8909, "hard": 0.9704}
RADII = {"easy": 0.32, "adaln": 0.55, "hard": 0.94}


def dense_solution(f: nn.Module, x: Tensor) -> Tensor:
    """The fixed point, by 300 plain iterations and Newton's method on the dense Jacobian, in float64."""
    f, x = copy.deepcopy(f).to(F64), x.to(F64)
    with torch.no_grad():
        z = torch.zeros_like(x)
        for _ in range(300):
            z = f(z, x)
        for _ in range(3):
            j = jacobian(f, z, x)
            r = (f(z, x) - z).flatten(1).unsqueeze(2)
            z = z + torch.linalg.solve(torch.eye(j.shape[-1], dtype=F64) - j, r).view_as(z)
    return z


def jacobian(f: nn.Module, z: Tensor, x: Tensor) -> Tensor:
    """df/dz per sample, (B, N, N)."""
    rows = [
        torch.autograd.functional.jacobian(lambda s, b=b: f(s.view_as(z[:1]), x[b : b + 1]).flatten(), z[b].flatten())
        for b in range(len(z))
    ]
    return torch.stack(rows)


def dense_gradient(f: nn.Module, x: Tensor, g: Tensor) -> Tensor:
    """Gradient of <g, z*> with respect to all parameters and x, by a dense linear solve; one long vector."""
    f, x, g = copy.deepcopy(f).to(F64), x.to(F64).detach().requires_grad_(), g.to(F64)
    z = dense_solution(f, x.detach())
    j = jacobian(f, z, x.detach())
    u = torch.linalg.solve(torch.eye(j.shape[-1], dtype=F64) - j.mT, g.flatten(1).unsqueeze(2))
    wanted = [p for p in f.parameters() if p.requires_grad]
    return flat(torch.autograd.grad(f(z, x), (*wanted, x), u.view_as(z)))


def cotangent(x, seed=1):
    """A random cotangent of x."""
    return torch.randn(x.shape, generator=torch.Generator().manual_seed(seed), dtype=F64).to(x.dtype)


def flat(tensors) -> Tensor:
    """Gradients as one float64 vector."""
    return torch.cat([t.flatten().to(F64) for t in tensors])


def off(a: Tensor, b: Tensor) -> float:
    """Relative distance of a from b."""
    return float((a - b).norm() / b.norm())
