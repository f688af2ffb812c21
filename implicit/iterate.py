"""The one loop: evaluate, judge, hold what has finished, ask the solver for the next iterate.

Setting: f maps a state to a state of the same shape; sample b is its own system. With z the iterate and
r = f(z) - z its residual, a sample has converged when

    ||r||  <=  atol + rtol ||f(z)||          (Euclidean norms over all the sample's numbers)

A finished sample is held at its answer while the others go on, so an answer never depends on batch-mates.
"""

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from implicit.convergence import ConvergenceMonitor
from implicit.evaluation import FlatMap
from implicit.options import SolveOptions
from implicit.pytree import Flat, Layout, Map, State, map_tensors, norm, validate_warm_start
from implicit.solution import Result, Solution
from implicit.solvers.base import AbstractSolver, Point
from implicit.stopping import Stop as Stop


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
    """Solve z = f(z, *args) with `solver` until `stop` is content, sample by sample.

    Operations are recorded by autograd if it is on: estimators decide that.

    Args:
        f: the map; keeps structure, shapes and dtypes of the state.
        z0: the starting state, ``(B, *)`` tensors.
        args: passed on to f.
        options: batch dimensions, warm start, compaction and what to record.
        image: return f(z) for converged samples too, not the z whose residual was judged.
        segment: without a tolerance, keep for autograd what there was at every `segment`-th evaluation alone, and run
            those between again in the backward pass; 0 keeps all.

    Raises:
        ValueError: f changes the shape, dtype, device or structure of the state or writes into it, or the state is
            not one that can be solved for, or `options.state` is not the memory of such a solve.
    """
    layout = Layout.of(z0, options.batch_dims)
    counted = FlatMap(f, args, layout, stop.max_evals)
    z = layout.pack(z0)
    if stop.has_tolerance or options.watched:
        return _until(counted, z, solver, stop, options, image)
    return _count(counted, z, solver, options, segment)


def _begin(solver: AbstractSolver[Any], point: Point, options: SolveOptions) -> Any:
    """The solver's memory before its first step."""
    if options.state is None:
        return solver.init(point)
    return solver.resume(point, validate_warm_start(options.state, solver.init(point)))


def _count(f: FlatMap, z: Flat, solver: AbstractSolver[Any], options: SolveOptions, segment: int) -> Solution:
    """The loop without a tolerance: no decision on the host, so a device never waits and one graph compiles.

    A sample whose f(z) is not finite is held at the point before.
    """
    point = f.at(z)
    began = alive = _finite(point)
    memory = _begin(solver, point, options)
    while f.left > 0 and not segment:  # not a function: its caller would hold the first point and memory
        z, memory = solver.step(f, point, memory)
        point, alive = _next(f, z, point, alive)
        del z  # the point has a copy
    while f.left > 0:
        run = partial(_segment, f, solver, min(f.left, segment), f.calls)
        z, fz, alive, memory, f.pushed, f.calls = checkpoint(
            run, point.z, point.fz, alive, memory, f.pushed, use_reentrant=False
        )
        point = Point(z, fz)
    value = torch.where(began, point.fz, point.z)
    with torch.no_grad():
        residual = norm(point.r)
        ended = torch.where(residual == 0, int(Result.CONVERGED), int(Result.MAX_EVALS))
        result = torch.where(alive[:, 0], ended, int(Result.NONFINITE)).to(torch.int8)
        evals = torch.full_like(result, f.calls, dtype=torch.int64)
    return Solution(
        value=f.layout.unpack(value),
        residual=residual,
        result=result,
        evals=evals,
        state=memory if options.keep_state else None,
    )


def _next(f: FlatMap, z: Flat, point: Point, alive: Tensor) -> tuple[Point, Tensor]:
    """The point at z, or the one before for samples where it is not finite, and who is alive."""
    new = f.at(z)
    alive = alive & _finite(new)
    f.forget()  # what is kept is a copy
    fz, z = torch.where(alive, new.fz, point.fz), new.z
    del new  # one state less at a time
    return Point(torch.where(alive, z, point.z), fz), alive


