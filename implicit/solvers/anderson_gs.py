"""Anderson acceleration by Gram-Schmidt: no small systems, a long memory at little cost.

Setting: r_k = f(z_k) - z_k. Each step gives a pair of differences (q, d) = (r_k - r_{k-1}, f(z_k) - f(z_{k-1})), made
orthogonal to the earlier ones,

    q <- q - sum_i h_i q_i,    d <- d - sum_i h_i d_i,    h_i = <q_i, q> / <q_i, q_i>

so that the mixture with the smallest residual needs no least-squares solve:

    z_{k+1} = f(z_k) - sum_i c_i d_i,    c_i = <q_i, r_k> / <q_i, q_i>

With all pairs kept this is Anderson acceleration of type II, GMRES on a linear map; on a symmetric linear map three
pairs give the same as all (Tang, Xu, He, Saad and Xi, "Anderson acceleration with truncated Gram-Schmidt", SIAM J.
Matrix Anal. Appl. 45(4), 2024). The oldest pair makes room for the newest.

A new q that lies almost in the span of the old ones, ||q after|| <= drop ||q before||, shows that the old pairs are out
of date (f is not linear) or that only rounding error is left. The sample then drops its old pairs and keeps the newest
one, as a secant method would.
"""

from dataclasses import dataclass, replace

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from implicit.argument_types import check_fields
from implicit.pytree import Flat
from implicit.solvers.base import AbstractSolver, Point, check_at_least, check_history, on_host, quiet, to_mask
from implicit.solvers.history_buffer import (
    HistoryBuffer,
    Slot,
    advanced,
    coefficient,
    dots,
    position,
    put,
    put_coefficient,
    rows_written,
)

_NOISE = 2  # a difference of residuals of at most this many eps ||f(z)|| consists of rounding errors


@dataclass(frozen=True)
class AndersonGSState:
    """The last point, the pairs (q_i, d_i), and <q_i, q_i>, infinite for pairs not in use: their coefficients are 0."""

    fz: Flat
    r: Flat
    pairs: HistoryBuffer
    square: Float[Tensor, "B 1 K"]
    count: int = 0
    fresh: bool = True  # before the first step of a solve, when no pair can be formed yet
    position: Int[Tensor, "1"] | None = None  # the slot of the next pair, if it is a tensor


