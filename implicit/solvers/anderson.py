"""Anderson acceleration (type II): the mixture of recent points whose residual is smallest.

Setting: r_k = f(z_k) - z_k. With the differences of the last m points as columns,

    dR = [r_{k-m+2} - r_{k-m+1}, ..., r_k - r_{k-1}],     dF likewise of f(z),

    gamma = argmin || r_k - dR gamma ||^2 + ridge sum_i (||dR_i|| gamma_i)^2
    z_{k+1} = (f(z_k) - dF gamma) - damping (r_k - dR gamma)

(Anderson 1965; Walker and Ni, SIAM J. Numer. Anal. 49(4), 2011.)
"""

from dataclasses import dataclass, replace

import torch
from jaxtyping import Bool, Int
from torch import Tensor

from implicit.argument_types import check_fields
from implicit.pytree import Flat
from implicit.solvers.base import AbstractSolver, Point, check_at_least, check_history, check_share
from implicit.solvers.history_buffer import advanced, position, rows_written
from implicit.solvers.ring_buffer import GramMatrix, RingBuffer


@dataclass(frozen=True)
class AndersonState:
    """The last point, K = memory - 1 differences in ring buffers, and the Gram matrix of dR with the ridge.

    `ridge` has 1 + ridge on the diagonal and 1 elsewhere: a new row of the Gram matrix is multiplied by a row of it.
    """

    fz: Flat
    r: Flat
    df: RingBuffer
    dr: RingBuffer
    gram: GramMatrix
    ridge: RingBuffer
    steps: int = 0
    columns: int = 0
    fresh: bool = True  # before the first step of a solve, when no difference can be formed yet
    position: Int[Tensor, "1"] | None = None  # the slot of the next difference, if it is a tensor


@dataclass(frozen=True)
class Anderson(AbstractSolver[AndersonState]):
    """Anderson acceleration, type II, of `memory` points per sample.

    The least-squares problem is solved through its Gram matrix, of which every step replaces one row and column. The
    ridge is relative to the differences, so the unit of z changes nothing. Memory: 2 `memory` states.

    Args:
        memory: number of points mixed, >= 1; 1 is the Picard iteration.
        damping: share of the mixture of old iterates z in the next one, in [0, 1); the rest is the mixture of f(z).
        ridge: relative ridge, > 0; None takes 1e-14 for float64 histories and 1e-6 for float32.
        start: number of plain steps before the first mixture, >= 1. Differences are collected from the beginning.
        safeguard: reset to the best iterate after a blow-up; where the residual stalls, plain steps, then Newton-Krylov
            steps (`implicit.staged_safeguard`).
    """

    memory: int = 5
    damping: float = 0.0
    ridge: float | None = None
    start: int = 1
    safeguard: bool = True

    def __post_init__(self) -> None:
        check_fields(self)
        check_at_least(self, 1, "memory", "start")
        check_share(self, "damping")
        if self.ridge is not None and not 0 < self.ridge < float("inf"):
            raise ValueError(f"Anderson.ridge must be positive and finite, got {self.ridge}.")

    def init(self, point: Point) -> AndersonState:
        rows, numbers = point.z.shape
        df, dr = (RingBuffer(point.z.new_zeros(rows, self.memory - 1, numbers)) for _ in range(2))
        gram = GramMatrix.empty(self.memory - 1, point.z)
        return AndersonState(point.fz, point.r, df, dr, gram, self._ridge(gram))

    def resume(self, point: Point, state: AndersonState) -> AndersonState:
        check_history(state.dr.rows.shape[1] + 1, self.memory)
        # the state may come from a solver with another ridge
        ridge = self._ridge(GramMatrix.empty(self.memory - 1, point.z))
        steps, columns = min(state.steps, self.start), rows_written(state.columns, max(self.memory - 1, 1))
        return replace(state, fz=point.fz, r=point.r, ridge=ridge, steps=steps, columns=columns, fresh=True)

    def _ridge(self, empty: GramMatrix) -> RingBuffer:
        ridge = self.ridge or (1e-14 if empty.products.dtype == torch.float64 else 1e-6)
        return RingBuffer(1 + ridge * empty.products)

    def region_state(self, state: AndersonState, steps: int) -> AndersonState | None:
        k = self.memory - 1
        if not k or state.steps + 1 < self.start:
            return None
        return replace(state, position=position(state.columns % k, state.r))

    def after_regions(self, state: AndersonState, steps: int) -> AndersonState:
        return replace(state, steps=state.steps + steps, columns=state.columns + steps, position=None)

    @property
    def patience(self) -> int:
        return min(2 * self.memory + 5, 30) if self.safeguard and self.memory > 1 else 0

    def restart(self, point: Point, state: AndersonState, mask: Bool[Tensor, "B 1"]) -> AndersonState:
        return replace(
            state,
            fz=torch.where(mask, point.fz, state.fz),
            r=torch.where(mask, point.r, state.r),
            df=state.df.clear(mask),
            dr=state.dr.clear(mask),
            gram=state.gram.clear(mask),
        )

    def step(self, point: Point, state: AndersonState) -> tuple[Flat, None, AndersonState]:
        steps, k, r = state.steps + 1, self.memory - 1, point.r
        df, dr, gram, columns, where = state.df, state.dr, state.gram, state.columns, state.position
        # the newest differences take the place of the oldest
        if not state.fresh and k:
            slot = columns % k if where is None else where
            df = df.set_difference(slot, point.fz, state.fz)
            dr = dr.set_difference(slot, r, state.r)
            gram = gram.set(slot, dr.dot_row(slot), state.ridge)
            columns, where = columns + 1, advanced(where, k)
        new = AndersonState(point.fz, r, df, dr, gram, state.ridge, steps, columns, False, where)
        if steps < self.start or not columns:
            return self._damp(point.fz, r), None, new
        # the mixture with the smallest residual
        gamma = gram.solve(dr.dot(r))
        z = df.add(point.fz, gamma, -1)
        if self.damping:
            z = self._damp(z, dr.add(r, gamma, -1))
        return z, None, new

    def _damp(self, z: Flat, r: Flat) -> Flat:
        return z - self.damping * r if self.damping else z

    def inverse_transpose(self, state: AndersonState, g: Flat) -> Flat:
        """H^T g, with H r = r - dF gamma(r)."""
        return state.dr.add(g, state.gram.solve(state.df.dot(g)), -1) if state.columns else g
