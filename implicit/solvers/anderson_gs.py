"""Anderson acceleration by Gram-Schmidt: no small systems, a long memory at little cost. The default solver.

Setting: r_k = f(z_k) - z_k. Each step gives a pair of differences (q, d) = (r_k - r_{k-1}, f(z_k) - f(z_{k-1})), made
orthogonal to the earlier ones,

    q <- q - sum_i h_i q_i,    d <- d - sum_i h_i d_i,    h_i = <q_i, q> / <q_i, q_i>

so that the mixture with the smallest residual needs no least-squares solve:

    z_{k+1} = f(z_k) - sum_i c_i d_i,    c_i = <q_i, r_k> / <q_i, q_i>

With all pairs kept this is Anderson acceleration of type II, GMRES on a linear map; on a symmetric linear map three
pairs give the same as all (Tang, Xu, He, Saad and Xi, "Anderson acceleration with truncated Gram-Schmidt", SIAM J.
Matrix Anal. Appl. 45(4), 2024). The oldest pair makes room for the newest.

A new q that lies almost in the span of the old ones, ||q after|| <= drop ||q before||, says that the old ones are
out of date (f is not linear) or that rounding error is all that is left: that sample forgets them and keeps the
newest, as a secant method would.
"""

from dataclasses import dataclass, replace

import numpy as np
import torch
from jaxtyping import Bool, Float
from torch import Tensor

from implicit.pytree import Flat
from implicit.solvers.base import AbstractSolver, Evaluator, Point
from implicit.solvers.history_buffer import HistoryBuffer, dots, near

_NOISE = 2  # a difference of residuals within that many eps of f(z) is made of rounding errors


@dataclass(frozen=True)
class AndersonGSState:
    """The last point, the pairs, and 1 / <q_i, q_i>, 0 for pairs not in use."""

    fz: Flat
    r: Flat
    q: HistoryBuffer
    d: HistoryBuffer
    inverse: Float[Tensor, "B 1 K"]
    pairs: int = 0
    fresh: bool = True  # the last point is not from this solve or not apart from the next: no pair yet


