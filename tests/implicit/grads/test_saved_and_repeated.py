"""What an estimator keeps for the backward pass, and layers that are used more than once."""

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrize

from implicit import (
    IFT,
    JFB,
    SHINE,
    Anderson,
    Broyden,
    Neumann,
    Phantom,
    Picard,
    Reversible,
    StochasticJFB,
    Stop,
    Unrolled,
    fixed_point,
)

EXACT = IFT(stop=Stop(rtol=1e-12, atol=0, max_evals=200), on_failure="ignore")
TIGHT = Stop(rtol=1e-12, atol=0, max_evals=200)


class Drawn(StochasticJFB):
    """StochasticJFB with a draw that is given."""

    def draw(self):
        return self.N, self.M


def saved_numbers(f, x, *modules, **options):
    """How many numbers autograd holds for the backward pass, parameters and inputs apart."""
    kept: dict[int, int] = {}
    known = {x.data_ptr()} | {p.data_ptr() for module in modules or (f,) for p in module.parameters()}

    def pack(t):
        if t.data_ptr() not in known:
            kept[t.data_ptr()] = t.numel()
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        value = fixed_point(lambda z, x: torch.tanh(f(z) + x), torch.zeros_like(x), x, **options).value
    assert value.requires_grad
    return sum(kept.values())


@pytest.fixture
def layer():
    generator = torch.Generator().manual_seed(0)
    f = nn.Linear(16, 16, dtype=torch.float64)
    with torch.no_grad():
        f.weight.copy_(0.1 * torch.randn(16, 16, generator=generator, dtype=torch.float64))
    return f, torch.randn(8, 16, generator=generator, dtype=torch.float64, requires_grad=True)


def test_free_iterations_store_nothing(layer):
    counts = {
        (n, m): saved_numbers(*layer, solver=Picard(), grad=Drawn(N=n, M=m)) for n, m in ((0, 1), (12, 1), (12, 6))
    }
    assert counts[12, 1] == counts[0, 1] > 0
    assert counts[12, 6] - counts[12, 1] == 5 * layer[1].numel()  # one tensor a step


@pytest.mark.parametrize(
    ("grad", "solver"),
    [
        (IFT(), Anderson()),
        (JFB(), Anderson()),
        (Phantom(), Anderson()),
        (Neumann(), Anderson()),
        (SHINE(), Broyden(memory=3)),
        (Reversible(on_drift="ignore"), Picard()),
    ],
    ids=lambda g: type(g).__name__,
)
def test_storage_does_not_grow_with_the_solve(layer, grad, solver):
    short, long = (
        saved_numbers(*layer, solver=solver, grad=grad, stop=Stop(rtol=0, atol=0, max_evals=n)) for n in (6, 24)
    )
    assert short == long > 0


def test_unrolling_does_grow(layer):
    short, long = (
        saved_numbers(*layer, solver=Picard(), grad=Unrolled(), stop=Stop(rtol=0, atol=0, max_evals=n)) for n in (6, 24)
    )
    assert long > 3 * short


def test_checkpointing_keeps_the_input_of_every_evaluation(layer):
    """Of a map with a wide inside: its inside is stored once, at most, and one state an evaluation."""
    f, x = layer
    wide = nn.Sequential(nn.Linear(16, 160), nn.Tanh(), nn.Linear(160, 16)).double()

    def count(checkpoint, evals):
        stop = Stop(rtol=0, atol=0, max_evals=evals)
        return saved_numbers(
            lambda z: f(0.1 * wide(z)), x, wide, f, solver=Picard(), grad=Unrolled(checkpoint), stop=stop
        )

    plain, kept = (count(c, 24) - count(c, 6) for c in (False, True))
    assert plain > 18 * 160 * len(x) and kept <= 18 * 2 * x.numel()


def _twice(f, x, solve):
    return solve(solve(x).tanh()).square().mean()


def test_a_layer_twice_in_one_graph_and_two_backward_passes(layer):
    f, x = layer

    def solve(x):
        return fixed_point(lambda z: torch.tanh(f(z) + x), torch.zeros_like(x), stop=TIGHT, grad=EXACT).value

    def unrolled(x):
        z = torch.zeros_like(x)
        for _ in range(60):
            z = torch.tanh(f(z) + x)
        return z

    inputs = [x, *f.parameters()]
    truth = torch.autograd.grad(_twice(f, x, unrolled), inputs)
    loss = _twice(f, x, solve)
    first = torch.autograd.grad(loss, inputs, retain_graph=True)
    second = torch.autograd.grad(loss, inputs, retain_graph=True)
    for a, b, c in zip(first, second, truth, strict=True):
        assert torch.equal(a, b)  # the second pass is not the 1-step gradient
        torch.testing.assert_close(a, c, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize(
    "grad", [IFT(), JFB(), Phantom(), SHINE(), Neumann(), StochasticJFB(), Reversible(), Unrolled()]
)
def test_no_graph_where_nothing_requires_gradients(grad):
    value = fixed_point(lambda z: torch.cos(z), torch.ones(2, 3), solver=Broyden(), grad=grad).value
    assert not value.requires_grad


class Half(nn.Module):
    def forward(self, weight):
        return 0.5 * torch.tanh(weight)


@pytest.mark.parametrize("warm", [False, True])
@pytest.mark.parametrize("inside", [False, True])
@pytest.mark.parametrize("estimator", [IFT(), JFB(), Phantom(), Neumann(), SHINE(), Reversible(), Unrolled()])
def test_weights_that_parametrize_has_cached(estimator, inside, warm):
    """A search without a graph must not leave weights without one in the cache."""
    linear, x = nn.Linear(3, 3), torch.randn(2, 3, generator=torch.Generator().manual_seed(0))
    parametrize.register_parametrization(linear, "weight", Half())
    weight = linear.parametrizations.weight.original
    with torch.no_grad():
        weight.copy_(torch.eye(3) + x.T @ x / 9)
    solver = Broyden() if isinstance(estimator, SHINE) else Picard()

    def loss():
        return fixed_point(
            lambda z: torch.tanh(linear(z)) + x, torch.zeros(2, 3), grad=estimator, solver=solver
        ).value.sum()

    (truth,) = torch.autograd.grad(loss(), weight)
    with parametrize.cached():
        if warm:
            assert linear.weight.requires_grad
        value = loss()
        if inside:
            value.backward()
    if not inside:
        value.backward()
    torch.testing.assert_close(weight.grad, truth)
