"""Time of forward and backward pass of our estimators and torchdeq's, on three layers (`pytest benchmarks`).

Each layer is a group; `extra_info` has the error of the gradient compared with the exact one in float64, and the bytes
saved. `python -m benchmarks.gradients.run` measures the same contenders in pairs, with counts and memory, on four
layers.
"""

import copy
from functools import cache, partial

import pytest
import torch

from benchmarks.gradients.contenders import CONTENDERS
from benchmarks.gradients.layers import AdaLN, Convolutions, Tanh
from benchmarks.gradients.run import loss, target
from implicit import AndersonGS
from implicit.diagnostics.profiling import measure
from implicit.diagnostics.reference_gradient import exact_gradient
from implicit.options import Problem
from implicit.pytree import Layout

SMALL = {"tanh": lambda: Tanh(0.34), "convolutions": lambda: Convolutions(1.0, side=8), "adaLN": lambda: AdaLN(0.7, 32)}
EXACT = ("IFT", "torchdeq ift")


@cache
def measured(name):
    """A layer and its exact gradient."""
    layer = SMALL[name]()
    f, x = copy.deepcopy(layer).double(), layer.x.double()
    z0 = torch.zeros_like(x)
    return layer, exact_gradient(Problem(f, z0, (x,)), tuple(f.parameters()), target, AndersonGS(), Layout.of(z0))[0]


@pytest.mark.filterwarnings("ignore::RuntimeWarning")
@pytest.mark.parametrize("contender", CONTENDERS)
@pytest.mark.parametrize("name", SMALL)
def test_estimator(name, contender, benchmark):
    benchmark.group = name
    layer, exact = measured(name)
    forward, params = partial(loss, CONTENDERS[contender], layer.x), list(layer.parameters())
    benchmark.pedantic(lambda: torch.autograd.grad(forward(layer), params), rounds=5, warmup_rounds=1)
    taken = measure(forward, layer, params)
    assert taken.gradient is not None
    error = float((taken.gradient - exact).norm() / exact.norm())
    benchmark.extra_info |= {"relative error": error, "saved bytes": taken.saved, "note": taken.note}
    assert contender not in EXACT or error < 1e-4
