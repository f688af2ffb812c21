"""The loop: evaluate f, test for convergence, freeze what has finished, ask the solver for the next iterate.

Setting: f maps a state to a state of the same shape; sample b is a system of its own. z is the iterate and
r = f(z) - z its residual; `implicit.stopping` has the criterion. A finished sample is frozen at its z while the others
go on.

CONVERGED is true of the value that is returned. Frozen samples are evaluated along, so a claim is tested in every
evaluation; where the last one was not at the value returned (after compaction, with `Stop.late`, beside samples that
failed), one more evaluation tests it. A claim that does not hold has one of two causes, told apart by evaluating f
again at the same z:

    noise      f gives two values at one z (dropout drawn anew, spectral_norm in training mode): the sample goes on,
               and ends as NONDETERMINISTIC if the budget does not suffice
    coupling   f takes one sample into another: the whole batch is solved on as one system, with a warning
"""

import warnings
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint, set_checkpoint_early_stop

from implicit.convergence import ConvergenceMonitor, differs
from implicit.evaluation import FlatMap, JointMap
from implicit.options import SolveOptions
from implicit.pytree import Flat, Layout, Map, State, map_tensors, to_device, validate_warm_start
from implicit.recomputation import SameValue
from implicit.safeguard import Safeguard
from implicit.solution import Result, Solution
from implicit.solvers.base import AbstractSolver, Point
from implicit.solvers.newton_krylov import NewtonKrylov
from implicit.staged_safeguard import StagedSafeguard
from implicit.stopping import Criterion, Stop
from implicit.torch_internals import not_compiled, transforms_active

_NEWTON = NewtonKrylov(safeguard=False)  # the steps of the safeguard's last stage
COUPLED = (
    "f takes one sample of the batch into another (nodes of a graph as rows, batch normalization in training mode, a "
    "mean over the batch), so that samples which had converged lost it again. The whole batch was solved on as one "
    "system, which takes more evaluations: pass batch_dims=0."
)


def iterate(
    f: Map,
    z0: State,
    solver: AbstractSolver[Any],
    stop: Stop,
    *,
    args: tuple[Any, ...] = (),
    options: SolveOptions = SolveOptions(),
    image: bool = False,
    segment: int = 0,
) -> Solution:
    """Solve z = f(z, *args) with `solver` until every sample meets the tolerance of `stop`.

    Operations are recorded by autograd if it is on: estimators decide that.

    Args:
        f: the map; keeps structure, shapes and dtypes of the state.
        z0: the starting state, ``(B, *)`` tensors.
        args: passed on to f.
        options: batch dimensions, warm start, compaction and what to record.
        image: return f(z) in place of z, wherever f(z) is no worse by the tolerance.
        segment: without a tolerance, keep for autograd what there was at every `segment`-th evaluation alone, and run
            those between again in the backward pass; 0 keeps all.

    Raises:
        ValueError: f changes the shape, dtype, device or structure of the state or writes into it, or the state is
            not one that can be solved for, or `options.state` is not the state of such a solve.
    """
    layout = Layout.of(z0, options.batch_dims)
    counted = FlatMap(f, args, layout, stop.max_evals)
    if stop.has_tolerance or options.observed:
        return _until(counted, z0, solver, stop, options, image)
    return _count(counted, layout.pack(z0), solver, stop, options, segment)


def _begin(solver: AbstractSolver[Any], point: Point, options: SolveOptions) -> Any:
    """The solver state before the first step."""
    if options.state is None:
        return solver.init(point)
    return solver.resume(point, validate_warm_start(options.state, solver.init(point)))


