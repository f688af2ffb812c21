"""Anderson acceleration (type II): the mixture of recent points whose residual is smallest.

Setting: r_k = f(z_k) - z_k. With the differences of the last m points as columns,

    dR = [r_{k-m+2} - r_{k-m+1}, ..., r_k - r_{k-1}],     dF likewise of f(z),

    gamma = argmin || r_k - dR gamma ||^2 + ridge sum_i (||dR_i|| gamma_i)^2
    z_{k+1} = (f(z_k) - dF gamma) - damping (r_k - dR gamma)

(Anderson 1965; Walker and Ni, SIAM J. Numer. Anal. 49(4), 2011.)
"""

from dataclasses import dataclass, replace

import numpy as np
import torch
from jaxtyping import Bool, Float
from torch import Tensor

from implicit.solvers.base import AbstractSolver, Evaluator, Point
from implicit.solvers.history import dots, on_host, put, put_difference
from implicit.state import Flat

# squared columns below this are none, for their products have underflowed; their diagonal is 1 and their weight 0
_NONE = {torch.float64: 1e-290, torch.float32: torch.finfo(torch.float32).tiny}


@dataclass(frozen=True)
class AndersonMemory:
    """The last point, rings of K = memory - 1 differences, the Gram matrix of dR with the ridge, 1 for <0, 0>."""

    fz: Flat
    r: Flat
    df: Float[Tensor, "B K N"]
    dr: Float[Tensor, "B K N"]
    gram: Float[Tensor, "B K K"]
    steps: int = 0
    columns: int = 0
    fresh: bool = True  # the last point is not apart from the next: no difference yet


