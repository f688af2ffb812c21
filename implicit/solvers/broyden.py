"""Broyden's method: a quasi-Newton iteration on g(z) = f(z) - z = 0, from residuals alone.

H_k approximates -(dg/dz)^-1 and starts as the identity, so the first step is Picard's. With s = z_k - z_{k-1} and
y = r_k - r_{k-1}, both updates satisfy the secant equation H y = -s; the good one is the smallest change of the
Jacobian that does, the bad one the smallest change of H:

    good   H_k = H_{k-1} - (s + H_{k-1} y) (s^T H_{k-1}) / (s^T H_{k-1} y)
    bad    H_k = H_{k-1} - (s + H_{k-1} y) y^T / (y^T y)
    z_{k+1} = z_k + H_k r_k

kept as H = I + sum_i u_i v_i^T (Broyden, Math. Comp. 19, 1965).
"""

from dataclasses import dataclass, replace

import torch
from jaxtyping import Bool
from torch import Tensor

from implicit.solvers.base import AbstractSolver, Evaluator, Point
from implicit.solvers.history import Ring
from implicit.state import Flat


@dataclass(frozen=True)
class BroydenMemory:
    """The last point and the rank-one terms of H, `updates` of them made so far."""

    z: Flat
    r: Flat
    u: Ring
    v: Ring
    updates: int = 0
    fresh: bool = True  # the last point is not apart from the next: no secant yet


@dataclass(frozen=True)
class Broyden(AbstractSolver[BroydenMemory]):
    """Broyden with the latest `memory` rank-one terms per sample.

    When the memory is full, terms are dropped *before* the new one is computed, so the newest secant equation always
    holds: the oldest one of the bad update, all of the good update, whose later terms mislead without the earlier ones
    that they were made with (dropping one at a time diverges on slow linear maps). A direction that is lost to rounding
    (s^T H y = 0) adds nothing. Memory grows with the steps taken, to at most 2 memory + 2 states.

    Args:
        memory: number of rank-one terms kept, >= 1.
        bad: the bad update instead of the good one.
        safeguard: go back to the best point after a blow-up, and to plain steps where nothing is gained.
    """

    memory: int = 20
    bad: bool = False
    safeguard: bool = True

    def __post_init__(self) -> None:
        if self.memory < 1:
            raise ValueError(f"Broyden.memory must be at least 1, got {self.memory}.")

    def init(self, point: Point) -> BroydenMemory:
        return BroydenMemory(point.z, point.r, Ring(self.memory), Ring(self.memory))

    def resume(self, point: Point, memory: BroydenMemory) -> BroydenMemory:
        if memory.u.memory != self.memory:
            raise ValueError(f"state must come from a solver with memory={self.memory}, got {memory.u.memory}.")
        return replace(memory, z=point.z, r=point.r, fresh=True)

    @property
    def patience(self) -> int:
        return 30 if self.safeguard else 0

    def restart(self, point: Point, memory: BroydenMemory, mask: Bool[Tensor, "B 1"]) -> BroydenMemory:
        return replace(
            memory,
            z=torch.where(mask, point.z, memory.z),
            r=torch.where(mask, point.r, memory.r),
            u=memory.u.forget(mask),
            v=memory.v.forget(mask),
        )

    def step(self, f: Evaluator, point: Point, memory: BroydenMemory) -> tuple[Flat, BroydenMemory]:
        u, v, updates = memory.u, memory.v, memory.updates
        if not memory.fresh:
            slot = updates % self.memory
            u, v = self._learn(point, memory, slot)
            updates += 1
        z = u.add(point.fz, v.dot(point.r)) if updates else point.fz
        return z, BroydenMemory(point.z, point.r, u, v, updates, False)

    def _learn(self, point: Point, memory: BroydenMemory, slot: int) -> tuple[Ring, Ring]:
        """The terms with the newest one at `slot`."""
        s, y = point.z - memory.z, point.r - memory.r
        u = memory.u.room(slot, y)
        v = memory.v.room(slot, y)
        if memory.updates >= self.memory and self.bad:
            u = u.put(slot, torch.zeros_like(y))
        elif memory.updates and slot == 0:
            every = torch.ones_like(y[:, :1], dtype=torch.bool)
            u, v = u.forget(every), v.forget(every)
        hy = u.add(y, v.dot(y))
        row = y if self.bad else v.add(s, u.dot(s))
        scale = torch.linalg.vecdot(row, y).unsqueeze(1)
        size = torch.linalg.vector_norm(row, dim=1) * torch.linalg.vector_norm(y, dim=1)
        lost = scale.abs() <= torch.finfo(y.dtype).eps * size.unsqueeze(1)
        column = (s + hy) / scale.masked_fill(lost, -torch.inf).neg()
        return u.put(slot, column), v.put(slot, row)

    def transposed(self, memory: BroydenMemory, g: Flat) -> Flat:
        """H^T g."""
        return memory.v.add(g, memory.u.dot(g)) if memory.u.rows else g
