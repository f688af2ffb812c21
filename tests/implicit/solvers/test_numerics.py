"""Numerics of all solvers: values that are not finite, half precision, scale, short and full histories."""

import copy
import math
import pickle

import pytest
import torch

from implicit import (
    Anderson,
    AndersonGS,
    BadBroyden,
    Broyden,
    Multisecant,
    NewtonKrylov,
    Picard,
    Result,
    Stop,
)
from implicit.solvers.base import Point
from implicit.testing import problem
from tests.helpers import SOLVERS, smooth, solve
from tests.helpers import each_solver as each

F64 = torch.float64
QUASI = [Anderson(), AndersonGS(), Broyden(), BadBroyden()]


def contraction(n=16, gain=0.5, dtype=F64):
    """f(z, x) = tanh(z W) + x with ||W|| = gain, and x."""
    rng = torch.Generator().manual_seed(0)
    w = (gain * torch.linalg.qr(torch.randn(n, n, generator=rng, dtype=F64))[0]).to(dtype)
    return (lambda z, x: torch.tanh(z @ w) + x), torch.randn(4, n, generator=rng, dtype=F64).to(dtype)


def burst(at, rows, value):
    """f that gives `value` for the samples `rows` at evaluation number `at`, and is a contraction otherwise."""
    f, x = contraction()
    calls = 0

    def broken(z, x):
        nonlocal calls
        calls += 1
        out = f(z, x)
        if calls == at:
            out = out.clone()
            out[rows] = value
        return out

    return broken, x


@each
@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_one_bad_evaluation_destroys_no_good_iterate(solver, value):
    """0 * NaN is NaN: an iterate that is masked out by multiplication comes through."""
    good, x = contraction()
    bad, _ = burst(4, [1], value)
    stop = Stop(rtol=1e-9, atol=0, max_evals=80)
    clean = solve(good, torch.zeros_like(x), x, solver=solver, stop=stop).check()
    found = solve(bad, torch.zeros_like(x), x, solver=solver, stop=stop)
    others = [0, 2, 3]
    assert torch.equal(found.value[others], clean.value[others])
    assert torch.equal(found.evals[others], clean.evals[others])
    assert torch.isfinite(found.value).all() and torch.isfinite(found.residual).all()
    if found.result[1] == Result.NONFINITE:
        assert int(found.evals[1]) == 4 and float(found.residual[1]) < float(torch.linalg.norm(x[1]))
    else:
        torch.testing.assert_close(found.value[1], clean.value[1], rtol=1e-7, atol=1e-8)


@each
def test_nan_for_ever_ends_the_sample_at_its_best_and_spends_no_budget(solver):
    f, x = contraction()
    calls = 0

    def broken(z, x):
        nonlocal calls
        calls += 1
        return f(z, x) if calls < 5 else f(z, x) * math.nan

    start = float(torch.linalg.norm(x[0]))
    found = solve(broken, torch.zeros_like(x), x, solver=solver, stop=Stop(rtol=1e-12, atol=0, max_evals=500))
    assert (found.result == Result.NONFINITE).all() and calls <= 60
    assert torch.isfinite(found.value).all() and float(found.residual[0]) <= start


@each
def test_norms_past_the_largest_half_precision_number_are_no_convergence(solver):
    """||f(z)|| of 400 numbers of 6e4 is inf in float16, and finite / inf = 0 would meet any tolerance."""
    grown = torch.full((1, 400), 3.0e4, dtype=torch.float16)
    found = solve(lambda z: 1.3 * z, grown, solver=solver, stop=Stop(rtol=1e-3, atol=0, max_evals=1))
    assert not found.converged.any() and math.isfinite(float(found.residual))
    torch.testing.assert_close(float(found.residual), 0.3 * 3.0e4 * 20, rtol=2e-3, atol=0)
    still = solve(lambda z: z.clone(), grown, solver=solver, stop=Stop(rtol=1e-3, atol=0))
    assert still.converged.all() and torch.equal(still.value, grown)


@each
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
def test_a_diverging_iteration_is_never_converged_with_residual_zero(solver, dtype):
    found = solve(lambda z: -3 * z + 1, torch.full((2, 8), 5.0, dtype=dtype), solver=solver, stop=Stop(max_evals=120))
    if isinstance(solver, Picard):
        assert not found.converged.any()
    for z in found.value[found.converged]:  # accelerated solvers find the fixed point 1/4
        torch.testing.assert_close(z, torch.full_like(z, 0.25), rtol=1e-2, atol=1e-2)
    assert torch.isfinite(found.value).all() and (found.residual[~found.converged] > 0).all()


@each
@pytest.mark.parametrize("name", ["repelling", "non-normal"])
def test_the_residual_reported_is_that_of_the_value_returned(solver, name):
    """To return f(z) and report the residual of z is a false claim wherever f expands."""
    p = problem(name)
    found = solve(p, p.z0, *p.args, solver=solver, stop=Stop(rtol=1e-4, atol=0, max_evals=60))
    fz = p.map(found.value, *p.args)
    true = (fz - found.value).norm(dim=1)
    done = found.converged
    torch.testing.assert_close(found.residual[done], true[done], rtol=1e-9, atol=0)
    assert (true[done] <= 1e-4 * fz.norm(dim=1)[done] * (1 + 1e-9)).all()


