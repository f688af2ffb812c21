"""Anderson acceleration (type II): the mixture of recent points whose residual is smallest.

Setting: r_k = f(z_k) - z_k. With the differences of the last m points as columns,

    dR = [r_{k-m+2} - r_{k-m+1}, ..., r_k - r_{k-1}],     dF likewise of f(z),

    gamma = argmin || r_k - dR gamma ||^2 + ridge sum_i (||dR_i|| gamma_i)^2
    z_{k+1} = (f(z_k) - dF gamma) - damping (r_k - dR gamma)

(Anderson 1965; Walker and Ni, SIAM J. Numer. Anal. 49(4), 2011.)
"""

from dataclasses import dataclass, replace

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from implicit.solvers.base import AbstractSolver, Evaluator, Point
from implicit.solvers.history import put
from implicit.state import Flat

_EMPTY = 1e-250  # added to the diagonal of the Gram matrix, so that columns of zeros get the weight 0


@dataclass(frozen=True)
class AndersonMemory:
    """The last point, rings of K = memory - 1 differences, and the Gram matrix of dR with the ridge on its diagonal."""

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
        gram = torch.zeros(rows, k, k, dtype=torch.float64, device=point.z.device)
        gram.diagonal(dim1=1, dim2=2).fill_(_EMPTY)
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
        blank = torch.eye(self.memory - 1, dtype=torch.float64, device=mask.device) * _EMPTY
        return replace(
            memory,
            fz=torch.where(mask, point.fz, memory.fz),
            r=torch.where(mask, point.r, memory.r),
            df=memory.df.masked_fill(lost, 0),
            dr=memory.dr.masked_fill(lost, 0),
            gram=torch.where(lost, blank, memory.gram),
        )

    def step(self, f: Evaluator, point: Point, memory: AndersonMemory) -> tuple[Flat, AndersonMemory]:
        steps, k = memory.steps + 1, self.memory - 1
        df, dr, gram, columns, dots = memory.df, memory.dr, memory.gram, memory.columns, None
        if k and not memory.fresh:
            slot = columns % k
            df, dr = put(df, slot, point.fz - memory.fz), put(dr, slot, point.r - memory.r)
            dots = torch.bmm(dr, torch.stack((dr[:, slot], point.r), dim=2)).double()
            gram, columns = self._renew(gram, slot, dots[:, :, 0], point.r.dtype), columns + 1
        used = min(columns, k)
        now = AndersonMemory(point.fz, point.r, df, dr, gram, steps, columns, False)
        if steps < self.start or not used:
            return self._damp(point.fz, point.r), now
        along = (torch.bmm(dr, point.r.unsqueeze(2)).double() if dots is None else dots[:, :, 1:])[:, :used]
        gamma = _weights(gram[:, :used, :used], along).to(point.r.dtype).mT
        z = torch.baddbmm(point.fz.unsqueeze(1), gamma, df[:, :used], alpha=-1).squeeze(1)
        if not self.damping:
            return z, now
        return self._damp(z, torch.baddbmm(point.r.unsqueeze(1), gamma, dr[:, :used], alpha=-1).squeeze(1)), now

    def _renew(
        self, gram: Float[Tensor, "B K K"], slot: int, row: Float[Tensor, "B K"], dtype: torch.dtype
    ) -> Float[Tensor, "B K K"]:
        ridge = self.ridge or (1e-14 if dtype == torch.float64 else 1e-7)
        gram = put(put(gram, slot, row).mT, slot, row)
        diagonal = slot * self.memory  # of the flattened matrix
        value = row[:, slot : slot + 1] * (1 + ridge) + _EMPTY
        return put(gram.reshape(gram.shape[0], (self.memory - 1) ** 2, 1), diagonal, value).view(gram.shape)

    def _damp(self, z: Flat, r: Flat) -> Flat:
        return z - self.damping * r if self.damping else z

    def transposed(self, memory: AndersonMemory, g: Flat) -> Flat:
        """H^T g, with H r = r - dF gamma(r)."""
        if not memory.columns:
            return g
        gamma = _weights(memory.gram, torch.bmm(memory.df, g.unsqueeze(2)).double()).to(g.dtype)
        return torch.baddbmm(g.unsqueeze(1), gamma.mT, memory.dr, alpha=-1).squeeze(1)


def _weights(gram: Float[Tensor, "B K K"], rhs: Float[Tensor, "B K 1"]) -> Float[Tensor, "B K 1"]:
    return torch.linalg.solve_ex(gram, rhs)[0]
