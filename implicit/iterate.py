"""The one loop: evaluate, judge, hold what has finished, ask the solver for the next iterate.

Setting: f maps a state to a state of the same shape; sample b is its own system. With z the iterate and
r = f(z) - z its residual, a sample has converged when

    ||r||  <=  atol + rtol ||f(z)||          (Euclidean norms over all the sample's numbers)

A finished sample is held at its answer while the others go on, so an answer never depends on batch-mates.
"""

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from implicit.convergence import Judge
from implicit.convergence import Stop as Stop
from implicit.pytree import Flat, Layout, State, leaves, map_tensors, norm, warm
from implicit.solution import Result, Solution
from implicit.solvers.base import AbstractSolver, Point

Map = Callable[..., State]


@dataclass
class PackedMap:
    """f on (B, N) matrices: checked, and every call counted."""

    f: Map
    args: tuple[Any, ...]
    layout: Layout
    budget: int = 0
    calls: int = 0
    aimed: Flat | None = None
    pushed: Flat | None = None
    forward: bool = True  # whether f has a forward mode, as far as is known
    last: tuple[State, Any] = (None, None)  # what f returned last, outside the graph, and its stamp

    @property
    def left(self) -> int:
        return self.budget - self.calls

    def __call__(self, z: Flat) -> Flat:
        self.calls += 1
        state = self.layout.unpack(z)
        if torch.compiler.is_compiling():
            return self.layout.pack(self.layout.check(self.f(state, *self.args), state))
        before = _stamp(state, self.calls == 1)
        out = self.f(state, *self.args)
        if _written(before, state) or _written(self.last[1], self.last[0]):
            raise ValueError(
                "f modifies its input in place, or writes its result into a tensor that it returned before; z and "
                "f(z) would be one tensor and every residual 0: use out-of-place operations in f, or clone."
            )
        out = self.layout.check(out, state)
        last = map_tensors(_detached, out)
        self.last = last, _stamp(last, False)
        return self.layout.pack(out)

    def forget(self) -> None:
        """Let go of what f returned last."""
        self.last = None, None

    def aim(self, v: Flat) -> None:
        """Take J v along with the next evaluation."""
        self.aimed = v

    def at(self, z: Flat) -> Point:
        """Evaluate f at z, rounded to what the state's dtype can hold, and J v there if a solver aimed at it."""
        z = self.layout.round(z) if self.layout.lossy else z
        v, self.aimed, self.pushed = self.aimed, None, None
        if v is None:
            return Point(z, self(z))
        fz, self.pushed = self._push(z, v)
        return Point(z, fz)

    def _push(self, z: Flat, v: Flat) -> tuple[Flat, Flat]:
        """f(z) and J v, by forward mode or, where an operator of f has none, by two vector-Jacobian products."""
        if self.forward:
            try:
                out, pushed = torch.func.jvp(self, (z,), (v,))[:2]
                self.forget()  # it belongs to the transform
                return out, pushed
            except (NotImplementedError, RuntimeError) as error:
                if not any(word in str(error) for word in ("orward", "setup_context")):
                    raise
            self.calls -= 1  # the attempt above is not charged for
            self.forward = False
        recorded = torch.is_grad_enabled()
        with torch.enable_grad():
            x, w = z.detach().requires_grad_(), torch.zeros_like(v, requires_grad=True)
            out = self(x)
            pulled = (
                torch.autograd.grad(out, x, w, create_graph=True, allow_unused=True)[0] if out.requires_grad else None
            )
            pushed = torch.zeros_like(v) if pulled is None else torch.autograd.grad(pulled, w, v)[0]
        return out if recorded else out.detach(), pushed


def _detached(t: Tensor) -> Tensor:
    return t.detach() if t.requires_grad else t


def _stamp(state: State, first: bool) -> Any:
    """What tells later whether tensors were written to; inference tensors have no version and are copied once."""
    if isinstance(state, Tensor):
        return state._version if not state.is_inference() else state.clone() if first else None
    return [_stamp(t, first) for t in leaves(state)]


def _written(before: Any, state: State) -> bool:
    if isinstance(before, int):
        return before != state._version
    if isinstance(before, Tensor):
        return not torch.allclose(before, state, rtol=0, atol=0, equal_nan=True)
    return isinstance(before, list) and any(map(_written, before, leaves(state)))


@dataclass(frozen=True, kw_only=True)
class Loop:
    """How a solve is run and watched, apart from when it stops.

    Args:
        batch_dims: 1, each row of the state is its own system; 0, the whole state is one.
        trace: record the residual at every evaluation.
        state: a solver's memory from an earlier ``Solution.state``, to go on with. It is copied, never written to.
        keep_state: put the solver's memory into ``Solution.state``.
        compact: evaluate f on the samples still running only: finished ones are cut out of the state, of the solver's
            memory and of the tensors in `args` that have one row per sample. True: every tensor in `args` whose first
            dimension is the batch size is cut; a tuple holds one True or False for each of `args`. What f closes over
            is not cut, so batched inputs must come through `args`.
        callback: called with (number of evaluations, (B,) float64 host tensor of residuals, NaN where finished) each
            time residuals are read: at every evaluation, or every `Stop.check_every`-th.
        progress: show a tqdm bar.
    """

    batch_dims: int = 1
    trace: bool = False
    state: Any = None
    keep_state: bool = False
    compact: bool | tuple[bool, ...] = False
    callback: Callable[[int, Tensor], None] | None = None
    progress: bool = False

    @property
    def watched(self) -> bool:
        """Whether residuals are wanted even without a tolerance."""
        return self.trace or self.progress or self.callback is not None


