"""Convergence of a solve, sample by sample: status, best iterate, and the final test of what is returned.

The loop (`implicit.iterate`) hands every evaluated point to a `ConvergenceMonitor`, which reads its norms on the host:

    running      no decision yet
    converged    the criterion (`implicit.stopping`) holds; the sample is frozen at this z
    nonfinite    f(z) is NaN or infinite and a retry from the best iterate failed, or none was possible
    stopped      `Stop.when` held; the sample is frozen at this z
    stalled      the smallest residual is rounding error and has not improved for some evaluations

Frozen samples are evaluated along with the running ones, so that their residual is known at every point. One that no
longer meets the tolerance has lost it to the other samples (f couples them) or to noise in f (two values at one z).
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor

from implicit.loop.observation import Observation, as_array, fetch
from implicit.loop.second_start import SecondStart
from implicit.options import Fold
from implicit.pytree import Flat, to_device, to_host
from implicit.solution import Result
from implicit.solvers.base import AbstractSolver, Point
from implicit.staged_safeguard import Stage, StagedSafeguard
from implicit.stopping import Criterion, classify

_RUNNING = np.int8(-1)
_PATIENCE = 10  # evaluations without a new smallest residual before rounding error is assumed
_AGED = 3  # evaluations without one after which the last of the budget is spent on the best iterate
_LISTS = 64  # samples up to which Python lists are quicker than arrays
_ROUNDING = 25.0  # residuals below this many eps ||f(z)|| count as rounding, below 4 times it after 3 times _PATIENCE
REPEATABLE = 100.0  # eps ||f(z)|| by which two evaluations of f at one z may differ


@dataclass
class ConvergenceMonitor:
    """Status of B samples: which still run, the best iterate of each, and how each one ended.

    `rows` are the samples that the loop evaluates at present: all of them, or with compaction those still running.
    """

    criterion: Criterion
    best_z: Flat
    callback: Callable[[int, np.ndarray], Any] | None = None
    safeguard: StagedSafeguard | None = None
    begin: int = 0  # evaluations made before
    trace: list[np.ndarray] = field(default_factory=list)
    fold: Fold | None = None  # of the evaluations
    running: Tensor | None = None  # (rows, 1) on the device, once a sample has finished
    use_picard: Tensor | None = None  # (rows, 1) on the device, once the safeguard has set a sample to plain steps
    use_newton: Tensor | None = None  # (rows, 1) on the device, samples in the safeguard's Newton-Krylov stage, if any
    scale: Tensor | None = None  # (rows, 1) on the device, the share of the next step to take, if not all of it
    at_start: Tensor | None = None  # (rows, 1) on the device, samples that are evaluated at z0 next, if any
    done: bool = False
    inconsistent: bool = False  # f gave another value at the z of a sample: coupling or noise
    noisy: bool = False  # it was noise

    def __post_init__(self) -> None:
        size = self.best_z.shape[0]
        self.layout, self.stop = self.criterion.layout, self.criterion.stop
        self.best_fz = self.best_z
        self.second = SecondStart(self.best_z)
        self.rows = np.arange(size)
        self.code = np.full(size, _RUNNING, dtype=np.int8)
        self.evals = np.zeros(size, dtype=np.int64)
        self.residual = np.full(size, np.inf)  # smallest
        self.size = np.zeros(size)  # ||f(z)|| with it
        # the same as absolute norms: with `norm="leaf"` and for joined samples those above are relative
        self.absolute = (
            (np.full(size, np.inf), np.zeros(size)) if self.criterion.grouped else (self.residual, self.size)
        )
        self.since = np.zeros(size, dtype=np.int64)  # number of the evaluation that gave it
        self.reset_at = np.zeros(size, dtype=np.int64)  # evaluations made when the sample was last reset
        self.done = size == 0
        self._held = np.zeros(size, dtype=bool)  # evaluated at their best iterate
        self._lost = np.zeros(0, dtype=np.int64)  # samples that had converged and meet the tolerance no longer
        self._pending: Observation | None = None
        self.last: tuple[np.ndarray, np.ndarray, int] | None = None  # rows, held, calls of the reading before
        self.observed: Point | None = None  # where f gave another value than before
        self._new = True  # nothing was read yet
        self._looks = self._made = self._calls = 0  # looks, evaluations made, evaluations made at the last reading
        # record of the fast path: smallest residuals, ||f(z)|| with them if not yet in `size`, the age of the oldest
        self._least: list[float] | np.ndarray = [np.inf] * size
        self._sizes: list[float] | np.ndarray | None = None
        self._oldest = 0
        self._floor: list[float] | np.ndarray = [np.inf] * size

    @property
    def has_finished_rows(self) -> bool:
        """Whether samples are evaluated that have finished."""
        return bool((self.code[self.rows] != _RUNNING).any())

    # ---- the loop's calls

    def observe(self, point: Point, calls: int, last: bool) -> None:
        """Take in the point of call number `calls`; its norms are read now or, with `Stop.late`, at the next call."""
        self._looks += 1
        self._made = calls
        if self.fold is not None:
            self.fold.add(self.layout, point.z, point.fz, self.criterion.joint)
        first = self._looks == 1 and self.stop.check_every > 1 and not last  # read along with the first reading
        if self._looks % self.stop.check_every and not last and not first:
            return
        sizes, ready = fetch(self.criterion, point)
        stopped = self.criterion.stopped(point.z, point.fz)
        seen = Observation(point, self.rows, self._held[self.rows], calls, sizes, ready, stopped)
        due, self._pending = self._pending, seen
        if due is not None:
            self._read(due, calls)
        if (last or not self.stop.late) and not first:
            self._read(self._pending, calls)
            self._pending = None

    def next_iterate(self, z: Flat, point: Point, last: bool) -> Flat:
        """z with plain steps where the safeguard is on, and finished samples frozen where they ended.

        In the last evaluation of the budget a sample without recent progress is evaluated at its best iterate again:
        that costs it little, and shows whether f gives one value there.
        """
        if self.use_picard is not None:
            z = torch.where(self.use_picard, point.fz, z)
        if self.at_start is not None:
            z, self.at_start = torch.where(self.at_start, self._of_rows(self.second.z0), z), None
        if self.scale is not None:
            z = torch.where(self.scale < 1, torch.lerp(point.z, z, self.scale), z)
            # a sample in GMRES stays where it is for some evaluations before it takes its step
            self.scale = None if self.use_newton is None else torch.where(self.use_newton, self.scale, 1)
        if self.running is not None:
            z = torch.where(self.running, z, self.best_iterates().z)
        self._held = self.code != _RUNNING
        if last and not self.noisy and self._made - self._oldest >= _AGED:
            self._flush()
            aged = (self._made - self.since >= _AGED) & np.isfinite(self.residual) & ~self._held
            if aged.any():
                z, self._held = torch.where(self._mask(aged), self.best_iterates().z, z), self._held | aged
        return z

    def apply_resets(self, point: Point, state: Any, solver: AbstractSolver[Any]) -> tuple[Point, Any]:
        """The samples that the safeguard resets, at their best iterate and without a history."""
        if self.safeguard is None or not self.safeguard.pending:
            return point, state
        resets = self.safeguard.pop_resets()
        self._start_over(*self.safeguard.pop_starts())
        self.reset_at[resets] = self._made
        mask, failed = self._mask(resets), point
        self._set_stages()
        best = self.best_iterates()
        z, fz = torch.where(mask, best.z, point.z), torch.where(mask, best.fz, point.fz)
        point = Point(z, fz, point.product, point.remaining)
        self.scale = self._mask(self.safeguard.scale).to(self.layout.dtype) if self.safeguard.shortened else None
        return point, solver.retreat(point, failed, state, mask, self._mask(self.safeguard.on(Stage.CAUTIOUS)))

    def _start_over(self, over: np.ndarray, back: np.ndarray) -> None:
        """Begin a second attempt for the samples in `over`, and end that of those in `back`."""
        self._end_second(back)
        if over.any():
            self.second.begin(over, Point(self.best_z, self.best_fz), (self.residual, self.size, self.since))
            self.at_start = self._mask(over)

    def _end_second(self, which: np.ndarray) -> None:
        """Take back the best iterates of a first attempt that the second one has not improved on."""
        best = self.second.end(which, Point(self.best_z, self.best_fz), (self.residual, self.size, self.since))
        self.best_z, self.best_fz = best.z, best.fz

    def _set_stages(self) -> None:
        """Bring the masks of the safeguard's stages to the device."""
        if self.safeguard is None:
            return
        plain = self.safeguard.use_picard
        self.use_picard = self._mask(plain) if self.use_picard is not None or plain.any() else None
        newton = self.safeguard.on(Stage.NEWTON)
        self.use_newton = self._mask(newton) if newton.any() else None

    def without_newton(self) -> None:
        """f cannot be differentiated: the safeguard's Newton-Krylov stage is left out."""
        if self.safeguard is not None:
            self.safeguard.leave_out(Stage.NEWTON)
            self._set_stages()

    def compact(self) -> Tensor:
        """Turn to the running samples alone; returns their positions among the rows evaluated so far."""
        keep = np.flatnonzero(self.code[self.rows] == _RUNNING)
        self.rows = self.rows[keep]
        self.running = None
        self._set_stages()
        positions = to_device(keep, self.layout.device)
        self.scale = None if self.scale is None else self.scale[positions]
        return positions

    def accept_noise(self) -> None:
        """f gives two values at one z: continue with the samples that this has cost their convergence."""
        self.inconsistent, self.noisy, self.observed = False, True, None
        self._release(self._lost)

    # ---- reading

    def _read(self, seen: Observation, calls: int) -> None:
        self._calls = calls
        if seen.ready is not None:
            seen.ready.synchronize()
        if self._new:
            self._set_first(seen)
        if self._fast_path(seen):
            return
        self._flush()
        rows, self.last = seen.rows, (seen.rows, seen.held, seen.calls)
        r, s, tolerance = self._norms(seen.point, seen.sizes, rows, seen.held)
        self._check_held(seen, r, s, tolerance)

        # which samples converge here, and which have a new best iterate
        running = self.code[rows] == _RUNNING
        finite = np.isfinite(r) & np.isfinite(s)
        live = running & finite
        converged = live & (classify(r, tolerance) == Result.CONVERGED)
        away, absolute = np.zeros_like(live), (r, s)
        if self.safeguard is not None:
            absolute = self._absolute(seen, r, s)
            away = live & self.safeguard.ran_away(
                rows, *absolute, self.absolute[0][rows], self.absolute[1][rows], converged
            )
            converged &= ~away
        stopped = live & ~converged & (False if seen.stopped is None else seen.stopped.cpu().numpy())
        better = (live & (r < self.residual[rows])) | converged | stopped
        self._update_best(seen, better, r, s)
        if self.criterion.grouped:
            least = live & (absolute[0] < self.absolute[0][rows])
            for kept, new in zip(self.absolute, absolute, strict=True):
                kept[rows[least]] = new[least]

        # which have come to rounding error
        floor, age = _ROUNDING * self.layout.eps * self.size[rows], seen.calls - self.since[rows]
        best = self.residual[rows]
        at_rounding = ((age >= _PATIENCE) & (best <= floor)) | ((age >= 3 * _PATIENCE) & (best <= 4 * floor))
        stalled = live & ~converged & ~stopped & at_rounding

        # which have failed; a point made before a reset says nothing about the retry
        fresh = seen.calls > self.reset_at[rows]
        broken = running & ~finite & fresh
        if self.safeguard is not None:
            broken[fresh] &= ~self.safeguard.allow_retry(rows[fresh], broken[fresh], self.residual)
            still = live & ~converged & ~stopped & ~stalled & fresh
            self.safeguard.update(rows[still], r[still], self.residual, seen.calls - self.begin, away[still])
        if self.callback is not None:
            self._report(seen, r, running)
        ends = (converged, broken, stalled, stopped)
        codes = (Result.CONVERGED, Result.NONFINITE, Result.STALLED, Result.STOPPED)
        for code, which in zip(codes, ends, strict=True):
            self.code[rows[which]] = code
        ended = rows[np.logical_or.reduce(ends)]
        if len(ended):
            self.evals[ended] = calls
            self.done = not (self.code == _RUNNING).any()
            self.running = self._mask(self.code == _RUNNING)
        self._least = self.residual.tolist() if len(self.code) <= _LISTS else self.residual
        self._oldest = int(self.since.min(initial=seen.calls))

    def _set_first(self, seen: Observation) -> None:
        """The norm of the first f(z), and the least tolerance that follows from it."""
        self._new = False
        s = as_array(seen.sizes[1])
        unsafe = self.criterion.unsafe(s, s)
        if unsafe.any():
            s = np.where(unsafe, to_host(self.criterion.measure(seen.point.fz.detach(), scaled=True)), s)
        if not isinstance(self.criterion.first, np.ndarray):
            self.criterion.first = np.where(np.isfinite(s), s, 0.0)
        if not self.criterion.grouped:
            rtol, smallest, first = self.stop.rtol, self.criterion.smallest, self.criterion.first
            floor = self.stop.atol + rtol * smallest * first + self.criterion.tiny
            self._floor = floor.tolist() if len(floor) <= _LISTS else floor

    def _norms(
        self, point: Point, sizes: tuple[Tensor, Tensor], rows: np.ndarray, held: np.ndarray
    ) -> tuple[np.ndarray, ...]:
        """(residual, size, tolerance); norms whose squares may be out of range are taken again, scaled."""
        r, s = as_array(sizes[0]), as_array(sizes[1])
        unsafe = self.criterion.unsafe(r, s)
        zero = r == 0 if r.ndim == 1 else (r == 0).all(axis=1)
        unsafe[held & zero & (self.residual[rows] == 0)] = False  # known already
        if unsafe.any():
            with torch.no_grad():
                again = [to_host(self.criterion.measure(x, scaled=True)) for x in (point.r.detach(), point.fz.detach())]
            r, s = np.where(unsafe, again[0], r), np.where(unsafe, again[1], s)
        first = self.criterion.first
        return self.criterion.compare(r, s, first[rows] if isinstance(first, np.ndarray) else first)

    def _absolute(self, seen: Observation, r: np.ndarray, s: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """||f(z) - z|| and ||f(z)|| of the whole row."""
        if not self.criterion.grouped:
            return r, s
        with np.errstate(all="ignore"):
            r, s = (np.linalg.norm(as_array(x), axis=1) for x in seen.sizes)
        return r, s

    def _check_held(self, seen: Observation, r: np.ndarray, s: np.ndarray, tolerance: np.ndarray) -> None:
        """Whether samples that were evaluated where they were before have another residual now.

        A sample that had converged has lost it if its residual is above the tolerance too.
        """
        if not seen.held.any():
            return
        rows = seen.rows
        same = np.abs(r - self.residual[rows]) <= REPEATABLE * self.layout.eps * np.maximum(s, self.size[rows])
        # with `Stop.late` a better iterate may have been read after this point was made
        held = seen.held & (self.since[rows] < seen.calls - (self.stop.check_every if self.stop.late else 0))
        above = held & ~(r <= tolerance) & (self.code[rows] == Result.CONVERGED)
        lost = above & ~same
        moved = held & ~same & (self.code[rows] == _RUNNING) & np.isfinite(self.residual[rows])
        self._lost = rows[lost]
        kept = seen.held & (r <= tolerance) & (self.code[rows] == Result.CONVERGED)
        self.residual[rows[kept]] = r[kept]
        self._release(rows[above & same])  # by rounding, or by mates that move as little: the sample goes on
        if self.noisy:
            self._release(self._lost)
        elif lost.any() or moved.any():
            self.inconsistent, self.observed = True, seen.point

    def _release(self, rows: np.ndarray) -> None:
        """Let samples run again that had finished."""
        if len(rows):
            self.code[rows], self.residual[rows], self.since[rows] = _RUNNING, np.inf, self._calls
            self.running, self.done = self._mask(self.code == _RUNNING), False

    def _fast_path(self, seen: Observation) -> bool:
        """True if no sample finishes, none needs the safeguard, and all or none of the best iterates change.

        Only then nothing but the record of smallest residuals has to be updated, which costs a tenth.
        """
        if self.running is not None or self.callback is not None or self.criterion.grouped or seen.stopped is not None:
            return False
        if len(seen.rows) < len(self.code) or seen.held.any():
            return False
        rtol, count = self.stop.rtol, len(seen.rows)
        if count <= _LISTS:
            r, s = seen.sizes[0].tolist(), seen.sizes[1].tolist()
            clear = all([new > rtol * size + low for new, size, low in zip(r, s, self._floor, strict=True)])
            gained = sum([new < old for new, old in zip(r, self._least, strict=True)])
        else:
            r, s = as_array(seen.sizes[0]), as_array(seen.sizes[1])
            clear = bool((r > rtol * s + self._floor).all())
            gained = int(np.count_nonzero(r < self._least))
        if not clear or (self.safeguard is not None and not self.safeguard.is_quiet(seen.calls - self.begin)):
            return False
        if gained < count:
            return not gained and self.safeguard is None and seen.calls - self._oldest < _PATIENCE
        self.best_z, self.best_fz = seen.point.z, seen.point.fz
        self._least, self._sizes, self._oldest = r, s, seen.calls
        return True

    def _flush(self) -> None:
        """Write the deferred record of the fast path into the arrays."""
        if self._sizes is not None:
            self.residual[:], self.size[:], self._sizes = self._least, self._sizes, None
            self.since.fill(self._oldest)

    def _update_best(self, seen: Observation, better: np.ndarray, r: np.ndarray, s: np.ndarray) -> None:
        if not better.any():
            return
        rows, point = seen.rows, seen.point
        if len(rows) < len(self.code):
            which, into = (to_device(i, self.layout.device) for i in (np.flatnonzero(better), rows[better]))
            self.best_z = self.best_z.index_copy(0, into, point.z[which])
            self.best_fz = self.best_fz.index_copy(0, into, point.fz[which])
        elif better.all():
            self.best_z, self.best_fz = point.z, point.fz
        else:
            mask = to_device(better, self.layout.device).unsqueeze(1)
            self.best_z = torch.where(mask, point.z, self.best_z)
            self.best_fz = torch.where(mask, point.fz, self.best_fz)
        kept = rows[better]
        self.residual[kept], self.size[kept], self.since[kept] = r[better], s[better], seen.calls

    def _report(self, seen: Observation, r: np.ndarray, running: np.ndarray) -> None:
        """Residuals of all samples to the callback and the trace, NaN where they had finished before."""
        if self.criterion.joint > 1:
            apart, raw = self.criterion.apart(), [self.criterion.samples(as_array(t)) for t in seen.sizes]
            full = apart.compare(raw[0], raw[1], apart.first)[0]
        else:
            full = np.full(len(self.code), np.nan)
            full[seen.rows] = np.where(running, r, np.nan)
        self.trace.append(full)
        assert self.callback is not None
        self.callback(seen.calls, full)

    def _mask(self, which: np.ndarray) -> Tensor:
        return to_device(which[self.rows], self.layout.device).unsqueeze(1)

    def best_iterates(self) -> Point:
        """The best iterates of `rows`."""
        return Point(self._of_rows(self.best_z), self._of_rows(self.best_fz))

    def _of_rows(self, x: Tensor) -> Tensor:
        return x if len(self.rows) == len(self.code) else x[to_device(self.rows, self.layout.device)]

    # ---- the end

    def close(self) -> None:
        """No more evaluations: what still runs has spent the budget."""
        self._flush()
        before = self.residual.copy()
        self._end_second((self.code != Result.CONVERGED) & (self.code != Result.STOPPED))
        if self.last is not None:  # the best iterate of a first attempt is not where the last evaluation was
            rows, held, calls = self.last
            self.last = rows, held & (self.residual[rows] == before[rows]), calls
        left = self.code == _RUNNING
        self.evals[left] = self._calls
        self.code[left] = Result.NONDETERMINISTIC if self.noisy else Result.MAX_EVALS

    def _all(self) -> tuple[np.ndarray, np.ndarray]:
        return np.arange(len(self.code)), np.zeros(len(self.code), dtype=bool)

    def verify(self, point: Point) -> np.ndarray:
        """Residuals at `point`, the best iterates; returns the samples whose claim does not hold there."""
        r, _, tolerance = self._norms(point, fetch(self.criterion, point)[0], *self._all())
        known = np.isfinite(r)
        lost = (self.code == Result.CONVERGED) & (classify(r, tolerance) != Result.CONVERGED)
        self.residual[known] = r[known]
        self.evals += 1
        return np.flatnonzero(lost)

    def finish_jointly(self, best: Point, code: np.int8, calls: int) -> None:
        """Enter the outcome of a solve of all samples as one system that ended with `code`."""
        self.best_z, self.best_fz, self.evals[:] = best.z, best.fz, calls
        r, _, tolerance = self._norms(best, fetch(self.criterion, best)[0], *self._all())
        found = classify(r, tolerance)
        self.residual, self.code = r, np.where(found == Result.CONVERGED, found, code)
