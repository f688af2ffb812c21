"""Broyden's bad method: the smallest change of the inverse, not of the Jacobian, that keeps the secant equation.

H_k approximates -(dg/dz)^-1, g(z) = f(z) - z, and starts as the identity. With s = z_k - z_{k-1}, y = r_k - r_{k-1},

    H_k = H_{k-1} - (s + H_{k-1} y) y^T / (y^T y),    z_{k+1} = z_k + H_k r_k

kept as H = I + sum_i u_i v_i^T (Broyden, Math. Comp. 19, 1965).
"""

from dataclasses import dataclass, replace

import torch
from jaxtyping import Bool
from torch import Tensor

from implicit.argument_types import check_fields
from implicit.pytree import Flat
from implicit.solvers.base import AbstractSolver, Point, check_at_least, check_history
from implicit.solvers.history_buffer import HistoryBuffer, rows_written


@dataclass(frozen=True)
class BadBroydenState:
    """The last point and the rank-one terms of H, `updates` of them made so far."""

    z: Flat
    r: Flat
    u: HistoryBuffer
    v: HistoryBuffer
    updates: int = 0
    fresh: bool = True  # before the first step of a solve, when no secant can be formed yet


@dataclass(frozen=True)
class BadBroyden(AbstractSolver[BadBroydenState]):
    """Bad Broyden with the latest `memory` rank-one terms per sample.

    When the history is full the oldest term is dropped before the new one is computed, so the newest secant equation
    always holds. Memory: a growing number of states, at most 2 `memory` + 3.

    Args:
        memory: number of rank-one terms kept, >= 1.
        safeguard: reset to the best iterate after a blow-up; where the residual stalls, plain steps, then Newton-Krylov
            steps (`implicit.staged_safeguard`).
    """

    memory: int = 20
    safeguard: bool = True

    def __post_init__(self) -> None:
        check_fields(self)
        check_at_least(self, 1, "memory")

    def init(self, point: Point) -> BadBroydenState:
        return BadBroydenState(point.z, point.r, HistoryBuffer(self.memory), HistoryBuffer(self.memory))

    def resume(self, point: Point, state: BadBroydenState) -> BadBroydenState:
        check_history(state.u.capacity, self.memory)
        return replace(state, z=point.z, r=point.r, updates=rows_written(state.updates, self.memory), fresh=True)

    @property
    def patience(self) -> int:
        return max(25, self.memory + 5) if self.safeguard else 0

    def restart(self, point: Point, state: BadBroydenState, mask: Bool[Tensor, "B 1"]) -> BadBroydenState:
        return replace(
            state,
            z=torch.where(mask, point.z, state.z),
            r=torch.where(mask, point.r, state.r),
            u=state.u.clear(mask),
            v=state.v.clear(mask),
        )

    def step(self, point: Point, state: BadBroydenState) -> tuple[Flat, None, BadBroydenState]:
        u, v, updates = state.u, state.v, state.updates
        if not state.fresh:
            u, v = self._update(point, state, updates % self.memory)
            updates += 1
        z = u.add(point.fz, v.dot(point.r)) if updates else point.fz
        return z, None, BadBroydenState(point.z, point.r, u, v, updates, False)

    def _update(self, point: Point, state: BadBroydenState, slot: int) -> tuple[HistoryBuffer, HistoryBuffer]:
        """The terms with the newest one at `slot`."""
        s, y = point.z - state.z, point.r - state.r
        u, v = state.u.reserve(slot, y), state.v.reserve(slot, y)
        if state.updates >= self.memory:
            u = u.set(slot, torch.zeros_like(y))
        scale = torch.linalg.vecdot(y, y).unsqueeze(1)
        scale = scale.masked_fill(scale == 0, torch.inf)  # a clamp would be a divisor in the backward pass
        column = (s + u.add(y, v.dot(y))) / -scale
        return u.set(slot, column), v.set(slot, y)

    def inverse_transpose(self, state: BadBroydenState, g: Flat) -> Flat:
        """H^T g, H = I + sum_i u_i v_i^T."""
        return state.v.add(g, state.u.dot(g)) if state.u.rows else g
