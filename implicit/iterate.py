"""The one loop: evaluate, judge, hold what has finished, ask the solver for the next iterate.

Setting: f maps a state to a state of the same shape; sample b is its own system. With z the iterate and
r = f(z) - z its residual, a sample has converged when

    ||r||  <=  atol + rtol ||f(z)||          (Euclidean norms over all the sample's numbers)

A finished sample is held at its answer while the others go on, so an answer never depends on batch-mates.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from implicit.solution import Result, Solution
from implicit.solvers.base import AbstractSolver, Point
from implicit.state import Flat, Layout, State, leaves, norm

Map = Callable[..., State]
_PATIENCE = 10  # evaluations without a new smallest residual before rounding error is blamed
_RUNNING = np.int8(-1)
_TINY, _HUGE = 1e-15, 1e15  # norms outside may have lost their squares in float32
_ROUNDING = 100.0  # residuals below this many eps ||f(z)|| count as possibly rounding


@dataclass(frozen=True, kw_only=True)
class Stop:
    """When a solve is good enough: ``||f(z) - z|| <= atol + rtol ||f(z)||`` per sample.

    The norm is Euclidean over all numbers of a sample, so `atol` is in that norm's unit: multiply a tolerance per
    entry by the square root of their number. ``rtol = atol = 0`` means no tolerance: exactly `max_evals` evaluations,
    with no synchronisation between host and device.

    Args:
        rtol: relative tolerance, >= 0.
        atol: absolute tolerance, >= 0.
        max_evals: budget of evaluations of f, >= 1.
        check_every: look at the residual at every k-th evaluation only (and at the last): one device synchronisation
            per look. A sample may then run up to k - 1 evaluations past its tolerance.
        late: read each residual one evaluation after it was computed, when the device has it ready, so that the host
            never waits; a finished sample costs one evaluation more. The answers are the same.
    """

    rtol: float = 1e-4
    atol: float = 1e-6
    max_evals: int = 50
    check_every: int = 1
    late: bool = False

    def __post_init__(self) -> None:
        for name in ("rtol", "atol"):
            if not getattr(self, name) >= 0:
                raise ValueError(f"Stop.{name} must be at least 0, got {getattr(self, name)}.")
        for name in ("max_evals", "check_every"):
            if getattr(self, name) < 1:
                raise ValueError(f"Stop.{name} must be at least 1, got {getattr(self, name)}.")

    @property
    def has_tolerance(self) -> bool:
        """False when only the budget ends the solve."""
        return self.rtol > 0 or self.atol > 0


@dataclass
class PackedMap:
    """f on (B, N) matrices: checked, and every call counted."""

    f: Map
    args: tuple[Any, ...]
    layout: Layout
    budget: int = 0
    calls: int = 0

    @property
    def left(self) -> int:
        return self.budget - self.calls

    def __call__(self, z: Flat) -> Flat:
        self.calls += 1
        state = self.layout.unpack(z)
        seen = leaves(state)
        before = [_version(t, self.calls == 1) for t in seen]
        out = self.f(state, *self.args)
        if any(_changed(b, t) for b, t in zip(before, seen, strict=True)):
            raise ValueError(
                "f modifies its input in place, so that z and f(z) would be one tensor and every residual 0: "
                "use out-of-place operations in f, or clone the state first."
            )
        return self.layout.pack(self.layout.check(out, z.shape[0]))

    def at(self, z: Flat) -> Point:
        """Evaluate f at z, rounded to what the state's dtype can hold."""
        z = self.layout.round(z)
        return Point(z, self(z))


def _version(t: Tensor, first: bool) -> int | Tensor | None:
    """Something to compare a tensor with later; inference tensors have no version counter, so they are copied once."""
    if torch.compiler.is_compiling():
        return None
    if t.is_inference():
        return t.clone() if first else None
    return t._version


def _changed(before: int | Tensor | None, t: Tensor) -> bool:
    if before is None:
        return False
    if isinstance(before, Tensor):
        return not torch.allclose(before, t, rtol=0, atol=0, equal_nan=True)
    return before != t._version