@dataclass(frozen=True)
class Anderson(AbstractSolver[AndersonMemory]):
    """Anderson acceleration, type II, of `memory` points per sample.

    The least-squares problem is solved in float64 through its Gram matrix, of which every step renews one row. The
    ridge is relative to the differences, so the unit of z changes nothing. Memory: 2 memory states.

    Args:
        memory: number of points mixed, >= 1; 1 is the Picard iteration.
        damping: share of the mixed old iterate kept, in [0, 1).
        ridge: relative ridge, > 0; None takes 1e-14 for float64 histories and 1e-7 for float32.
        start: number of plain steps before the first mixture, >= 1. Differences are collected from the beginning.
        safeguard: go back to the best point after a blow-up, and to plain steps where nothing is gained.
    """

    memory: int = 5
    damping: float = 0.0
    ridge: float | None = None
    start: int = 1
    safeguard: bool = True

    def __post_init__(self) -> None:
        for name in ("memory", "start"):
            if getattr(self, name) < 1:
                raise ValueError(f"Anderson.{name} must be at least 1, got {getattr(self, name)}.")
        if not 0 <= self.damping < 1:
            raise ValueError(f"Anderson.damping must lie in [0, 1), got {self.damping}.")
        if self.ridge is not None and not self.ridge > 0:
            raise ValueError(f"Anderson.ridge must be positive, got {self.ridge}.")

    def init(self, point: Point) -> AndersonMemory:
        rows, numbers = point.z.shape
        k = self.memory - 1
        df, dr = point.z.new_zeros(rows, k, numbers), point.z.new_zeros(rows, k, numbers)
        gram = _none(torch.empty(rows, k, k, dtype=torch.float64, device=point.z.device))
        return AndersonMemory(point.fz, point.r, df, dr, gram)

    def resume(self, point: Point, memory: AndersonMemory) -> AndersonMemory:
        if memory.dr.shape[1] + 1 != self.memory:
            raise ValueError(f"state must come from a solver with memory={self.memory}, got {memory.dr.shape[1] + 1}.")
        return replace(memory, fz=point.fz, r=point.r, fresh=True)

    @property
    def patience(self) -> int:
        return min(2 * self.memory + 5, 30) if self.safeguard and self.memory > 1 else 0

    def restart(self, point: Point, memory: AndersonMemory, mask: Bool[Tensor, "B 1"]) -> AndersonMemory:
        lost = mask.unsqueeze(2)
        return replace(
            memory,
            fz=torch.where(mask, point.fz, memory.fz),
            r=torch.where(mask, point.r, memory.r),
            df=memory.df.masked_fill(lost, 0),
            dr=memory.dr.masked_fill(lost, 0),
            gram=torch.where(lost, _none(memory.gram), memory.gram),
        )

    def step(self, f: Evaluator, point: Point, memory: AndersonMemory) -> tuple[Flat, AndersonMemory]:
        steps, k, r = memory.steps + 1, self.memory - 1, point.r
        df, dr, gram, columns = memory.df, memory.dr, memory.gram, memory.columns
        if k and not memory.fresh:
            slot = columns % k
            df = put_difference(df, slot, point.fz, memory.fz)
            dr = put_difference(dr, slot, r, memory.r)
            gram, columns = self._renew(gram, slot, dots(dr, dr[:, slot])), columns + 1
        now = AndersonMemory(point.fz, r, df, dr, gram, steps, columns, False)
        if steps < self.start or not columns:
            return self._damp(point.fz, r), now
        gamma = _weights(gram, dots(dr, r))
        z = torch.baddbmm(point.fz.unsqueeze(1), gamma, df, alpha=-1).squeeze(1)
        if not self.damping:
            return z, now
        return self._damp(z, torch.baddbmm(r.unsqueeze(1), gamma, dr, alpha=-1).squeeze(1)), now

    def _renew(self, gram: Float[Tensor, "B K K"], slot: int, row: Float[Tensor, "B 1 K"]) -> Float[Tensor, "B K K"]:
        """The Gram matrix with a new row and column."""
        ridge = self.ridge or (1e-14 if row.dtype == torch.float64 else 1e-7)
        if on_host(gram, row):
            matrix = gram.numpy()  # the same memory
            matrix[:, slot] = matrix[:, :, slot] = row.numpy()[:, 0]
            size = matrix[:, slot, slot]
            size[size < _NONE[row.dtype]] = 1
            size *= 1 + ridge
            return gram
        size = row[:, 0, slot].double()
        size = size.masked_fill(size < _NONE[row.dtype], 1) * (1 + ridge)
        row = put(row.double().mT, slot, size.unsqueeze(1)).squeeze(2)
        return put(put(gram, slot, row).mT, slot, row).mT

    def _damp(self, z: Flat, r: Flat) -> Flat:
        return z - self.damping * r if self.damping else z

    def transposed(self, memory: AndersonMemory, g: Flat) -> Flat:
        """H^T g, with H r = r - dF gamma(r)."""
        if not memory.columns:
            return g
        gamma = _weights(memory.gram, dots(memory.df, g))
        return torch.baddbmm(g.unsqueeze(1), gamma, memory.dr, alpha=-1).squeeze(1)


def _none(like: Float[Tensor, "B K K"]) -> Float[Tensor, "B K K"]:
    """The Gram matrix of columns of zeros."""
    return torch.eye(like.shape[1], dtype=like.dtype, device=like.device).repeat(like.shape[0], 1, 1)


def _weights(gram: Float[Tensor, "B K K"], rhs: Float[Tensor, "B 1 K"]) -> Float[Tensor, "B 1 K"]:
    """The solution of the small systems in float64, by numpy where that is near: for one sample half the cost.

    Rows are taken in one unit, for pivots are chosen between rows.
    """
    if on_host(gram, rhs):
        matrix, numbers = gram.numpy(), rhs.numpy()
        try:
            with np.errstate(all="ignore"):
                rows = matrix.diagonal(0, 1, 2)[:, :, None] ** -0.5
                gamma = np.linalg.solve(matrix * rows, numbers[:, 0, :, None] * rows)
                return torch.from_numpy(gamma[:, None, :, 0].astype(numbers.dtype))
        except np.linalg.LinAlgError:  # a sample's matrix is singular, which torch leaves to that sample
            pass
    rows = gram.diagonal(dim1=1, dim2=2).rsqrt().unsqueeze(2)
    return torch.linalg.solve_ex(gram * rows, rhs.double().mT * rows)[0].mT.to(rhs.dtype)
