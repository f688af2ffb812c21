"""The loop without a tolerance: a fixed number of evaluations, with no decision on the host.

The host reads no number of the device, so the device never waits, and the loop compiles to one graph. A sample whose
f(z) is not finite is reset to the point before it, and takes plain steps z' = f(z) from there until f is finite again,
as the safeguard of a solve with a tolerance does; with a solver that has no safeguard the sample stays at that point.

If autograd records the loop, an f(z) of NaN must not stay in the graph: 0 times NaN in the backward pass would reach
the parameters that samples share. A CPU repeats such an evaluation at once. On a device, and inside torch.func, the
host learns after the loop whether there was one (`implicit.autodiff.failed_samples`), and if so the loop runs once more
and the host reads at every evaluation.

The value is f(z) of the last evaluation. f is not evaluated at the value, so its residual is not known. CONVERGED is
therefore given only to a batch of one sample with f(z) = z: in a larger batch f may couple that sample to others, which
moved in the same step.
"""

from collections import deque
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import numpy as np
import torch
from jaxtyping import Bool
from torch import Tensor
from torch.utils.checkpoint import checkpoint, set_checkpoint_early_stop

from implicit.autodiff.failed_samples import failed, finite
from implicit.autodiff.recomputation import SameValue, Segments
from implicit.evaluation import FlatMap
from implicit.loop.progress import Report, progress_callback, recorded
from implicit.loop.step_region import step_region
from implicit.options import Fold, SolveOptions
from implicit.pytree import Flat, State, map_tensors, to_host, validate_warm_start
from implicit.solution import Solution
from implicit.solvers.base import AbstractSolver, Point
from implicit.stopping import Criterion, Stop, classify_count
from implicit.torch_internals import constant_numbers, has_derivative, host_readable, not_compiled, unwrap_all


@dataclass(frozen=True)
class _Position:
    """The last point with a finite f(z) of every sample; `failed` where the evaluation after it was not finite.

    `reads`: the host reads whether f(z) is finite, and leaves no other f(z) in the graph; else `spoiled` marks the
    samples that have one, or is None while autograd has recorded nothing.
    """

    point: Point
    failed: Bool[Tensor, "B 1"]
    reads: bool
    spoiled: Bool[Tensor, "B 1"] | None = None


def begin(solver: AbstractSolver[Any], point: Point, options: SolveOptions) -> Any:
    """The solver state before the first step.

    Raises:
        ValueError: f(z) has a derivative, and autograd cannot record the solver's steps.
    """
    if not solver.differentiable and has_derivative(point.fz):
        raise ValueError(
            f"Autograd cannot record the steps of {type(solver).__name__}, so the gradient would be that of the last "
            "evaluation alone: use grad=IFT() in place of Unrolled, or another solver."
        )
    if options.state is None:
        return solver.init(point)
    return solver.resume(point, validate_warm_start(constant_numbers(options.state), solver.init(point)))


def fixed_count(
    f: FlatMap, z0: State, solver: AbstractSolver[Any], stop: Stop, options: SolveOptions, segments: Segments | None
) -> Solution:
    """`stop.max_evals` evaluations; with `segments`, autograd keeps only the point and state at the end of each."""
    solver = constant_numbers(solver)
    criterion, fold = Criterion(stop, f.layout), options.fold()
    if not options.observed:
        solution, spoiled = _evaluations(f, z0, solver, options, segments, _Observer(criterion, None, fold))
        if spoiled is None or not failed(spoiled, stop):
            return solution
        del solution  # frees its graph
        f.repeats, f.calls = f.repeats + f.calls, 0
        return _evaluations(f, z0, solver, options, segments, _Observer(criterion, None, options.fold()), True)[0]
    with progress_callback(options, stop) as callback:
        return _evaluations(f, z0, solver, options, segments, _Observer(criterion, callback, fold), True)[0]


