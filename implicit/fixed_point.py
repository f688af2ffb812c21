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
from implicit.solvers.anderson_gs import AndersonGS
from implicit.solvers.base import AbstractSolver
from implicit.stopping import Stop


def fixed_point(
    f: Map,
    z0: State,
    *args: Any,
    solver: AbstractSolver[Any] | None = None,
    grad: AbstractGrad | None = None,
    stop: Stop | None = None,
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
            gradient.
        z0: where to start: a tensor ``(B, *)`` or any nested tuple, list or dict of such tensors with one batch size.
            Each sample is its own system, with its own tolerance, failure and answer.
        args: passed on to f.
        solver: how the next iterate is made; default ``AndersonGS()``.
        grad: what autograd sees of the solve; default ``IFT()``, the exact gradient.
        stop: when it is good enough; default ``Stop()``.
        batch_dims: 0 makes the whole state one system.
        trace: record the residual at every evaluation.
        state: the solver's memory to go on with, from ``Solution.state`` of an earlier, related solve.
        keep_state: put the solver's memory into ``Solution.state``.
        compact: evaluate f on the samples still running only; see `SolveOptions` for how `args` are cut.
        callback: called with (number of evaluations, (B,) residuals on the host) whenever residuals are read.
        progress: show a tqdm bar.

    Returns:
        A `Solution`: ``.value`` is attached to the graph, ``.check()`` raises if a sample failed.

    Raises:
        ValueError: f changes the shape, dtype, device or structure of the state or writes into it, or z0 is not a
            state that can be solved for.

    Example:
        >>> import torch, implicit
        >>> implicit.fixed_point(torch.cos, torch.ones(1, 1)).value
        tensor([[0.7391]])
    """
    for name, given, kind in (
        ("solver", solver, AbstractSolver),
        ("grad", grad, AbstractGrad),
        ("stop", stop, Stop),
    ):
        if given is not None and not isinstance(given, kind):
            hint = f"an instance such as {given.__name__}()" if isinstance(given, type) else f"a {kind.__name__}"
            raise ValueError(f"{name} must be {hint}, got {given!r}.")
    options = SolveOptions(
        batch_dims=batch_dims,
        trace=trace,
        state=state,
        keep_state=keep_state,
        compact=compact,
        callback=callback,
        progress=progress,
    )
    kind = next((t.device.type for t in leaves(z0)), "cpu")
    estimator, solver, stop = grad or IFT(), solver or AndersonGS(), stop or Stop()
    problem = Problem(as_now(weights_once(f), kind), z0, args)
    if not torch.is_autocast_enabled(kind):
        return estimator(problem, solver, stop, options)
    with torch.autocast(kind, enabled=False):
        return estimator(problem, solver, stop, options)
