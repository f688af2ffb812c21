"""Convergence of a solve: the status of every sample while it runs, and the result when it ends.

The loop (`implicit.iterate`) hands every evaluated point to a `ConvergenceMonitor`, which reads its norms on the host:

    running      no decision yet
    converged    the criterion (`implicit.stopping`) holds; the sample is frozen at this z
    nonfinite    f(z) is NaN or infinite and a retry from the best iterate failed, or none was possible
    stopped      `Stop.when` held; the sample is frozen at this z
    stalled      the smallest residual is rounding error and has not improved for some evaluations

Frozen samples are evaluated along with the running ones, so that their residual is known at every point. A frozen
sample that misses the tolerance later shows that f couples the samples, or that f gives two values at one z (noise).
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor

from implicit.loop.best_iterates import BestIterates
from implicit.loop.observation import Observation, absolute, compare, fetch, of_every_sample, set_first
from implicit.loop.quick_reading import QuickReading
from implicit.loop.repeated_points import compare_repeats
from implicit.loop.step_masks import StepMasks
from implicit.options import Fold
from implicit.pytree import Flat, to_device
from implicit.solution import Result
from implicit.solvers.base import AbstractSolver, Point
from implicit.staged_safeguard import Stage, StagedSafeguard
from implicit.stopping import Criterion, classify

RUNNING = np.int8(-1)
_AGED = 3  # the last evaluation is made at a best iterate that has not improved for so many evaluations


@dataclass
class ConvergenceMonitor:
    """Status of B samples from z0 on: which still run, the best iterate of each, and how each one ended.

    `rows` are the samples that the loop evaluates at present: all samples, or with compaction the running ones.
    """

    criterion: Criterion
    z0: Flat
    callback: Callable[[int, np.ndarray], Any] | None = None
    safeguard: StagedSafeguard | None = None
    begin: int = 0  # evaluations of f before the first one that this monitor observes
    trace: list[np.ndarray] = field(default_factory=list)
    fold: Fold | None = None  # a function `SolveOptions.trace`, folded over the evaluations
    inconsistent: bool = False  # f gave two values at one z of a sample: coupling or noise
    noisy: bool = False  # noise was the cause
    product_keeps_bits: bool = False  # a Jacobian-vector product changes no bit of f(z), or f is noisy
    product_rounds: bool = False  # a Jacobian-vector product changes bits of f(z)

    def __post_init__(self) -> None:
        size = self.z0.shape[0]
        self.layout, self.stop = self.criterion.layout, self.criterion.stop
        self.best = BestIterates(self.z0, self.criterion.grouped)
        self.masks = StepMasks()
        self.rows = np.arange(size)
        self.code = np.full(size, RUNNING, dtype=np.int8)
        self.evals = np.zeros(size, dtype=np.int64)
        self.reset_at = np.zeros(size, dtype=np.int64)  # evaluations made when the sample was last reset
        self.done = size == 0
        self.last: tuple[np.ndarray, np.ndarray, int] | None = None  # rows, held, calls of the last whole reading
        self.observed: Point | None = None  # the point at which f gave another value than before
        self._none = np.zeros(size, dtype=bool)  # no sample
        self._held = self._none  # samples whose present z is their best iterate
        self._lost = np.zeros(0, dtype=np.int64)  # converged samples that miss the tolerance in a later evaluation
        self._pending: Observation | None = None
        self._quick: QuickReading | None = None
        self._new = True  # no norms were read yet
        self.calls = 0  # evaluations made at the last reading
        self._looks = self._made = 0  # calls of `observe`, and evaluations made

    # ---- the loop's calls

    def observe(self, point: Point, calls: int, last: bool) -> None:
        """Enter the point of evaluation number `calls`; norms are read now or, with `Stop.late`, at the next call.

        A sample that the safeguard retries, since its f(z) was not finite, is read at every evaluation and at once: it
        has failed after several such evaluations in a row. The other samples are read as if it were not there.
        """
        self._looks += 1
        self._made = calls
        if self.fold is not None:
            self.fold.add(self.layout, point.z, point.fz, self.criterion.joint)
        first = self._looks == 1 and self.stop.check_every > 1 and not last  # read along with the first reading
        regular = self._looks % self.stop.check_every == 0 or last or first
        if not regular and not self._retrying:
            return
        norms = fetch(self.criterion, point)
        stopped = self.criterion.stopped(point.z, point.fz)
        seen = Observation(point, self.rows, self._held[self.rows], calls, norms, stopped)
        if not regular:
            self._read(seen, calls, early=True)
            return
        due, self._pending = self._pending, seen
        if due is not None:
            self._read_before(seen, due, calls)
        if (last or not self.stop.late) and not first:
            self._read(self._pending, calls)
            self._pending = None
        elif self._retrying:
            self._read(seen, calls, early=True)

    def _read_before(self, seen: Observation, due: Observation, calls: int) -> None:
        """Read `due`; a sample whose best iterate changes by it was not at its best iterate in `seen`."""
        if not seen.held.any():
            self._read(due, calls)
            return
        self.best.flush()
        since = self.best.since.copy()
        self._read(due, calls)
        self.best.flush()
        seen.held &= (self.best.since == since)[seen.rows]

    def next_iterate(self, z: Flat, point: Point, last: bool) -> Flat:
        """The z to evaluate next: the solver's z, or a step of the safeguard; finished samples keep their final z.

        The `last` evaluation of the budget is made at the best iterate for every sample without recent progress, which
        shows whether f gives the same value there again.
        """
        # a graph node apart from f(z), as `torch.where` makes beside frozen samples: gradients are summed in one order
        if z is point.fz and z.requires_grad:
            z = z.view_as(z)
        z = self.masks.apply(z, point, self.best, self.rows)
        self._held = self._none if self.masks.running is None else self.code != RUNNING
        if last and not self.noisy and self._made - self.best.oldest >= _AGED:
            self.best.flush()
            aged = (self._made - self.best.since >= _AGED) & np.isfinite(self.best.residual) & ~self._held
            if aged.any():
                z, self._held = torch.where(self._mask(aged), self.best_iterates().z, z), self._held | aged
        return z

    def apply_resets(self, point: Point, state: Any, solver: AbstractSolver[Any]) -> tuple[Point, Any]:
        """The point and the solver state after the safeguard's resets, which put samples at their best iterate."""
        if self.safeguard is None or not self.safeguard.pending:
            return point, state
        # second attempts that end, and that begin
        resets, (starting, returning) = self.safeguard.pop_resets(), self.safeguard.pop_starts()
        self.best.take_back(returning)
        if starting.any():
            self.best.set_aside(starting, self._made)
            self.masks.at_start = self._mask(starting)
        # the others continue from their best iterate
        self.reset_at[resets] = self._made
        mask, failed = self._mask(resets), point
        if point.fz.requires_grad:  # `point` holds another f(z) in place of one that is not finite, see `_without_nan`
            failed = Point(point.z, torch.where(self._mask(self.safeguard.broken > 0), torch.nan, point.fz))
        self.masks.set_stages(self.safeguard, self._mask)
        best = self.best_iterates()
        z, fz = torch.where(mask, best.z, point.z), torch.where(mask, best.fz, point.fz)
        point = Point(z, fz, point.product, point.remaining)
        shares = np.where(resets | self.safeguard.on(Stage.NEWTON), self.safeguard.scale, 1.0)
        self.masks.scale = self._mask(shares).to(self.layout.dtype) if (shares < 1).any() else None
        return point, solver.retreat(point, failed, state, mask, self._mask(self.safeguard.on(Stage.CAUTIOUS)))

    def without_newton(self) -> None:
        """Leave out the safeguard's Newton-Krylov stage, since f cannot be differentiated."""
        if self.safeguard is not None:
            self.safeguard.leave_out(Stage.NEWTON)
            self.masks.set_stages(self.safeguard, self._mask)

    def compact(self) -> Tensor:
        """Restrict `rows` to the running samples; returns their positions among the `rows` before."""
        keep = np.flatnonzero(self.code[self.rows] == RUNNING)
        self.rows = self.rows[keep]
        self.masks.running = None
        if self.safeguard is not None:
            self.masks.set_stages(self.safeguard, self._mask)
        positions = to_device(keep, self.layout.device)
        self.masks.scale = None if self.masks.scale is None else self.masks.scale[positions]
        return positions

    def accept_noise(self) -> None:
        """Record that f gives two values at one z; samples that miss their tolerance because of it run again."""
        self.inconsistent, self.noisy, self.observed = False, True, None
        self._release(self._lost)

    def best_iterates(self) -> Point:
        """The best iterates of `rows`."""
        return self.best.of(self.rows)

    @property
    def _retrying(self) -> bool:
        return self.safeguard is not None and self.safeguard.retrying

    def _mask(self, which: np.ndarray) -> Tensor:
        return to_device(which[self.rows], self.layout.device).unsqueeze(1)

    def _read(self, seen: Observation, calls: int, early: bool = False) -> None:
        """Read a point; `early`: for the samples alone that the safeguard retries."""
        self.calls = calls
        if self._new:
            set_first(self.criterion, seen)
            self._quick = None if self.criterion.grouped or self.callback is not None else QuickReading(self.criterion)
            self._new = False
        if not early and self._read_quickly(seen):
            return
        best, rows = self.best, seen.rows
        best.flush()
        solved = seen.held & (best.residual[rows] == 0)
        r, s, tolerance = compare(self.criterion, seen.point, seen.sizes, rows, solved)
        if not early:
            self.last = rows, seen.held, seen.calls
            self._check_repeats(seen, (r, s, tolerance))

        # which samples are read; a point made before a reset is not part of the retry
        running, fresh = self.code[rows] == RUNNING, seen.calls > self.reset_at[rows]
        if self.safeguard is not None:
            fresh &= ~self.safeguard.resets[rows]
            if early:
                running &= fresh & (self.safeguard.broken[rows] > 0)
                seen.read_early = running.copy()
            elif seen.read_early is not None:
                running &= ~seen.read_early

        # which samples converge here, and which have a new best iterate
        finite = np.isfinite(r) & np.isfinite(s)
        live = running & finite
        converged = live & (classify(r, tolerance) == Result.CONVERGED)
        whole = absolute(self.criterion, seen.sizes, r, s)
        away = np.zeros_like(live)
        if self.safeguard is not None:
            least = best.absolute[0][rows], best.absolute[1][rows]
            away = live & self.safeguard.ran_away(rows, *whole, *least, converged)
        converged &= ~away
        stopped = live & ~converged & (False if seen.stopped is None else seen.stopped.cpu().numpy())
        counts = live & (seen.calls > best.begun_at[rows])
        before = best.residual.copy()
        best.update_absolute(rows, counts, *whole)
        best.update(rows, (counts & (r < best.residual[rows])) | converged | stopped, seen.point, r, s, seen.calls)

        # which samples stall at rounding error or have failed
        stalled = live & ~converged & ~stopped & best.at_rounding(rows, seen.calls, self.layout.eps)
        fresh &= running
        broken = running & ~finite & fresh
        if self.safeguard is not None:
            broken[fresh] &= ~self.safeguard.allow_retry(rows[fresh], broken[fresh], best.residual)
            still = live & ~converged & ~stopped & ~stalled & fresh
            self.safeguard.update(rows[still], r[still], best.residual, before, seen.calls - self.begin, away[still])
        if self.callback is not None and not early:
            known = running if seen.read_early is None else running | seen.read_early
            self.trace.append(of_every_sample(self.criterion, seen, np.where(known, r, np.nan), len(self.code)))
            self.callback(seen.calls, self.trace[-1])

        # how samples end here
        ends = (converged, broken, stalled, stopped)
        codes = (Result.CONVERGED, Result.NONFINITE, Result.STALLED, Result.STOPPED)
        for code, which in zip(codes, ends, strict=True):
            self.code[rows[which]] = code
        ended = rows[np.logical_or.reduce(ends)]
        if len(ended):
            self.evals[ended] = calls
            self.done = not (self.code == RUNNING).any()
            self.masks.running = self._mask(self.code == RUNNING)
        best.refresh(seen.calls)

    def _read_quickly(self, seen: Observation) -> bool:
        """Read by the quick reading if that suffices; returns whether it did."""
        if self._quick is None or self.masks.running is not None or seen.stopped is not None:
            return False
        if len(seen.rows) < len(self.code) or seen.read_early is not None or seen.held.any():
            return False
        safeguard, calls = self.safeguard, seen.calls - self.begin
        quiet = safeguard is None or (safeguard.begun and calls < safeguard.next_due and not safeguard.failing)
        return self._quick.take(seen, self.best, quiet, safeguard is not None)

    def _check_repeats(self, seen: Observation, measured: tuple[np.ndarray, ...]) -> None:
        """Compare the residuals of samples evaluated at their best iterate again with the residuals found there."""
        if not seen.held.any():
            return
        rows = seen.rows
        found = compare_repeats(seen, self.best, self.code[rows], measured, self.criterion)
        self._lost = rows[found.lost]
        self.best.residual[rows[found.kept]] = measured[0][found.kept]
        self._release(rows[found.rounded])
        if self.noisy:
            self._release(self._lost)
        elif found.lost.any() or found.moved.any():
            self.inconsistent, self.observed = True, seen.point

    def _release(self, rows: np.ndarray) -> None:
        """Let finished samples run again."""
        if len(rows):
            self.code[rows] = RUNNING
            self.best.residual[rows], self.best.since[rows] = np.inf, self.calls  # the next point counts as the first
            self.masks.running, self.done = self._mask(self.code == RUNNING), False
