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
from implicit.solvers.history_buffer import Ring, dots, near

_NOISE = 2  # a difference of residuals within that many eps of f(z) is made of rounding errors


@dataclass(frozen=True)
class AndersonGSMemory:
    """The last point, the pairs, and 1 / <q_i, q_i>, 0 for pairs not in use."""

    fz: Flat
    r: Flat
    q: Ring
    d: Ring
    inverse: Float[Tensor, "B 1 K"]
    pairs: int = 0
    fresh: bool = True  # the last point is not from this solve or not apart from the next: no pair yet


@dataclass(frozen=True)
class AndersonGS(AbstractSolver[AndersonGSMemory]):
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

    def init(self, point: Point) -> AndersonGSMemory:
        none = Ring(self.memory)
        return AndersonGSMemory(point.fz, point.r, none, none, point.z.new_zeros(point.z.shape[0], 1, self.memory))

    def resume(self, point: Point, memory: AndersonGSMemory) -> AndersonGSMemory:
        if memory.q.memory != self.memory:
            raise ValueError(f"state must come from a solver with memory={self.memory}, got {memory.q.memory}.")
        return replace(memory, fz=point.fz, r=point.r, fresh=True)

    @property
    def patience(self) -> int:
        return max(30, self.memory + 10) if self.safeguard else 0

    def restart(self, point: Point, memory: AndersonGSMemory, mask: Bool[Tensor, "B 1"]) -> AndersonGSMemory:
        return replace(
            memory,
            fz=torch.where(mask, point.fz, memory.fz),
            r=torch.where(mask, point.r, memory.r),
            inverse=memory.inverse.masked_fill(mask.unsqueeze(2), 0),
        )

    def step(self, f: Evaluator, point: Point, memory: AndersonGSMemory) -> tuple[Flat, AndersonGSMemory]:
        if not memory.fresh:
            if len(blocks := (*memory.q.blocks, *memory.d.blocks)) == 2 and memory.q.rows == self.memory:
                if near(point.fz, point.r, memory.fz, memory.r, memory.inverse, *blocks):
                    return self._near(point, memory)
            memory = self._learn(point, memory)
        elif not memory.pairs:
            return point.fz, replace(memory, fz=point.fz, r=point.r, fresh=False)
        c = memory.q.dot(point.r) * memory.inverse[:, :, : memory.q.rows]
        return memory.d.add(point.fz, c, -1), replace(memory, fz=point.fz, r=point.r, fresh=False)

    def _drop(self, dtype: torch.dtype) -> float:
        return torch.finfo(dtype).eps ** 0.25 if self.drop is None else self.drop

    @np.errstate(all="ignore")
    def _near(self, point: Point, memory: AndersonGSMemory) -> tuple[Flat, AndersonGSMemory]:
        """`_learn` and the mixture in numpy, in the same memory: small states wait for calls, which cost less so."""
        slot, limits = memory.pairs % self.memory, torch.finfo(point.r.dtype)
        q, d, inverse = memory.q.blocks[0].numpy(), memory.d.blocks[0].numpy(), memory.inverse.numpy()[:, 0]
        fz, r = point.fz.numpy(), point.r.numpy()
        new, new_fz = r - memory.r.numpy(), fz - memory.fz.numpy()
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
        return z, AndersonGSMemory(point.fz, point.r, memory.q, memory.d, memory.inverse, memory.pairs + 1, False)

    def _learn(self, point: Point, memory: AndersonGSMemory) -> AndersonGSMemory:
        """The memory with the newest pair."""
        slot = memory.pairs % self.memory
        q, d = memory.q.room(slot, point.r), memory.d.room(slot, point.r)
        drop = self._drop(point.r.dtype)
        inverse = memory.inverse.clone()
        inverse[:, :, slot] = 0
        new, new_fz = point.r - memory.r, point.fz - memory.fz
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
        return replace(memory, q=q.put(slot, new), d=d.put(slot, new_fz), inverse=inverse, pairs=memory.pairs + 1)

    def transposed(self, memory: AndersonGSMemory, g: Flat) -> Flat:
        """H^T g, with H r = r - sum_i d_i <q_i, r> / <q_i, q_i>."""
        if not memory.pairs:
            return g
        return memory.q.add(g, memory.d.dot(g) * memory.inverse[:, :, : memory.q.rows], -1)
