"""Samples that failed, kept out of the gradients that samples share.

Setting: sample b has a state where f or its derivative is not finite. Left out of the loss, it has the cotangent 0; but
0 times an infinite derivative is NaN, which a weight that all samples share would sum up. Such samples are therefore
known before the graph is kept: the evaluations are recorded once more with

    f_b(z)  ->  z0_b, a constant, while f is evaluated at z0_b

for the failed samples b. Their state gets no gradient, and the other samples are evaluated as before. A sample whose f
is not finite at z0 either (NaN in its input) keeps its NaN: leave it out of `args`.
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
    """Whether a sample has failed, where the host may read that.

    With a tolerance the host reads residuals anyway, and on a CPU reading costs nothing. A fixed number of evaluations
    on another device never waits; a transform, a compiled graph and a fake tensor have no value to read.
    """
    if active() or torch.compiler.is_compiling() or type(samples) is not Tensor:
        return False
    if not (stop.has_tolerance or samples.device.type == "cpu"):
        return False
    return bool(samples.any())


def without(problem: Problem, samples: Bool[Tensor, " B"], batch_dims: int) -> Problem:
    """The problem with f constant for some samples."""
    layout = Layout.of(problem.z0, batch_dims)
    rows, start = samples.unsqueeze(1), layout.pack(problem.z0)
    safe = start.detach()

    def f(z: State, *args: Any) -> State:
        out = problem.f(layout.unpack(torch.where(rows, safe, layout.pack(z))), *args)
        return layout.unpack(torch.where(rows, safe, layout.pack(out)))

    return replace(problem, f=f, z0=layout.unpack(torch.where(rows, safe, start)))
