"""Mixed precision with every estimator: forward pass under autocast, backward pass outside, any scale of the loss."""

from typing import Any

import pytest
import torch
from torch import nn

from implicit import (
    IFT,
    SHINE,
    AbstractGrad,
    Anderson,
    AndersonGS,
    Broyden,
    Picard,
    Stop,
    Unrolled,
    fixed_point,
)
from tests import helpers

ESTIMATORS = {**helpers.ESTIMATORS, "IFT by Anderson": lambda: IFT(solver=Anderson(10))}


def problem():
    rng = torch.Generator().manual_seed(0)
    f = nn.Linear(16, 16)
    with torch.no_grad():
        f.weight.copy_(0.15 * torch.randn(16, 16, generator=rng))
        f.bias.copy_(0.1 * torch.randn(16, generator=rng))
    return f, torch.randn(8, 16, generator=rng)


def gradient(make: Any, casts: bool, scale: float = 1.0, backward_casts: bool = False):
    """Gradients of scale * mean(z*^2), divided by scale."""
    f, x = problem()
    x.requires_grad_()
    solver, stop = Broyden(), Stop(rtol=2e-2 if casts else 1e-6, max_evals=40)
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=casts):
        value = fixed_point(
            lambda z, x: torch.tanh(f(z) + x), torch.zeros_like(x), x, grad=make(), solver=solver, stop=stop
        ).value
    assert value.dtype == torch.float32
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=backward_casts):
        grads = torch.autograd.grad(value.square().mean() * scale, (f.weight, f.bias, x))
    return torch.cat([g.flatten() for g in grads]) / scale


@pytest.mark.parametrize("name", ESTIMATORS)
def test_forward_under_autocast_backward_outside(name):
    full, half = gradient(ESTIMATORS[name], False), gradient(ESTIMATORS[name], True)
    assert 1e-4 * full.norm() < (half - full).norm() < 0.05 * full.norm()
    inside = gradient(ESTIMATORS[name], True, backward_casts=True)
    assert (inside - full).norm() < 0.05 * full.norm()


@pytest.mark.parametrize("casts", [False, True])
@pytest.mark.parametrize("name", ESTIMATORS)
def test_the_scale_of_the_loss_changes_nothing(name, casts):
    one = gradient(ESTIMATORS[name], casts)
    for scale in (2.0**16, 2.0**-33, 2.0**33):  # powers of two: the very same bits
        assert torch.equal(gradient(ESTIMATORS[name], casts, scale), one)
    for scale in (1e-10, 1e10):
        other = gradient(ESTIMATORS[name], casts, scale)
        assert (other - one).norm() < (1e-2 if casts else 1e-5) * one.norm()


def test_a_gradient_scaler_changes_no_step():
    def step(scaled):
        f, x = problem()
        optimizer = torch.optim.SGD(f.parameters(), lr=0.1)
        scaler = torch.amp.GradScaler("cpu", enabled=scaled)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            loss = fixed_point(lambda z: torch.tanh(f(z) + x), torch.zeros_like(x)).value.square().mean()
        scaler.scale(loss).backward()
        scaler.step(optimizer)
        return f.weight.detach()

    assert torch.equal(step(True), step(False)) and not torch.equal(step(True), problem()[0].weight)


@pytest.mark.parametrize("solver", [Picard(), Anderson(), AndersonGS(), Broyden()], ids=str)
@pytest.mark.parametrize(
    "grad", [IFT(AndersonGS(), Stop(rtol=1e-6)), SHINE(), Unrolled()], ids=lambda g: type(g).__name__
)
def test_solvers_and_estimators_reckon_in_full_precision(solver, grad: AbstractGrad):
    """f has no operator that autocast would change, so nothing changes."""
    if isinstance(grad, SHINE) and isinstance(solver, Picard):
        pytest.skip("Picard builds no inverse")
    x = torch.linspace(-1, 1, 24).view(4, 6).requires_grad_()

    def run(casts):
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=casts):
            found = fixed_point(
                lambda z, x: 0.8 * z.roll(1, 1).sin() + x, torch.zeros_like(x), x, solver=solver, grad=grad
            )
        return found, torch.autograd.grad(found.value.square().sum(), x)[0]

    (plain, slope), (cast, cast_slope) = run(False), run(True)
    assert torch.equal(plain.value, cast.value) and torch.equal(plain.evals, cast.evals)
    assert torch.equal(slope, cast_slope)
