"""Contracts that hold for every estimator: one value with and without a graph, claims, memory, learned starts."""

import warnings

import pytest
import torch
from torch import nn

from implicit import (
    DEQ,
    IFT,
    JFB,
    SHINE,
    Anderson,
    AndersonGS,
    Broyden,
    Neumann,
    NewtonKrylov,
    Phantom,
    Picard,
    Result,
    Reversible,
    StochasticJFB,
    Stop,
    Unrolled,
    fixed_point,
)
from implicit.testing import problem
from tests.helpers import SOLVERS
from tests.implicit.grads.tanh_layer import F64, TIGHT, ZERO, Late, X, named, weight


@named(
    IFT(), JFB(), JFB(5), Phantom(), Neumann(), Unrolled(), StochasticJFB(generator=torch.Generator().manual_seed(0))
)
def test_a_failed_sample_does_not_reach_the_weights_of_the_others(grad):
    def run(x):
        w = torch.tensor(0.5, requires_grad=True)
        x = torch.tensor(x, requires_grad=True)
        if isinstance(grad, StochasticJFB):
            grad.generator.manual_seed(0)
        solution = fixed_point(
            lambda z, x: torch.where(x > 2, z**4 + x, torch.sin(w * z) + x),
            torch.zeros_like(x),
            x,
            grad=grad,
            solver=Picard(),
            stop=Stop(rtol=1e-5, max_evals=60),
        )
        return torch.autograd.grad(solution.value[0].sum(), (w, x)), solution

    (alone, _), _ = run([[1.0]])
    (w, x), solution = run([[1.0], [3.0]])
    assert solution.result[1] != Result.CONVERGED
    assert torch.equal(w, alone)
    assert x[1].item() == 0 and bool(x.isfinite().all())


@pytest.mark.parametrize(
    ("name", "solver", "grad"),
    [
        (name, solver, grad)
        for name, grads in (
            ("one hard of 16", (IFT(), JFB(), JFB(5), Phantom(), Neumann(), SHINE())),
            ("non-normal", (IFT(), JFB(5))),  # without and with evaluations after the solve
        )
        for solver in SOLVERS
        for grad in grads
        if not (isinstance(grad, SHINE) and isinstance(solver, Picard | NewtonKrylov))  # these have no inverse estimate
    ],
    ids=str,
)
def test_one_value_and_result_with_and_without_a_graph(name, solver, grad):
    p = problem(name)
    stop = Stop(rtol=1e-8, atol=0, max_evals=80)
    w = torch.ones((), dtype=F64, requires_grad=True)

    def f(z, *args):
        return p.map(z, *args) * w

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        recorded = fixed_point(f, p.z0, *p.args, solver=solver, grad=grad, stop=stop)
    with torch.no_grad():
        quiet = fixed_point(f, p.z0, *p.args, solver=solver, grad=grad, stop=stop)
    assert torch.equal(recorded.result, quiet.result) and torch.equal(recorded.value, quiet.value)
    assert torch.equal(recorded.residual, quiet.residual)


@named(JFB(5), Phantom(5, 0.0), Phantom())
@pytest.mark.parametrize("solver", [Picard(0.7), Anderson(2, damping=0.5), AndersonGS()], ids=str)
def test_a_claim_is_true_of_the_value_after_tracked_steps(grad, solver):
    """An eigenvalue of -3: each further plain step multiplies the residual by 3."""
    q = torch.linalg.qr(torch.randn(4, 4, dtype=F64, generator=torch.Generator().manual_seed(0)))[0]
    a = q @ torch.diag(torch.tensor([-3.0, -1.5, 0.5, 0.2], dtype=F64)) @ q.T
    w = torch.ones((), dtype=F64, requires_grad=True)

    def f(z):
        return w * (z @ a + torch.arange(1.0, 5.0, dtype=F64))

    stop = Stop(rtol=1e-6, atol=0, max_evals=400)
    solution = fixed_point(f, torch.zeros(2, 4, dtype=F64), solver=solver, grad=grad, stop=stop).check()
    value = solution.value.detach()
    residual = (f(value) - value).norm(dim=1).detach()
    assert bool((residual <= 1.001e-6 * f(value).norm(dim=1)).all())
    torch.testing.assert_close(solution.residual, residual, rtol=1e-6, atol=1e-12)


@named(IFT(), JFB(), Neumann(), SHINE(), Phantom(), Reversible(), Unrolled())
@pytest.mark.parametrize("recorded", [True, False])
def test_a_value_never_shares_the_memory_of_the_start(grad, recorded):
    w = weight().detach().requires_grad_(recorded)

    def f(z):
        return torch.tanh(z @ w.T + X)

    with torch.no_grad():
        start = fixed_point(f, ZERO, stop=TIGHT).value
    solver = Broyden() if isinstance(grad, SHINE) else AndersonGS()
    value = fixed_point(f, start, grad=grad, solver=solver).value
    before = value.detach().clone()
    start.zero_()
    assert torch.equal(value.detach(), before)


@named(IFT(), Neumann(60), JFB(60), SHINE(refine=60), Unrolled())
def test_jacobian_of_many_cotangents_at_once(grad):
    solver = Broyden() if isinstance(grad, SHINE) else AndersonGS()

    def solve(x):
        return fixed_point(lambda z, x: torch.tanh(0.5 * z + x), ZERO, x, grad=grad, solver=solver).value

    jacobian = torch.autograd.functional.jacobian
    torch.testing.assert_close(jacobian(solve, X, vectorize=True), jacobian(solve, X))


def test_reversible_refuses_many_cotangents_at_once():
    value = fixed_point(lambda z, x: torch.tanh(0.5 * z + x), ZERO, X.clone().requires_grad_(), grad=Reversible()).value
    with pytest.raises(NotImplementedError, match="vectorize"):
        torch.autograd.functional.jacobian(
            lambda x: fixed_point(lambda z, x: torch.tanh(0.5 * z + x), ZERO, x, grad=Reversible()).value,
            X,
            vectorize=True,
        )
    assert value.requires_grad


@named(IFT(), JFB(), Neumann(), Phantom(), SHINE())
def test_a_learned_start_without_a_gradient_warns(grad):
    w, start = weight(), nn.Parameter(torch.zeros(1, 5, dtype=F64))
    solver = Broyden() if isinstance(grad, SHINE) else AndersonGS()

    def f(z):
        return torch.tanh(z @ w.T + X)

    with pytest.warns(RuntimeWarning, match="z0"):
        fixed_point(f, start.expand(3, 5), grad=grad, solver=solver)
    fixed_point(f, start.detach().expand(3, 5), grad=grad, solver=solver)  # no warning


@named(Unrolled(), Reversible())
def test_a_learned_start_with_a_gradient(grad):
    start = nn.Parameter(torch.zeros(3, 5, dtype=F64))
    w = weight()
    stop = Stop(rtol=0, atol=0, max_evals=5)
    fixed_point(lambda z: torch.tanh(z @ w.T + X), start, grad=grad, stop=stop).value.sum().backward()
    assert start.grad is not None and start.grad.norm() > 0


def test_a_random_budget_gives_way_in_evaluation_mode():
    deq = DEQ(Late(), grad=StochasticJFB()).eval()
    with torch.no_grad():
        first, second = deq(ZERO).check(), deq(ZERO).check()
    assert torch.equal(first.value, second.value)
