"""The loop: evaluate f, test for convergence, freeze finished samples, take the solver's next iterate.

Setting: f maps a state to a state of the same shape; sample b is a system of its own. z is the iterate and
r = f(z) - z its residual; `implicit.stopping` has the criterion. A finished sample is frozen at its z while the others
go on.

CONVERGED and `residual` are true of the value that is returned. Frozen samples are evaluated along with the running
ones, so every evaluation measures them again. If no evaluation was at the batch that is returned (after compaction,
with `Stop.late`, beside samples that did not converge), one more evaluation measures that batch. A converged sample
that misses the tolerance there has one of two causes, distinguished by evaluating f again at the same z:

    noise      f gives two values at one z (a fresh dropout mask, spectral_norm in training mode): the sample goes on,
               and ends as NONDETERMINISTIC if the budget does not suffice
    coupling   f takes one sample into another: the solve goes on with the whole batch as one system, and a warning
"""

import warnings
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor

from implicit.autodiff.recomputation import Segments
from implicit.convergence import RUNNING, ConvergenceMonitor
from implicit.evaluation import FlatMap, JointMap
from implicit.loop.fixed_count import begin, fixed_count
from implicit.loop.progress import progress_callback, recorded
from implicit.loop.repeated_points import differs
from implicit.loop.verification import COUPLED, enter_joint, image_of_best, is_noise, must_continue, spend_budget
from implicit.options import SolveOptions
from implicit.pytree import Flat, Layout, Map, State, leaves, map_tensors, to_device
from implicit.solution import Solution
from implicit.solvers.base import AbstractSolver, Point
from implicit.solvers.newton_krylov import NewtonKrylov
from implicit.staged_safeguard import CAUTIOUS, HISTORY_LOST, Stage, StagedSafeguard
from implicit.stopping import Criterion, Stop
from implicit.torch_internals import constant_numbers, is_abstract, jit_traces, not_compiled, transforms_active

_NEWTON = NewtonKrylov(60, safeguard=False)  # the steps of the safeguard's last stage


def iterate(
    f: Map,
    z0: State,
    solver: AbstractSolver[Any],
    stop: Stop,
    *,
    args: tuple[Any, ...] = (),
    options: SolveOptions = SolveOptions(),
    image: bool = False,
    segments: Segments | None = None,
) -> Solution:
    """Solve z = f(z, *args) with `solver` until every sample meets the tolerance of `stop`.

    Autograd records the operations if gradients are enabled, which the estimators decide.

    Args:
        f: the map; keeps structure, shapes and dtypes of the state.
        z0: the starting state, ``(B, *)`` tensors.
        args: passed on to f.
        options: batch dimensions, warm start, compaction and what to record.
        image: return f(z) in place of z, except for a sample of which only z meets the tolerance or has a finite
            residual.
        segments: for a solve without a tolerance: autograd keeps only the point and the solver state at the end of
            each segment, and the backward pass runs the segments again; None: autograd keeps every evaluation.

    Raises:
        ValueError: f changes the shape, dtype, device or structure of the state or writes into it, or the state is
            empty or not of floating point or complex tensors, or `options.state` belongs to another kind of solve.
    """
    layout = Layout.of(z0, options.batch_dims)
    stop = stop if stop.has_tolerance else constant_numbers(stop)
    counted = FlatMap(f, args, layout, stop.max_evals)
    require_numbers(z0, stop)
    if stop.has_tolerance:
        return _until(counted, z0, solver, stop, options, image)
    return fixed_count(counted, z0, solver, stop, options, segments)


def require_numbers(z0: State, stop: Stop) -> None:
    """Refuse a tolerance for a state on the meta device, for a state of fake tensors, and under torch.jit.trace.

    Raises:
        ValueError: naming the criterion to pass.
        NotImplementedError: under torch.jit.trace.
    """
    if stop.has_tolerance and jit_traces():
        raise NotImplementedError(
            "torch.jit.trace records the evaluations that this input needs, and another input may need more: pass "
            "stop=Stop(rtol=0, atol=0, max_evals=n), or use torch.compile, which keeps the loop."
        )
    if stop.has_tolerance and is_abstract(leaves(z0)[0]):
        raise ValueError(
            "A state on the meta device, or of fake tensors, has no residual to compare with a tolerance: pass "
            "stop=Stop(rtol=0, atol=0, max_evals=n)."
        )


