"""IFT: the exact gradient, by gradcheck, a dense linear solve and unrolling; at any scale."""

import copy
import gc
import pickle
import warnings
import weakref
from typing import ClassVar

import pytest
import torch
from torch import nn

import implicit
from implicit import (
    DEQ,
    IFT,
    AbstractGrad,
    AbstractSolver,
    Anderson,
    Broyden,
    NotConverged,
    Picard,
    Stop,
    Unrolled,
    fixed_point,
)
from implicit.diagnostics.profiling import measure
from tests.layers import F64, RADII, Tanh, cotangent, dense_gradient, dense_solution, flat, jacobian, layer, off

TIGHT = Stop(rtol=1e-13, atol=0, max_evals=400)


def gradient(f, x, g, *, scale=1.0, grad: AbstractGrad = IFT(), solver: AbstractSolver = Anderson(10), stop=TIGHT):
    """Gradient of scale * <g, z*> with respect to parameters and x, one float64 vector."""
    x = x.detach().requires_grad_()
    z = fixed_point(f, torch.zeros_like(x), x, solver=solver, grad=grad, stop=stop).value
    return flat(torch.autograd.grad(scale * (g * z).sum(), (*f.parameters(), x)))


@pytest.mark.parametrize("name", RADII)
def test_the_layers_have_the_radius_they_claim(name):
    f, x = layer(name)
    radius = torch.linalg.eigvals(jacobian(f, dense_solution(f, x), x)).abs().max()
    assert abs(float(radius) - RADII[name]) < 0.01


@pytest.mark.parametrize("name", RADII)
@pytest.mark.parametrize("solver", [None, Picard(), Broyden()], ids=str)
def test_float64_against_a_dense_linear_solve(name, solver):
    f, x = layer(name)
    g = cotangent(x)
    grad = IFT(solver=solver, stop=Stop(rtol=1e-10, atol=0, max_evals=1000))
    assert off(gradient(f, x, g, grad=grad), dense_gradient(f, x, g)) < 1e-8


@pytest.mark.parametrize("name", RADII)
def test_float64_against_unrolling(name):
    f, x = layer(name)
    g = cotangent(x)
    unrolled = gradient(f, x, g, grad=Unrolled(), solver=Picard(), stop=Stop(rtol=0, atol=0, max_evals=600))
    assert off(gradient(f, x, g), unrolled) < 1e-8


@pytest.mark.parametrize("name", RADII)
def test_float32_with_the_default_backward_solve(name):
    f, x = layer(name, torch.float32)
    g = cotangent(x)
    got = gradient(f, x, g, stop=Stop(rtol=2e-7, atol=0, max_evals=400))
    assert off(got, dense_gradient(f, x, g)) < 1e-5


@pytest.mark.parametrize("dtype", [torch.float32, F64])
@pytest.mark.parametrize("name", RADII)
def test_the_scale_of_the_loss_changes_nothing_else(name, dtype):
    f, x = layer(name, dtype)
    g = cotangent(x)
    stop = Stop(rtol=3e-7, atol=0, max_evals=400)
    one = gradient(f, x, g, stop=stop)
    for scale in (1e-10, 1e-5, 1e5, 1e10):
        assert off(gradient(f, x, g, stop=stop, scale=scale) / scale, one) < 1e-5
    for power in (-33, 33):  # powers of two: the very same bits
        assert torch.equal(gradient(f, x, g, stop=stop, scale=2.0**power) / 2.0**power, one)


def test_gradients_of_different_size_in_one_batch_are_equally_accurate():
    f, x = layer("hard", torch.float32)
    g = cotangent(x) * torch.tensor([1e-9, 1.0, 1e9]).view(3, 1)
    x = x.requires_grad_()
    z = fixed_point(f, torch.zeros_like(x), x, stop=Stop(rtol=2e-7, atol=0, max_evals=400)).value
    (got,) = torch.autograd.grad(z, x, g)
    true = dense_gradient(f, x, g)[-x.numel() :].view_as(x)
    assert ((got - true).norm(dim=1) / true.norm(dim=1)).max() < 1e-5