def _evaluations(
    f: FlatMap,
    z0: State,
    solver: AbstractSolver[Any],
    options: SolveOptions,
    segments: Segments | None,
    observer: "_Observer",
    reads: bool = False,
) -> tuple[Solution, Bool[Tensor, "B 1"] | None]:
    """(solution, `_Position.spoiled` of a recorded loop); `reads` lets the host read whether f(z) is finite."""
    point = f.evaluate(f.layout.pack(z0))
    began = finite(point.fz)
    at, state = _Position(point, ~began, reads or host_readable(began)), begin(solver, point, options)
    observer(at, f)
    del point  # frees a state
    while f.remaining > 0 and segments is None:  # inline: a function's caller would hold the first point and state
        z, tangent, state = _step(solver, at, state)
        at, (z, tangent, state) = _in_regions(f, solver, at, (z, tangent, state), observer)
        at = _next(f, z, tangent, at, bool(solver.patience))
        observer(at, f)
        del z, tangent  # the point has a copy
    while segments is not None and f.remaining > 0:
        at, state = _checkpointed(f, solver, segments, at, state)
    return _solution(f, at, began, state if options.keep_state else None, observer, options), at.spoiled


def _solution(
    f: FlatMap, at: _Position, began: Bool[Tensor, "B 1"], state: Any, observer: "_Observer", options: SolveOptions
) -> Solution:
    point, layout = at.point, f.layout
    with torch.no_grad():
        residual = observer.criterion.measure(point.fz - point.z, scaled=True, overwrite=True)
        residual = residual if residual.ndim == 1 else residual.amax(dim=1)
        # f(z) = z is tested number by number, since a norm may underflow to 0
        result = classify_count((point.fz == point.z).all(dim=1), at.failed[:, 0])
    return Solution(
        value=layout.unpack(torch.where(began, point.fz, point.z)),
        residual=residual,
        result=result,
        evals=torch.full_like(result, f.calls + f.repeats, dtype=torch.int64),
        trace=recorded(observer.fold, observer.trace, layout, options),
        state=state,
    )


def _step(solver: AbstractSolver[Any], at: _Position, state: Any) -> tuple[Flat, Flat | None, Any]:
    """(next z, tangent, solver state); a sample whose last f(z) was not finite takes a plain step, or stays."""
    z, tangent, state = solver.step(at.point, state)
    return torch.where(at.failed, at.point.fz if solver.patience else at.point.z, z), tangent, state


@dataclass(frozen=True)
class _Evaluation:
    """f at a new z, where it is finite, and `_Position.spoiled` after it."""

    point: Point
    good: Bool[Tensor, "B 1"]
    spoiled: Bool[Tensor, "B 1"] | None = None


def _next(f: FlatMap, z: Flat, tangent: Flat | None, at: _Position, retry: bool) -> _Position:
    """The point at z, or the point before for samples whose f(z) is not finite: with `retry` they step plainly next."""
    return _accept(_evaluate(f, z, tangent, at), at, retry)


def _evaluate(f: FlatMap, z: Flat, tangent: Flat | None, at: _Position) -> _Evaluation:
    """f at z; autograd keeps no f(z) that is not finite, or the evaluation marks it."""
    new = f.evaluate(z, tangent)
    good, spoiled = finite(new.fz), at.spoiled
    if has_derivative(new.fz):
        if not at.reads:
            spoiled = ~good if spoiled is None else spoiled | ~good
        elif not unwrap_all(good).all():
            new = f.repeat(torch.where(good, new.z, at.point.z), tangent)
    return _Evaluation(new, good, spoiled)


def _accept(new: _Evaluation, at: _Position, retry: bool) -> _Position:
    """The position after an evaluation, see `_next`."""
    point, good, spoiled = new.point, new.good, new.spoiled
    fz, z, product, remaining = torch.where(good, point.fz, at.point.fz), point.z, point.product, point.remaining
    del new, point  # frees a state
    point = Point(torch.where(good, z, at.point.z), fz, product, remaining)
    return _Position(point, ~good if retry else at.failed | ~good, at.reads, spoiled)