@not_compiled
def _until(
    f: FlatMap, z0: State, solver: AbstractSolver[Any], stop: Stop, options: SolveOptions, image: bool
) -> Solution:
    """The loop with a tolerance: the host reads two norms per sample and evaluation, in one copy."""
    with progress_callback(options, stop) as callback:
        start = f.layout.pack(z0)
        criterion, fold = Criterion(stop, f.layout), options.fold()
        # `Unrolled`, which sets `image`, cannot record Newton-Krylov steps
        make_safeguard = partial(_safeguard, solver, derivatives=not image)
        monitor = ConvergenceMonitor(criterion, start, callback, make_safeguard(start), f.calls, fold=fold)
        args = f.args
        state = _run(f, monitor, solver, options)
        f.args = args
        if must_continue(f, monitor, bool(options.compact), image):
            if options.compact:
                options = replace(options, compact=False, state=None)
                monitor = ConvergenceMonitor(
                    monitor.criterion, monitor.best.z, callback, make_safeguard(start), f.calls, monitor.trace
                )
                state = _run(f, monitor, solver, options)
                again = must_continue(f, monitor, False, image)
            else:
                again = True
            if again:
                state = _solve_jointly(f, monitor, solver, stop, callback, make_safeguard)
        value = image_of_best(f, monitor) if image else monitor.best.z
    monitor.evals += f.repeats
    return _solution(monitor, value, options, state)


def _run(f: FlatMap | JointMap, monitor: ConvergenceMonitor, solver: AbstractSolver[Any], options: SolveOptions) -> Any:
    """Evaluate until all samples have finished, the budget is spent or f couples samples; returns the solver state."""
    compactor = _Compactor(f, monitor, options) if isinstance(f, FlatMap) and options.compact else None
    point = f.evaluate(monitor.best.z)
    monitor.observe(point, f.calls, f.remaining <= 0 or monitor.done)  # no sample runs in an empty batch
    state, newton = begin(solver, point, options), None
    if point.fz.requires_grad:
        monitor.without_newton()
    while f.remaining > 0 and not monitor.done:
        # samples to leave out, and samples to reset
        if compactor is not None and (monitor.code[monitor.rows] != RUNNING).any():
            point, (state, newton) = compactor(point, (state, newton))
        point, state = monitor.apply_resets(point, state, solver)
        # the next iterate, and f there
        z, tangent, state = solver.step(point, state)
        if monitor.masks.newton is not None:
            krylov, tangent, newton = _NEWTON.step(point, _NEWTON.init(point) if newton is None else newton)
            z = torch.where(monitor.masks.newton, krylov, z)
        point = _evaluate(f, monitor.next_iterate(z, point, f.remaining == 1), tangent, monitor)
        observed, point = _without_nan(f, point, monitor, tangent)
        monitor.observe(observed, f.calls, f.remaining <= 0)
        del observed
        del z, tangent
        if monitor.inconsistent:
            assert monitor.observed is not None
            if not is_noise(f, monitor, monitor.observed):
                break
            monitor.accept_noise()
    return state


def _without_nan(
    f: FlatMap | JointMap, point: Point, monitor: ConvergenceMonitor, tangent: Flat | None
) -> tuple[Point, Point]:
    """The point to observe and the point to step from; they differ only if autograd records an f(z) that is NaN.

    In the backward pass a cotangent of 0 times NaN is NaN and would reach the parameters that samples share. Therefore
    f is evaluated again with the best iterates of the samples whose f(z) is not finite, and the monitor observes the
    constant NaN as their f(z).
    """
    if not point.fz.requires_grad:
        return point, point
    finite = point.fz.detach().isfinite().all(dim=1, keepdim=True)
    if finite.all():
        return point, point
    again = f.repeat(torch.where(finite, point.z, monitor.best_iterates().z), tangent)
    return Point(again.z, torch.where(finite, again.fz, torch.nan), again.product, again.remaining), again


