"""Broyden's method: a quasi-Newton iteration on g(z) = f(z) - z = 0, from residuals alone.

H_k approximates -(dg/dz)^-1 and starts as the identity, so the first step is Picard's. With s = z_k - z_{k-1} and
y = r_k - r_{k-1}, the good update is the smallest change of the Jacobian that satisfies the secant equation H y = -s:

    H_k = H_{k-1} - (s + H_{k-1} y) (s^T H_{k-1}) / (s^T H_{k-1} y)
    z_{k+1} = z_k + H_k r_k

kept as H = I + sum_i u_i v_i^T (Broyden, Math. Comp. 19, 1965).
"""

from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from implicit.solvers.base import AbstractSolver, Evaluator, Point
from implicit.solvers.history import put
from implicit.state import Flat

Ring = Float[Tensor, "B K N"]


@dataclass(frozen=True)
class BroydenMemory:
    """The last point and the rank-one terms of H, `terms` of them in use."""

    z: Flat
    r: Flat
    u: Ring
    v: Ring
    updates: int = 0


@dataclass(frozen=True)
class Broyden(AbstractSolver[BroydenMemory]):
    """Good Broyden with the latest `memory` rank-one terms per sample.

    When the memory is full the oldest term is dropped *before* the new one is computed, so the newest secant equation
    always holds. Memory grows with the steps taken: at most 2 memory + 2 states.

    Args:
        memory: number of rank-one terms kept, >= 1.
    """

    memory: int = 20

    def __post_init__(self) -> None:
        if self.memory < 1:
            raise ValueError(f"Broyden.memory must be at least 1, got {self.memory}.")

    def init(self, point: Point) -> BroydenMemory:
        rows, numbers = point.z.shape
        empty = point.z.new_zeros(rows, 0, numbers)
        return BroydenMemory(point.z, point.r, empty, empty, -1)

    def step(self, f: Evaluator, point: Point, memory: BroydenMemory) -> tuple[Flat, BroydenMemory]:
        updates = memory.updates + 1
        if updates == 0:
            return point.fz, BroydenMemory(point.z, point.r, memory.u, memory.v, updates)
        slot = (updates - 1) % self.memory
        u, v = self._room(memory, slot, updates)
        s, y = point.z - memory.z, point.r - memory.r
        hy = apply(u, v, y)
        sh = apply(v, u, s)
        scale = (sh * y).sum(1, keepdim=True)
        lost = scale.abs() <= torch.finfo(s.dtype).eps * sh.norm(dim=1, keepdim=True) * y.norm(
            dim=1, keepdim=True
        )
        u = put(u, slot, torch.where(lost, 0.0, -(s + hy) / scale))
        v = put(v, slot, sh)
        return point.z + apply(u, v, point.r), BroydenMemory(point.z, point.r, u, v, updates)

    def _room(self, memory: BroydenMemory, slot: int, updates: int) -> tuple[Ring, Ring]:
        """u and v with an empty row at `slot`."""
        if slot < memory.u.shape[1]:
            return put(memory.u, slot, torch.zeros_like(memory.r)), memory.v
        row = torch.zeros_like(memory.r).unsqueeze(1)
        return torch.cat((memory.u, row), 1), torch.cat((memory.v, row), 1)


def apply(u: Ring, v: Ring, x: Flat) -> Flat:
    """(I + sum_i u_i v_i^T) x for every sample."""
    return x + torch.bmm(torch.bmm(v, x.unsqueeze(2)).mT, u).squeeze(1)