@dataclass(frozen=True, kw_only=True)
class Loop:
    """How a solve is run and watched, apart from when it stops.

    Args:
        batch_dims: 1, each row of the state is its own system; 0, the whole state is one.
        trace: record the residual at every evaluation.
    """

    batch_dims: int = 1
    trace: bool = False


def iterate(
    f: Map,
    z0: State,
    solver: AbstractSolver[Any],
    stop: Stop,
    *,
    args: tuple[Any, ...] = (),
    loop: Loop = Loop(),
    image: bool = False,
) -> Solution:
    """Solve z = f(z, *args) with `solver` until `stop` is content, sample by sample.

    Operations are recorded by autograd if it is on: estimators decide that.

    Args:
        f: the map; keeps structure, shapes and dtypes of the state.
        z0: the starting state, ``(B, *)`` tensors.
        args: passed on to f.
        loop: batch dimensions and what to record.
        image: return f(z) for converged samples too, not the z whose residual was judged.

    Raises:
        ValueError: f changes the shape, dtype, device or structure of the state or writes into it, or the state is
            not one that can be solved for.
    """
    layout = Layout.of(z0, loop.batch_dims)
    counted = PackedMap(f, args, layout, stop.max_evals)
    z = layout.pack(z0)
    if stop.has_tolerance or loop.trace:
        return _until(counted, z, solver, stop, image, loop.trace)
    return _count(counted, z, solver)


def _count(f: PackedMap, z: Flat, solver: AbstractSolver[Any]) -> Solution:
    """The loop without a tolerance: no decision on the host, so a device never waits and one graph compiles.

    A sample whose f(z) is not finite is held at that z.
    """
    point = f.at(z)
    alive = _finite(point)
    memory = solver.init(point)
    while f.left > 0:
        z, memory = solver.step(f, point, memory)
        point = f.at(torch.where(alive, z, point.z))
        alive = alive & _finite(point)
    value = torch.where(alive, point.fz, point.z)
    with torch.no_grad():
        residual = norm(point.r)
        ended = torch.where(residual == 0, int(Result.CONVERGED), int(Result.MAX_EVALS))
        result = torch.where(alive[:, 0], ended, int(Result.NONFINITE)).to(torch.int8)
        evals = torch.full_like(result, f.calls, dtype=torch.int64)
    return Solution(value=f.layout.unpack(value), residual=residual, result=result, evals=evals)


def _finite(point: Point) -> Tensor:
    """(B, 1) whether f(z) is finite."""
    return torch.linalg.vector_norm(point.fz.detach(), ord=torch.inf, dim=1, keepdim=True) < torch.inf


@torch.compiler.disable(recursive=False)
def _until(f: PackedMap, z: Flat, solver: AbstractSolver[Any], stop: Stop, image: bool, trace: bool) -> Solution:
    """The loop with a tolerance: the host reads two norms per sample and evaluation, in one copy."""
    judge = _Judge(f, stop, z, trace)
    point = judge.see(f.at(z))
    memory = solver.init(point)
    while f.left > 0 and not judge.done:
        z, memory = solver.step(f, point, memory)
        point = judge.see(f.at(judge.hold(z)))
    return judge.solution(image)