def _solve_jointly(
    f: FlatMap,
    monitor: ConvergenceMonitor,
    solver: AbstractSolver[Any],
    stop: Stop,
    callback: Callable[[int, np.ndarray], None] | None,
    make_safeguard: Callable[[Tensor], StagedSafeguard | None],
) -> Any:
    """Solve the whole batch as one system from the best iterates; enters the outcome into `monitor`.

    Every sample has to meet the tolerance in the same evaluation. The solver state that is returned has no history,
    since the history of the joint system has one row for the whole batch.
    """
    warnings.warn(COUPLED, RuntimeWarning, stacklevel=2)
    rows, first = len(monitor.best.z), monitor.criterion.first
    first = first.reshape(1, -1) if isinstance(first, np.ndarray) else first
    criterion = Criterion(stop, f.layout, rows, first)
    start = monitor.best.z.reshape(1, -1)
    joint = ConvergenceMonitor(criterion, start, callback, make_safeguard(start), f.calls, monitor.trace, monitor.fold)
    _run(JointMap(f, rows), joint, solver, SolveOptions())
    spend_budget(joint)
    enter_joint(monitor, joint, f.calls)
    return solver.init(monitor.best_iterates())


def _solution(monitor: ConvergenceMonitor, value: Flat, options: SolveOptions, state: Any) -> Solution:
    layout = monitor.layout
    device, dtype = layout.device, layout.dtype
    first = monitor.criterion.first
    return Solution(
        value=layout.unpack(value),
        residual=to_device(monitor.best.residual, device, dtype),
        result=to_device(monitor.code, device),
        evals=to_device(monitor.evals, device),
        trace=recorded(monitor.fold, monitor.trace, layout, options),
        state=state if options.keep_state else None,
        scale=to_device(first, device, dtype) if isinstance(first, np.ndarray) else None,
    )


def _safeguard(solver: AbstractSolver[Any], z: Flat, derivatives: bool) -> StagedSafeguard | None:
    """The safeguard of a solver that has `patience`; without `derivatives` it has no Newton-Krylov stage.

    `Unrolled` cannot record Newton-Krylov steps. It leaves the stage out without a graph too, so that the value does
    not depend on whether gradients are enabled.
    """
    if not solver.patience:
        return None
    limits = CAUTIOUS if solver.has_cautious_stage else HISTORY_LOST
    safeguard = StagedSafeguard(len(z), solver.stall_after(z.shape[1]), z.shape[1], limits)
    if not solver.has_cautious_stage:
        safeguard.leave_out(Stage.CAUTIOUS)
    if not derivatives or transforms_active() or isinstance(solver, NewtonKrylov):
        safeguard.leave_out(Stage.NEWTON)
    return safeguard


def _evaluate(f: FlatMap | JointMap, z: Flat, tangent: Flat | None, monitor: ConvergenceMonitor) -> Point:
    """f at z, with the Jacobian-vector product of samples in the Newton-Krylov stage if f can be differentiated.

    PyTorch may choose another kernel for f(z), of attention for example, when the product is computed along with it.
    The samples in other stages must get the same bits as without the product, so f(z) is evaluated once more without
    it, outside of the budget, until the bits have agreed once. If f gives two values at one z, they never agree: then
    two evaluations without the product differ too, and no more of them are made.
    """
    if monitor.masks.newton is None or tangent is None:
        return f.evaluate(z, tangent)
    try:
        point = f.evaluate(z, tangent)
    except (RuntimeError, NotImplementedError, TypeError):
        monitor.without_newton()
        return f.evaluate(z)
    if monitor.product_keeps_bits:
        return point
    fz = f.repeat(z).fz
    monitor.product_keeps_bits = _same_bits(point.fz, fz)
    # a difference beyond rounding is tested again, since noise in a small state may give the same value twice
    if not monitor.product_keeps_bits and (not monitor.product_rounds or differs(monitor.criterion, point.fz, fz)):
        monitor.product_rounds = _same_bits(f.repeat(z).fz, fz)
        monitor.product_keeps_bits = not monitor.product_rounds
    return Point(point.z, fz, point.product, point.remaining)


def _same_bits(a: Flat, b: Flat) -> bool:
    """Whether a and b have the same numbers; any number of a agrees with a NaN of b."""
    return bool(((a == b) | b.isnan()).all())


class _Compactor:
    """Cuts f's arguments, the point and the solver state down to the running samples."""

    def __init__(self, f: FlatMap, monitor: ConvergenceMonitor, options: SolveOptions) -> None:
        self.f, self.monitor = f, monitor
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