def _count(
    f: FlatMap, z: Flat, solver: AbstractSolver[Any], stop: Stop, options: SolveOptions, segment: int
) -> Solution:
    """The loop without a tolerance: no decision on the host, so a device never waits and one graph compiles.

    A sample whose f(z) is not finite is held at the point before.
    """
    point = f.evaluate(z)
    began = alive = _finite(point)
    state = _begin(solver, point, options)
    while f.remaining > 0 and not segment:  # not a function: its caller would hold the first point and state
        z, tangent, state = solver.step(point, state)
        point, alive = _next(f, z, tangent, point, alive)
        del z, tangent  # the point has a copy
    while f.remaining > 0:
        run = SameValue(partial(_segment, f, solver, min(f.remaining, segment), f.calls), parts=2)
        with set_checkpoint_early_stop(False):  # the values are compared
            z, fz, product, alive, state, f.calls = checkpoint(
                run, point.z, point.fz, point.product, alive, state, use_reentrant=False
            )
        point = Point(z, fz, product, f.remaining)
    value = torch.where(began, point.fz, point.z)
    with torch.no_grad():
        fixed = (point.fz == point.z).all(dim=1)  # a norm may underflow to 0
        residual = Criterion(stop, f.layout).measure(point.fz - point.z, scaled=True, overwrite=True)
        residual = residual if residual.ndim == 1 else residual.amax(dim=1)
        ended = torch.where(fixed, int(Result.CONVERGED), int(Result.MAX_EVALS))
        result = torch.where(alive[:, 0], ended, int(Result.NONFINITE)).to(torch.int8)
        evals = torch.full_like(result, f.calls, dtype=torch.int64)
    return Solution(
        value=f.layout.unpack(value),
        residual=residual,
        result=result,
        evals=evals,
        state=state if options.keep_state else None,
    )


def _next(f: FlatMap, z: Flat, tangent: Flat | None, point: Point, alive: Tensor) -> tuple[Point, Tensor]:
    """The point at z, or the one before for samples where it is not finite, and which samples never failed."""
    new = f.evaluate(z, tangent)
    alive = alive & _finite(new)
    f.forget()  # what is kept is a copy
    fz, z, product, remaining = torch.where(alive, new.fz, point.fz), new.z, new.product, new.remaining
    del new  # one state less at a time
    return Point(torch.where(alive, z, point.z), fz, product, remaining), alive


def _segment(
    f: FlatMap,
    solver: AbstractSolver[Any],
    evals: int,
    calls: int,
    z: Flat,
    fz: Flat,
    product: Flat | None,
    alive: Tensor,
    state: Any,
) -> tuple[Flat, Flat, Flat | None, Tensor, Any, int]:
    """`evals` evaluations as a function that may be run twice, since it changes nothing; and the calls of f so far."""
    f = replace(f, calls=calls, _output=(None, None))
    state = map_tensors(torch.clone, state)  # histories may be written in place
    point, end = Point(z, fz, product, f.remaining), f.remaining - evals
    while f.remaining > end:
        z, tangent, state = solver.step(point, state)
        point, alive = _next(f, z, tangent, point, alive)
    return point.z, point.fz, point.product, alive, state, f.calls


def _finite(point: Point) -> Tensor:
    """(B, 1) whether f(z) is finite."""
    low, high = torch.aminmax(point.fz.detach(), dim=1, keepdim=True)  # without a copy of f(z)
    return (low > -torch.inf) & (high < torch.inf)


@not_compiled
def _until(
    f: FlatMap, z0: State, solver: AbstractSolver[Any], stop: Stop, options: SolveOptions, image: bool
) -> Solution:
    """The loop with a tolerance: the host reads two norms per sample and evaluation, in one copy."""
    with _progress_callback(options, stop) as callback:
        start = f.layout.pack(z0)
        monitor = ConvergenceMonitor(Criterion(stop, f.layout), start, callback, _safeguard(solver, start), f.calls)
        args = f.args
        state = _run(f, monitor, solver, options)
        f.args = args
        if _must_continue(f, monitor):
            if options.compact:
                options = replace(options, compact=False, state=None)
                monitor = ConvergenceMonitor(
                    monitor.criterion, monitor.best_z, callback, _safeguard(solver, start), f.calls, monitor.trace
                )
                state = _run(f, monitor, solver, options)
                again = _must_continue(f, monitor)
            else:
                again = True
            if again:
                state = _solve_jointly(f, monitor, solver, stop, callback)
        value = _image(f, monitor) if image else monitor.best_z
    return _solution(monitor, value, options, state)


