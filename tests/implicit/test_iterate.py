"""The loop: stopping, failure per sample, and bad input."""

from typing import Any

import pytest
import torch

from implicit import Anderson, NotConverged, Picard, Result, Stop, fixed_point
from implicit.testing import problem
from tests.helpers import SOLVERS, each_estimator, half, solve, solver_and
from tests.helpers import each_solver as each

F64 = torch.float64


# ---- numbers that are too large, and tolerances that are too small


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@each
def test_divergence_past_the_largest_number_is_no_convergence(solver, dtype):
    found = solve(lambda z: z * z + 3, torch.full((2, 4), 3.0, dtype=dtype), solver=solver, stop=Stop(max_evals=30))
    assert not found.converged.any()
    if solver == Picard():
        assert (found.result == Result.NONFINITE).all() and torch.isfinite(found.value).all()


@each
def test_a_norm_whose_square_overflows_is_still_right(solver):
    z = torch.full((1, 4), 1e25)
    found = solve(lambda z: 0.5 * z + 1e25, z, solver=solver, stop=Stop(rtol=1e-4, atol=0, max_evals=60))
    if isinstance(solver, Picard):
        assert found.converged.all()
    if found.converged.all():  # inner products of such vectors overflow, so not every solver gets there
        torch.testing.assert_close(found.value, torch.full((1, 4), 2e25), rtol=1e-3, atol=0)


def test_damping_does_not_loosen_the_test():
    found = solve(half, torch.zeros(1, 3, dtype=F64), solver=Picard(0.99), stop=Stop(rtol=1e-3, atol=0, max_evals=5))
    assert (found.result == Result.MAX_EVALS).all() and float(found.residual) > 0.5


@each
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_a_tolerance_out_of_reach_ends_early_with_advice(solver, dtype):
    w = 0.5 * torch.linalg.qr(torch.randn(16, 16, generator=torch.Generator().manual_seed(0)))[0]
    stop = Stop(rtol=1e-12, atol=0, max_evals=400)
    found = solve(
        lambda z: torch.tanh(z.float() @ w + 0.7).to(z.dtype),
        torch.zeros(3, 16, dtype=dtype),
        solver=solver,
        stop=stop,
    )
    assert torch.isin(found.result, torch.tensor([Result.STALLED, Result.CONVERGED], dtype=torch.int8)).all()
    assert int(found.evals.max()) < 150
    assert "Stop.rtol" in Result.STALLED.message and "dtype" in Result.STALLED.message


# ---- samples that fail


@each
def test_nan_from_the_first_evaluation(solver):
    found = solve(lambda z: z * torch.nan, torch.ones(2, 3), solver=solver)
    assert (found.result == Result.NONFINITE).all() and (found.evals == 1).all()
    with pytest.raises(NotConverged, match="NONFINITE"):
        found.check()


@each
def test_nan_later_in_one_sample_ends_that_sample_alone(solver):
    rate = torch.tensor([[0.5], [0.9], [0.3]], dtype=F64)
    z0 = torch.zeros(3, 4, dtype=F64)

    def f(z, rate, key):
        out = rate * torch.sin(z) + 1
        return torch.where((key == 1) & (z.abs().sum(1, keepdim=True) > 1), torch.nan, out)

    key = torch.arange(3).unsqueeze(1)
    stop = Stop(rtol=1e-8, atol=0, max_evals=200)
    found = solve(f, z0, rate, key, solver=solver, stop=stop)
    assert found.result.tolist() == [Result.CONVERGED, Result.NONFINITE, Result.CONVERGED]
    assert torch.isfinite(found.value).all() and int(found.evals[1]) < 15
    alone = solve(f, z0[[0, 2]], rate[[0, 2]], key[[0, 2]], solver=solver, stop=stop)
    torch.testing.assert_close(found.value[[0, 2]], alone.value, rtol=1e-7, atol=1e-8)


# ---- bad and odd input


@each
@pytest.mark.parametrize("budget", [1, 2])
def test_a_budget_of_one_or_two(solver, budget):
    p = problem("tanh layers")
    found = solve(p, p.z0, *p.args, solver=solver, stop=Stop(max_evals=budget))
    assert p.calls == budget and (found.result == Result.MAX_EVALS).all() and (found.evals == budget).all()
    if budget == 1:
        assert torch.equal(found.value, p.z0)  # the only point whose residual is known


@each
def test_a_start_that_is_the_answer_and_a_zero_residual(solver):
    zero, two = torch.zeros(2, 3), torch.full((2, 3), 2.0)
    for f, z in ((half, two), (lambda z: z.clone(), two + 0.3), (lambda z: z * 0, zero)):
        found = solve(f, z, solver=solver)
        assert found.converged.all() and (found.evals == 1).all() and (found.residual == 0).all()
        assert torch.equal(found.value, z)
        fixed = solve(f, z, solver=solver, stop=Stop(rtol=0, atol=0, max_evals=6))
        assert torch.equal(fixed.value, z)


