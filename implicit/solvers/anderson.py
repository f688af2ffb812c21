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


@dataclass(frozen=True)
class AndersonMemory:
    """The last point and a ring of differences."""

    fz: Flat
    r: Flat
    df: Float[Tensor, "B K N"]
    dr: Float[Tensor, "B K N"]
    gram: Float[Tensor, "B K K"]
    steps: int = 0


@dataclass(frozen=True)
class Anderson(AbstractSolver[AndersonMemory]):
    """Anderson acceleration, type II, of `memory` points per sample.

    The least-squares problem is solved in float64 through its Gram matrix, scaled to a unit diagonal: the ridge is
    relative to the residuals, so the unit of z changes nothing. Memory: 2 memory + 2 states.

    Args:
        memory: number of points mixed, >= 1; 1 is the Picard iteration.
        damping: share of the mixed old iterate kept, in [0, 1).
        ridge: relative ridge, > 0; None takes 1e-14 for float64 histories and 1e-7 for float32.
    """

    memory: int = 5
    damping: float = 0.0
    ridge: float | None = None
    safeguard: bool = True

    def __post_init__(self) -> None:
        if self.memory < 1:
            raise ValueError(f"Anderson.memory must be at least 1, got {self.memory}.")
        if not 0 <= self.damping < 1:
            raise ValueError(f"Anderson.damping must lie in [0, 1), got {self.damping}.")
        if self.ridge is not None and not self.ridge > 0:
            raise ValueError(f"Anderson.ridge must be positive, got {self.ridge}.")

    def init(self, point: Point) -> AndersonMemory:
        rows, numbers = point.z.shape
        columns = self.memory - 1
        history = point.z.new_zeros(rows, columns, numbers)
        gram = torch.zeros(rows, columns, columns, dtype=torch.float64, device=point.z.device)
        return AndersonMemory(point.fz, point.r, history, history.clone(), gram, -1)

    def resume(self, point: Point, memory: AndersonMemory) -> AndersonMemory:
        return replace(memory, fz=point.fz, r=point.r)

    @property
    def patience(self) -> int:
        return 2 * self.memory + 5 if self.safeguard and self.memory > 1 else 0

    def restart(self, point: Point, memory: AndersonMemory, mask: Bool[Tensor, "B 1"]) -> AndersonMemory:
        lost = mask.unsqueeze(2)
        return replace(
            memory,
            fz=torch.where(mask, point.fz, memory.fz),
            r=torch.where(mask, point.r, memory.r),
            df=memory.df.masked_fill(lost, 0),
            dr=memory.dr.masked_fill(lost, 0),
            gram=memory.gram.masked_fill(lost, 0),
        )

    def step(self, f: Evaluator, point: Point, memory: AndersonMemory) -> tuple[Flat, AndersonMemory]:
        steps = memory.steps + 1
        if self.memory == 1 or steps == 0:
            return self._damp(point.fz, point.r), replace(memory, fz=point.fz, r=point.r, steps=steps)
        slot = (steps - 1) % (self.memory - 1)
        new = point.r - memory.r
        df, dr = put(memory.df, slot, point.fz - memory.fz), put(memory.dr, slot, new)
        products = torch.bmm(dr, torch.stack((point.r, new), dim=2)).double()
        gram = put(put(memory.gram, slot, products[:, :, 1]).mT, slot, products[:, :, 1])
        weights = self._weights(gram, products[:, :, 0], point.z.dtype)
        z = point.fz - torch.bmm(weights.mT, df).squeeze(1)
        r = point.r - torch.bmm(weights.mT, dr).squeeze(1) if self.damping else point.r
        return self._damp(z, r), AndersonMemory(point.fz, point.r, df, dr, gram, steps)

    def _weights(
        self, gram: Float[Tensor, "B K K"], rhs: Float[Tensor, "B K"], dtype: torch.dtype
    ) -> Float[Tensor, "B K 1"]:
        """gamma, (B, K, 1); empty columns get 0."""
        size = gram.diagonal(dim1=1, dim2=2).sqrt()
        unit = torch.where(size > 0, 1 / size, 0.0)
        ridge = self.ridge or (1e-14 if dtype == torch.float64 else 1e-7)
        eye = torch.eye(gram.shape[1], dtype=gram.dtype, device=gram.device)
        scaled = gram * unit.unsqueeze(1) * unit.unsqueeze(2) + eye * torch.where(
            size > 0, ridge, 1.0
        ).unsqueeze(1)
        solved, _ = torch.linalg.solve_ex(scaled, (rhs * unit).unsqueeze(2))
        return (solved * unit.unsqueeze(2)).to(dtype)

    def _damp(self, z: Flat, r: Flat) -> Flat:
        return z - self.damping * r if self.damping else z
