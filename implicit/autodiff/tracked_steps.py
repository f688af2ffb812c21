"""Fixed-point steps recorded by autograd, after a solve without a graph.

Setting: the solve ended at z. z_0 = z and z_{i+1} = d z_i + (1 - d) f(z_i), with damping d; the gradient is that of
z_k. With a tolerance the value remains z, to which residual and result refer, and only the gradient is that of z_k.
Without a tolerance the steps are part of the requested number of iterations, and the value is z_k.
"""

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from implicit.autodiff.failed_samples import failed, without
from implicit.autodiff.functorch import active, refuse_threads
from implicit.autodiff.implicit_diff import warn_learned_start
from implicit.autodiff.solved_map import require_solved_map
from implicit.evaluation import FlatMap
from implicit.options import Problem, SolveOptions
from implicit.pytree import Flat, Layout, PerSample, scaled_norm
from implicit.solution import Result, Solution
from implicit.stopping import Stop, classify_count
from implicit.torch_internals import has_derivative


def track(
    problem: Problem, solved: Solution, stop: Stop, options: SolveOptions, *, steps: int, damping: float = 0.0
) -> Solution:
    """Take `steps` more steps from the value of `solved`, which autograd records if gradients are enabled.

    A sample with a step that is not finite keeps its value of `solved`, without a gradient, even if later steps are
    finite: f may take infinity to a number.
    """
    if stop.has_tolerance and not torch.is_grad_enabled() and not active():
        return solved
    layout = Layout.of(solved.value, options.batch_dims)
    start = layout.pack(solved.value)
    z, image, residual, largest = _steps(problem, layout, start, steps, damping)
    if stop.has_tolerance:
        solved = replace(solved, evals=solved.evals + require_solved_map(problem, solved, start, image, stop, layout))
    lost = ~torch.isfinite(largest)
    if has_derivative(z) and failed(lost, stop):
        z, *_ = _steps(without(problem, lost, options.batch_dims), layout, start, steps, damping)
        solved = replace(solved, evals=solved.evals + steps)
    z = torch.where(lost.unsqueeze(1), start.detach(), z)
    solved = replace(solved, evals=solved.evals + steps)
    if z.requires_grad and not active() and not torch.compiler.is_compiling() and not start.requires_grad:
        warn_learned_start(problem, z)
    if stop.has_tolerance:
        return replace(solved, value=layout.unpack(_Value.apply(start.detach(), z)))
    result = classify_count(residual == 0, lost | (solved.result == int(Result.NONFINITE)))
    return replace(solved, value=layout.unpack(z), residual=residual, result=result)


def _steps(
    problem: Problem, layout: Layout, z: Flat, steps: int, damping: float
) -> tuple[Flat, Flat, PerSample, PerSample]:
    """(z after the steps, f(z) before, residual at the z before the last step, the largest residual or NaN)."""
    flat = FlatMap(problem.f, problem.args, layout)
    residual = largest = torch.zeros(z.shape[0], dtype=z.dtype, device=z.device)
    image = z
    for step in range(steps):
        fz = flat(z)
        image = image if step else fz.detach()
        with torch.no_grad():
            residual = scaled_norm(fz - z)
            largest = torch.maximum(largest, residual) if step else residual  # keeps NaN
        z = torch.lerp(fz, z, damping) if damping else fz
    return z, image, residual, largest


def unsolved(problem: Problem, options: SolveOptions) -> Solution:
    """The solution of a solve of no iterations: a copy of z0 that keeps its graph."""
    layout, traced = Layout.of(problem.z0, options.batch_dims), active()
    if traced:
        refuse_threads(problem, layout)
    z = layout.pack(problem.z0)
    return Solution(
        value=layout.unpack(z.clone()),
        residual=torch.full((len(z),), torch.inf, dtype=layout.dtype, device=layout.device),
        result=torch.full((len(z),), int(Result.MAX_EVALS), dtype=torch.int8, device=layout.device),
        evals=torch.full((len(z),), int(traced), dtype=torch.int64, device=layout.device),
    )


class _Value(torch.autograd.Function):
    """z, with the derivative of `tracked`."""

    generate_vmap_rule = True

    @staticmethod
    def forward(z: Tensor, tracked: Tensor) -> Tensor:
        return z.clone()

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        pass

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[None, Tensor]:
        return None, grads[0]

    @staticmethod
    def jvp(ctx: Any, *tangents: Any) -> Tensor:
        return tangents[1]
