"""Solvers of this package inside torchdeq, and solvers of torchdeq with this package's `Solution`.

Solvers are given by torchdeq's names:

    register("implicit", Anderson())    torchdeq.get_deq(f_solver="implicit") uses this solver
    solve(f, z0, method="broyden")      torchdeq's solver; the answer is classified as by `fixed_point`
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torchdeq.solver import get_solver, register_solver

from implicit.evaluation import FlatMap
from implicit.iterate import iterate
from implicit.options import SolveOptions
from implicit.pytree import Layout, Map, State, norm, to_device, to_host
from implicit.solution import Solution
from implicit.solvers.base import AbstractSolver
from implicit.stopping import Stop, classify, require_tolerance_alone


def register(name: str, solver: AbstractSolver[Any]) -> None:
    """Register `solver` in torchdeq as `name`, for ``get_deq(f_solver=name, b_solver=name)``.

    torchdeq's settings keep their meaning: ``max_iter`` evaluations at most, ``tol`` on the relative or absolute
    residual of every sample.
    """
    register_solver(name, adapter(solver))


def adapter(solver: AbstractSolver[Any]) -> Callable[..., tuple[Tensor, list[Tensor], dict[str, Tensor]]]:
    """`solver` as a function with torchdeq's signature."""

    def run(
        func: Callable[[Tensor], Tensor],
        x0: Tensor,
        max_iter: int = 50,
        tol: float = 1e-3,
        stop_mode: str = "abs",
        indexing: list[int] | None = None,
        **unused: Any,
    ) -> tuple[Tensor, list[Tensor], dict[str, Tensor]]:
        if indexing is not None and len(indexing) > 1:
            raise ValueError("Solvers of implicit record no intermediate states: use torchdeq's n_states=1.")
        rtol, atol = (tol, 0.0) if stop_mode == "rel" else (0.0, tol)
        found = iterate(
            func, x0, solver, Stop(rtol=rtol, atol=atol, max_evals=max_iter), options=SolveOptions(trace=True)
        )
        fz = norm(func(found.value).flatten(1))
        absolute = found.residual
        assert found.trace is not None
        info = {
            "abs_lowest": absolute,
            "rel_lowest": absolute / fz,
            "abs_trace": found.trace.T,
            "rel_trace": found.trace.T / fz.unsqueeze(1),
            "nstep": found.evals.to(absolute.dtype),
        }
        return found.value, [found.value] if indexing else [], info

    return run


def solve(f: Map, z0: State, *args: Any, method: str = "broyden", stop: Stop = Stop(), **options: Any) -> Solution:
    """Solve z = f(z, *args) with torchdeq's solver `method`; no gradient.

    torchdeq stops the whole batch at once, so every sample reports the same number of evaluations, as counted by f.

    Raises:
        ValueError: `fixed_point` would refuse f or z0, or `stop` has a norm or a test that is not used here.
    """
    require_tolerance_alone(stop, "interop.torchdeq.solve")
    layout = Layout.of(z0)
    counted = FlatMap(f, args, layout, stop.max_evals)
    tolerance = dict(tol=stop.rtol, stop_mode="rel") if stop.rtol else dict(tol=stop.atol, stop_mode="abs")

    def damped(z: Tensor, tau: float = 1.0) -> Tensor:  # simple_fixed_point_iter passes its damping tau to the map
        fz = counted(z)
        return fz if tau == 1 else torch.lerp(z, fz, tau)

    with torch.no_grad():
        value = get_solver(method)(damped, layout.pack(z0), max_iter=stop.max_evals, **tolerance, **options)[0]
        calls, fz = counted.calls, counted(value)
    residual = norm(fz - value)
    result = to_device(classify(to_host(residual), stop.atol + stop.rtol * to_host(norm(fz))), layout.device)
    return Solution(
        value=layout.unpack(value),
        residual=residual,
        result=result,
        evals=torch.full_like(residual, calls).long(),
    )
