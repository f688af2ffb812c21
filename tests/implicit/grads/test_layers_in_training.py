"""One layer in training: several forwards before a backward, autocast, no_grad, copies; no Jacobian is formed."""

import copy
import pickle

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from implicit import (
    DEQ,
    IFT,
    JFB,
    SHINE,
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
from tests.helpers import SOLVERS

GRADS = [IFT(), JFB(2), StochasticJFB(), Phantom(3, 0.3), Neumann(4), SHINE(), Reversible(), Unrolled()]
each_grad = pytest.mark.parametrize("grad", GRADS, ids=lambda g: type(g).__name__)


class Layer(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = torch.nn.Linear(8, 8)
        with torch.no_grad():
            self.linear.weight.copy_(0.6 * torch.linalg.qr(torch.arange(64.0).view(8, 8).cos())[0])
            self.linear.bias.zero_()

    def forward(self, z, x):
        return torch.tanh(self.linear(z) + x)


def tight(grad):
    """The estimator with a budget of its own to play with, where it draws one."""
    return StochasticJFB(30, 2, generator=torch.Generator().manual_seed(0)) if isinstance(grad, StochasticJFB) else grad


@each_grad
def test_two_forwards_of_one_layer_before_their_backwards_in_either_order(grad):
    """A hook kept on the module would be that of the last forward alone."""
    stop = Stop(rtol=1e-6, atol=0)
    xs = [torch.full((2, 8), 0.3), torch.linspace(-1, 1, 16).view(2, 8)]

    def run(order, together):
        deq = DEQ(Layer(), grad=grad, solver=Broyden(), stop=stop)
        inputs = [x.clone().requires_grad_() for x in xs]
        grads = {}

        def forward(i):
            if isinstance(grad, StochasticJFB):
                deq.grad = StochasticJFB(generator=torch.Generator().manual_seed(i))
            return deq(torch.zeros(2, 8), inputs[i]).value.square().sum()

        if together:
            losses = [forward(i) for i in (0, 1)]
            for i in order:
                grads[i] = torch.autograd.grad(losses[i], [inputs[i], *deq.parameters()])
        else:
            for i in order:
                grads[i] = torch.autograd.grad(forward(i), [inputs[i], *deq.parameters()])
        return [*grads[0], *grads[1]]

    alone = run((0, 1), False)
    for order in ((0, 1), (1, 0)):
        for a, b in zip(run(order, True), alone, strict=True):
            assert torch.equal(a, b)


@each_grad
def test_the_backward_pass_of_a_bfloat16_state_under_autocast(grad):
    """The map is evaluated again in the backward pass, which runs outside autocast."""
    layer, x = Layer(), torch.linspace(-1, 1, 16).view(2, 8)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        z0 = torch.zeros(2, 8, dtype=torch.bfloat16)
        found = fixed_point(
            lambda z, x: layer(z, x).bfloat16(), z0, x, grad=tight(grad), solver=Broyden(), stop=Stop(rtol=3e-2)
        )
    found.value.float().square().mean().backward()
    got, true = layer.linear.weight.grad, Layer()
    fixed_point(true, torch.zeros(2, 8), x, stop=Stop(rtol=1e-6, atol=0)).value.square().mean().backward()
    exact = true.linear.weight.grad
    assert got is not None and exact is not None
    off = float((got - exact).norm() / exact.norm())
    assert off < (0.1 if isinstance(grad, (IFT, Unrolled, Reversible)) else 0.6)


@each_grad
def test_no_grad_in_training_mode_is_no_error(grad):
    deq = DEQ(Layer(), grad=grad, solver=Broyden()).train()
    with torch.no_grad():
        assert not deq(torch.zeros(2, 8), torch.ones(2, 8)).value.requires_grad


class Largest(TorchDispatchMode):
    """The number of elements of the largest tensor made."""

    numel = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for t in out if isinstance(out, (tuple, list)) else (out,):
            if isinstance(t, torch.Tensor):
                self.numel = max(self.numel, t.untyped_storage().nbytes() // t.element_size())
        return out


def test_the_exact_gradient_makes_no_jacobian():
    n = 1500
    x = torch.linspace(0, 1, n).unsqueeze(0).requires_grad_()
    with Largest() as seen:
        value = fixed_point(lambda z, x: torch.cos(z) * 0.5 + x, torch.zeros(1, n), x, solver=Picard()).value
        value.square().sum().backward()
    assert 2 * n <= seen.numel < 100 * n  # the basis of the backward solve, at most 61 vectors, not n x n


def test_the_returned_value_does_not_ask_for_gradients_that_it_cannot_have():
    """No leftover requires_grad on values or on the caller's tensors."""
    z0, x = torch.zeros(2, 8), torch.ones(2, 8)
    layer = Layer().requires_grad_(False)
    assert not fixed_point(layer, z0, x).value.requires_grad
    assert not z0.requires_grad and not x.requires_grad


@pytest.mark.parametrize(
    ("grad", "solver"),
    [(g, Picard() if isinstance(g, Reversible) else Broyden(5)) for g in GRADS] + [(IFT(), s) for s in SOLVERS],
    ids=lambda thing: type(thing).__name__,
)
def test_layers_pickle_and_copy_after_use(grad, solver):
    deq = DEQ(Layer(), solver=solver, grad=tight(grad), stop=Stop(rtol=1e-5))
    z0, x = torch.zeros(2, 8), torch.ones(2, 8)
    deq(z0, x).value.sum().backward()
    copies = pickle.loads(pickle.dumps(deq)), copy.deepcopy(deq)
    with torch.no_grad():
        value = deq(z0, x).value
        for again in copies:
            assert torch.equal(again(z0, x).value, value)  # a generator of the estimator's is copied with it
            assert again.solver == solver and again.stop == deq.stop
