"""GMRES for the linear systems of backward passes: no method reaches the same residual in fewer products.

Setting: u = g + A u, M = I - A, r = g - M u. Arnoldi's method (`implicit.linear.arnoldi`) builds orthonormal columns V
of span{r, A r, ...}, one product per column, with

    A V_k = V_{k+1} H,     u' = u + V_k y,     y = argmin || beta e_1 - (I - H) y ||,     beta = ||r||

H is (k+1) x k, upper Hessenberg (`implicit.linear.hessenberg`).

If every product reduces the residual by a good factor, older columns contribute next to nothing, and short cycles are
as good as a long one. Therefore a cycle ends after a few products if they were that fast, and else goes on.

(Saad and Schultz, "GMRES", SIAM J. Sci. Stat. Comput. 7(3), 1986.)
"""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from implicit.argument_types import check_fields
from implicit.linear.arnoldi import orthogonalize
from implicit.linear.hessenberg import HessenbergSystem
from implicit.pytree import Flat, PerSample, norm, to_device, to_host
from implicit.solution import Result, Solution
from implicit.solvers.base import check_at_least
from implicit.solvers.history_buffer import HistoryBuffer
from implicit.stopping import Stop, classify

_SMALL = 1024  # samples of fewer numbers have long cycles only, since their basis takes little memory
_ONCE = 3  # a basis of fewer columns stays orthogonal enough with one pass of Gram-Schmidt


@dataclass(frozen=True)
class GMRES:
    """GMRES for u = g + A u; every sample is a system of its own and keeps the answer with which it converged.

    A sample has converged when ||g - (I - A) u|| <= atol + min(rtol ||u||, sqrt(rtol) ||g||). The bound by ||g|| is for
    a singular I - A, where u grows until rtol ||u|| exceeds the residual. The residual is that of the recurrence, which
    costs no product, but at least `eps` ||u||, the rounding error: a sample whose tolerance is smaller ends as
    `STALLED`. Products are taken for all samples until the last one has converged, and the host reads the residuals
    after each (`Stop.check_every` and `Stop.late` have no effect).

    A sample of at least 1024 numbers ends its cycle, and starts over from its residual, after `short` products if each
    reduced the residual by `rate`, and after `memory` products otherwise. A smaller sample always starts over after
    `memory`. Memory: `short` + 3 states while all samples are fast; else one state per product of the longest cycle.

    Args:
        memory: products of a cycle, >= 1.
        short: products of a fast cycle, >= 1; with `memory` or more, all cycles are of `memory` products.
        rate: a cycle is fast if its residual falls at least by this factor per product, on average, in [0, 1].
    """

    memory: int = 60
    short: int = 2
    rate: float = 0.7

    def __post_init__(self) -> None:
        check_fields(self)
        check_at_least(self, 1, "memory", "short")
        if not 0 <= self.rate <= 1:
            raise ValueError(f"GMRES.rate must lie in [0, 1], got {self.rate}.")

    def __call__(self, act: Callable[[Flat], Flat], g: Flat, stop: Stop, eps: float = 0.0) -> Solution:
        """Solve u = g + act(u) for a linear `act` with a relative rounding error of `eps`.

        The value of a sample whose products are not finite is its g.
        """
        return self.apart(act, g, stop, eps)[0]

    def apart(
        self,
        act: Callable[[Flat], Flat],
        g: Flat,
        stop: Stop,
        eps: float = 0.0,
        guess: PerSample | None = None,
        right: PerSample | None = None,
    ) -> tuple[Solution, bool | None]:
        """The solution, and whether the samples are systems of their own (None: not known).

        The vector of a converged sample is zero in the products for the others. If its product is not zero, `act`
        couples the samples: the second result is False and the solution invalid. The second result is None if all
        samples converged at the same product, since then no zero vector was multiplied.

        If g is the residual of a first guess, u is the correction; `guess` is the norm of the guess and `right` that
        of the right-hand side, to which the tolerance refers.
        """
        length, u = norm(g), torch.zeros_like(g)
        status = _Status(to_host(length), stop, max(eps, torch.finfo(g.dtype).eps))
        if guess is not None and right is not None:
            status.begin(to_host(guess), to_host(right))
        cycles = _Cycles(status.residual, 4 * torch.finfo(g.dtype).eps)
        short = min(self.short if g.shape[1] >= _SMALL else self.memory, self.memory)
        basis, v, size = HistoryBuffer(self.memory, first=short if short < self.memory else 0), _unit(g, length), ()
        apart: bool | None = None
        while status.open:
            # the newest basis vector; zero for samples that have converged or stalled
            idle = status.solved
            if idle.any():
                v = v.masked_fill(_mask(idle, v), 0)
            basis, v = _append(basis, cycles.place, v)
            # the part of its product orthogonal to the basis is the next vector; h is the newest column of H
            h, v, length = orthogonalize(act(v), basis, passes=1 if cycles.columns < _ONCE else 2)
            found = to_host(torch.cat((h, torch.stack((length, *size), dim=1)), dim=1))
            v, k = _unit(v, length), h.shape[1]
            # if the product of a zero vector is not zero, the vectors of other samples have contributed to it
            if idle.any():
                apart = not (np.abs(found[idle, : k + 1]) > 0).any()
                if not apart:
                    break
            # the least-squares problem with this column
            spent = cycles.add(found[:, :k], found[:, k], status.running)
            if spent.any():
                v = v.masked_fill(_mask(spent, v), 0)
            status.update(cycles, found[:, k + 1 :])
            # where a cycle ends, u moves to its solution, and the next cycle begins with the residual of this u
            over, size = cycles.over(short, self.memory, self.rate, status), ()
            if over.any():
                u = basis.add(u, _upload(cycles.y * over[:, None], basis.rows, u))
                basis, v = _start_over(basis, v, cycles, over)
                size = (norm(u),)
        lost = status.code == Result.NONFINITE
        return status.solution(torch.where(_mask(lost, g), g, u) if lost.any() else u), apart