def _run(f: FlatMap | JointMap, monitor: ConvergenceMonitor, solver: AbstractSolver[Any], options: SolveOptions) -> Any:
    """Evaluations until every sample has finished, the budget is spent or samples prove coupled; the solver state."""
    compactor = _Compactor(f, monitor, options) if isinstance(f, FlatMap) and options.compact else None
    point = f.evaluate(monitor.best_z)
    monitor.observe(point, f.calls, f.remaining <= 0)
    state, newton = _begin(solver, point, options), None
    if point.fz.requires_grad:
        monitor.without_newton()
    while f.remaining > 0 and not monitor.done:
        # samples to leave out, and samples to reset
        if compactor is not None and monitor.has_finished_rows:
            point, state = compactor(point, state)
            newton = None
        point, state = monitor.apply_resets(point, state, solver)
        # the next iterate, and f there
        z, tangent, state = solver.step(point, state)
        if monitor.use_newton is not None:
            krylov, tangent, newton = _NEWTON.step(point, _NEWTON.init(point) if newton is None else newton)
            z = torch.where(monitor.use_newton, krylov, z)
        point = _evaluate(f, monitor.next_iterate(z, point, f.remaining == 1), tangent, monitor)
        monitor.observe(point, f.calls, f.remaining <= 0)
        del z, tangent
        if monitor.inconsistent:
            assert monitor.observed is not None
            if not _is_noise(f, monitor, monitor.observed):
                break
            monitor.accept_noise()
    return state


def _is_noise(f: FlatMap | JointMap, monitor: ConvergenceMonitor, point: Point) -> bool:
    """Whether f gives another value at the z of `point` than before; one sample alone can have no other cause."""
    if len(monitor.code) == 1:
        return True
    with torch.no_grad():
        return differs(monitor.criterion, f.evaluate(point.z).fz, point.fz)


def _must_continue(f: FlatMap, monitor: ConvergenceMonitor) -> bool:
    """Test the claims of convergence that are not tested yet; whether samples prove coupled and budget is left."""
    coupled = monitor.inconsistent
    if coupled and f.remaining > 0:
        return True
    monitor.close()
    if not coupled and monitor.verified:
        return False
    with torch.no_grad():
        point = f.evaluate(monitor.best_z)
    lost = monitor.verify(point)
    if not len(lost) and not coupled:
        return False
    if not coupled and _is_noise(f, monitor, point):
        monitor.code[lost] = Result.NONDETERMINISTIC
        return False
    if f.remaining > 0:
        return True
    warnings.warn(COUPLED, RuntimeWarning, stacklevel=2)
    monitor.code[lost] = Result.MAX_EVALS
    return False


def _solve_jointly(
    f: FlatMap,
    monitor: ConvergenceMonitor,
    solver: AbstractSolver[Any],
    stop: Stop,
    callback: Callable[[int, np.ndarray], None] | None,
) -> Any:
    """Solve the whole batch as one system from the best iterates; enters the outcome into `monitor`.

    Every sample has to meet the tolerance in the same evaluation. The solver state that is returned has no history: one
    of the joint system does not fit the samples.
    """
    warnings.warn(COUPLED, RuntimeWarning, stacklevel=2)
    rows, first = len(monitor.best_z), monitor.criterion.first
    first = first.reshape(1, -1) if isinstance(first, np.ndarray) else first
    criterion = Criterion(stop, f.layout, rows, first)
    start = monitor.best_z.reshape(1, -1)
    joint = ConvergenceMonitor(criterion, start, callback, _safeguard(solver, start), f.calls, monitor.trace)
    _run(JointMap(f, rows), joint, solver, SolveOptions())
    joint.close()
    best = Point(joint.best_z.reshape(rows, -1), joint.best_fz.reshape(rows, -1))
    monitor.finish_jointly(best, joint.code[0], f.calls)
    return solver.init(best)


def _image(f: FlatMap, monitor: ConvergenceMonitor) -> Flat:
    """f(z) of the best iterates with its own residual, or z for a sample of which only z meets the tolerance."""
    with torch.no_grad():
        point = f.evaluate(monitor.best_fz.detach())
    claimed, before = monitor.code == Result.CONVERGED, monitor.residual.copy()
    lost = np.zeros(len(claimed), dtype=bool)
    lost[monitor.verify(point)] = True
    if not lost.any():
        return monitor.best_fz
    monitor.residual[lost] = before[lost]
    mask = to_device(lost, f.layout.device).unsqueeze(1)
    value = torch.where(mask, monitor.best_z, monitor.best_fz)
    # f may take one sample into another, so that z beside f(z) is a value of its own
    with torch.no_grad():
        point = f.evaluate(value.detach())
    if not len(monitor.verify(point)):
        return value
    monitor.residual = before
    return monitor.best_z