def iterate(
    f: Map,
    z0: State,
    solver: AbstractSolver[Any],
    stop: Stop,
    *,
    args: tuple[Any, ...] = (),
    loop: Loop = Loop(),
    image: bool = False,
    segment: int = 0,
) -> Solution:
    """Solve z = f(z, *args) with `solver` until `stop` is content, sample by sample.

    Operations are recorded by autograd if it is on: estimators decide that.

    Args:
        f: the map; keeps structure, shapes and dtypes of the state.
        z0: the starting state, ``(B, *)`` tensors.
        args: passed on to f.
        loop: batch dimensions, warm start, compaction and what to record.
        image: return f(z) for converged samples too, not the z whose residual was judged.
        segment: without a tolerance, keep for autograd what there was at every `segment`-th evaluation alone, and run
            those between again in the backward pass; 0 keeps all.

    Raises:
        ValueError: f changes the shape, dtype, device or structure of the state or writes into it, or the state is
            not one that can be solved for, or `loop.state` is not the memory of such a solve.
    """
    layout = Layout.of(z0, loop.batch_dims)
    counted = PackedMap(f, args, layout, stop.max_evals)
    z = layout.pack(z0)
    if stop.has_tolerance or loop.watched:
        return _until(counted, z, solver, stop, loop, image)
    return _count(counted, z, solver, loop, segment)


def _begin(solver: AbstractSolver[Any], point: Point, loop: Loop) -> Any:
    """The solver's memory before its first step."""
    if loop.state is None:
        return solver.init(point)
    return solver.resume(point, warm(loop.state, solver.init(point)))


def _count(f: PackedMap, z: Flat, solver: AbstractSolver[Any], loop: Loop, segment: int) -> Solution:
    """The loop without a tolerance: no decision on the host, so a device never waits and one graph compiles.

    A sample whose f(z) is not finite is held at the point before.
    """
    point = f.at(z)
    began = alive = _finite(point)
    memory = _begin(solver, point, loop)
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
        state=memory if loop.keep_state else None,
    )


def _next(f: PackedMap, z: Flat, point: Point, alive: Tensor) -> tuple[Point, Tensor]:
    """The point at z, or the one before for samples where it is not finite, and who is alive."""
    new = f.at(z)
    alive = alive & _finite(new)
    f.forget()  # what is kept is a copy
    fz, z = torch.where(alive, new.fz, point.fz), new.z
    del new  # one state less at a time
    return Point(torch.where(alive, z, point.z), fz), alive


def _segment(
    f: PackedMap,
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
def _until(f: PackedMap, z: Flat, solver: AbstractSolver[Any], stop: Stop, loop: Loop, image: bool) -> Solution:
    """The loop with a tolerance: the host reads two norms per sample and evaluation, in one copy."""
    with _watching(loop, stop) as watch:
        judge = Judge(f.layout, stop, z, watch, solver.patience)
        cut = _Cut(f, judge, loop)
        point = judge.see(f.at(z), f.calls, f.left <= 0)
        memory = _begin(solver, point, loop)
        while f.left > 0 and not judge.done:
            if cut.on and judge.idle:
                point, memory = cut(point, memory)
            point, memory = judge.back(point, memory, solver)
            z, memory = solver.step(f, point, memory)
            point = judge.see(f.at(judge.hold(z, point)), f.calls, f.left <= 0)
        return judge.solution(image=image, trace=loop.trace, state=memory if loop.keep_state else None)


class _Cut:
    """Compaction: f, the point and the solver's memory for the running samples only."""

    def __init__(self, f: PackedMap, judge: Judge, loop: Loop) -> None:
        self.f, self.judge = f, judge
        self.on = bool(loop.compact) and f.layout.batch_dims == 1
        self.which = loop.compact if isinstance(loop.compact, tuple) else (True,) * len(f.args)
        if loop.compact and loop.keep_state:
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
def _watching(loop: Loop, stop: Stop) -> Iterator[Callable[[int, np.ndarray], None] | None]:
    """What to call with the residuals as they are read; None when nobody watches."""
    if not loop.watched:
        yield None
        return
    with ExitStack() as stack:
        bar = None
        if loop.progress:
            from tqdm.auto import tqdm

            bar = stack.enter_context(tqdm(total=stop.max_evals, unit="eval", leave=False))

        def watch(calls: int, residual: np.ndarray) -> None:
            if bar is not None:
                running = residual[~np.isnan(residual)]
                bar.update(calls - bar.n)
                bar.set_postfix(running=len(running), residual=f"{running.max(initial=0.0):.1e}", refresh=False)
            if loop.callback is not None:
                loop.callback(calls, torch.from_numpy(residual.copy()))

        yield watch