def _in_regions(
    f: FlatMap,
    solver: AbstractSolver[Any],
    at: _Position,
    step: tuple[Flat, Flat | None, Any],
    observer: "_Observer",
) -> tuple[_Position, tuple[Flat, Flat | None, Any]]:
    """All evaluations but the last one and the steps after them, if a compiled graph may have regions between them."""
    steps, z = f.remaining - 1, step[0]
    region = step_region(_next_and_step, solver, z, step[2], steps) if steps > 0 else None
    if region is None:
        return at, step
    values, before, failed = region.values(), at.point.z.clone(), at.failed  # f(z0) may be z0
    for _ in range(steps):
        new = f.evaluate(z)
        image = new.fz.clone()  # f, as at z0, may have returned a view of its argument
        (before, fz, failed, z), values = region(before, at.point.fz, (failed, new.z, image), values)
        at = _Position(Point(before, fz, None, f.remaining), failed, False)
        observer(at, f)
    return at, (z, None, solver.after_regions(region.filled(at.point, values), steps))


def _next_and_step(
    solver: AbstractSolver[Any], state: Any, before: Point, failed: Bool[Tensor, "B 1"], z: Flat, fz: Flat
) -> tuple[tuple[Tensor, ...], Any]:
    """`_accept` and `_step` after an evaluation that autograd does not record.

    Returns z, f(z) and failed of the position, and the next z; and the solver state.
    """
    at = _Position(before, failed, False)
    at = _accept(_Evaluation(Point(z, fz), finite(fz)), at, bool(solver.patience))
    z, _, state = _step(solver, at, state)
    return (at.point.z, at.point.fz, at.failed, z), state


def _checkpointed(
    f: FlatMap, solver: AbstractSolver[Any], segments: Segments, at: _Position, state: Any
) -> tuple[_Position, Any]:
    """A segment of which autograd keeps only the input; the backward pass compares the values of its second run."""
    part = partial(_segment, f, solver, min(f.remaining, segments.length), f.calls)
    run = SameValue(segments.compare(part) if f.calls == 1 else part, parts=2)
    point = at.point
    with set_checkpoint_early_stop(False):  # the second run must reach the values that are compared
        z, fz, product, marks, state, f.calls, f.repeats = checkpoint(
            run, point.z, point.fz, point.product, (at.failed, at.reads, at.spoiled), state, use_reentrant=False
        )
    return _Position(Point(z, fz, product, f.remaining), *marks), state


def _segment(
    f: FlatMap,
    solver: AbstractSolver[Any],
    evals: int,
    calls: int,
    z: Flat,
    fz: Flat,
    product: Flat | None,
    marks: tuple[Tensor, bool, Tensor | None],
    state: Any,
) -> tuple[Flat, Flat, Flat | None, tuple[Tensor, bool, Tensor | None], Any, int, int]:
    """`evals` evaluations that change no argument, so that they may run twice; the last results are calls, repeats."""
    f = replace(f, calls=calls, _outputs=deque(), _copies=[])
    state = map_tensors(torch.clone, state)  # histories may be written in place
    at, end = _Position(Point(z, fz, product, f.remaining), *marks), f.remaining - evals
    while f.remaining > end:
        z, tangent, state = _step(solver, at, state)
        at = _next(f, z, tangent, at, bool(solver.patience))
    return at.point.z, at.point.fz, at.point.product, (at.failed, at.reads, at.spoiled), state, f.calls, f.repeats


class _Observer:
    """Reads the residuals if there is a callback, and folds the evaluations if the trace is a function."""

    def __init__(self, criterion: Criterion, callback: Report | None, fold: Fold | None = None) -> None:
        self.criterion, self.callback, self.fold = criterion, callback, fold
        self.trace: list[np.ndarray] = []

    def __call__(self, at: _Position, f: FlatMap) -> None:
        if self.fold is not None:
            self.fold.add(f.layout, at.point.z, at.point.fz)
        if self.callback is not None and (f.remaining <= 0 or f.calls % self.criterion.stop.check_every == 0):
            self._read(at, f.calls, self.callback)

    @not_compiled
    def _read(self, at: _Position, calls: int, callback: Report) -> None:
        with torch.no_grad():
            sizes = to_host(self.criterion.measure(at.point.r, scaled=True))
        residual = sizes if sizes.ndim == 1 else sizes.max(axis=1)
        residual = np.where(at.failed[:, 0].cpu().numpy(), np.nan, residual)
        self.trace.append(residual)
        callback(calls, residual)