def test_a_failed_backward_pass_warns_or_raises():
    f, x = layer("hard", torch.float32)
    g = cotangent(x)
    short = Stop(rtol=1e-6, atol=0, max_evals=3)
    with pytest.warns(RuntimeWarning, match="MAX_EVALS"):
        gradient(f, x, g, grad=IFT(stop=short), stop=Stop())
    with pytest.raises(NotConverged, match="IFT"):
        gradient(f, x, g, grad=IFT(stop=short, on_failure="raise"), stop=Stop())
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        gradient(f, x, g, grad=IFT(stop=short, on_failure="ignore"), stop=Stop())


def test_failed_backwards_say_one_and_the_same_thing():
    """Python's default filter shows a warning of one text and place once."""
    f, x = layer("hard", torch.float32)
    grad = IFT(stop=Stop(rtol=1e-6, atol=0, max_evals=3))
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        for seed in range(3):
            gradient(f, x, cotangent(x, seed), grad=grad, stop=Stop(rtol=1e-3, max_evals=20))
    assert len(seen) == 3
    assert len({(str(w.message), w.filename, w.lineno, w.category) for w in seen}) == 1


def test_the_report_of_the_backward_solve():
    f, x = layer("hard")
    reports = []
    gradient(f, x, cotangent(x), grad=IFT(report=reports.append))
    (report,) = reports
    assert bool(report.converged.all()) and report.evals.shape == (3,)
    assert (report.residual > 0).all() and 5 < int(report.evals.max()) < 60


def test_the_value_and_the_mode_of_the_module_do_not_depend_on_the_graph():
    f, x = layer("hard", torch.float32)
    deq = DEQ(f).eval()
    z = deq(torch.zeros_like(x), x).value
    assert z.requires_grad
    with torch.no_grad():
        assert torch.equal(z, deq(torch.zeros_like(x), x).value)
    with torch.inference_mode():
        assert torch.equal(z, deq(torch.zeros_like(x), x).value)
    (z**2).sum().backward()
    assert all(p.grad is not None and p.grad.norm() > 0 for p in f.parameters())


def test_no_graph_outlives_a_forward_that_is_thrown_away():
    f, x = layer("easy", torch.float32)

    class Probe(torch.autograd.Function):
        seen: ClassVar[list] = []

        @staticmethod
        def forward(ctx, t):
            Probe.seen.append(weakref.ref(ctx))
            return t.view_as(t)

        @staticmethod
        def backward(ctx, *grads):
            return grads[0]

    for train in (True, False):
        deq = DEQ(f).train(train)
        for backward in (False, True):
            value = deq(torch.zeros_like(x), Probe.apply(x.clone().requires_grad_())).value
            if backward:
                value.sum().backward()
            del value
    gc.collect()
    assert len(Probe.seen) == 4 and all(ref() is None for ref in Probe.seen)


@pytest.mark.parametrize(
    "estimator", [IFT(), implicit.JFB(2), implicit.Phantom(), implicit.SHINE(), implicit.Reversible()]
)
def test_a_layer_pickles_and_copies(estimator):
    f, x = layer("easy", torch.float32)
    deq = DEQ(f, grad=estimator, solver=Broyden())
    for twin in (pickle.loads(pickle.dumps(deq)), copy.deepcopy(deq)):
        assert torch.equal(twin(torch.zeros_like(x), x).value, deq(torch.zeros_like(x), x).value)


def test_a_nested_equilibrium():
    """The map of the outer equilibrium holds an inner one: against a plain double loop."""
    inner, outer = Tanh(4, 0.3), Tanh(4, 0.3, seed=5)
    x = inner.x[:2].clone().requires_grad_()
    stop = Stop(rtol=1e-11, atol=0)

    def nested(z, x):
        return outer(fixed_point(inner, torch.zeros_like(z), 0.5 * z + x, stop=stop).value, x)

    def plain(x):
        z = torch.zeros_like(x)
        for _ in range(25):
            y = torch.zeros_like(x)
            for _ in range(25):
                y = inner(y, 0.5 * z + x)
            z = outer(y, x)
        return z

    def all_of(z):
        return flat(torch.autograd.grad(z.sin().sum(), (*inner.parameters(), *outer.parameters(), x)))

    def twice(z):
        first = torch.autograd.grad(z.sin().sum(), x, create_graph=True)[0]
        return flat(torch.autograd.grad(first.square().sum(), (*inner.parameters(), x)))

    z = fixed_point(nested, torch.zeros_like(x), x, stop=stop).value
    assert off(all_of(z), all_of(plain(x))) < 1e-8
    z = fixed_point(nested, torch.zeros_like(x), x, stop=stop).value
    assert off(twice(z), twice(plain(x))) < 1e-7


