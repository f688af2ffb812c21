"""Elliptic equations on the unit square by the five-point stencil, and the sweeps of classical relaxation.

Bratu: Laplace u + 6 e^u = 0, u = 0 on the boundary, as u + D^-1 (6 e^u - A u) with A the discrete -Laplace and D its
diagonal. Electric field: -Laplace u = s for two line charges of opposite sign, by Jacobi's, Gauss-Seidel's or the SOR
sweep. States are ``(B, side^2)``.
"""

from collections.abc import Callable

import numpy as np
import torch
from scipy import sparse
from scipy.sparse import linalg
from torch import Tensor
from torch.nn.functional import pad

from benchmarks.problems.problem import F64, like

Made = tuple[Callable[[Tensor], Tensor], Tensor, Callable[[], Tensor]]


def neighbors(u: Tensor) -> Tensor:
    """Sum of the four neighbors on a ``(B, m, n)`` grid, 0 outside."""
    around = pad(u, (1, 1, 1, 1))
    return around[:, 2:, 1:-1] + around[:, :-2, 1:-1] + around[:, 1:-1, 2:] + around[:, 1:-1, :-2]


def laplacian(side: int) -> sparse.csc_matrix:
    """The matrix 4 u - neighbors of a square grid with zeros outside."""
    second = 2 * sparse.identity(side) - sparse.eye(side, k=1) - sparse.eye(side, k=-1)
    eye = sparse.identity(side)
    return sparse.csc_matrix(sparse.kron(second, eye) + sparse.kron(eye, second))


def bratu(side: int, parameter: float = 6.0) -> Made:
    """The diagonally preconditioned Bratu map on side x side inner points."""
    h2 = 1 / (side + 1) ** 2

    def f(u: Tensor) -> Tensor:
        grid = u.unflatten(1, (side, side))
        return (neighbors(grid) / 4 + h2 / 4 * parameter * grid.exp()).flatten(1)

    def answer() -> Tensor:
        # Newton's method with a sparse factorization
        a, u = laplacian(side) / h2, np.zeros(side * side)
        for _ in range(20):
            push = parameter * np.exp(u)
            u += linalg.spsolve(sparse.csc_matrix(a - sparse.diags(push)), push - a @ u)
        return torch.from_numpy(u).unsqueeze(0)

    return f, torch.zeros(1, side * side, dtype=F64), answer


def charges(side: int) -> Tensor:
    """The source: two lines of charges in the columns at 1/4 and 3/4, from 1/4 to 3/4 of the height."""
    s = torch.zeros(side, side, dtype=F64)
    low, high = int(0.25 * side), int(0.75 * side)
    strength = 2 * (side - 1) ** 2 / side
    s[low - 1, low - 1 : high] += strength
    s[high - 1, low - 1 : high] -= strength
    return s


def electric_field(side: int, relaxation: float | None) -> Made:
    """One sweep for -Laplace u = s on a side x side grid, boundary included; relaxation None: Jacobi's sweep."""
    source = charges(side)
    push = source[1:-1, 1:-1] / (side - 1) ** 2

    def jacobi(u: Tensor) -> Tensor:
        grid = u.unflatten(1, (side, side))
        inner = grid[:, 2:, 1:-1] + grid[:, :-2, 1:-1] + grid[:, 1:-1, 2:] + grid[:, 1:-1, :-2]
        return pad((inner + like(push, u)) / 4, (1, 1, 1, 1)).flatten(1)

    def answer() -> Tensor:
        inner = linalg.spsolve(laplacian(side - 2), push.numpy().ravel())
        return pad(torch.from_numpy(inner).reshape(1, side - 2, side - 2), (1, 1, 1, 1)).flatten(1)

    f = jacobi if relaxation is None else _sweep(side, push, relaxation)
    return f, source.reshape(1, -1).clone(), answer


def _sweep(side: int, push: Tensor, w: float) -> Callable[[Tensor], Tensor]:
    """u_ij <- (1 - w) u_ij + w/4 (new left, new above, old right, old below, h^2 s), rows one after the other.

    With q = w/4 the new values solve x_ij = q (x_{i-1,j} + x_{i,j-1}) + d_ij, d made of old ones: x is the convolution
    of d with h_ij = binom(i + j, i) q^(i + j), done by the fast Fourier transform.
    """
    n, q = side - 2, w / 4
    h = np.zeros((n, n))
    h[0] = q ** np.arange(n)
    for i in range(1, n):
        h[i, 0] = q * h[i - 1, 0]
        for j in range(1, n):
            h[i, j] = q * (h[i - 1, j] + h[i, j - 1])
    spectrum = torch.fft.rfft2(torch.from_numpy(h), s=(2 * n, 2 * n))

    def f(u: Tensor) -> Tensor:
        grid, kernel = u.unflatten(1, (side, side)), spectrum.to(u.dtype.to_complex())
        d = (1 - w) * grid[:, 1:-1, 1:-1] + q * (grid[:, 2:, 1:-1] + grid[:, 1:-1, 2:] + like(push, u))
        # the boundary's values above the first row and left of the first column
        edge = pad(grid[:, :1, 1:-1], (0, 0, 0, n - 1)) + pad(grid[:, 1:-1, :1], (0, n - 1))
        new = torch.fft.irfft2(torch.fft.rfft2(d + q * edge, s=(2 * n, 2 * n)) * kernel, s=(2 * n, 2 * n))[:, :n, :n]
        middle = torch.cat((grid[:, 1:-1, :1], new, grid[:, 1:-1, -1:]), dim=2)
        return torch.cat((grid[:, :1], middle, grid[:, -1:]), dim=1).flatten(1)

    return f