def _append(basis: HistoryBuffer, place: np.ndarray, v: Flat) -> tuple[HistoryBuffer, Flat]:
    """The basis with v in row `place` of every sample; and v, as a view of the basis if all rows are the same."""
    last = int(place.max(initial=0))
    basis = basis.reserve(last, v)
    if not len(place) or np.ptp(place) == 0:
        basis = basis.set(last, v)
        return basis, basis.row(last)
    first = 0
    for block in basis.blocks:
        rows = np.flatnonzero((place >= first) & (place < first + block.shape[1]))
        b, k = (to_device(i, v.device) for i in (rows, place[rows] - first))
        block[b, k] = v[b]
        first += block.shape[1]
    return basis, v


def _start_over(basis: HistoryBuffer, v: Flat, cycles: "_Cycles", over: np.ndarray) -> tuple[HistoryBuffer, Flat]:
    """An empty basis and the direction of the residual for the samples in `over`; empties their `cycles` too."""
    rows, last = (t.numpy() for t in cycles.system.direction(torch.from_numpy(cycles.place)))
    last, rows = np.where(over, last, 1.0), rows * over[:, None]
    v = basis.add(v * _upload(last[:, None], 1, v)[:, 0], _upload(rows, basis.rows, v))
    cycles.start_over(over)
    return basis.clear(_mask(over, v)), v


def _unit(w: Flat, length: Tensor) -> Flat:
    return w / length.clamp_min(torch.finfo(w.dtype).tiny).unsqueeze(1)


def _upload(c: np.ndarray, width: int, like: Flat) -> Tensor:
    """Coefficients on the device, (B, 1, width), padded with zeros."""
    full = np.zeros((len(c), 1, width))
    full[:, 0, : c.shape[1]] = c[:, :width]
    return to_device(full, like.device, like.dtype)


def _mask(which: np.ndarray, like: Flat) -> Tensor:
    return to_device(which, like.device).unsqueeze(1)


