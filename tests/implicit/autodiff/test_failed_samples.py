"""A sample that fails and is left out of the loss reaches no gradient of the parameters that the samples share."""

import warnings

import pytest
import torch

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
from tests.helpers import F64, FREE, Waits, watching

ESTIMATORS = (
    IFT(on_failure="ignore"),
    JFB(),
    JFB(3),
    Phantom(),
    Neumann(),
    SHINE(),
    StochasticJFB(N=3, M=3),
    Reversible(on_drift="ignore"),
    Unrolled(),
    Unrolled(checkpoint=True),
    Unrolled(checkpoint=2),
)
PLAIN_ALONE = (Neumann, SHINE, Reversible)  # refuse torch.func


def explodes(h):
    return torch.exp(3 * h + 1)


def ends_in_nan(h):
    return torch.where(h > 2, torch.nan, 2 * h.abs() + 1)


FAILURES = (explodes, ends_in_nan)
STOPS = [Stop(max_evals=n, **FREE) for n in (3, 5, 9)] + [Stop(rtol=1e-6, max_evals=9)]


def weights():
    rng = torch.Generator().manual_seed(0)
    return 0.3 * torch.randn(6, 6, dtype=F64, generator=rng), torch.randn(4, 6, dtype=F64, generator=rng)


def loss(w, grad, stop, failure=None):
    """Of the first three samples; the fourth fails, or with `failure` None goes the way of the others."""
    x = weights()[1]
    solver = Broyden() if isinstance(grad, SHINE) else Picard()

    def f(z):
        fine = torch.tanh(z @ w + x)
        return fine if failure is None else torch.cat((fine[:3], failure(z[3:] + z[3:] @ w)))

    torch.manual_seed(5)  # the draw of StochasticJFB
    return fixed_point(f, torch.zeros(4, 6, dtype=F64), solver=solver, stop=stop, grad=grad).value[:3].square().sum()


def backward(function):
    w = weights()[0].requires_grad_()
    return torch.autograd.grad(function(w), w)[0]


def on_a_device(function):
    """On the emulated device of `tests.helpers`, whose numbers the host has to wait for."""
    with watching(Waits()):
        return backward(function)


def by_torch_func(function):
    return torch.func.grad(function)(weights()[0])


def by_vmap(function):
    w = weights()[0]
    return torch.func.vmap(torch.func.grad(function), randomness="same")(torch.stack([w, 0.9 * w]))[0]


@pytest.mark.parametrize("way", [backward, on_a_device, by_torch_func, by_vmap], ids=lambda way: way.__name__)
@pytest.mark.parametrize("failure", FAILURES, ids=lambda failure: failure.__name__)
@pytest.mark.parametrize("grad", ESTIMATORS, ids=str)
@pytest.mark.parametrize("stop", STOPS, ids=lambda stop: f"{stop.max_evals}, {stop.rtol:g}")
def test_the_gradient_of_shared_weights_is_that_beside_a_sample_that_does_not_fail(way, failure, grad, stop):
    if way in (by_torch_func, by_vmap):
        refused = isinstance(grad, PLAIN_ALONE) or (
            isinstance(grad, Unrolled) and (bool(grad.checkpoint) or stop.has_tolerance)
        )
        if refused:
            with pytest.raises(NotImplementedError):
                way(lambda w: loss(w, grad, stop, failure))
            return
    if grad == Unrolled(checkpoint=2) and stop.has_tolerance:
        with pytest.raises(ValueError, match="checkpoint=2"):
            way(lambda w: loss(w, grad, stop, failure))
        return
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        alone, beside = (way(lambda w, m=mate: loss(w, grad, stop, m)) for mate in (None, failure))
    assert alone.isfinite().all() and alone.abs().sum() > 0
    torch.testing.assert_close(beside, alone, rtol=0, atol=1e-14)


@pytest.mark.parametrize("way", [on_a_device, by_torch_func, by_vmap], ids=lambda way: way.__name__)
@pytest.mark.parametrize("grad", [Unrolled(), Unrolled(checkpoint=2)], ids=str)
@pytest.mark.parametrize("solver", [Picard(), Anderson(3), Broyden(4)], ids=str)
def test_a_sample_that_goes_on_after_a_nan_keeps_its_gradient(way, grad, solver):
    """Two samples run into a wall, are reset, and go on: all their evaluations but the first behind the wall count."""
    x = torch.linspace(0.1, 1.6, 24, dtype=F64).reshape(4, 6)
    evals = []
    if grad.checkpoint and way is not on_a_device:
        with pytest.raises(NotImplementedError, match="checkpoint"):
            way(lambda w: fixed_point(lambda z: z @ w, torch.zeros_like(x), grad=grad, stop=STOPS[0]).value)
        return

    def function(w):
        gain = 0.4 + w[:1, :1].square()

        def f(z):
            wall = ((z.detach() > 2.0) & (z.detach() < 2.1)).any(dim=1, keepdim=True)
            return torch.where(wall, torch.nan, torch.tanh(gain * z) + x)

        stop = Stop(max_evals=9, **FREE)
        solution = fixed_point(f, torch.zeros_like(x), solver=solver, stop=stop, grad=grad)
        evals.append(solution.evals)
        return solution.value.square().sum()

    expected = backward(function)
    assert expected.isfinite().all() and int(evals[0].min()) > 9  # evaluations were repeated
    torch.testing.assert_close(way(function), expected, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("grad", [g for g in ESTIMATORS if not isinstance(g, Reversible)], ids=str)
@pytest.mark.parametrize("late", [False, True])
def test_a_recorded_fixed_count_waits_for_a_device_only_to_learn_of_failures(grad, late, monkeypatch):
    monkeypatch.setattr(StochasticJFB, "draw", lambda self: (2, 2))  # two numbers of the host
    stop, mode = Stop(max_evals=5, late=late, **FREE), Waits()
    with watching(mode):
        loss(weights()[0].requires_grad_(), grad, stop)
    assert sum(mode.counts.values()) <= (0 if late else 2)