def _segment(
    f: FlatMap,
    solver: AbstractSolver[Any],
    evals: int,
    calls: int,
    z: Flat,
    fz: Flat,
    alive: Tensor,
    memory: Any,
    pushed: Flat | None,
) -> tuple[Flat, Flat, Tensor, Any, Flat | None, int]:
    """`evals` evaluations as a function that may be run twice, since it changes nothing; and the calls of f so far."""
    f = replace(f, calls=calls, aimed=None, pushed=pushed, last=(None, None))
    memory = map_tensors(torch.clone, memory)  # histories may be written in place
    point, end = Point(z, fz), f.left - evals
    while f.left > end:
        z, memory = solver.step(f, point, memory)
        point, alive = _next(f, z, point, alive)
    return point.z, point.fz, alive, memory, f.pushed, f.calls


def _finite(point: Point) -> Tensor:
    """(B, 1) whether f(z) is finite."""
    low, high = torch.aminmax(point.fz.detach(), dim=1, keepdim=True)  # without a copy of f(z)
    return (low > -torch.inf) & (high < torch.inf)


@torch.compiler.disable(recursive=True)
def _until(
    f: FlatMap, z: Flat, solver: AbstractSolver[Any], stop: Stop, options: SolveOptions, image: bool
) -> Solution:
    """The loop with a tolerance: the host reads two norms per sample and evaluation, in one copy."""
    with _watching(options, stop) as watch:
        judge = ConvergenceMonitor(f.layout, stop, z, watch, solver.patience)
        cut = _Cut(f, judge, options)
        point = judge.see(f.at(z), f.calls, f.left <= 0)
        memory = _begin(solver, point, options)
        while f.left > 0 and not judge.done:
            if cut.on and judge.idle:
                point, memory = cut(point, memory)
            point, memory = judge.back(point, memory, solver)
            z, memory = solver.step(f, point, memory)
            point = judge.see(f.at(judge.hold(z, point)), f.calls, f.left <= 0)
        return judge.solution(image=image, trace=options.trace, state=memory if options.keep_state else None)


class _Cut:
    """Compaction: f, the point and the solver's memory for the running samples only."""

    def __init__(self, f: FlatMap, judge: ConvergenceMonitor, options: SolveOptions) -> None:
        self.f, self.judge = f, judge
        self.on = bool(options.compact) and f.layout.batch_dims == 1
        self.which = options.compact if isinstance(options.compact, tuple) else (True,) * len(f.args)
        if options.compact and options.keep_state:
            raise ValueError("compact and keep_state cannot go together: finished samples have no memory left.")
        if self.on and len(self.which) != len(f.args):
            raise ValueError(f"compact must hold one flag for each of the {len(f.args)} args, got {len(self.which)}.")

    def __call__(self, point: Point, memory: Any) -> tuple[Point, Any]:
        batch = point.z.shape[0]
        keep = self.judge.compact()

        def select(t: Tensor) -> Tensor:
            return t.index_select(0, keep) if t.ndim and t.shape[0] == batch else t

        self.f.args = tuple(
            map_tensors(select, arg) if cut else arg for arg, cut in zip(self.f.args, self.which, strict=True)
        )
        self.f.pushed = map_tensors(select, self.f.pushed)
        return Point(select(point.z), select(point.fz)), map_tensors(select, memory)


@contextmanager
def _watching(options: SolveOptions, stop: Stop) -> Iterator[Callable[[int, np.ndarray], None] | None]:
    """What to call with the residuals as they are read; None when nobody watches."""
    if not options.watched:
        yield None
        return
    with ExitStack() as stack:
        bar = None
        if options.progress:
            from tqdm.auto import tqdm

            bar = stack.enter_context(tqdm(total=stop.max_evals, unit="eval", leave=False))

        def watch(calls: int, residual: np.ndarray) -> None:
            if bar is not None:
                running = residual[~np.isnan(residual)]
                bar.update(calls - bar.n)
                bar.set_postfix(running=len(running), residual=f"{running.max(initial=0.0):.1e}", refresh=False)
            if options.callback is not None:
                options.callback(calls, torch.from_numpy(residual.copy()))

        yield watch