class _Cycles:
    """min || beta e_1 - (I - H) y || for every sample, as H grows by columns; on the host, in float64.

    Samples may be at different places in their cycles.
    """

    def __init__(self, beta: np.ndarray, rounding: float) -> None:
        self.rounding = rounding
        self.place = np.zeros(len(beta), dtype=np.int64)  # number of columns of H in the present cycle
        self.beta = beta.copy()
        self.system = HessenbergSystem.empty(1, torch.from_numpy(beta.copy()))

    @property
    def columns(self) -> int:
        """The largest number of columns of a sample."""
        return int(self.place.max(initial=0))

    @property
    def y(self) -> np.ndarray:
        """(B, K) coefficients of the basis."""
        return self.system.y.numpy()

    @property
    def rho(self) -> np.ndarray:
        """(B,) residual, with a sign."""
        return self.system.rho.numpy()

    def add(self, h: np.ndarray, length: np.ndarray, running: np.ndarray) -> np.ndarray:
        """Append the newest column of H; returns where A v is in the span of the basis, up to rounding.

        Samples that have finished keep their y.
        """
        self.system = self.system.widen(self.columns + 1)
        width = min(h.shape[1], self.y.shape[1])
        column = np.zeros_like(self.y)
        column[:, :width] = -h[:, :width]
        column[np.arange(len(h)), self.place] += 1
        spent = length <= self.rounding * np.sqrt((h * h).sum(axis=1) + length * length)
        below, place = torch.from_numpy(np.where(spent, 0.0, -length)), torch.from_numpy(self.place)
        on = torch.from_numpy(running)
        self.system = self.system.add(torch.from_numpy(column), below, place, on, self.rounding)
        self.place = self.place + 1
        return spent

    def over(self, short: int, memory: int, rate: float, status: "_Status") -> np.ndarray:
        """Which samples end their cycle here; finished samples count as fast."""
        if not status.open:
            return np.ones_like(status.running)
        fast = ~status.running | (np.abs(self.rho) <= rate**short * self.beta)
        return fast & (self.place == short) | (self.place >= memory)

    def start_over(self, over: np.ndarray) -> None:
        """An empty H for the samples in `over`."""
        beta = np.abs(self.rho)
        self.beta = np.where(over, beta, self.beta)
        self.system = self.system.reset(torch.from_numpy(over), torch.from_numpy(beta))
        self.place = np.where(over, 0, self.place)


class _Status:
    """Residual, ||u|| and `Result` code of every sample."""

    def __init__(self, beta: np.ndarray, stop: Stop, eps: float) -> None:
        self.stop, self.eps, self.most = stop, eps, stop.rtol**0.5 * beta
        self.residual, self.size, self.guess = beta.copy(), np.zeros_like(beta), np.zeros_like(beta)
        self.evals = np.zeros(len(beta), dtype=np.int64)
        self.products = 0
        self.code = classify(beta, np.zeros_like(beta))
        self.running = self.code == Result.MAX_EVALS

    def begin(self, size: np.ndarray, right: np.ndarray) -> None:
        """Enter the norms of a first guess and of the right-hand side."""
        self.guess, self.size, self.most = size, size, self.stop.rtol**0.5 * right
        within = self.residual <= self._tolerance(size)
        self.code[self.running & within] = Result.CONVERGED
        self.running = self.code == Result.MAX_EVALS

    def _tolerance(self, size: np.ndarray) -> np.ndarray:
        return self.stop.atol + np.minimum(self.stop.rtol * size, self.most)

    @property
    def solved(self) -> np.ndarray:
        """Which samples have converged or stalled."""
        return (self.code == Result.CONVERGED) | (self.code == Result.STALLED)

    @property
    def open(self) -> bool:
        """Whether more products are to be taken."""
        return bool(self.running.any()) and self.products < self.stop.max_evals

    def update(self, cycles: _Cycles, size: np.ndarray) -> None:
        """The codes after one more product; `size` is (B, 1) ||u|| if samples have started over, else empty.

        Within a cycle, ||u|| is that at its beginning.
        """
        self.products += 1
        if size.size:
            self.size = np.maximum(size[:, 0], self.guess)
        step = np.sqrt((cycles.y * cycles.y).sum(axis=1))
        size = np.where(self.size > 0, self.size, step)
        floor = self.eps * np.maximum(size, step)  # the correction can be far longer than u if I - A is singular
        residual = np.maximum(np.abs(cycles.rho), floor)
        code = classify(residual, self._tolerance(size))
        code[(code == Result.MAX_EVALS) & (residual <= floor)] = Result.STALLED
        self.residual, self.code = (np.where(self.running, *x) for x in ((residual, self.residual), (code, self.code)))
        self.evals[self.running] = self.products
        self.running = self.running & (code == Result.MAX_EVALS)

    def solution(self, value: Flat) -> Solution:
        """The outcome, with `value`."""
        return Solution(
            value=value,
            residual=to_device(self.residual, value.device, value.dtype),
            result=to_device(self.code, value.device),
            evals=to_device(self.evals, value.device),
        )
