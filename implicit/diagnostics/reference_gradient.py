"""The exact gradient of a fixed point, as a reference: computed without an estimator.

Setting: z* = f(z*, theta), J = df/dz at z*, g = dL/dz*;

    dL/dtheta = u^T df/dtheta,     (I - J^T) u = g

at a z* solved to the rounding error of its dtype. For small samples J is formed and the linear system solved by
elimination in float64; for larger ones u is iterated to rounding error.
"""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from implicit.autodiff.vjp import pullback, vjp
from implicit.diagnostics.profiling import flat
from implicit.evaluation import FlatMap
from implicit.fixed_point import fixed_point
from implicit.iterate import iterate
from implicit.options import Problem
from implicit.pytree import Flat, Layout, State, norm
from implicit.solution import NotConverged
from implicit.solvers import AbstractSolver, AndersonGS
from implicit.stopping import Stop

Loss = Callable[[State], Tensor]

_DENSE = 2**23  # largest number of entries in the Jacobians of all samples with which they are formed


def exact_gradient(
    problem: Problem,
    wanted: tuple[Tensor, ...],
    loss: Loss,
    solver: AbstractSolver[Any],
    layout: Layout,
    dense: int | None = None,
) -> tuple[Float[Tensor, " n"], str]:
    """dL/dtheta for every theta in `wanted` as one float64 vector on the host, and how it was found.

    The Jacobian is formed if a sample has at most `dense` numbers; None: if all Jacobians fit `_DENSE`.

    Raises:
        ValueError: the loss is no scalar, or a constant.
        NotConverged: the solution or the linear system was not found accurately enough to compare estimators with.
    """
    tight = Stop(rtol=2 * layout.eps, atol=0, max_evals=2000)
    with torch.no_grad():
        start = problem.z0, *problem.args
        solved = fixed_point(problem.f, *start, solver=solver, stop=tight, batch_dims=layout.batch_dims)
        z = layout.pack(solved.value)
        off = _accepted(solved.residual / norm(z).clamp_min(torch.finfo(z.dtype).tiny), layout, "solution")
    with torch.enable_grad():
        x = z.detach().requires_grad_()
        y = FlatMap(problem.f, problem.args, layout)(x)
        act = pullback(y, x)
        end = z.detach().requires_grad_()
        total = loss(layout.unpack(end))
        if not isinstance(total, Tensor) or total.numel() != 1:
            shape = tuple(total.shape) if isinstance(total, Tensor) else type(total).__name__
            raise ValueError(f"loss must return a scalar tensor, got {shape}: sum or average it.")
        if not total.requires_grad:
            raise ValueError("loss must depend on the solution or on the parameters, and returned a constant.")
        g, *direct = torch.autograd.grad(total, (end, *wanted), allow_unused=True)

    g = torch.zeros_like(z) if g is None else g
    formed = z.shape[0] * z.shape[1] ** 2 <= _DENSE if dense is None else z.shape[1] <= dense
    u = _directly(act, g) if formed else _iterated(act, g, replace(tight, rtol=4 * layout.eps), layout)
    through = vjp(y, wanted, u.to(y.dtype))
    kind = "a dense linear solve" if formed else "an iterated linear solve"
    return flat(direct, wanted) + flat(through, wanted), f"{kind} at a solution of relative residual {off:.0e}"


def _directly(act: Callable[[Flat], Flat], g: Flat) -> Flat:
    """(I - J^T) u = g by elimination in float64 on the host, J from N products."""
    n = g.shape[1]
    columns = []
    for i in range(n):
        e = torch.zeros_like(g)
        e[:, i] = 1
        columns.append(act(e))
    transposed = torch.stack(columns, dim=2).cpu().double()  # (B, N, N), column i is J^T e_i
    eye = torch.eye(n, dtype=torch.float64, device=transposed.device)
    u = torch.linalg.solve(eye - transposed, g.cpu().double().unsqueeze(2))
    return u.squeeze(2).to(g)


def _iterated(act: Callable[[Flat], Flat], g: Flat, stop: Stop, layout: Layout) -> Flat:
    """u = g + J^T u, by iteration, scale-invariant in g."""
    size = norm(g).clamp_min(torch.finfo(g.dtype).tiny).unsqueeze(1)
    with torch.no_grad():
        solved = iterate(lambda u: g / size + act(u), g / size, AndersonGS(60), stop)
    _accepted(solved.residual / norm(solved.value).clamp_min(1), layout, "linear system for the exact gradient")
    return solved.value * size


def _accepted(relative: Tensor, layout: Layout, what: str) -> float:
    worst, most = float(relative.max()), layout.eps**0.5
    if not worst <= most:
        raise NotConverged(
            f"The {what} was found to a relative residual of {worst:.1g} only, and {most:.0e} is needed to compare "
            "estimators: use a stronger solver, or a layer that has a fixed point."
        )
    return worst