class _Judge:
    """The host's books of one solve: who still runs, the best point of each sample, and how each one ended."""

    def __init__(self, f: PackedMap, stop: Stop, z: Flat, trace: bool) -> None:
        self.f, self.stop = f, stop
        rows = z.shape[0]
        self.code = np.full(rows, _RUNNING, dtype=np.int8)
        self.evals = np.zeros(rows, dtype=np.int64)
        self.residual = np.full(rows, np.inf)
        self.floor = np.zeros(rows)  # residuals below this may be rounding
        self.since = np.zeros(rows, dtype=np.int64)  # evaluations since the residual was smallest
        self.best_z, self.best_fz = z, z
        self.running: Tensor | None = None  # (B, 1) on the device, once a sample has finished
        self.pending: tuple[Point, Callable[[], np.ndarray], int] | None = None
        self.seen, self.looks = 0, 0
        self.trace: list[np.ndarray] | None = [] if trace else None

    @property
    def done(self) -> bool:
        return bool((self.code != _RUNNING).all())

    def see(self, point: Point) -> Point:
        """Judge a fresh point, now or one evaluation later; returns it."""
        self.looks += 1
        last = self.f.left <= 0
        if self.looks % self.stop.check_every and not last:
            return point
        ready, self.pending = self.pending, (point, _fetch(point), self.f.calls)
        if ready is not None:
            self._read(*ready)
        if last or not self.stop.late:
            self._read(*self.pending)
            self.pending = None
        return point

    def hold(self, z: Flat) -> Flat:
        """z, with finished samples kept where they ended."""
        return z if self.running is None else torch.where(self.running, z, self.best_z)

    def _read(self, point: Point, fetch: Callable[[], np.ndarray], calls: int) -> None:
        r, s = fetch()
        running = self.code == _RUNNING
        finite = np.isfinite(r) & np.isfinite(s)
        live = running & finite
        converged = live & (r <= self.stop.atol + self.stop.rtol * s)
        better = (live & (r < self.residual)) | converged
        self._keep(point, better, r, s)
        self.since = np.where(better, 0, self.since + calls - self.seen)
        stalled = live & ~converged & (self.since >= _PATIENCE) & (self.residual <= self.floor)
        for code, rows in (
            (Result.CONVERGED, converged),
            (Result.NONFINITE, running & ~finite),
            (Result.STALLED, stalled),
        ):
            self.code[rows] = code
        self.evals[running] = self.f.calls
        self.seen = calls
        if self.trace is not None:
            self.trace.append(np.where(running, r, np.nan))
        now = self.code == _RUNNING
        if not np.array_equal(now, running):
            self.running = torch.from_numpy(now).to(point.z.device).unsqueeze(1)

    def _keep(self, point: Point, better: np.ndarray, r: np.ndarray, s: np.ndarray) -> None:
        if better.all():
            self.best_z, self.best_fz = point.z, point.fz
        elif better.any():
            mask = torch.from_numpy(better).to(point.z.device).unsqueeze(1)
            self.best_z = torch.where(mask, point.z, self.best_z)
            self.best_fz = torch.where(mask, point.fz, self.best_fz)
        self.residual = np.where(better, r, self.residual)
        self.floor = np.where(better, _ROUNDING * self.f.layout.eps * s, self.floor)

    def solution(self, image: bool) -> Solution:
        """The books closed."""
        converged = self.code == Result.CONVERGED
        value = self.best_fz
        if not image and converged.any():
            mask = torch.from_numpy(converged).to(value.device).unsqueeze(1)
            value = self.best_z if converged.all() else torch.where(mask, self.best_z, value)
        code = np.where(self.code == _RUNNING, np.int8(Result.MAX_EVALS), self.code)
        device, dtype = value.device, value.dtype
        return Solution(
            value=self.f.layout.unpack(value),
            residual=torch.from_numpy(self.residual).to(device, dtype),
            result=torch.from_numpy(code).to(device),
            evals=torch.from_numpy(self.evals).to(device),
            trace=None if self.trace is None else torch.from_numpy(np.stack(self.trace)).to(device, dtype),
        )


def _fetch(point: Point) -> Callable[[], np.ndarray]:
    """Start moving (||r||, ||f(z)||), (2, B), to the host; the result waits for the move."""
    with torch.no_grad():
        both = torch.stack((norm(point.r), norm(point.fz)))
        if both.is_cuda:
            host = both.to("cpu", non_blocking=True)
            moved = torch.cuda.Event()
            moved.record()
        else:
            host, moved = both, None

    def wait() -> np.ndarray:
        if moved is not None:
            moved.synchronize()
        values = host.double().numpy()
        if ((values < _TINY) | (values > _HUGE)).any() and point.r.dtype != torch.float64:
            with torch.no_grad():  # squares under- or overflowed: norms in double
                values = torch.stack((norm(point.r.double()), norm(point.fz.double()))).cpu().numpy()
        return values

    return wait