@dataclass(frozen=True)
class AndersonGS(AbstractSolver[AndersonGSState]):
    """Anderson acceleration by Gram-Schmidt, at most `memory` pairs per sample.

    Free of the unit of z, as long as squared norms stay in the dtype's range (norms of 1e-18 to 1e18 in float32).
    Memory grows with the steps taken, to at most 2 memory + 2 states.

    Args:
        memory: number of pairs kept, >= 1.
        drop: how nearly dependent a new pair must be to end the old ones, in [0, 1); None takes eps^(1/4): 1e-4 for
            float64 histories, 2e-2 for float32.
        safeguard: go back to the best point after a blow-up, and to plain steps where nothing is gained.
    """

    memory: int = 30
    drop: float | None = None
    safeguard: bool = True

    def __post_init__(self) -> None:
        if self.memory < 1:
            raise ValueError(f"AndersonGS.memory must be at least 1, got {self.memory}.")
        if self.drop is not None and not 0 <= self.drop < 1:
            raise ValueError(f"AndersonGS.drop must lie in [0, 1), got {self.drop}.")

    def init(self, point: Point) -> AndersonGSState:
        none = HistoryBuffer(self.memory)
        return AndersonGSState(point.fz, point.r, none, none, point.z.new_zeros(point.z.shape[0], 1, self.memory))

    def resume(self, point: Point, state: AndersonGSState) -> AndersonGSState:
        if state.q.memory != self.memory:
            raise ValueError(f"state must come from a solver with memory={self.memory}, got {state.q.memory}.")
        return replace(state, fz=point.fz, r=point.r, fresh=True)

    @property
    def patience(self) -> int:
        return max(30, self.memory + 10) if self.safeguard else 0

    def restart(self, point: Point, state: AndersonGSState, mask: Bool[Tensor, "B 1"]) -> AndersonGSState:
        return replace(
            state,
            fz=torch.where(mask, point.fz, state.fz),
            r=torch.where(mask, point.r, state.r),
            inverse=state.inverse.masked_fill(mask.unsqueeze(2), 0),
        )

    def step(self, f: Evaluator, point: Point, state: AndersonGSState) -> tuple[Flat, AndersonGSState]:
        if not state.fresh:
            if len(blocks := (*state.q.blocks, *state.d.blocks)) == 2 and state.q.rows == self.memory:
                if near(point.fz, point.r, state.fz, state.r, state.inverse, *blocks):
                    return self._near(point, state)
            state = self._learn(point, state)
        elif not state.pairs:
            return point.fz, replace(state, fz=point.fz, r=point.r, fresh=False)
        c = state.q.dot(point.r) * state.inverse[:, :, : state.q.rows]
        return state.d.add(point.fz, c, -1), replace(state, fz=point.fz, r=point.r, fresh=False)

    def _drop(self, dtype: torch.dtype) -> float:
        return torch.finfo(dtype).eps ** 0.25 if self.drop is None else self.drop

    @np.errstate(all="ignore")
    def _near(self, point: Point, state: AndersonGSState) -> tuple[Flat, AndersonGSState]:
        """`_learn` and the mixture in numpy, in the same memory: small states wait for calls, which cost less so."""
        slot, limits = state.pairs % self.memory, torch.finfo(point.r.dtype)
        q, d, inverse = state.q.blocks[0].numpy(), state.d.blocks[0].numpy(), state.inverse.numpy()[:, 0]
        fz, r = point.fz.numpy(), point.r.numpy()
        new, new_fz = r - state.r.numpy(), fz - state.fz.numpy()
        inverse[:, slot] = 0
        along = (q @ new[:, :, None])[:, :, 0]
        h = along * inverse
        stale = (h * along).sum(1) >= (1 - self._drop(point.r.dtype) ** 2) * (new * new).sum(1)
        if stale.any():
            h[stale] = inverse[stale] = 0
        new -= (h[:, None] @ q)[:, 0]
        new_fz -= (h[:, None] @ d)[:, 0]
        square = (new * new).sum(1)
        none = square <= np.maximum((_NOISE * limits.eps) ** 2 * (fz * fz).sum(1), limits.tiny)
        inverse[:, slot] = 1 / np.where(none, np.inf, square)
        q[:, slot], d[:, slot] = new, new_fz
        c = (q @ r[:, :, None])[:, :, 0] * inverse
        z = torch.empty_like(point.fz)  # in torch's alignment, on which the rounding of a product may depend
        np.subtract(fz, (c[:, None] @ d)[:, 0], out=z.numpy())
        return z, AndersonGSState(point.fz, point.r, state.q, state.d, state.inverse, state.pairs + 1, False)

    def _learn(self, point: Point, state: AndersonGSState) -> AndersonGSState:
        """The memory with the newest pair."""
        slot = state.pairs % self.memory
        q, d = state.q.room(slot, point.r), state.d.room(slot, point.r)
        drop = self._drop(point.r.dtype)
        inverse = state.inverse.clone()
        inverse[:, :, slot] = 0
        new, new_fz = point.r - state.r, point.fz - state.fz
        square = dots(new.unsqueeze(1), new)  # a norm has no second derivative at zero
        along = q.dot(new)
        h = along * inverse[:, :, : q.rows]
        inside = torch.bmm(h, along.mT)  # squared length in the old span
        stale = inside >= (1 - drop**2) * square
        h = h.masked_fill(stale, 0)
        new, new_fz = q.add(new, h, -1), d.add(new_fz, h, -1)
        square = dots(new.unsqueeze(1), new).squeeze(2)
        inverse = inverse.masked_fill(stale, 0)
        noise = (_NOISE * torch.finfo(square.dtype).eps) ** 2 * dots(point.fz.unsqueeze(1), point.fz).squeeze(2)
        none = square <= noise.clamp_min(torch.finfo(square.dtype).tiny)
        inverse[:, :, slot] = square.masked_fill(none, torch.inf).reciprocal()
        return replace(state, q=q.put(slot, new), d=d.put(slot, new_fz), inverse=inverse, pairs=state.pairs + 1)

    def inverse_transpose(self, state: AndersonGSState, g: Flat) -> Flat:
        """H^T g, with H r = r - sum_i d_i <q_i, r> / <q_i, q_i>."""
        if not state.pairs:
            return g
        return state.q.add(g, state.d.dot(g) * state.inverse[:, :, : state.q.rows], -1)