@each
def test_a_batch_of_one_is_as_accurate_as_any(solver):
    """Progress over the iterations, not over the batch."""
    for seed in range(3):
        rng = torch.Generator().manual_seed(seed)
        w = 0.9 * torch.linalg.qr(torch.randn(30, 30, generator=rng, dtype=F64))[0]
        x = torch.randn(1, 30, generator=rng, dtype=F64)
        found = solve(
            lambda z, x, w=w: torch.tanh(z @ w) + x,
            torch.zeros_like(x),
            x,
            solver=solver,
            stop=Stop(rtol=1e-9, atol=0, max_evals=250),
        )
        fz = torch.tanh(found.value @ w) + x
        claim = (fz - found.value).norm() <= 1e-9 * fz.norm()
        assert bool(claim) == bool(found.converged[0])
        assert bool(claim) or int(found.evals) == 250


@pytest.mark.parametrize("solver", SOLVERS, ids=lambda s: type(s).__name__)
@pytest.mark.parametrize("name", ["tanh layers", "repelling", "H 0.99"])
def test_the_unit_of_z_changes_no_count(solver, name):
    """An absolute regularisation of a Gram matrix does."""
    counts = set()
    for unit in (1e-4, 1.0, 1e4):
        p = problem(name)
        found = solve(
            lambda z, *args, p=p, unit=unit: unit * p.map(z / unit, *args),
            p.z0 * unit,
            *p.args,
            solver=solver,
            stop=Stop(rtol=1e-5, atol=0, max_evals=40),
        )
        counts.add(tuple(found.evals.tolist()))
    assert len(counts) == 1


@pytest.mark.parametrize("memory", [2, 5, 10])
@pytest.mark.parametrize("method", [Broyden, BadBroyden])
def test_a_history_that_wraps_goes_on_converging(memory, method):
    p = problem("linear 0.9")
    solver = method(memory, safeguard=False)
    found = solve(p, p.z0, *p.args, solver=solver, stop=Stop(rtol=1e-8, atol=0, max_evals=300))
    assert torch.isfinite(found.value).all() and (found.result != Result.NONFINITE).all()
    plain = solve(p, p.z0, *p.args, solver=Picard(), stop=Stop(rtol=1e-8, atol=0, max_evals=300))
    assert found.converged.all() and int(found.evals.max()) <= int(plain.evals.max())


@each
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_needs_no_solver_that_torch_lacks(solver, dtype):
    """LU and QR do not exist in half precision on a CPU."""
    f, x = contraction(dtype=dtype)
    rtol = 1e-2 if dtype == torch.float16 else 5e-2
    found = solve(f, torch.zeros_like(x), x, solver=solver, stop=Stop(rtol=rtol, atol=0, max_evals=60)).check()
    true, y = contraction()
    z = solve(true, torch.zeros_like(y), y, stop=Stop(rtol=1e-10, atol=0, max_evals=60)).check().value
    assert found.value.dtype == dtype
    assert ((found.value.double() - z).norm(dim=1) <= 3 * rtol * z.norm(dim=1)).all()


@pytest.mark.parametrize("solver", [Anderson(1), Anderson(2), AndersonGS(1), Broyden(1), NewtonKrylov(1)], ids=repr)
def test_the_shortest_memory_works(solver):
    f, x = contraction()
    found = solve(f, torch.zeros_like(x), x, solver=solver, stop=Stop(rtol=1e-8, atol=0, max_evals=200)).check()
    torch.testing.assert_close(f(found.value, x), found.value, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("solver", QUASI, ids=lambda s: type(s).__name__)
def test_residuals_that_are_equal_make_no_singular_system(solver):
    """Identical differences, hence a singular Gram matrix, from a map that moves at constant speed."""
    found = solve(lambda z: z + 1, torch.zeros(2, 3), solver=solver, stop=Stop(max_evals=20))
    assert not found.converged.any() and torch.isfinite(found.value).all()


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda state: pickle.loads(pickle.dumps(state))])
@pytest.mark.parametrize("solver", [Anderson(4), AndersonGS(4), Broyden(8), BadBroyden(8), Multisecant(4)], ids=repr)
@torch.no_grad()
def test_steps_from_a_copied_state_are_those_of_the_original(solver, copied):
    f, z = smooth()
    state = solver.init(Point(z, f(z)))
    for _ in range(5):
        z, _, state = solver.step(Point(z, f(z)), state)
    other, w = copied(state), z
    for _ in range(3):
        z, _, state = solver.step(Point(z, f(z)), state)
        w, _, other = solver.step(Point(w, f(w)), other)
        assert torch.equal(w, z)
