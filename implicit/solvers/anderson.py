"""Anderson acceleration (type II): the mixture of recent points whose residual is smallest.

Setting: r_k = f(z_k) - z_k. With the differences of the last m points as columns,

    dR = [r_{k-m+2} - r_{k-m+1}, ..., r_k - r_{k-1}],     dF likewise of f(z),

    gamma = argmin || r_k - dR gamma ||^2 + ridge sum_i (||dR_i|| gamma_i)^2
    z_{k+1} = (f(z_k) - dF gamma) - damping (r_k - dR gamma)

(Anderson 1965; Walker and Ni, SIAM J. Numer. Anal. 49(4), 2011.)
"""

from dataclasses import dataclass, replace

import numpy as np
import torch
from jaxtyping import Bool, Float
from torch import Tensor

from implicit.pytree import Flat
from implicit.solvers.base import AbstractSolver, Evaluator, Point
from implicit.solvers.history_buffer import dots, near, put, put_difference

# squared columns below this are none, for their products have underflowed; their diagonal is 1 and their weight 0
_NONE = {torch.float64: 1e-290, torch.float32: torch.finfo(torch.float32).tiny}

_PLAIN = 8  # columns up to which plain numbers are quicker than LAPACK's call


@dataclass(frozen=True)
class AndersonState:
    """The last point, rings of K = memory - 1 differences, the Gram matrix of dR with the ridge, 1 for <0, 0>."""

    fz: Flat
    r: Flat
    df: Float[Tensor, "B K N"]
    dr: Float[Tensor, "B K N"]
    gram: Float[Tensor, "B K K"]
    steps: int = 0
    columns: int = 0
    fresh: bool = True  # the last point is not apart from the next: no difference yet


@dataclass(frozen=True)
class Anderson(AbstractSolver[AndersonState]):
    """Anderson acceleration, type II, of `memory` points per sample.

    The least-squares problem is solved in float64 through its Gram matrix, of which every step renews one row. The
    ridge is relative to the differences, so the unit of z changes nothing. Memory: 2 memory states.

    Args:
        memory: number of points mixed, >= 1; 1 is the Picard iteration.
        damping: share of the mixed old iterate kept, in [0, 1).
        ridge: relative ridge, > 0; None takes 1e-14 for float64 histories and 1e-7 for float32.
        start: number of plain steps before the first mixture, >= 1. Differences are collected from the beginning.
        safeguard: go back to the best point after a blow-up, and to plain steps where nothing is gained.
    """

    memory: int = 5
    damping: float = 0.0
    ridge: float | None = None
    start: int = 1
    safeguard: bool = True

    def __post_init__(self) -> None:
        for name in ("memory", "start"):
            if getattr(self, name) < 1:
                raise ValueError(f"Anderson.{name} must be at least 1, got {getattr(self, name)}.")
        if not 0 <= self.damping < 1:
            raise ValueError(f"Anderson.damping must lie in [0, 1), got {self.damping}.")
        if self.ridge is not None and not self.ridge > 0:
            raise ValueError(f"Anderson.ridge must be positive, got {self.ridge}.")

    def init(self, point: Point) -> AndersonState:
        rows, numbers = point.z.shape
        k = self.memory - 1
        df, dr = point.z.new_zeros(rows, k, numbers), point.z.new_zeros(rows, k, numbers)
        gram = _none(torch.empty(rows, k, k, dtype=torch.float64, device=point.z.device))
        return AndersonState(point.fz, point.r, df, dr, gram)

    def resume(self, point: Point, state: AndersonState) -> AndersonState:
        if state.dr.shape[1] + 1 != self.memory:
            raise ValueError(f"state must come from a solver with memory={self.memory}, got {state.dr.shape[1] + 1}.")
        return replace(state, fz=point.fz, r=point.r, fresh=True)

    @property
    def patience(self) -> int:
        return min(2 * self.memory + 5, 30) if self.safeguard and self.memory > 1 else 0

    def restart(self, point: Point, state: AndersonState, mask: Bool[Tensor, "B 1"]) -> AndersonState:
        lost = mask.unsqueeze(2)
        return replace(
            state,
            fz=torch.where(mask, point.fz, state.fz),
            r=torch.where(mask, point.r, state.r),
            df=state.df.masked_fill(lost, 0),
            dr=state.dr.masked_fill(lost, 0),
            gram=torch.where(lost, _none(state.gram), state.gram),
        )

    def step(self, f: Evaluator, point: Point, state: AndersonState) -> tuple[Flat, AndersonState]:
        steps, k, r = state.steps + 1, self.memory - 1, point.r
        df, dr, gram, columns = state.df, state.dr, state.gram, state.columns
        slot = None if state.fresh or not k else columns % k
        columns += slot is not None
        mixes = steps >= self.start and columns > 0
        if columns and near(point.fz, r, state.fz, state.r, df, dr, gram):
            z = self._near(point, state, slot, mixes)
            return z, AndersonState(point.fz, r, df, dr, gram, steps, columns, False)
        if slot is not None:
            df = put_difference(df, slot, point.fz, state.fz)
            dr = put_difference(dr, slot, r, state.r)
            gram = self._renew(gram, slot, dots(dr, dr[:, slot]))
        now = AndersonState(point.fz, r, df, dr, gram, steps, columns, False)
        if not mixes:
            return self._damp(point.fz, r), now
        gamma = _weights(gram, dots(dr, r))
        z = torch.baddbmm(point.fz.unsqueeze(1), gamma, df, alpha=-1).squeeze(1)
        if not self.damping:
            return z, now
        return self._damp(z, torch.baddbmm(r.unsqueeze(1), gamma, dr, alpha=-1).squeeze(1)), now

    @np.errstate(all="ignore")
    def _near(self, point: Point, state: AndersonState, slot: int | None, mixes: bool) -> Flat:
        """The same step in numpy, on the same memory: small states wait for calls, and these cost a quarter."""
        fz, r, df, dr = point.fz.numpy(), point.r.numpy(), state.df.numpy(), state.dr.numpy()
        gram = state.gram.numpy()
        if slot is not None:
            np.subtract(fz, state.fz.numpy(), out=df[:, slot])
            np.subtract(r, state.r.numpy(), out=dr[:, slot])
            row = (dr @ dr[:, slot, :, None])[:, :, 0].astype(np.float64)
            size = row[:, slot]
            gram[:, slot] = gram[:, :, slot] = row
            gram[:, slot, slot] = (size + (size < _NONE[point.r.dtype])) * (1 + self._ridge(point.r.dtype))
        if not mixes:
            return self._damp(point.fz, point.r)
        gamma = _solve(gram, dr @ r[:, :, None])
        z = torch.empty_like(point.fz)  # in torch's alignment, on which the rounding of a product may depend
        np.subtract(fz, (gamma @ df)[:, 0], out=z.numpy())
        return self._damp(z, point.r - torch.from_numpy((gamma @ dr)[:, 0])) if self.damping else z

    def _ridge(self, dtype: torch.dtype) -> float:
        return self.ridge or (1e-14 if dtype == torch.float64 else 1e-7)

    def _renew(self, gram: Float[Tensor, "B K K"], slot: int, row: Float[Tensor, "B 1 K"]) -> Float[Tensor, "B K K"]:
        """The Gram matrix with a new row and column."""
        new = row.double().squeeze(1)
        torch.threshold_(new[:, slot], _NONE[row.dtype], 1).mul_(1 + self._ridge(row.dtype))
        return put(put(gram, slot, new).mT, slot, new).mT

    def _damp(self, z: Flat, r: Flat) -> Flat:
        return z - self.damping * r if self.damping else z

    def inverse_transpose(self, state: AndersonState, g: Flat) -> Flat:
        """H^T g, with H r = r - dF gamma(r)."""
        if not state.columns:
            return g
        gamma = _weights(state.gram, dots(state.df, g))
        return torch.baddbmm(g.unsqueeze(1), gamma, state.dr, alpha=-1).squeeze(1)