def test_frozen_parameters_and_inputs_only():
    f, x = layer("easy")
    g = cotangent(x)
    f.weight.requires_grad_(False)
    true = dense_gradient(f, x, g)
    x.requires_grad_()
    z = fixed_point(f, torch.zeros_like(x), x, stop=TIGHT).value
    assert off(flat(torch.autograd.grad(z, (f.bias, x), g)), true) < 1e-8
    f.requires_grad_(False)
    z = fixed_point(f, torch.zeros_like(x), x, stop=TIGHT).value
    assert off(flat(torch.autograd.grad(z, (x,), g)), true[-x.numel() :]) < 1e-8
    with torch.no_grad():
        assert not fixed_point(f, torch.zeros_like(x), x).value.requires_grad
    assert not fixed_point(f, torch.zeros_like(x), x.detach()).value.requires_grad


def test_a_whole_state_of_several_tensors():
    """A dict state under IFT equals the same numbers in one tensor."""
    f, x = layer("hard")
    g = cotangent(x)

    def split(z, x):
        out = f(torch.cat((z["a"], z["b"]), 1), x)
        return {"a": out[:, :5], "b": out[:, 5:]}

    x.requires_grad_()
    start = {"a": torch.zeros(3, 5, dtype=F64), "b": torch.zeros(3, 11, dtype=F64)}
    z = fixed_point(split, start, x, stop=TIGHT).value
    got = flat(torch.autograd.grad((torch.cat((z["a"], z["b"]), 1) * g).sum(), (*f.parameters(), x)))
    assert off(got, dense_gradient(f, x.detach(), g)) < 1e-8


def test_a_map_without_parameters_has_no_gradient():
    z = fixed_point(torch.cos, torch.ones(2, 1))
    assert not z.value.requires_grad


def test_parameters_used_outside_and_inside_the_layer_add_up():
    f, x = layer("easy")
    x.requires_grad_()
    injected = nn.functional.linear(x, f.weight)  # the weight reaches the answer by two roads
    z = fixed_point(f, torch.zeros_like(x), injected, stop=TIGHT).value
    (got,) = torch.autograd.grad(z.sum(), f.weight)
    w = torch.zeros_like(x)
    for _ in range(100):
        w = f(w, nn.functional.linear(x, f.weight))
    (true,) = torch.autograd.grad(w.sum(), f.weight)
    assert off(flat([got]), flat([true])) < 1e-8


def test_a_value_that_is_written_to_is_noticed():
    """It shares the memory of what the graph of f has kept: never a silent change of the gradient."""
    f, x = layer("easy")
    value = fixed_point(f, torch.zeros_like(x), x).value
    value.add_(1)
    with pytest.raises(RuntimeError, match="inplace"):
        value.sum().backward()


def test_states_held_between_the_passes_and_at_the_peak():
    """f keeps two states: z for the product, tanh for its derivative. z is the value. The loss keeps nothing."""
    weight = nn.Parameter(0.4 * torch.linalg.qr(torch.randn(32, 32, generator=torch.Generator().manual_seed(0)))[0])
    x = torch.randn(8, 64, 32, generator=torch.Generator().manual_seed(1))

    def run(f):
        return fixed_point(f, torch.zeros_like(x), x, solver=Picard(), stop=Stop(rtol=1e-6, atol=0, max_evals=99)).value

    class Map(nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = weight

        def forward(self, z, x):
            return torch.tanh(z @ self.weight) + x

    taken = measure(lambda f: run(f).sum(), Map(), [weight])
    state = x.numel() * x.element_size()
    assert taken.products > 8 and taken.note == ""
    assert taken.saved < 2.1 * state and taken.peak < 9.1 * state
