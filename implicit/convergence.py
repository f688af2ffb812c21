"""When a solve is good enough, and the books that are kept of it, sample by sample, on the host."""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor

from implicit.pytree import Flat, Layout, norm
from implicit.safeguard import Safeguard
from implicit.solution import Result, Solution
from implicit.solvers.base import AbstractSolver, Point
from implicit.stopping import Stop

_PATIENCE = 10  # evaluations without a new smallest residual before rounding error is blamed
_RUNNING = np.int8(-1)
_FEW = 64  # samples that are judged one by one
_TINY, _HUGE = 1e-15, 1e15  # norms outside may have lost their squares in float32
_ROUNDING = (
    25.0  # residuals below this many eps ||f(z)|| count as rounding, below 4 times it after 3 times the patience
)


@dataclass
class _Look:
    """A point on its way to being judged: its norms may still be moving to the host."""

    point: Point
    rows: np.ndarray  # the samples it holds
    calls: int
    sizes: tuple[Tensor, ...]  # ||r|| and ||f(z)||, (B,) each, on the host
    moved: "torch.cuda.Event | None"  # when they are there


@dataclass
class ConvergenceMonitor:
    """The books of one solve of B samples: who still runs, the best point of each, and how each one ended.

    `rows` are the samples that the loop evaluates at present: all of them, or with compaction those still running.
    """

    layout: Layout
    stop: Stop
    best_z: Flat
    watch: Callable[[int, np.ndarray], Any] | None = None
    patience: int = 0  # of the safeguard; 0: none
    running: Tensor | None = None  # (rows, 1) on the device, once a sample has finished
    plain: Tensor | None = None  # (rows, 1) on the device, once the safeguard has made a sample take plain steps
    done: bool = False
    _pending: _Look | None = None
    _looks: int = 0
    _calls: int = 0  # evaluations made when residuals were last read
    trace: list[np.ndarray] = field(default_factory=list)

    def __post_init__(self) -> None:
        size = self.best_z.shape[0]
        self.best_fz = self.best_z
        self.rows = np.arange(size)
        self.code = np.full(size, _RUNNING, dtype=np.int8)
        self.evals = np.zeros(size, dtype=np.int64)
        self.residual = np.full(size, np.inf)
        self.size = np.zeros(size)  # ||f(z)|| at the smallest residual
        self.since = np.zeros(size, dtype=np.int64)  # number of the evaluation whose residual was smallest
        self.guard = Safeguard(size, self.patience) if self.patience else None
        self.done = size == 0
        self._least: list[float] | np.ndarray = [np.inf] * size  # the smallest residuals,
        self._sizes: list[float] | np.ndarray | None = None  # if not yet in `size`: ||f(z)|| with them,
        self._oldest = 0  # and the number of the evaluation at which the first of them was found
        self._floor = max(self.stop.atol, 0.0 if self.layout.dtype == torch.float64 else _TINY)

    @property
    def idle(self) -> bool:
        """Whether samples are evaluated that have finished."""
        return bool((self.code[self.rows] != _RUNNING).any())

    def see(self, point: Point, calls: int, last: bool) -> Point:
        """Take in a point, the result of call number `calls`, now or one evaluation later; returns it."""
        self._looks += 1
        if self._looks % self.stop.check_every and not last:
            return point
        ready, self._pending = self._pending, _Look(point, self.rows, calls, *_fetch(point))
        if ready is not None:
            self._read(ready, calls)
        if last or not self.stop.late:
            self._read(self._pending, calls)
            self._pending = None
        return point

    def hold(self, z: Flat, point: Point) -> Flat:
        """z, with plain steps where the safeguard wants them and finished samples kept where they ended."""
        if self.plain is not None:
            z = torch.where(self.plain, point.fz, z)
        return z if self.running is None else torch.where(self.running, z, self._best().z)

    def back(self, point: Point, memory: Any, solver: AbstractSolver[Any]) -> tuple[Point, Any]:
        """The samples that the safeguard sends back, at their best point and without a history."""
        if self.guard is None or not self.guard.waiting:
            return point, memory
        mask, self.plain = self._mask(self.guard.take()), self._mask(self.guard.plain)
        best = self._best()
        point = Point(torch.where(mask, best.z, point.z), torch.where(mask, best.fz, point.fz))
        return point, solver.restart(point, memory, mask)

    def _mask(self, which: np.ndarray) -> Tensor:
        # CUDA stages pageable memory before it returns: such a copy neither waits for the device nor needs the array
        return torch.from_numpy(which[self.rows]).to(self.layout.device, non_blocking=True).unsqueeze(1)

    def _best(self) -> Point:
        """The best points of `rows`."""
        if len(self.rows) == len(self.code):
            return Point(self.best_z, self.best_fz)
        index = torch.from_numpy(self.rows).to(self.layout.device, non_blocking=True)
        return Point(self.best_z[index], self.best_fz[index])

    def compact(self) -> Tensor:
        """Turn to the running samples alone; returns their positions among the rows evaluated so far."""
        keep = np.flatnonzero(self.code[self.rows] == _RUNNING)
        self.rows = self.rows[keep]
        self.running = None
        if self.plain is not None and self.guard is not None:
            self.plain = self._mask(self.guard.plain)
        return torch.from_numpy(keep).to(self.layout.device, non_blocking=True)

    def _read(self, look: _Look, calls: int) -> None:
        self._calls = calls
        if look.moved is not None:
            look.moved.synchronize()
        if self._no_news(look):
            return
        self._open()
        rows = look.rows
        r, s = _exact(look.point, *_arrays(look.sizes))
        running = self.code[rows] == _RUNNING
        finite = np.isfinite(r) & np.isfinite(s)
        live = running & finite
        converged = live & (r <= self.stop.atol + self.stop.rtol * np.where(finite, s, 0))
        better = (live & (r < self.residual[rows])) | converged
        self._keep(look, better, r, s)
        floor, age = _ROUNDING * self.layout.eps * self.size[rows], look.calls - self.since[rows]
        best = self.residual[rows]
        spent = ((age >= _PATIENCE) & (best <= floor)) | ((age >= 3 * _PATIENCE) & (best <= 4 * floor))
        stalled = live & ~converged & spent
        broken = running & ~finite
        if self.guard is not None:
            broken &= ~self.guard.forgives(rows, broken, self.residual)
            still = live & ~converged & ~stalled
            self.guard.watch(rows[still], r[still], self.residual, look.calls)
        if self.watch is not None:
            full = np.full(len(self.code), np.nan)
            full[rows] = np.where(running, r, np.nan)
            self.trace.append(full)
            self.watch(look.calls, full)
        for code, which in ((Result.CONVERGED, converged), (Result.NONFINITE, broken), (Result.STALLED, stalled)):
            self.code[rows[which]] = code
        ended = rows[converged | broken | stalled]
        if len(ended):
            self.evals[ended] = calls
            self.done = not (self.code == _RUNNING).any()
            self.running = self._mask(self.code == _RUNNING)
        self._least = self.residual.tolist() if len(self.code) <= _FEW else self.residual
        self._oldest = int(self.since.min(initial=look.calls))

    def _no_news(self, look: _Look) -> bool:
        """Whether no sample ends or needs the safeguard, and all are better than ever or none is: nearly always."""
        if self.running is not None or self.watch is not None or len(look.rows) < len(self.code):
            return False
        rtol, floor = self.stop.rtol, self._floor
        if len(look.rows) <= _FEW:  # plain numbers, which cost a tenth of what so short arrays do
            r, s = look.sizes[0].tolist(), look.sizes[1].tolist()
            clear = all([new > rtol * size + floor for new, size in zip(r, s, strict=True)])
            gained = sum([new < old for new, old in zip(r, self._least, strict=True)])
        else:
            r, s = _arrays(look.sizes)
            clear = bool((r > rtol * s + floor).all())
            gained = np.count_nonzero(r < self._least)
        if not clear or (self.guard is not None and not self.guard.calm(look.calls)):
            return False
        if gained < len(look.rows):
            return not gained and self.guard is None and look.calls - self._oldest < _PATIENCE
        self.best_z, self.best_fz = look.point.z, look.point.fz
        self._least, self._sizes, self._oldest = r, s, look.calls
        return True

    def _open(self) -> None:
        """Enter into the arrays what `_no_news` has noted down."""
        if self._sizes is not None:
            self.residual[:], self.size[:], self._sizes = self._least, self._sizes, None
            self.since.fill(self._oldest)

    def _keep(self, look: _Look, better: np.ndarray, r: np.ndarray, s: np.ndarray) -> None:
        if not better.any():
            return
        rows, point = look.rows, look.point
        if len(rows) < len(self.code):
            which = torch.from_numpy(np.flatnonzero(better)).to(point.z.device, non_blocking=True)
            into = torch.from_numpy(rows[better]).to(point.z.device, non_blocking=True)
            self.best_z = self.best_z.index_copy(0, into, point.z[which])
            self.best_fz = self.best_fz.index_copy(0, into, point.fz[which])
        elif better.all():
            self.best_z, self.best_fz = point.z, point.fz
        else:
            mask = torch.from_numpy(better).to(point.z.device, non_blocking=True).unsqueeze(1)
            self.best_z = torch.where(mask, point.z, self.best_z)
            self.best_fz = torch.where(mask, point.fz, self.best_fz)
        kept = rows[better]
        self.residual[kept], self.size[kept], self.since[kept] = r[better], s[better], look.calls

    def solution(self, *, image: bool, trace: bool, state: Any) -> Solution:
        """The books closed."""
        self._open()
        converged = self.code == Result.CONVERGED
        value = self.best_fz
        if not image and converged.any():
            mask = torch.from_numpy(converged).to(value.device, non_blocking=True).unsqueeze(1)
            value = self.best_z if converged.all() else torch.where(mask, self.best_z, value)
        self.evals[self.code == _RUNNING] = self._calls
        code = np.where(self.code == _RUNNING, np.int8(Result.MAX_EVALS), self.code)
        device, dtype = value.device, value.dtype
        return Solution(
            value=self.layout.unpack(value),
            residual=torch.from_numpy(self.residual).to(device, dtype, non_blocking=True),
            result=torch.from_numpy(code).to(device, non_blocking=True),
            evals=torch.from_numpy(self.evals).to(device, non_blocking=True),
            trace=torch.from_numpy(np.stack(self.trace)).to(device, dtype, non_blocking=True) if trace else None,
            state=state,
        )


def _fetch(point: Point) -> tuple[tuple[Tensor, ...], "torch.cuda.Event | None"]:
    """(||r||, ||f(z)||) on their way to the host, and the event that says that they are there."""
    r, fz = point.r, point.fz
    if fz.requires_grad:
        r, fz = r.detach(), fz.detach()
    sizes = norm(r), norm(fz)
    if not fz.is_cuda:
        return sizes, None
    sizes = torch.stack(sizes).to("cpu", non_blocking=True).unbind()
    moved = torch.cuda.Event()
    moved.record()
    return sizes, moved


def _arrays(sizes: tuple[Tensor, ...]) -> tuple[np.ndarray, ...]:
    return tuple(size.numpy().astype(np.float64) for size in sizes)


def _exact(point: Point, r: np.ndarray, s: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The norms r and s, once more in double where squares may have under- or overflowed."""
    if point.fz.dtype == torch.float64 or not r.size:
        return r, s
    if min(r.min(), s.min()) >= _TINY and max(r.max(), s.max()) <= _HUGE:
        return r, s
    with torch.no_grad():
        sizes = norm(point.r.double()), norm(point.fz.double())
    return sizes[0].cpu().numpy(), sizes[1].cpu().numpy()
