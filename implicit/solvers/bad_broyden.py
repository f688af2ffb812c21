"""Broyden's bad method: the smallest change of the inverse, not of the Jacobian, that keeps the secant equation.

H_k approximates -(dg/dz)^-1, g(z) = f(z) - z, and starts as the identity. With s = z_k - z_{k-1}, y = r_k - r_{k-1},

    H_k = H_{k-1} - (s + H_{k-1} y) y^T / (y^T y),    z_{k+1} = z_k + H_k r_k

kept as H = I + sum_i u_i v_i^T (Broyden, Math. Comp. 19, 1965; the name is his, and not always deserved).
"""

from dataclasses import dataclass, replace

import torch
from jaxtyping import Bool
from torch import Tensor

from implicit.pytree import Flat
from implicit.solvers.base import AbstractSolver, Evaluator, Point
from implicit.solvers.history_buffer import HistoryBuffer


@dataclass(frozen=True)
class BadBroydenState:
    """The last point and the rank-one terms of H, `updates` of them made so far."""

    z: Flat
    r: Flat
    u: HistoryBuffer
    v: HistoryBuffer
    updates: int = 0
    fresh: bool = True  # the last point is not apart from the next: no secant yet


@dataclass(frozen=True)
class BadBroyden(AbstractSolver[BadBroydenState]):
    """Bad Broyden with the latest `memory` rank-one terms per sample.

    When the memory is full the oldest term is dropped *before* the new one is computed, so the newest secant equation
    always holds. Memory grows with the steps taken, to at most 2 memory + 3 states.

    Args:
        memory: number of rank-one terms kept, >= 1.
        safeguard: go back to the best point after a blow-up, and to plain steps where nothing is gained.
    """

    memory: int = 20
    safeguard: bool = True

    def __post_init__(self) -> None:
        if self.memory < 1:
            raise ValueError(f"BadBroyden.memory must be at least 1, got {self.memory}.")

    def init(self, point: Point) -> BadBroydenState:
        return BadBroydenState(point.z, point.r, HistoryBuffer(self.memory), HistoryBuffer(self.memory))

    def resume(self, point: Point, state: BadBroydenState) -> BadBroydenState:
        if state.u.memory != self.memory:
            raise ValueError(f"state must come from a solver with memory={self.memory}, got {state.u.memory}.")
        return replace(state, z=point.z, r=point.r, fresh=True)

    @property
    def patience(self) -> int:
        return max(25, self.memory + 5) if self.safeguard else 0

    def restart(self, point: Point, state: BadBroydenState, mask: Bool[Tensor, "B 1"]) -> BadBroydenState:
        return replace(
            state,
            z=torch.where(mask, point.z, state.z),
            r=torch.where(mask, point.r, state.r),
            u=state.u.forget(mask),
            v=state.v.forget(mask),
        )

    def step(self, f: Evaluator, point: Point, state: BadBroydenState) -> tuple[Flat, BadBroydenState]:
        u, v, updates = state.u, state.v, state.updates
        if not state.fresh:
            slot = updates % self.memory
            u, v = self._learn(point, state, slot)
            updates += 1
        z = u.add(point.fz, v.dot(point.r)) if updates else point.fz
        return z, BadBroydenState(point.z, point.r, u, v, updates, False)

    def _learn(self, point: Point, state: BadBroydenState, slot: int) -> tuple[HistoryBuffer, HistoryBuffer]:
        """The terms with the newest one at `slot`."""
        s, y = point.z - state.z, point.r - state.r
        u = state.u.room(slot, y)
        v = state.v.room(slot, y)
        if state.updates >= self.memory:
            u = u.put(slot, torch.zeros_like(y))
        scale = torch.linalg.vecdot(y, y).unsqueeze(1)
        scale = scale.masked_fill(scale == 0, torch.inf)  # not clamped: a backward pass would divide by the clamp
        column = (s + u.add(y, v.dot(y))) / -scale
        return u.put(slot, column), v.put(slot, y)

    def inverse_transpose(self, state: BadBroydenState, g: Flat) -> Flat:
        """H^T g."""
        return state.v.add(g, state.u.dot(g)) if state.u.rows else g
