"""`fixed_point`: the one public entry point."""

from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from implicit import grads, solvers
from implicit.argument_types import check_arguments
from implicit.autodiff.autocast import as_now
from implicit.autodiff.detached_solve import own_memory
from implicit.autodiff.parametrizations import weights_once
from implicit.grads.base import AbstractGrad
from implicit.grads.ift import IFT
from implicit.grads.unrolled import Unrolled
from implicit.options import Problem, SolveOptions
from implicit.problem_forms import Main, all_starts, best_start
from implicit.pytree import Map, State, leaves
from implicit.solution import Adjoint, Solution
from implicit.solvers import AbstractSolver, Multisecant
from implicit.stopping import Stop
from implicit.torch_internals import jit_traces


def fixed_point(
    f: Map,
    z0: State | Callable[[torch.Generator | None], State],
    *args: Any,
    solver: AbstractSolver[Any] = Multisecant(),
    grad: AbstractGrad = IFT(),
    stop: Stop = Stop(),
    batch_dims: int = 1,
    has_aux: bool = False,
    starts: int = 1,
    generator: torch.Generator | None = None,
    trace: bool | Callable[[Any, State, State], Any] = False,
    state: Any = None,
    keep_state: bool = False,
    compact: bool | tuple[bool, ...] = False,
    adjoint: Adjoint | None = None,
    callback: Callable[[int, Tensor], None] | None = None,
    progress: bool = False,
) -> Solution:
    """Solve z = f(z, *args), differentiably.

    Args:
        f: the map; f(z, *args) has the structure, shapes and dtypes of z. Parameters that f closes over and tensors in
            `args` get gradients. The solve calls f without a graph first, so a tensor that f computes from them once
            and keeps gives them no gradient. A weight under `torch.nn.utils.parametrize` is computed once per solve,
            and again if f replaces what it is computed from. Every evaluation is one call of f, so forward hooks and
            the running statistics of BatchNorm in f act ``Solution.evals`` times. Backward hooks in f act once per
            vector-Jacobian product of the estimator; with `IFT` on the vectors of its linear solve, so a hook that
            changes them changes the gradient. In second derivatives PyTorch may call a tensor's hook with None.
        z0: the starting state: a tensor ``(B, *)`` or any nested tuple, list or dict of such tensors with one batch
            size. Each sample is its own system, with its own tolerance, failure and answer. Or a function of
            `generator` that draws such a state.
        args: passed on to f.
        solver: how the next iterate is made.
        grad: the gradient estimator, which defines the derivatives of the solution; `IFT` is the exact gradient.
        stop: tolerance, norm and budget.
        batch_dims: 1, each row of the state is a system of its own; 0, the whole state is one system. A state without a
            batch dimension, such as a vector, needs 0. If f takes rows into each other (nodes of a graph), the solve
            detects this and continues with the whole batch as one system, with a warning; with 0 it takes fewer
            evaluations.
        has_aux: f returns (f(z), aux). One more evaluation at the value gives ``Solution.aux``, with the graph that
            the value and f's parameters have. After a fixed count that autograd records, a sample whose f is not finite
            at its value has the aux of its start, and f is evaluated once more.
        starts: number of starts per sample: z0 has a leading axis of this length, or is drawn that many times. The
            problem is solved from every start without a graph, then once more with `grad` from the start of smallest
            residual; ``Solution.evals`` counts all of these solves.
        generator: passed to z0 if z0 is a function.
        trace: record the residual at every evaluation; or a function ``(carry, z, f(z)) -> carry``, folded over the
            evaluations of the solve from the carry None on, for example to collect states or to add a loss on each.
            With `Unrolled` these states have a graph, and those of a sample that fails are its start; with the other
            estimators they are detached.
        state: solver state to continue with, from ``Solution.state`` of an earlier, related solve.
        keep_state: put the solver state into ``Solution.state``.
        compact: evaluate f on the running samples only; see `SolveOptions` for how `args` are cut.
        adjoint: first guess of u in the backward pass of `IFT`: ``Solution.adjoint`` of an earlier, related solve, or
            ``Adjoint()`` if there is no earlier solve; see `Adjoint`.
        callback: called with (number of evaluations, (B,) residuals on the host) whenever residuals are read.
        progress: show a tqdm bar.

    Returns:
        A `Solution`: ``.value`` is attached to the graph, ``.check()`` raises if a sample failed.

    Raises:
        TypeError: an argument has the wrong type; the message names the right one.
        ValueError: f changes the shape, dtype, device or structure of the state or writes into it, or z0 is empty or
            not of floating point or complex tensors.

    Example:
        >>> import torch, implicit
        >>> implicit.fixed_point(torch.cos, torch.ones(1, 1)).value
        tensor([[0.7391]])
    """
    check_types(solver, grad, stop)
    check_arguments(fixed_point, {"f": f, "has_aux": has_aux, "starts": starts, "generator": generator})
    options = SolveOptions(
        batch_dims=batch_dims,
        trace=trace,
        state=state,
        keep_state=keep_state,
        compact=compact,
        adjoint=adjoint,
        callback=callback,
        progress=progress,
    )
    return _solve(f, all_starts(z0, starts, generator), args, solver, grad, stop, options, has_aux)


def _solve(
    f: Map,
    z0s: list[State],
    args: tuple[Any, ...],
    solver: AbstractSolver[Any],
    grad: AbstractGrad,
    stop: Stop,
    options: SolveOptions,
    has_aux: bool,
) -> Solution:
    """The solution from the best of several starts; autocast and parametrized weights of f are as at this call."""
    if jit_traces() and torch.is_grad_enabled() and not isinstance(grad, Unrolled):
        raise NotImplementedError(
            f"A graph of torch.jit.trace has the gradient of its operations, not that of {type(grad).__name__}: trace "
            "under torch.no_grad(), or pass grad=Unrolled()."
        )
    if options.adjoint is not None and not isinstance(grad, IFT):
        raise ValueError(f"adjoint is a first guess for the linear solve of IFT, got grad={grad!r}: leave it unset.")
    devices = (t.device.type for t in leaves(z0s[0]) if t.device.type != "meta")  # autocast has no meta device
    kind = next(devices, "cpu")
    main = Main(weights_once(f)) if has_aux else weights_once(f)
    flow = as_now(main, kind)
    off = torch.autocast(kind, enabled=False) if torch.is_autocast_enabled(kind) else nullcontext()
    with off:
        start, before = best_start(flow, z0s, args, solver, stop, options)
        problem = Problem(flow, start, args)
        solution = grad(problem, solver, stop, options)
        solution = replace(solution, value=own_memory(solution.value, problem))
    if len(z0s) > 1:
        solution = replace(solution, evals=solution.evals + before)
    return main.with_aux(solution, problem, stop, options.batch_dims) if isinstance(main, Main) else solution


def check_types(solver: object, grad: object, stop: object) -> None:
    """Refuse a class, a name or anything else in place of an instance.

    Raises:
        TypeError: naming the argument and an instance to pass.
    """
    members = (vars(solvers) | vars(grads)).items()
    known = {member.lower(): member for member, kind in members if isinstance(kind, type)}
    for name, given, kind, example in (
        ("solver", solver, AbstractSolver, "Multisecant()"),
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
