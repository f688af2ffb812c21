"""Keep failed samples out of the gradients of parameters that all samples share.

Setting: sample b has a state where f or its derivative is not finite. If the loss leaves b out, the cotangent of b is
0, but 0 times an infinite derivative is NaN, and the gradient of a shared weight is a sum over the samples. Therefore
the failed samples are determined first, and then the evaluations are recorded once more with

    f_b(z)  ->  z0_b, a constant, while f is evaluated at z0_b

for the failed samples b. The state of b gets no gradient, and the other samples are evaluated as before. A sample whose
f is not finite at z0 either (NaN in its input) keeps its NaN: leave this sample out of the batch.

Whether a sample has failed is one boolean, which the host reads. With a tolerance it reads residuals anyway. A fixed
count reads nothing else, so on a device it waits for this boolean once or twice where autograd records the solve, and
not with ``Stop(late=True)``.
"""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from jaxtyping import Bool
from torch import Tensor

from implicit.evaluation import FlatMap
from implicit.options import Problem
from implicit.pytree import Flat, Layout, State
from implicit.stopping import Stop
from implicit.torch_internals import is_abstract, unwrap_all


def failed(samples: Bool[Tensor, "*B"], stop: Stop) -> bool:
    """Whether a sample has failed, in any lane of a vmap; False if the host must not or cannot read `samples`.

    Compiled graphs, CUDA graphs and fake tensors have no value to read.
    """
    if torch.compiler.is_compiling():
        return False
    samples = unwrap_all(samples)
    if type(samples) is not Tensor or is_abstract(samples):
        return False
    if not samples.is_cpu:
        if stop.late and not stop.has_tolerance:
            return False
        if samples.is_cuda and torch.cuda.is_current_stream_capturing():
            return False
    return bool(samples.any())


def without(problem: Problem, samples: Bool[Tensor, " B"], batch_dims: int) -> Problem:
    """The problem with a constant f for the samples marked in `samples`."""
    layout = Layout.of(problem.z0, batch_dims)
    rows, start = samples.unsqueeze(1), layout.pack(problem.z0)
    safe = start.detach()

    def f(z: State, *args: Any) -> State:
        out = problem.f(layout.unpack(torch.where(rows, safe, layout.pack(z))), *args)
        return layout.unpack(torch.where(rows, safe, layout.pack(out)))

    return replace(problem, f=f, z0=layout.unpack(torch.where(rows, safe, start)))


def attach_finite(
    attach: Callable[[FlatMap, Flat], tuple[Flat, Flat]], problem: Problem, z: Flat, stop: Stop, layout: Layout
) -> tuple[Flat, Flat, int]:
    """(`attach` of f at z without the samples whose f(z) is not finite, f(z), evaluations).

    The value of a solve with a tolerance has a finite f, so the question arises for a fixed count alone.
    """
    value, image = attach(FlatMap(problem.f, problem.args, layout), z)
    if stop.has_tolerance or not value.requires_grad or not failed(lost := ~finite(image), stop):
        return value, image, 1
    rest = without(problem, lost[:, 0], layout.batch_dims)
    again, _ = attach(FlatMap(rest.f, rest.args, layout), z)
    return torch.where(lost, z, again), image, 2


def finite(image: Flat) -> Bool[Tensor, "B 1"]:
    """Whether all numbers of a sample are finite."""
    low, high = torch.aminmax(image.detach(), dim=1, keepdim=True)  # unlike isfinite, allocates no copy
    return (low > -torch.inf) & (high < torch.inf)
