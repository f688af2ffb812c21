"""The small systems of a multisecant method: which pairs enter, both mixtures, and the residuals that they promise.

G = dR^T dR and T = dZ^T dR, pairs newest first. The sine of the angle between a pair and the span of the newer ones is
the pivot of that pair in the Cholesky factor of G, divided by ||dR_i||. With the products dZ^T r and dR^T r,

    type I     T y = dZ^T r
    type II    (G + mu diag G) y = dR^T r
    promise    ||r - dR y||^2 = ||r||^2 + y^T (G y - 2 dR^T r)
"""

from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from implicit.pytree import to_host
from implicit.solvers.base import on_host, quiet

Systems = Float[Tensor, "B K 2 1+K"]
"""Products of dZ_i and dR_i with r and with dR_j, newest first."""
Pairs = Float[Tensor, "B 2 K K"]
"""T and G."""


def all_independent(gram: Float[Tensor, "B K K"], tolerance: float) -> bool:
    """Whether the host finds that every pair has a sine above `tolerance`, by more than rounding."""
    gram = gram.detach()
    pivots = to_host(torch.linalg.cholesky_ex(gram)[0].diagonal(dim1=1, dim2=2))
    return bool((pivots**2 > (1.001 * tolerance) ** 2 * to_host(gram.diagonal(dim1=1, dim2=2))).all())


def dependent(
    gram: Float[Tensor, "B K K"], dropped: Bool[Tensor, "B K"], tolerance: float, least: Float[Tensor, "B 1"] | float
) -> Bool[Tensor, "B K"]:
    """Which pairs are dropped, or have an angle to the span of the newer ones with a sine of at most `least`."""
    gram = gram.detach().masked_fill(dropped.unsqueeze(1) | dropped.unsqueeze(2), 0)
    diagonal = gram.diagonal(dim1=1, dim2=2)
    # a small ridge keeps the factorization going past a dependent column
    ridge = (0.01 * tolerance**2 * diagonal).masked_fill(dropped, 1)
    pivots = torch.linalg.cholesky_ex(gram + torch.diag_embed(ridge))[0].diagonal(dim1=1, dim2=2)
    return dropped | ~(pivots > least * diagonal.sqrt())


def leave_out(systems: Systems, out: Bool[Tensor, "B K"]) -> Systems:
    """The systems in which the pairs in `out` have coefficient 0."""
    columns = torch.nn.functional.pad(out, (1, 0))
    return systems.masked_fill((out.unsqueeze(2) | columns.unsqueeze(1)).unsqueeze(2), 0)


def split(systems: Systems) -> tuple[Float[Tensor, "B 2 K"], Pairs]:
    """The right-hand sides dZ^T r and dR^T r, and the matrices T and G.

    Both are views in which rows do not lie one after another: `torch.linalg.solve_ex` factors the transpose of a
    contiguous matrix, so one layout for all cases keeps the bits of the solution.
    """
    systems = systems.transpose(1, 2)
    return systems[..., 0], systems[..., 1:]


def with_diagonal(pairs: Pairs, out: Bool[Tensor, "B K"] | None, mu: Float[Tensor, "B 1"] | None) -> Pairs:
    """The matrices to solve with: 1 on the diagonal for the pairs in `out`, and the ridge mu in that of type II."""
    if out is None and mu is None:
        return pairs
    squares = pairs[:, 1].diagonal(dim1=1, dim2=2)
    none = torch.zeros_like(squares)
    ridge = torch.stack((none, none if mu is None else mu * squares), dim=1)
    if out is not None:
        ridge = ridge.masked_fill(out.unsqueeze(1), 1)
    return pairs + torch.diag_embed(ridge)


def promised(pairs: Pairs, right: Float[Tensor, "B 2 K"], y: Float[Tensor, "B 2 K"], square: Any) -> Any:
    """||r - dR y||^2 for both mixtures y, (B, 2), as `on_host` gives it; `square` is ||r||^2, likewise."""
    with torch.no_grad():
        y, inner = on_host(y, torch.baddbmm(right[:, 1:], y, pairs[:, 1], beta=-2))
    with quiet(y):
        return square + (y * inner).sum(2)


def solution(matrix: Pairs, right: Float[Tensor, "B 2 K"]) -> Float[Tensor, "B 2 K"]:
    """The solutions; not finite for a singular system, or 0 where autograd would give its derivative as NaN."""
    if torch.is_grad_enabled() and (matrix.requires_grad or right.requires_grad):
        lost = not_finite(_solve(matrix.detach(), right.detach()))
        eye = torch.eye(matrix.shape[2], dtype=matrix.dtype, device=matrix.device)
        matrix, right = torch.where(lost.unsqueeze(3), eye, matrix), right.masked_fill(lost, 0)
    return _solve(matrix, right)


def _solve(matrix: Pairs, right: Float[Tensor, "B 2 K"]) -> Float[Tensor, "B 2 K"]:
    """y of matrix y = right, as y^T matrix^T = right^T, whose factorization compares columns to choose its pivots."""
    return torch.linalg.solve_ex(matrix.mT, right.unsqueeze(2), left=False)[0].squeeze(2)


def not_finite(y: Float[Tensor, "B 2 K"]) -> Bool[Tensor, "B 2 1"]:
    """Which solutions are not finite."""
    return ~(torch.linalg.vector_norm(y.detach(), torch.inf, dim=2, keepdim=True) < torch.inf)
