"""Keep failed samples out of the gradients of parameters that all samples share.

Setting: sample b has a state where f or its derivative is not finite. If the loss leaves b out, the cotangent of b is
0, but 0 times an infinite derivative is NaN, and the gradient of a shared weight is a sum over the samples. Therefore
the failed samples are determined first, and then the evaluations are recorded once more with

    f_b(z)  ->  z0_b, a constant, while f is evaluated at z0_b

for the failed samples b. The state of b gets no gradient, and the other samples are evaluated as before. A sample whose
f is not finite at z0 either (NaN in its input) keeps its NaN: leave this sample out of the batch.
"""

from dataclasses import replace
from typing import Any

import torch
from jaxtyping import Bool
from torch import Tensor

from implicit.autodiff.functorch import active
from implicit.options import Problem
from implicit.pytree import Layout, State
from implicit.stopping import Stop


def failed(samples: Bool[Tensor, " B"], stop: Stop) -> bool:
    """Whether a sample has failed; False if the host must not or cannot read `samples`.

    With a tolerance the host reads residuals anyway, and on a CPU reading costs nothing. A solve of a fixed number of
    evaluations must not wait for another device; transforms, compiled graphs and fake tensors have no value to read.
    """
    if active() or torch.compiler.is_compiling() or type(samples) is not Tensor:
        return False
    if not (stop.has_tolerance or samples.device.type == "cpu"):
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
