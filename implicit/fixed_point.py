"""`fixed_point`: the one public entry point."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from implicit.autodiff.autocast import as_now
from implicit.autodiff.parametrizations import weights_once
from implicit.grads.base import AbstractGrad
from implicit.grads.ift import IFT
from implicit.options import Problem, SolveOptions
from implicit.pytree import Map, State, leaves
from implicit.solution import Solution
from implicit.solvers import Anderson, AndersonGS, BadBroyden, Broyden, NewtonKrylov, Picard
from implicit.solvers.base import AbstractSolver
from implicit.stopping import Stop


def fixed_point(
    f: Map,
    z0: State,
    *args: Any,
    solver: AbstractSolver[Any] = AndersonGS(),
    grad: AbstractGrad = IFT(),
    stop: Stop = Stop(),
    batch_dims: int = 1,
    trace: bool = False,
    state: Any = None,
    keep_state: bool = False,
    compact: bool | tuple[bool, ...] = False,
    callback: Callable[[int, Tensor], None] | None = None,
    progress: bool = False,
) -> Solution:
    """Solve z = f(z, *args), differentiably.

    Args:
        f: keeps the structure, shapes and dtypes of z. Parameters it closes over and tensors in `args` both get their
            gradient. It is called once an evaluation, so that forward hooks and the running statistics of BatchNorm in
            it act ``Solution.evals`` times. Backward hooks in it act once a product of the estimator, on vectors of its
            linear solve with `IFT`: one that changes them changes the gradient.
        z0: where to start: a tensor ``(B, *)`` or any nested tuple, list or dict of such tensors with one batch size.
            Each sample is its own system, with its own tolerance, failure and answer.
        args: passed on to f.
        solver: how the next iterate is made.
        grad: what autograd sees of the solve; `IFT` is the exact gradient.
        stop: tolerance, norm and budget.
        batch_dims: 1, each row of the state is a system of its own; 0, the whole state is one system. A state without
            a batch dimension, such as a vector, needs 0. Rows that f takes into each other (nodes of a graph) are
            noticed, solved on as one system with a warning, and solved in fewer evaluations with 0.
        trace: record the residual at every evaluation.
        state: solver state to continue with, from ``Solution.state`` of an earlier, related solve.
        keep_state: put the solver state into ``Solution.state``.
        compact: evaluate f on the samples still running only; see `SolveOptions` for how `args` are cut.
        callback: called with (number of evaluations, (B,) residuals on the host) whenever residuals are read.
        progress: show a tqdm bar.

    Returns:
        A `Solution`: ``.value`` is attached to the graph, ``.check()`` raises if a sample failed.

    Raises:
        TypeError: an argument has the wrong type; the message names what fits.
        ValueError: f changes the shape, dtype, device or structure of the state or writes into it, or z0 is not a
            state that can be solved for.

    Example:
        >>> import torch, implicit
        >>> implicit.fixed_point(torch.cos, torch.ones(1, 1)).value
        tensor([[0.7391]])
    """
    check_types(solver, grad, stop)
    if isinstance(z0, Solution):
        raise TypeError("z0 must be a tensor or a nest of tensors, got a Solution: pass solution.value.")
    options = SolveOptions(
        batch_dims=batch_dims,
        trace=trace,
        state=state,
        keep_state=keep_state,
        compact=compact,
        callback=callback,
        progress=progress,
    )
    kind = next((t.device.type for t in leaves(z0) if t.device.type != "meta"), "cpu")  # autocast has no meta device
    problem = Problem(as_now(weights_once(f), kind), z0, args)
    if not torch.is_autocast_enabled(kind):
        return grad(problem, solver, stop, options)
    with torch.autocast(kind, enabled=False):
        return grad(problem, solver, stop, options)


_SOLVERS = (Anderson, AndersonGS, BadBroyden, Broyden, NewtonKrylov, Picard)


def check_types(solver: object, grad: object, stop: object) -> None:
    """Refuse a class, a name or anything else in place of an instance.

    Raises:
        TypeError: naming the argument and what fits.
    """
    known = {kind.__name__.lower(): kind.__name__ for kind in (*_SOLVERS, *AbstractGrad.__subclasses__())}
    for name, given, kind, example in (
        ("solver", solver, AbstractSolver, "AndersonGS()"),
        ("grad", grad, AbstractGrad, "IFT()"),
        ("stop", stop, Stop, "Stop(rtol=1e-4)"),
    ):
        if isinstance(given, kind):
            continue
        if isinstance(given, type):
            example = f"{given.__name__}()"
        elif isinstance(given, str):
            found = known.get(given.lower().replace("_", "").replace("-", ""))
            example = example if found is None else f"{found}()"
        raise TypeError(f"{name} must be an instance of {kind.__name__}, got {given!r}: pass implicit.{example}.")
