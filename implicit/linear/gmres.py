"""GMRES for the linear systems of backward passes: no method reaches the same residual in fewer products.

Setting: u = g + A u, M = I - A, r = g - M u. Arnoldi's method builds orthonormal columns V of span{r, A r, ...}, one
product a column, with

    A V_k = V_{k+1} H,     u' = u + V_k y,     y = argmin || beta e_1 - (I - H) y ||,     beta = ||r||

H is (k+1) x k, upper Hessenberg. With Q the product of the Givens rotations that make I - H triangular,
Q (I - H) = [R; 0] and Q beta e_1 = [t; rho]: y = R^-1 t, and |rho| is the residual. Q and R^-1 grow by one row and
column a product.

Where every product takes the residual down by a good factor, what the older columns still know is worth next to
nothing, and a few columns, over and over, are as good as all of them. So every cycle begins short, and one that is slow
goes on to be a long one: nothing is thrown away.

(Saad and Schultz, "GMRES", SIAM J. Sci. Stat. Comput. 7(3), 1986.)
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from implicit.linear.arnoldi import orthogonalize
from implicit.pytree import Flat, norm, to_device, to_host
from implicit.solution import Result, Solution
from implicit.solvers.history_buffer import HistoryBuffer
from implicit.stopping import Stop

_RUNNING = np.int8(-1)
_SMALL = 1024  # numbers of a sample whose basis is not worth saving
_ONCE = 3  # columns that stay orthogonal enough without a second pass


@dataclass(frozen=True)
class GMRES:
    """GMRES for u = g + A u; every sample is a system of its own and keeps the answer that contented it.

    A sample is content when ||g - (I - A) u|| <= atol + min(rtol ||u||, sqrt(rtol) ||g||): the second, since where
    I - A is singular, u grows until any residual is small beside it. The residual is the recurrence's, which costs no
    product, and is never called smaller than rounding, `eps` ||u||: a tolerance below that ends as `STALLED`. Products
    are taken for all samples until the last is content; the host looks at each (`Stop.check_every` and `Stop.late`
    play no part).

    A sample of at least 1024 numbers starts over from its residual after `short` products if they made that smaller by
    `rate` each, and after `memory` products otherwise; a smaller one always does so after `memory`. Memory: `short`
    states and three while all samples are fast; else as many states as the longest cycle has products.

    Args:
        memory: products before a sample starts over from its residual, >= 1.
        short: the same for a sample that is fast, >= 1; `memory` or more: no sample is.
        rate: factor a product that is fast, in [0, 1].
    """

    memory: int = 60
    short: int = 2
    rate: float = 0.7

    def __post_init__(self) -> None:
        for name in ("memory", "short"):
            if getattr(self, name) < 1:
                raise ValueError(f"GMRES.{name} must be at least 1, got {getattr(self, name)}.")
        if not 0 <= self.rate <= 1:
            raise ValueError(f"GMRES.rate must lie in [0, 1], got {self.rate}.")

    def __call__(self, act: Callable[[Flat], Flat], g: Flat, stop: Stop, eps: float = 0.0) -> Solution:
        """Solve u = g + act(u) for a linear `act` with rounding errors of `eps`, relative.

        A sample whose products are not finite has its g for a value.
        """
        return self.apart(act, g, stop, eps)[0]

    def apart(self, act: Callable[[Flat], Flat], g: Flat, stop: Stop, eps: float = 0.0) -> tuple[Solution, bool | None]:
        """The solution, and whether the samples are systems of their own, as far as that shows at no cost.

        A sample that is content is multiplied as zero, and what comes back for it comes from the others: False, and
        the solution is none. None: all were content at once.
        """
        length, u = norm(g), torch.zeros_like(g)
        books = _Books(to_host(length), stop, max(eps, torch.finfo(g.dtype).eps))
        fit = _LeastSquares(books.residual, 4 * torch.finfo(g.dtype).eps)
        short = min(self.short if g.shape[1] >= _SMALL else self.memory, self.memory)
        basis, v, size = HistoryBuffer(self.memory, first=short if short < self.memory else 0), _unit(g, length), ()
        apart: bool | None = None
        while books.open:
            idle = books.content
            if idle.any():
                v = v.masked_fill(_mask(idle, v), 0)
            basis, v = _append(basis, fit.place, v)
            h, v, length = orthogonalize(act(v), basis, passes=1 if fit.columns < _ONCE else 2)
            found = to_host(torch.cat((h, torch.stack((length, *size), dim=1)), dim=1))
            v, k = _unit(v, length), h.shape[1]
            if idle.any():
                apart = not (np.abs(found[idle, : k + 1]) > 0).any()
                if not apart:
                    break
            spent = fit.add(found[:, :k], found[:, k], books.running)
            if spent.any():
                v = v.masked_fill(_mask(spent, v), 0)
            books.judge(fit, found[:, k + 1 :])
            over, size = fit.over(short, self.memory, self.rate, books), ()
            if over.any():
                u = basis.add(u, _upload(fit.y * over[:, None], basis.rows, u))
                basis, v = _start_over(basis, v, fit, over)
                size = (norm(u),)
        lost = books.code == Result.NONFINITE
        return books.solution(torch.where(_mask(lost, g), g, u) if lost.any() else u), apart


def _append(basis: HistoryBuffer, place: "int | np.ndarray", v: Flat) -> tuple[HistoryBuffer, Flat]:
    """The basis with v in row `place` of every sample, and v as it lies there where that is one row."""
    if isinstance(place, int):
        basis = basis.reserve(place, v).set(place, v)
        return basis, basis.row(place)
    first, basis = 0, basis.reserve(int(place.max()), v)
    for block in basis.blocks:
        rows = np.flatnonzero((place >= first) & (place < first + block.shape[1]))
        b, k = (to_device(i, v.device) for i in (rows, place[rows] - first))
        block[b, k] = v[b]
        first += block.shape[1]
    return basis, v


def _start_over(basis: HistoryBuffer, v: Flat, fit: "_LeastSquares", over: np.ndarray) -> tuple[HistoryBuffer, Flat]:
    """An empty basis and the direction of the residual, for the samples that are `over`; changes `fit` likewise."""
    rows, last = fit.residual()
    last, rows = np.where(over, last, 1.0), rows * over[:, None]
    v = basis.add(v * _upload(last[:, None], 1, v)[:, 0], _upload(rows, basis.rows, v))
    fit.start_over(over)
    return basis.clear(_mask(over, v)), v


def _unit(w: Flat, length: Tensor) -> Flat:
    return w / length.clamp_min(torch.finfo(w.dtype).tiny).unsqueeze(1)


def _upload(c: np.ndarray, width: int, like: Flat) -> Tensor:
    """Coefficients on the device, (B, 1, width): filled up with zeros."""
    full = np.zeros((len(c), 1, width))
    full[:, 0, : c.shape[1]] = c[:, :width]
    return to_device(full, like.device, like.dtype)


def _mask(which: np.ndarray, like: Flat) -> Tensor:
    return to_device(which, like.device).unsqueeze(1)


class _LeastSquares:
    """min || beta e_1 - (I - H) y || for every sample, as H grows by columns; each at its own `place` in its cycle.

    All on the host: B samples, room for K columns.
    """

    def __init__(self, beta: np.ndarray, rounding: float) -> None:
        self.rounding = rounding
        self.samples = np.arange(len(beta))
        self.place: int | np.ndarray = 0  # columns so far; a number while it is the same for all
        self.beta, self.rho = beta.copy(), beta.copy()
        self.q = np.ones((len(beta), 1, 1))  # (B, K + 1, K + 1)
        self.inverse = np.zeros((len(beta), 1, 1))  # R^-1, likewise
        self.y = np.zeros((len(beta), 1))

    @property
    def columns(self) -> int:
        """The most that a sample has."""
        return self.place if isinstance(self.place, int) else int(self.place.max())

    @property
    def _at(self) -> tuple[Any, Any]:
        """Index of the next column."""
        return (slice(None), self.place) if isinstance(self.place, int) else (self.samples, self.place)

    def add(self, h: np.ndarray, length: np.ndarray, running: np.ndarray) -> np.ndarray:
        """Take in the newest column of H; whether it is in the span of the others, up to rounding.

        Samples that do not run any more keep their y.
        """
        if self.columns + 1 == self.y.shape[1]:
            self._grow()
        i, k = self._at
        column, width = np.zeros_like(self.y), min(h.shape[1], self.y.shape[1])
        np.negative(h[:, :width], out=column[:, :width])
        column[i, k] += 1
        size = np.sqrt((h * h).sum(axis=1) + length * length)
        spent = length <= self.rounding * size
        turned = (self.q @ column[:, :, None])[:, :, 0]
        a, b = turned[i, k], np.where(spent, 0.0, -length)
        pivot = np.hypot(a, b)
        none = pivot <= self.rounding * (1 + size)  # a column of zeros: it gets the weight 0 and rho stays
        pivot[none] = np.inf
        cos, sin = a / pivot, np.where(none, -1.0, b / pivot)
        last = self.q[i, k].copy()
        self.q[i, k], self.q[i, k + 1] = cos[:, None] * last, -sin[:, None] * last
        self.q[i, k, k + 1], self.q[i, k + 1, k + 1] = sin, cos
        new = (self.inverse @ turned[:, :, None])[:, :, 0]
        new[i, k] = -1
        new /= -pivot[:, None]
        self.inverse[i, :, k] = new
        self.y += (cos * self.rho * running)[:, None] * new
        self.rho = np.where(running, -sin * self.rho, 0.0)
        self.place = k + 1
        return spent

    def _grow(self) -> None:
        """Room for twice the columns."""
        old = self.y.shape[1]
        q, inverse = np.zeros((2, len(self.beta), 2 * old + 2, 2 * old + 2))
        y = np.zeros((len(self.beta), 2 * old + 2))
        q[:] = np.eye(2 * old + 2)
        q[:, :old, :old], inverse[:, :old, :old], y[:, :old] = self.q, self.inverse, self.y
        self.q, self.inverse, self.y = q, inverse, y

    def over(self, short: int, memory: int, rate: float, books: "_Books") -> np.ndarray:
        """Whose cycle ends here; those that do not run any more are fast."""
        if not books.open:
            return np.ones_like(books.running)
        if isinstance(self.place, int) and self.place not in (short, memory):
            return np.zeros_like(books.running)
        fast = ~books.running | (np.abs(self.rho) <= rate**short * self.beta)
        return fast & (self.place == short) | (self.place >= memory)

    def residual(self) -> tuple[np.ndarray, np.ndarray]:
        """The unit vector along the residual, in terms of the basis (B, K) and of the vector after it (B,)."""
        i, k = self._at
        rows = np.sign(self.rho)[:, None] * self.q[i, k]
        last = rows[i, k].copy()
        rows[i, k] = 0
        return rows, last

    def start_over(self, over: np.ndarray) -> None:
        """An empty H for the samples that are `over`."""
        self.q[over], self.inverse[over], self.y[over] = np.eye(self.y.shape[1]), 0, 0
        self.rho[over] = self.beta[over] = np.abs(self.rho[over])
        place = np.where(over, 0, self.place)
        self.place = place if np.ptp(place) else int(place[0])


class _Books:
    """How each sample stands."""

    def __init__(self, beta: np.ndarray, stop: Stop, eps: float) -> None:
        self.stop, self.eps, self.most = stop, eps, stop.rtol**0.5 * beta
        self.residual, self.size = beta.copy(), np.zeros_like(beta)
        self.evals = np.zeros(len(beta), dtype=np.int64)
        self.products = 0
        self.code = np.where(beta == 0, int(Result.CONVERGED), int(_RUNNING)).astype(np.int8)
        self.code[~np.isfinite(beta)] = Result.NONFINITE
        self.running = self.code == _RUNNING

    @property
    def content(self) -> np.ndarray:
        """Who has an answer."""
        return (self.code == Result.CONVERGED) | (self.code == Result.STALLED)

    @property
    def open(self) -> bool:
        """Whether more products are to be taken."""
        return bool(self.running.any()) and self.products < self.stop.max_evals

    def judge(self, fit: _LeastSquares, size: np.ndarray) -> None:
        """Take in what one more product has brought; `size` is ||u|| (B, 1) where samples have started over, or empty.

        ||u|| within a cycle is that of its beginning.
        """
        self.products += 1
        if size.size:
            self.size = size[:, 0]
        step = np.sqrt((fit.y * fit.y).sum(axis=1))
        size = np.where(self.size > 0, self.size, step)
        floor = self.eps * np.maximum(size, step)  # a step can be far longer than u was, where I - A is singular
        residual = np.maximum(np.abs(fit.rho), floor)
        self.residual = np.where(self.running, residual, self.residual)
        content = residual <= self.stop.atol + np.minimum(self.stop.rtol * size, self.most)
        for code, which in (
            (Result.STALLED, residual <= floor),
            (Result.CONVERGED, content),
            (Result.NONFINITE, ~np.isfinite(residual)),
        ):
            self.code[self.running & which] = code
        self.evals[self.running] = self.products
        self.running = self.code == _RUNNING

    def solution(self, value: Flat) -> Solution:
        """The books closed."""
        code = np.where(self.running, np.int8(Result.MAX_EVALS), self.code)
        return Solution(
            value=value,
            residual=to_device(self.residual, value.device, value.dtype),
            result=to_device(code, value.device),
            evals=to_device(self.evals, value.device),
        )