def _solution(monitor: ConvergenceMonitor, value: Flat, options: SolveOptions, state: Any) -> Solution:
    layout = monitor.layout
    device, dtype = layout.device, layout.dtype
    first = monitor.criterion.first
    return Solution(
        value=layout.unpack(value),
        residual=to_device(monitor.residual, device, dtype),
        result=to_device(monitor.code, device),
        evals=to_device(monitor.evals, device),
        trace=to_device(np.stack(monitor.trace), device, dtype) if options.trace else None,
        state=state if options.keep_state else None,
        scale=to_device(first, device, dtype) if isinstance(first, np.ndarray) else None,
    )


def _safeguard(solver: AbstractSolver[Any], z: Flat) -> Safeguard | StagedSafeguard | None:
    """The safeguard that the solver asks for; its Newton-Krylov stage needs derivatives that no transform takes."""
    if not solver.patience:
        return None
    if not solver.has_cautious_stage:
        return Safeguard(len(z), solver.patience)
    guard = StagedSafeguard(len(z), solver.stall_after(z.shape[1]))
    if transforms_active():
        guard.without_newton()
    return guard


def _evaluate(f: FlatMap | JointMap, z: Flat, tangent: Flat | None, monitor: ConvergenceMonitor) -> Point:
    """f at z with the Newton-Krylov stage's product; without it where f cannot be differentiated."""
    if monitor.use_newton is None or tangent is None:
        return f.evaluate(z, tangent)
    try:
        return f.evaluate(z, tangent)
    except (RuntimeError, NotImplementedError, TypeError):
        monitor.without_newton()
        return f.evaluate(z)


class _Compactor:
    """Cuts f's arguments, the point and the solver state down to the running samples."""

    def __init__(self, f: FlatMap, monitor: ConvergenceMonitor, options: SolveOptions) -> None:
        self.f, self.monitor = f, monitor
        self.guessed = options.compact is True
        self.which = options.compact if isinstance(options.compact, tuple) else (True,) * len(f.args)
        if options.keep_state:
            raise ValueError("compact and keep_state cannot go together: finished samples have no solver state left.")
        if f.layout.batch_dims and len(self.which) != len(f.args):
            raise ValueError(f"compact must hold one flag for each of the {len(f.args)} args, got {len(self.which)}.")

    def __call__(self, point: Point, state: Any) -> tuple[Point, Any]:
        if not self.f.layout.batch_dims:
            return point, state
        batch = point.z.shape[0]
        keep = self.monitor.compact()

        def select(t: Tensor) -> Tensor:
            return t.index_select(0, keep) if t.ndim and t.shape[0] == batch else t

        self.f.args = tuple(
            map_tensors(select, arg) if cut else arg for arg, cut in zip(self.f.args, self.which, strict=True)
        )
        product = None if point.product is None else select(point.product)
        return Point(select(point.z), select(point.fz), product, point.remaining), map_tensors(select, state)


@contextmanager
def _progress_callback(options: SolveOptions, stop: Stop) -> Iterator[Callable[[int, np.ndarray], None] | None]:
    """What is called with the residuals as they are read; None without trace, callback and progress bar."""
    if not options.observed:
        yield None
        return
    with ExitStack() as stack:
        bar = None
        if options.progress:
            from tqdm.auto import tqdm

            bar = stack.enter_context(tqdm(total=stop.max_evals, unit="eval", leave=False))

        def callback(calls: int, residual: np.ndarray) -> None:
            if bar is not None:
                running = residual[~np.isnan(residual)]
                bar.update(calls - bar.n)
                bar.set_postfix(running=len(running), residual=f"{running.max(initial=0.0):.1e}", refresh=False)
            if options.callback is not None:
                options.callback(calls, torch.from_numpy(residual.copy()))

        yield callback