@pytest.mark.parametrize("solver", [*SOLVERS, Anderson(2)], ids=repr)
def test_a_fixed_count_keeps_the_last_finite_point(solver):
    calls = 0

    def f(z):
        nonlocal calls
        calls += 1
        return torch.where(torch.tensor([[True], [calls < 5]]), 0.9 * torch.cos(z), torch.nan)

    stop = Stop(rtol=0, atol=0, max_evals=8)
    found = solve(f, torch.ones(2, 3), solver=solver, stop=stop)
    assert found.result.tolist() == [Result.MAX_EVALS, Result.NONFINITE] or not found.residual[0]
    z = found.value
    assert torch.isfinite(z).all() and float(found.residual[1]) < float((0.9 * torch.cos(torch.ones(3)) - 1).norm())
    never = solve(lambda z: z * torch.nan, torch.ones(2, 3), solver=solver, stop=stop)
    assert torch.equal(never.value, torch.ones(2, 3)) and (never.result == Result.NONFINITE).all()


@each
def test_a_constant_map_and_one_that_ignores_z(solver):
    c = torch.randn(2, 3)
    found = solve(lambda z: c, torch.zeros(2, 3), solver=solver)
    assert found.converged.all() and int(found.evals.max()) <= 12
    torch.testing.assert_close(found.value, c, rtol=1e-3, atol=1e-3)


@each
@pytest.mark.parametrize(
    ("f", "message"),
    [
        (lambda z: z.double(), "dtype"),
        (lambda z: z[:, :2], "shape"),
        (lambda z: z.repeat(2, 1), "shape"),
        (lambda z: z.reshape(3, 2), "shape"),
        (lambda z: (z, z), "structure"),
        (lambda z: z.to("meta"), "device"),
        (lambda z: z.mul_(0.5), r"^f\b"),
        (lambda z: None, "structure"),
    ],
)
def test_a_map_that_changes_what_it_must_keep_is_refused(solver, f, message):
    with pytest.raises(ValueError, match=message):
        solve(f, torch.ones(2, 3), solver=solver)


@pytest.mark.parametrize(
    ("z0", "message"),
    [
        (torch.ones(()), "batch_dims=0"),
        (torch.ones(2, 3, dtype=torch.int64), "int64"),
        (torch.ones(2, 0), "elements"),
        ((torch.ones(2, 3), torch.ones(3, 3)), "batch_dims=0"),
        ([], "tensor"),
        ({"a": "text"}, "str"),
    ],
)
def test_a_state_that_cannot_be_solved_for_is_refused(z0, message):
    with pytest.raises(ValueError, match=message):
        solve(lambda z: z, z0)


@each
def test_an_empty_batch_gives_an_empty_answer(solver):
    for stop in (Stop(), Stop(rtol=0, atol=0, max_evals=4)):
        found = solve(half, torch.ones(0, 3), solver=solver, stop=stop)
        assert found.value.shape == (0, 3) and found.result.shape == (0,) and found.check() is found


@each
def test_a_0_dim_state_is_one_system(solver):
    found = solve(
        torch.cos,
        torch.tensor(1.0, dtype=F64),
        solver=solver,
        batch_dims=0,
        stop=Stop(rtol=1e-10, max_evals=99),
    )
    assert found.value.shape == () and float(found.value) == pytest.approx(0.7390851332151607, abs=1e-6)


def test_bad_stops_are_named():
    kwargs: dict[str, Any]
    for kwargs in ({"rtol": -1.0}, {"atol": float("nan")}, {"max_evals": 0}, {"check_every": 0}):
        with pytest.raises(ValueError, match=next(iter(kwargs))):
            Stop(**kwargs)


@each_estimator
@pytest.mark.parametrize("stop", [Stop(), Stop(rtol=0, max_evals=4), Stop(late=True, check_every=2), Stop(norm="leaf")])
def test_an_empty_batch_has_a_gradient_of_zero(estimator, stop):
    w = torch.ones(3, requires_grad=True)
    start = (torch.zeros(0, 3), torch.zeros(0, 2, 1))
    ways = solver_and(estimator)
    found = fixed_point(lambda s: (torch.tanh(w * s[0]), 0.5 * s[1]), start, stop=stop, trace=True, **ways)
    found.check().value[0].sum().backward()
    assert w.grad is not None and w.grad.eq(0).all() and found.trace.shape[1] == 0
