"""A sample that fails and is left out of the loss reaches no gradient of the parameters that the samples share."""

import itertools
import warnings
from functools import partial

import pytest
import torch

from implicit import (
    IFT,
    JFB,
    SHINE,
    Anderson,
    AndersonGS,
    BadBroyden,
    Broyden,
    Multisecant,
    Neumann,
    Phantom,
    Picard,
    Result,
    Reversible,
    StochasticJFB,
    Stop,
    Unrolled,
    fixed_point,
)
from tests.helpers import F64, FREE, SOLVERS, Waits, watching

ESTIMATORS = (
    IFT(on_failure="ignore"),
    JFB(),
    JFB(3),
    Phantom(),
    Neumann(),
    SHINE(),
    SHINE(fallback=None),
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


def returns_from_infinity(h):
    """0, 1, infinity, 0, ..."""
    h = torch.nan_to_num(h, nan=torch.inf, posinf=torch.inf)
    return torch.exp(1000 * h * (2 - h))


FAILURES = (explodes, ends_in_nan, returns_from_infinity)
STOPS = [Stop(max_evals=n, **FREE) for n in (3, 5, 9)] + [Stop(rtol=1e-6, max_evals=9)]


def weights():
    rng = torch.Generator().manual_seed(0)
    return 0.3 * torch.randn(6, 6, dtype=F64, generator=rng), torch.randn(4, 6, dtype=F64, generator=rng)


def loss(w, grad, stop, failure=None, solver=None, aux=False):
    """Of the first three samples; the fourth fails, or with `failure` None goes the way of the others."""
    x = weights()[1]
    solver = solver or (Broyden() if isinstance(grad, SHINE) else Picard())

    def f(z):
        fine = torch.tanh(z @ w + x)
        return fine if failure is None else torch.cat((fine[:3], failure(z[3:] + z[3:] @ w)))

    torch.manual_seed(5)  # the draw of StochasticJFB
    if aux:
        found = fixed_point(
            lambda z: (f(z), z * f(z)), torch.zeros_like(x), solver=solver, stop=stop, grad=grad, has_aux=True
        )
        return found.aux[:3].sum()
    return fixed_point(f, torch.zeros_like(x), solver=solver, stop=stop, grad=grad).value[:3].square().sum()


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
@pytest.mark.parametrize("stop", STOPS[1:], ids=lambda stop: f"{stop.max_evals}, {stop.rtol:g}")
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


@pytest.mark.parametrize("way", [backward, on_a_device, by_torch_func, by_vmap], ids=lambda way: way.__name__)
@pytest.mark.parametrize("failure", FAILURES, ids=lambda failure: failure.__name__)
@pytest.mark.parametrize("grad", [IFT(on_failure="ignore"), JFB(3), SHINE(), Reversible(), Unrolled()], ids=str)
@pytest.mark.filterwarnings("ignore")
def test_aux_of_a_failed_sample_reaches_no_gradient_of_shared_weights(way, failure, grad):
    """f is evaluated at the value of a fixed count for aux alone."""
    if isinstance(grad, PLAIN_ALONE) and way in (by_torch_func, by_vmap):
        with pytest.raises(NotImplementedError, match="transforms or forward mode"):
            way(lambda w: loss(w, grad, STOPS[0], failure, aux=True))
        return
    for stop in STOPS[:3]:
        alone, beside = (way(lambda w, m=m, s=stop: loss(w, grad, s, m, aux=True)) for m in (None, failure))
        assert alone.isfinite().all() and alone.abs().sum() > 0
        torch.testing.assert_close(beside, alone, rtol=0, atol=1e-13)


@pytest.mark.parametrize("solver", [Anderson(), AndersonGS(), BadBroyden(), Broyden(), Multisecant()], ids=str)
@pytest.mark.parametrize("failure", [*FAILURES, lambda h: torch.sqrt(1.3 - h) - 1.2 * h], ids=range(4))
@pytest.mark.filterwarnings("ignore")
def test_an_inverse_estimate_of_a_failed_sample_that_is_not_finite_is_not_used(solver, failure):
    stops = (Stop(max_evals=4, **FREE), *(Stop(rtol=1e-8, max_evals=n) for n in (3, 5, 9, 20)))
    stops += tuple(Stop(rtol=1e-8, max_evals=40, **reading) for reading in ({"late": True}, {"check_every": 3}))
    for stop, refine in itertools.product(stops, (0, 1)):
        one = partial(loss, grad=SHINE(refine, fallback=None), stop=stop, solver=solver)
        alone, beside = backward(one), backward(partial(one, failure=failure))
        torch.testing.assert_close(beside, alone, rtol=0, atol=1e-12)


LEFT = {
    "logarithm": lambda h: torch.log(h.clamp(min=-0.9) + 1) * 3 - 2 * h + 0.5,
    "square root": lambda h: 4 - torch.sqrt(h + 0.5) * (h + 0.2),
    "square": lambda h: h**2 + 1.5,
    "range of squares": lambda h: 1e200 * (h + 1),
    "arc cosine": lambda h: torch.acos(0.9 * h.cos() - 0.05 * h) * 2 - 0.86,
}


@pytest.mark.parametrize("way", [backward, on_a_device], ids=lambda way: way.__name__)
@pytest.mark.parametrize("failure", LEFT)
@pytest.mark.parametrize("anchor", [None, 4])
@pytest.mark.filterwarnings("ignore")
def test_a_backward_run_of_reversible_that_leaves_the_domain_of_f_is_that_of_its_sample_alone(way, failure, anchor):
    """Running backwards multiplies the error of a state until f is not finite there, at points it never saw forward."""
    grad, ended = Reversible(on_drift="ignore", anchor=anchor), 0
    for evals in (9, 21, 61):
        for rtol in (0.0, 1e-6):
            one = partial(loss, grad=grad, stop=Stop(rtol=rtol, max_evals=evals))
            alone, beside = way(one), way(partial(one, failure=LEFT[failure]))
            ended += int(alone.isfinite().all())
            torch.testing.assert_close(beside, alone, rtol=0, atol=1e-12)
    assert ended == 6


@pytest.mark.parametrize("stop", [STOPS[2], Stop(rtol=1e-6, max_evals=12)], ids=["count", "rtol"])
def test_unrolled_reports_a_solve_with_a_failed_sample_once(stop):
    """It runs the solve a second time without the failed sample, which is no part of what is observed."""

    def observe():
        seen, (w, x) = [], weights()
        w.requires_grad_()

        def f(z):
            return torch.cat((torch.tanh(z[:3] @ w + x[:3]), explodes(z[3:] + z[3:] @ w)))

        def callback(calls, residual):
            seen.append((calls, residual[:3].tolist()))

        found = fixed_point(f, 0 * x, solver=Picard(), grad=Unrolled(), stop=stop, trace=True, callback=callback)
        assert int(found.result[3]) == Result.NONFINITE
        return seen, found.trace.detach().nan_to_num(torch.inf, posinf=torch.inf)

    seen, trace = observe()
    with torch.no_grad():
        expected, plain = observe()
    assert str(seen) == str(expected)
    assert torch.equal(trace, plain)


@pytest.mark.parametrize("solver", [s for s in SOLVERS if s.differentiable], ids=repr)
@pytest.mark.parametrize("checkpoint", [False, True])
@pytest.mark.filterwarnings("ignore")
def test_unrolled_goes_on_from_a_warm_start_beside_a_sample_that_is_reset(solver, checkpoint):
    """A step by the history of the warm start ends in NaN, so the history, which has no graph, is cleared."""
    x = weights()[1]

    def function(w, fails=True):
        def f(z):
            far = torch.where(z[3:] > 2, torch.nan, 0.9 * z[3:] + 0.4) if fails else torch.tanh(z[3:])
            return torch.cat((torch.tanh(z[:3] @ w + x[:3]), far))

        z0 = torch.zeros_like(x)
        with torch.no_grad():
            warm = fixed_point(f, z0, solver=solver, stop=Stop(rtol=1e-9, max_evals=3), keep_state=True)
        stop = Stop(rtol=1e-9, max_evals=4)
        grad = Unrolled(checkpoint=checkpoint)
        return fixed_point(f, z0, solver=solver, stop=stop, grad=grad, state=warm.state).value[:3].square().sum()

    torch.testing.assert_close(backward(function), backward(partial(function, fails=False)), rtol=1e-10, atol=1e-12)


PAIRS = [(grad, stop) for grad in ESTIMATORS for stop in STOPS[2:] if grad != Unrolled(2) or not stop.has_tolerance]


@pytest.mark.parametrize("start", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize(("grad", "stop"), PAIRS, ids=str)
def test_a_sample_whose_f_is_not_finite_at_its_start_leaves_the_inputs_of_the_others_their_gradients(start, grad, stop):
    """The gradients of shared weights are NaN then, as documented; the input of a sample is its own."""
    w, x = weights()

    def slope(failing):
        b = x.clone().requires_grad_()

        def f(z, b):
            return torch.cat((torch.tanh(z[:3] @ w + b[:3]), start + z[3:] if failing else torch.tanh(z[3:] + b[3:])))

        torch.manual_seed(5)
        solver = Broyden() if isinstance(grad, SHINE) else Picard()
        found = fixed_point(f, torch.zeros_like(x), b, solver=solver, stop=stop, grad=grad)
        assert not failing or found.result[3] == Result.NONFINITE
        return torch.autograd.grad(found.value[:3].square().sum(), b)[0][:3]

    assert torch.equal(slope(True), slope(False))
