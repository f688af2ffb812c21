"""The small systems of a multisecant method: which pairs enter, both mixtures, and the residuals that they promise.

With the pairs divided by ||dR_i||, G = dR^T dR has the cosines of their angles as entries, and T = dZ^T dR. The sine of
the angle between a pair and the span of the newer ones is a pivot of the Cholesky factor of G, newest first. For an r
of norm 1, with the products dZ^T r and dR^T r,

    type I     T y = dZ^T r
    type II    (G + mu) y = dR^T r
    promise    ||r - dR y||^2 = 1 + y^T (G y - 2 dR^T r)
"""

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from implicit.solvers.history_buffer import put

Systems = Float[Tensor, "B 2 K K"]
"""T and G."""


def pairs_in_use(
    gram: Float[Tensor, "B K K"], turn: int, tolerance: float, least: Float[Tensor, "B 1"]
) -> Bool[Tensor, "B K"]:
    """Which pairs have an angle to the span of the newer ones whose sine exceeds `least` (not below `tolerance`).

    Slot turn - 1 is the newest. A pair whose diagonal entry is 0 is not in use.
    """
    ordered = _newest_first(gram.detach(), turn, 1, 2)
    # a small ridge keeps the factorization going past a dependent column
    ordered.diagonal(dim1=1, dim2=2).add_(0.01 * tolerance**2)
    factor = torch.linalg.cholesky_ex(ordered)[0]
    return _newest_first(factor.diagonal(dim1=1, dim2=2), -turn, 1) > least


def mixtures(
    systems: Systems, products: Float[Tensor, "B 2 K"], used: Bool[Tensor, "B K"], mu: Float[Tensor, "B 1"]
) -> tuple[Float[Tensor, "B 2 K"], Float[Tensor, "B 2"]]:
    """(y of types I and II, 0 for pairs left out and in a singular system; the squared residuals that they promise)."""
    left_out = ~used
    none = left_out.unsqueeze(1)
    systems = systems.masked_fill((none | left_out.unsqueeze(2)).unsqueeze(1), 0)
    right = products.masked_fill(none, 0)
    # 1 on the diagonal for pairs left out
    diagonal = torch.stack((left_out.to(right.dtype), left_out + mu), dim=1)
    y = _solution(systems + torch.diag_embed(diagonal), right)
    with torch.no_grad():
        promised = 1 + (y * (torch.bmm(y, systems[:, 1]) - 2 * right[:, 1:])).sum(dim=2)
    return y, promised


def put_cross(systems: Systems, slot: int, row: Float[Tensor, "B 2 J"], column: Float[Tensor, "B 2 J"]) -> Systems:
    """`systems` with the first J entries of row `slot` and of column `slot` replaced."""
    matrix, row, column = systems.flatten(0, 1), row.flatten(0, 1), column.flatten(0, 1)
    missing = matrix.shape[1] - row.shape[1]
    if missing:
        row, column = (torch.nn.functional.pad(x, (0, missing)) for x in (row, column))
    return put(put(matrix, slot, row).mT, slot, column).mT.unflatten(0, (-1, 2))


def _solution(matrix: Systems, right: Float[Tensor, "B 2 K"]) -> Float[Tensor, "B 2 K"]:
    """The solutions; 0 with a derivative of 0 for a singular system, whose derivative would be NaN."""
    # rows are scaled to a largest entry of 1, since pivots are chosen by comparing rows
    rows = torch.linalg.vector_norm(matrix.detach(), torch.inf, dim=3).clamp_min(torch.finfo(matrix.dtype).tiny)
    matrix, right = matrix / rows.unsqueeze(3), right / rows
    if torch.is_grad_enabled() and (matrix.requires_grad or right.requires_grad):
        lost = _not_finite(torch.linalg.solve_ex(matrix.detach(), right.detach().unsqueeze(3))[0].squeeze(3))
        eye = torch.eye(matrix.shape[2], dtype=matrix.dtype, device=matrix.device)
        matrix, right = torch.where(lost.unsqueeze(3), eye, matrix), right.masked_fill(lost, 0)
    y = torch.linalg.solve_ex(matrix, right.unsqueeze(3))[0].squeeze(3)
    return y.masked_fill(_not_finite(y.detach()), 0)


def _not_finite(y: Float[Tensor, "B 2 K"]) -> Bool[Tensor, "B 2 1"]:
    return ~(torch.linalg.vector_norm(y, torch.inf, dim=2, keepdim=True) < torch.inf)


def _newest_first(x: Tensor, turn: int, *dims: int) -> Tensor:
    """`x` with the newest slot, turn - 1, first along `dims`, then by age; -turn gives the inverse permutation."""
    if not turn:
        return x.flip(dims)
    return x.roll([-turn] * len(dims), dims).flip(dims) if turn > 0 else x.flip(dims).roll([-turn] * len(dims), dims)
