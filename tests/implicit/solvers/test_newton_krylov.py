"""Newton-Krylov against dense Newton steps, and its count of evaluations."""

import pytest
import torch

from implicit import NewtonKrylov, Result, SolveOptions, Stop, fixed_point, iterate
from implicit.testing import jacobian, problem

F64 = torch.float64


def test_every_step_is_newtons():
    p, seen = problem("adaLN block"), []
    stop = Stop(rtol=1e-9, atol=0, max_evals=140)
    options = SolveOptions(callback=lambda calls, residual: seen.append(residual))
    with torch.no_grad():
        iterate(p, p.z0, NewtonKrylov(128, 1e-12), stop, args=p.args, options=options)
    z = p.z0
    residuals = torch.stack(seen)
    for _ in range(2):
        r = p.map(z, *p.args) - z
        near = (residuals / r.norm(dim=1) - 1).abs() < 1e-6  # a sample stays where it is while it takes its products
        assert near.any(dim=0).all()
        z = z + torch.linalg.solve(torch.eye(z.shape[1], dtype=F64) - jacobian(p.map, z, p.args), r)


def test_on_a_linear_map_one_step_is_enough():
    p = problem("linear 0.9")
    with torch.no_grad():
        found = iterate(p, p.z0, NewtonKrylov(60, 1e-11), Stop(rtol=1e-9, atol=0, max_evals=60), args=p.args)
    assert found.converged.all() and int(found.evals.max()) == p.calls <= 50
    torch.testing.assert_close(found.value, p.solution, rtol=1e-7, atol=1e-7)


class _Tanh(torch.autograd.Function):
    """An operator without a forward mode."""

    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return x.tanh()

    @staticmethod
    def backward(ctx, *grads):
        (x,) = ctx.saved_tensors
        return grads[0] * (1 - x.tanh() ** 2)


def test_without_a_forward_mode_the_products_are_the_same():
    w = 0.6 * torch.linalg.qr(torch.randn(6, 6, generator=torch.Generator().manual_seed(1), dtype=F64))[0]
    stop = Stop(rtol=1e-10, atol=0, max_evals=80)
    one, two = (
        iterate(lambda z, t=t: t(z @ w) + 1, torch.zeros(2, 6, dtype=F64), NewtonKrylov(), stop)
        for t in (torch.tanh, _Tanh.apply)
    )
    assert one.converged.all() and two.converged.all()
    assert (two.evals - one.evals <= 1).all()  # the call of f that found no forward mode counts
    torch.testing.assert_close(one.value, two.value, rtol=1e-13, atol=1e-13)


def test_samples_that_need_different_numbers_of_products_count_their_own():
    p = problem("one hard of 16")
    stop = Stop(rtol=1e-8, atol=0, max_evals=300)
    whole = fixed_point(p, p.z0, *p.args, solver=NewtonKrylov(), stop=stop).check()
    assert p.calls == int(whole.evals[8]) > 2 * int(whole.evals[0])
    for rows in (slice(0, 1), slice(8, 9)):
        alone = fixed_point(p, p.z0[rows], *(a[rows] for a in p.args), solver=NewtonKrylov(), stop=stop)
        assert torch.equal(alone.evals, whole.evals[rows])
        torch.testing.assert_close(alone.value, whole.value[rows], rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("budget", [1, 2, 3, 7])
def test_products_stay_within_the_budget(budget):
    p = problem("repelling")
    with torch.no_grad():
        found = iterate(p, p.z0, NewtonKrylov(), Stop(rtol=1e-10, max_evals=budget), args=p.args)
    assert (found.evals <= budget).all() and (found.result == Result.MAX_EVALS).all()


def test_bad_arguments_are_named():
    with pytest.raises(ValueError, match="inner"):
        NewtonKrylov(0)
    with pytest.raises(ValueError, match="forcing"):
        NewtonKrylov(forcing=1.0)


def test_a_sample_that_fails_does_not_spend_the_budget_of_the_others():
    weight = 0.3 * torch.randn(5, 5, generator=torch.Generator().manual_seed(0))
    x = torch.randn(4, 5, generator=torch.Generator().manual_seed(1))
    broken = torch.cat((x, torch.full((1, 5), torch.nan)))

    def f(z, x):
        return torch.tanh(z @ weight) + x

    alone = fixed_point(f, torch.zeros(4, 5), x, solver=NewtonKrylov()).check()
    beside = fixed_point(f, torch.zeros(5, 5), broken, solver=NewtonKrylov())
    assert beside.result.tolist() == [0, 0, 0, 0, Result.NONFINITE]
    assert beside.evals[:4].tolist() == alone.evals.tolist()
    torch.testing.assert_close(beside.value[:4], alone.value)


@pytest.mark.parametrize("unit", [1e-30, 1.0, 1e20])
def test_norms_whose_squares_leave_the_dtypes_range(unit):
    random = torch.Generator().manual_seed(0)
    matrix, b = torch.randn(8, 8, generator=random), unit * torch.randn(3, 8, generator=random)
    matrix *= 0.7 / torch.linalg.matrix_norm(matrix, 2)
    stop = Stop(rtol=1e-4, atol=0, max_evals=30)
    solution = iterate(lambda z: z @ matrix.T + b, torch.zeros(3, 8), NewtonKrylov(), stop)
    truth = torch.linalg.solve(torch.eye(8).double() - matrix.double(), b.T.double()).T
    assert solution.converged.all()
    assert ((solution.value - truth).norm(dim=1) < 1e-3 * truth.norm(dim=1)).all()