@dataclass(frozen=True)
class AndersonGS(AbstractSolver[AndersonGSState]):
    """Anderson acceleration by Gram-Schmidt, at most `memory` pairs per sample.

    The unit of z changes nothing, as long as squared norms stay in the dtype's range (norms of 1e-18 to 1e18 in
    float32). Memory: a growing number of states, at most 2 `memory` + 2.

    Args:
        memory: number of pairs kept, >= 1.
        drop: a new q with at most this share of its norm outside the span of the old ones makes the sample drop its
            old pairs, in [0, 1); None takes eps^(1/4): 1e-4 for float64 histories, 2e-2 for float32.
        safeguard: reset to the best iterate after a blow-up; where the residual stalls, plain steps, then Newton-Krylov
            steps (`implicit.staged_safeguard`).
    """

    memory: int = 30
    drop: float | None = None
    safeguard: bool = True

    def __post_init__(self) -> None:
        check_fields(self)
        check_at_least(self, 1, "memory")
        if self.drop is not None and not 0 <= self.drop < 1:
            raise ValueError(f"AndersonGS.drop must lie in [0, 1), got {self.drop}.")

    def init(self, point: Point) -> AndersonGSState:
        square = point.z.new_empty(point.z.shape[0], 1, 0)
        return AndersonGSState(point.fz, point.r, HistoryBuffer(self.memory, vectors=2), square)

    def resume(self, point: Point, state: AndersonGSState) -> AndersonGSState:
        check_history(state.pairs.capacity, self.memory)
        return replace(state, fz=point.fz, r=point.r, count=rows_written(state.count, self.memory), fresh=True)

    def region_state(self, state: AndersonGSState, steps: int) -> AndersonGSState:
        pairs = state.pairs.one_block(min(self.memory, state.count + steps), state.r)
        square = _padded(state.square, pairs)
        return replace(state, pairs=pairs, square=square, position=position(state.count % self.memory, state.r))

    def after_regions(self, state: AndersonGSState, steps: int) -> AndersonGSState:
        return replace(state, count=state.count + steps, position=None)

    @property
    def patience(self) -> int:
        return max(30, self.memory + 10) if self.safeguard else 0

    def restart(self, point: Point, state: AndersonGSState, mask: Bool[Tensor, "B 1"]) -> AndersonGSState:
        return replace(
            state,
            fz=torch.where(mask, point.fz, state.fz),
            r=torch.where(mask, point.r, state.r),
            pairs=state.pairs.clear(mask),  # a coefficient of 0 would not do, since 0 times NaN is NaN
            square=state.square.masked_fill(mask.unsqueeze(2), torch.inf),
        )

    def step(self, point: Point, state: AndersonGSState) -> tuple[Flat, None, AndersonGSState]:
        pairs, square, count, where = state.pairs, state.square, state.count, state.position
        if not state.fresh:
            pairs, square = self._add_pair(point, state)
            count, where = count + 1, advanced(where, self.memory)
        new = AndersonGSState(point.fz, point.r, pairs, square, count, False, where)
        if not count:
            return point.fz, None, new
        q, d = pairs.apart
        return d.add(point.fz, q.dot(point.r) / square, -1), None, new

    def _add_pair(self, point: Point, state: AndersonGSState) -> tuple[HistoryBuffer, Float[Tensor, "B 1 K"]]:
        """The pairs with the newest one, and <q_i, q_i>."""
        slot = state.count % self.memory
        pairs = state.pairs.reserve(slot, point.r)
        square = _padded(state.square, pairs)
        slot = slot if state.position is None else state.position
        pairs = pairs.set_differences(slot, (point.r, state.r), (point.fz, state.fz))
        # the coefficients of the new q in the span of the others; the new pair has the place of the oldest one
        q = pairs.apart[0]
        along = q.dot(q.row(slot))
        h = along / square
        put_coefficient(h, slot, 0)
        # if nearly all of q is in this span, the old pairs are dropped
        if (stale := self._stale(h, along, slot)) is not None:
            h, square = h.masked_fill(stale, 0), square.masked_fill(stale, torch.inf)
        # the new pair without this part
        new = pairs.add(pairs.row(slot), h, -1)
        own = new[:, : point.r.shape[1]]
        length = dots(own.unsqueeze(1), own).squeeze(2)  # a norm has no second derivative at zero
        if (noise := _noise(point, length)) is not None:
            length = length.masked_fill(noise, torch.inf)
        return pairs.set(slot, new), put(square.mT, slot, length).mT

    def _stale(
        self, h: Float[Tensor, "B 1 K"], along: Float[Tensor, "B 1 K"], slot: Slot
    ) -> Bool[Tensor, "B 1 1"] | None:
        """The samples in which at most the share `drop` of the new q lies outside of the span of the others."""
        drop = torch.finfo(h.dtype).eps ** 0.25 if self.drop is None else self.drop
        found, products = on_host(h, along)
        with quiet(found):
            # the squared lengths of the part inside the span and of all of q
            inside = (found * products).sum(2)
            whole = coefficient(products, slot) if isinstance(slot, Tensor) else products[:, :, slot]
            mask = to_mask(inside >= (1 - drop**2) * whole, h)
        return None if mask is None else mask.unsqueeze(2)

    def inverse_transpose(self, state: AndersonGSState, g: Flat) -> Flat:
        """H^T g, with H r = r - sum_i d_i <q_i, r> / <q_i, q_i>."""
        if not state.count:
            return g
        q, d = state.pairs.apart
        return q.add(g, d.dot(g) / state.square, -1)


def _padded(square: Float[Tensor, "B 1 _"], pairs: HistoryBuffer) -> Float[Tensor, "B 1 K"]:
    """<q_i, q_i> for all rows of the history, infinite for the new ones."""
    more = pairs.rows - square.shape[2]
    return torch.nn.functional.pad(square, (0, more), value=torch.inf) if more else square


def _noise(point: Point, square: Float[Tensor, "B 1"]) -> Bool[Tensor, "B 1"] | None:
    """The samples whose new q, of squared length `square`, consists of rounding errors; their pair is not used."""
    info = torch.finfo(square.dtype)
    found, size = on_host(square, point.fz_size)
    return to_mask((found**0.5 <= _NOISE * info.eps * size[:, None]) | (found <= info.tiny), square)