def _none(like: Float[Tensor, "B K K"]) -> Float[Tensor, "B K K"]:
    """The Gram matrix of columns of zeros."""
    return torch.eye(like.shape[1], dtype=like.dtype, device=like.device).repeat(like.shape[0], 1, 1)


def _weights(gram: Float[Tensor, "B K K"], rhs: Float[Tensor, "B 1 K"]) -> Float[Tensor, "B 1 K"]:
    """The solution of the small systems in float64. Rows are taken in one unit, for pivots are chosen between rows."""
    rows = gram.diagonal(dim1=1, dim2=2).rsqrt().unsqueeze(2)
    return torch.linalg.solve_ex(gram * rows, rhs.mT * rows)[0].mT.to(rhs.dtype)


def _solve(gram: np.ndarray, rhs: np.ndarray) -> np.ndarray:
    """`_weights` in numpy; one small system, by Gauss's elimination in plain numbers, which is the quickest then."""
    try:
        if len(rhs) == 1 and rhs.shape[1] <= _PLAIN:
            return np.array([[_eliminate(gram[0].tolist(), rhs[0, :, 0].tolist())]], rhs.dtype)
        rows = 1 / np.sqrt(gram.diagonal(0, 1, 2)[:, :, None])
        return np.linalg.solve(gram * rows, rhs * rows).swapaxes(1, 2).astype(rhs.dtype)
    except (ZeroDivisionError, np.linalg.LinAlgError):  # one is singular, which torch leaves to that sample
        return _weights(torch.from_numpy(gram), torch.from_numpy(rhs).mT).numpy()


def _eliminate(a: list[list[float]], b: list[float]) -> list[float]:
    """The solution of a x = b without pivots, which a symmetric positive matrix does not need; a and b are used up."""
    n = len(b)
    for j in range(n):
        row, x, unit = a[j], b[j], 1 / a[j][j]
        for i in range(j + 1, n):
            c = row[i] * unit
            b[i] -= c * x
            below = a[i]
            for k in range(i, n):
                below[k] -= c * row[k]
    for j in range(n - 1, -1, -1):
        row, x = a[j], b[j]
        for k in range(j + 1, n):
            x -= row[k] * b[k]
        b[j] = x / row[j]
    return b
