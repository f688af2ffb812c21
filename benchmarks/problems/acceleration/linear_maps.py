"""Affine maps z -> M z + b of classical iterations in linear algebra.

The answer of each is (I - M)^-1 b by a dense factorization.
"""

import math

import torch
from torch import Tensor

from benchmarks.problems.problem import F64, Problem, like, normal, uniform


def linear_maps() -> list[Problem]:
    """Seven affine maps, most of them of several samples."""
    return [
        _complex_pairs(),
        _non_normal(),
        _convection_diffusion(),
        _ridge(),
        _heavy_ball(),
        _page_rank(),
        _power_network(),
    ]


def affine(name: str, matrix: Tensor, shift: Tensor, source: str) -> Problem:
    """z -> z M^T + b for the rows b of `shift`."""

    def f(z: Tensor, b: Tensor) -> Tensor:
        return z @ like(matrix, z).T + b

    def answer() -> Tensor:
        return torch.linalg.solve(torch.eye(len(matrix), dtype=F64) - matrix, shift.T).T

    return Problem(name, f, torch.zeros_like(shift), source, (shift,), answer=answer)


def _complex_pairs(n: int = 40) -> Problem:
    """Rotations shrunk to moduli in [0.9, 0.99]: complex pairs all around the unit circle."""
    angle = torch.linspace(0.1, math.pi - 0.1, n // 2, dtype=F64)
    modulus = torch.linspace(0.9, 0.99, n // 2, dtype=F64)
    cos, sin = modulus * torch.cos(angle), modulus * torch.sin(angle)
    blocks = torch.stack((torch.stack((cos, -sin), dim=1), torch.stack((sin, cos), dim=1)), dim=1)
    q = torch.linalg.qr(normal(1, n, n))[0]
    return affine(
        "Complex pairs", q @ torch.block_diag(*blocks) @ q.T, normal(2, 3, n), "rotations, moduli 0.9 to 0.99"
    )


def _non_normal(n: int = 40) -> Problem:
    """0.55 I + 0.5 shift: the spectral radius is 0.55, but the powers grow before they decay."""
    matrix = 0.55 * torch.eye(n, dtype=F64) + 0.5 * torch.diag(torch.ones(n - 1, dtype=F64), 1)
    return affine("Strongly non-normal", matrix, normal(3, 3, n), "Jordan block 0.55 I + 0.5 shift")


def _convection_diffusion(side: int = 14, wind: float = 30.0) -> Problem:
    """Jacobi's sweep for -Laplace u + wind du/dx = b, central differences."""
    one = torch.eye(side, dtype=F64)
    right = torch.diag(torch.ones(side - 1, dtype=F64), 1)
    h = 1 / (side + 1)
    x = 2 * one - (1 - wind * h / 2) * right - (1 + wind * h / 2) * right.T
    y = 2 * one - right - right.T
    matrix = torch.kron(y, one) + torch.kron(one, x)
    source = "Jacobi's sweep, central differences, cell Peclet number 2"
    return affine(
        "Convection-diffusion", torch.eye(side**2, dtype=F64) - matrix / 4, normal(4, 2, side**2) * h**2, source
    )


def _spread(condition: float, n: int, seed: int) -> Tensor:
    """A symmetric matrix with eigenvalues from 1 / condition to 1, evenly spread in their logarithm."""
    q = torch.linalg.qr(normal(seed, n, n))[0]
    return q @ torch.diag(torch.logspace(-math.log10(condition), 0, n, dtype=F64)) @ q.T


def _ridge(n: int = 30) -> Problem:
    """Gradient descent with step 1.9 / L on a quadratic of condition 1e4 (ridge regression)."""
    hessian = _spread(1e4, n, 5)
    return affine(
        "Ridge by gradient descent", torch.eye(n, dtype=F64) - 1.9 * hessian, normal(6, 3, n) @ hessian, "step 1.9 / L"
    )


def _heavy_ball(n: int = 30) -> Problem:
    """Polyak's heavy ball on a quadratic of condition 1000; state (x_k, x_{k-1})."""
    hessian = _spread(1e3, n, 7)
    root = math.sqrt(1e3)
    step, momentum = (2 / (1 + 1 / root)) ** 2, ((root - 1) / (root + 1)) ** 2
    eye = torch.eye(n, dtype=F64)
    top = torch.cat(((1 + momentum) * eye - step * hessian, -momentum * eye), dim=1)
    matrix = torch.cat((top, torch.cat((eye, 0 * eye), dim=1)))
    b = step * normal(8, 3, n) @ hessian
    return affine("Heavy ball", matrix, torch.cat((b, 0 * b), dim=1), "B. Polyak, 1964, with its optimal parameters")


def _page_rank(n: int = 150) -> Problem:
    """PageRank with damping 0.85, 0.95 and 0.99 on one random directed graph: three samples."""
    links = (uniform(9, n, n) < 0.03).to(F64) + torch.diag(torch.ones(n - 1, dtype=F64), 1)
    links[-1, 0] = 1
    chain = links / links.sum(1, keepdim=True)
    damping = torch.tensor([[0.85], [0.95], [0.99]], dtype=F64)

    def f(z: Tensor, d: Tensor) -> Tensor:
        return d * (z @ like(chain, z)) + (1 - d) / n

    def answer() -> Tensor:
        eye = torch.eye(n, dtype=F64)
        return torch.stack(
            [torch.linalg.solve(eye - d * chain.T, (1 - d) / n * torch.ones(n, dtype=F64)) for d in damping[:, 0]]
        )

    z0 = torch.full((3, n), 1 / n, dtype=F64)
    return Problem("PageRank", f, z0, "L. Page et al., 1999, random graph", (damping,), answer=answer)


def _power_network(n: int = 60) -> Problem:
    """Richardson's iteration on a ring network with conductances from 0.01 to 1; smooth modes converge slowly."""
    g = torch.logspace(-2, 0, n, dtype=F64)
    inner = torch.diag(g + g.roll(-1)) - torch.diag(g[1:], 1) - torch.diag(g[1:], -1)
    inner[0, -1] = inner[-1, 0] = -g[0]
    matrix = inner + 0.01 * torch.eye(n, dtype=F64)
    step = 2 / float(torch.linalg.eigvalsh(matrix)[-1])
    return affine(
        "Network by Richardson",
        torch.eye(n, dtype=F64) - 0.95 * step * matrix,
        step * normal(10, 2, n),
        "ring of resistors",
    )
