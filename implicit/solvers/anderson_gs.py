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
from jaxtyping import Bool, Float
from torch import Tensor

from implicit.argument_types import check_fields
from implicit.pytree import Flat
from implicit.solvers.base import AbstractSolver, Point, check_at_least, check_history
from implicit.solvers.history_buffer import HistoryBuffer, dots

_NOISE = 2  # a difference of residuals of at most this many eps ||f(z)|| consists of rounding errors


@dataclass(frozen=True)
class AndersonGSState:
    """The last point, the pairs, and 1 / <q_i, q_i>, 0 for pairs not in use."""

    fz: Flat
    r: Flat
    q: HistoryBuffer
    d: HistoryBuffer
    inverse: Float[Tensor, "B 1 K"]
    pairs: int = 0
    fresh: bool = True  # before the first step of a solve, when no pair can be formed yet


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
        none = HistoryBuffer(self.memory)
        return AndersonGSState(point.fz, point.r, none, none, point.z.new_zeros(point.z.shape[0], 1, self.memory))

    def resume(self, point: Point, state: AndersonGSState) -> AndersonGSState:
        check_history(state.q.capacity, self.memory)
        return replace(state, fz=point.fz, r=point.r, fresh=True)

    @property
    def patience(self) -> int:
        return max(30, self.memory + 10) if self.safeguard else 0

    def restart(self, point: Point, state: AndersonGSState, mask: Bool[Tensor, "B 1"]) -> AndersonGSState:
        return replace(
            state,
            fz=torch.where(mask, point.fz, state.fz),
            r=torch.where(mask, point.r, state.r),
            q=state.q.clear(mask),  # a weight of 0 would not do, since 0 times NaN is NaN
            d=state.d.clear(mask),
            inverse=state.inverse.masked_fill(mask.unsqueeze(2), 0),
        )

    def step(self, point: Point, state: AndersonGSState) -> tuple[Flat, None, AndersonGSState]:
        if not state.fresh:
            state = self._add_pair(point, state)
        elif not state.pairs:
            return point.fz, None, replace(state, fz=point.fz, r=point.r, fresh=False)
        c = state.q.dot(point.r) * state.inverse[:, :, : state.q.rows]
        return state.d.add(point.fz, c, -1), None, replace(state, fz=point.fz, r=point.r, fresh=False)

    def _drop(self, dtype: torch.dtype) -> float:
        return torch.finfo(dtype).eps ** 0.25 if self.drop is None else self.drop

    def _add_pair(self, point: Point, state: AndersonGSState) -> AndersonGSState:
        """The solver state with the newest pair."""
        slot = state.pairs % self.memory
        q, d = state.q.reserve(slot, point.r), state.d.reserve(slot, point.r)
        inverse = state.inverse.clone()
        inverse[:, :, slot] = 0  # the oldest pair is dropped
        new, new_fz = point.r - state.r, point.fz - state.fz
        # the part of the new q in the span of the old ones; if that is nearly all of q, the old pairs are dropped
        square = dots(new.unsqueeze(1), new)  # a norm has no second derivative at zero
        along = q.dot(new)
        h = along * inverse[:, :, : q.rows]
        inside = torch.bmm(h, along.mT)  # its squared length
        stale = inside >= (1 - self._drop(point.r.dtype) ** 2) * square
        h, inverse = h.masked_fill(stale, 0), inverse.masked_fill(stale, 0)
        # the new pair without this part
        new, new_fz = q.add(new, h, -1), d.add(new_fz, h, -1)
        # the weight of the pair; 0 if the pair consists of rounding errors
        square = dots(new.unsqueeze(1), new).squeeze(2)
        noise = (_NOISE * torch.finfo(square.dtype).eps) ** 2 * dots(point.fz.unsqueeze(1), point.fz).squeeze(2)
        none = square <= noise.clamp_min(torch.finfo(square.dtype).tiny)
        inverse[:, :, slot] = square.masked_fill(none, torch.inf).reciprocal()
        return replace(state, q=q.set(slot, new), d=d.set(slot, new_fz), inverse=inverse, pairs=state.pairs + 1)

    def inverse_transpose(self, state: AndersonGSState, g: Flat) -> Flat:
        """H^T g, with H r = r - sum_i d_i <q_i, r> / <q_i, q_i>."""
        if not state.pairs:
            return g
        return state.q.add(g, state.d.dot(g) * state.inverse[:, :, : state.q.rows], -1)
