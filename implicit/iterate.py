"""The loop: evaluate f, test for convergence, freeze what has finished, ask the solver for the next iterate.

Setting: f maps a state to a state of the same shape; sample b is a system of its own. z is the iterate and
r = f(z) - z its residual; `implicit.stopping` has the criterion. A finished sample is frozen at its z while the others
go on.

CONVERGED and `residual` are true of the value that is returned. Frozen samples are evaluated along, so a claim is
tested in every evaluation; where none was at the batch that is returned (after compaction, with `Stop.late`, beside
samples that did not converge), one more evaluation measures it. A claim that does not hold has one of two causes,
distinguished by evaluating f again at the same z:

    noise      f gives two values at one z (a fresh dropout mask, spectral_norm in training mode): the sample goes on,
               and ends as NONDETERMINISTIC if the budget does not suffice
    coupling   f takes one sample into another: the whole batch is solved on as one system, with a warning
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
from implicit.loop.verification import COUPLED, enter_joint, image_of_best, is_noise, must_continue, spend_budget
from implicit.options import SolveOptions
from implicit.pytree import Flat, Layout, Map, State, leaves, map_tensors, to_device
from implicit.solution import Solution
from implicit.solvers.base import AbstractSolver, Point
from implicit.solvers.newton_krylov import NewtonKrylov
from implicit.staged_safeguard import CAUTIOUS, HISTORY_LOST, Stage, StagedSafeguard
from implicit.stopping import Criterion, Stop
from implicit.torch_internals import is_abstract, not_compiled, transforms_active

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

    Operations are recorded by autograd if it is on: estimators decide that.

    Args:
        f: the map; keeps structure, shapes and dtypes of the state.
        z0: the starting state, ``(B, *)`` tensors.
        args: passed on to f.
        options: batch dimensions, warm start, compaction and what to record.
        image: return f(z) in place of z, wherever f(z) is no worse by the tolerance.
        segments: without a tolerance, keep for autograd what there was at the end of each segment alone, and run the
            segments again in the backward pass; None keeps all.

    Raises:
        ValueError: f changes the shape, dtype, device or structure of the state or writes into it, or the state is
            not one that can be solved for, or `options.state` is not the state of such a solve.
    """
    layout = Layout.of(z0, options.batch_dims)
    counted = FlatMap(f, args, layout, stop.max_evals)
    require_numbers(z0, stop)
    if stop.has_tolerance:
        return _until(counted, z0, solver, stop, options, image)
    return fixed_count(counted, z0, solver, stop, options, segments)


def require_numbers(z0: State, stop: Stop) -> None:
    """Refuse a tolerance for a state on the meta device or a fake one.

    Raises:
        ValueError: naming the criterion to pass.
    """
    if stop.has_tolerance and is_abstract(leaves(z0)[0]):
        raise ValueError(
            "A state on the meta device, or a fake one, has no residual to compare with a tolerance: pass "
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
        # a recorded solve takes no Newton-Krylov steps
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
    """Evaluations until every sample has finished, the budget is spent or samples prove coupled; the solver state."""
    compactor = _Compactor(f, monitor, options) if isinstance(f, FlatMap) and options.compact else None
    point = f.evaluate(monitor.best.z)
    monitor.observe(point, f.calls, f.remaining <= 0)
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
    """The point to observe and the point to step from, which are one unless autograd records an f(z) that is NaN.

    A cotangent of 0 times NaN would reach the parameters that samples share. So f is evaluated again, with the best
    iterates of those samples, and NaN stands for their values as a constant.
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

    Every sample has to meet the tolerance in the same evaluation. The solver state that is returned has no history: one
    of the joint system does not fit the samples.
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
    """The safeguard of a solver that has `patience`; its Newton-Krylov stage needs `derivatives` outside of transforms.

    `Unrolled` cannot record those, and leaves the stage out without a graph too: the value is one.
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
    """f at z with the Newton-Krylov stage's product; without it where f cannot be differentiated.

    Attention has other kernels with a product than without one. Samples in other stages must not see that, so that
    f(z) is then evaluated by itself, outside of the budget.
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
    monitor.product_keeps_bits = bool(((fz == point.fz) | fz.isnan()).all())
    return Point(point.z, fz, point.product, point.remaining)


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
