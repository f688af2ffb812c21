"""GMRES against dense least squares and scipy, product by product; failures, and settings that are refused."""

import numpy as np
import pytest
import scipy.sparse.linalg
import torch

from implicit import GMRES, Result, Stop
from implicit.diagnostics.profiling import Bytes
from tests.helpers import Waits, watching
from tests.layers import F64, off


@pytest.fixture
def problem():
    rng = torch.Generator().manual_seed(0)
    a = 0.25 * torch.randn(3, 12, 12, generator=rng, dtype=F64)
    return a, torch.randn(3, 12, generator=rng, dtype=F64)


def act_by(a):
    return lambda v: (a @ v.unsqueeze(2)).squeeze(2)


def budget(k):
    return Stop(rtol=0, atol=0, max_evals=k)


def true_residual(a, g, u):
    return (g - u + act_by(a)(u)).norm(dim=1)


@pytest.mark.parametrize("k", [1, 2, 5, 9])
def test_it_minimises_the_residual_over_the_krylov_space(problem, k):
    a, g = problem
    powers = [g]
    for _ in range(k):
        powers.append(act_by(a)(powers[-1]))
    space = torch.stack(powers[:k], dim=2)
    m = torch.eye(12, dtype=F64) - a
    best = torch.linalg.lstsq(m @ space, g.unsqueeze(2)).solution
    found = GMRES()(act_by(a), g, budget(k))
    torch.testing.assert_close(found.value, (space @ best).squeeze(2), rtol=1e-7, atol=1e-9)
    torch.testing.assert_close(found.residual, true_residual(a, g, found.value), rtol=1e-9, atol=1e-14)
    assert found.evals.tolist() == [k] * 3 and found.result.tolist() == [Result.MAX_EVALS] * 3


def test_restarts_against_scipy(problem):
    a, g = problem
    for b in range(3):
        m = np.eye(12) - a[b].numpy()
        for cycles in (1, 2, 4):
            theirs, _ = scipy.sparse.linalg.gmres(m, g[b].numpy(), restart=3, maxiter=cycles, rtol=1e-15)
            ours = GMRES(memory=3)(act_by(a[b : b + 1]), g[b : b + 1], budget(3 * cycles)).value
            np.testing.assert_allclose(ours[0].numpy(), theirs, rtol=1e-9, atol=1e-12)


def test_samples_are_independent(problem):
    a, g = problem
    a = a * torch.tensor([0.05, 1.0, 0.5], dtype=F64).view(3, 1, 1)
    stop = Stop(rtol=1e-8, atol=0, max_evals=100)
    for memory in (4, 60):
        together = GMRES(memory)(act_by(a), g, stop)
        assert together.evals[0] < together.evals[1:].min() and bool(together.converged.all())
        for b in range(3):
            alone = GMRES(memory)(act_by(a[b : b + 1]), g[b : b + 1], stop)
            assert alone.evals == together.evals[b]
            torch.testing.assert_close(alone.value[0], together.value[b], rtol=1e-12, atol=1e-12)
            assert true_residual(a, g, together.value)[b] <= 1.001e-8 * together.value[b].norm()


@pytest.mark.parametrize("dtype", [torch.float32, F64])
def test_a_residual_below_rounding_is_not_claimed(problem, dtype):
    a, g = (t.to(dtype) for t in problem)
    found = GMRES()(act_by(a), g, Stop(rtol=1e-30, atol=0, max_evals=100))
    assert found.result.tolist() == [Result.STALLED] * 3 and found.evals.max() <= 13
    exact = torch.linalg.solve(torch.eye(12, dtype=F64) - problem[0], problem[1])
    assert off(found.value.to(F64), exact) < 30 * torch.finfo(dtype).eps
    assert (true_residual(problem[0], problem[1], found.value.to(F64)) < 4 * found.residual).all()


def test_a_sample_that_fails_harms_no_other(problem):
    a, g = problem
    a[1, 4, 5] = torch.nan
    found = GMRES()(act_by(a), g, Stop(rtol=1e-10, atol=0, max_evals=100))
    assert found.result.tolist() == [Result.CONVERGED, Result.NONFINITE, Result.CONVERGED]
    assert torch.equal(found.value[1], g[1])
    exact = torch.linalg.solve(torch.eye(12, dtype=F64) - a[[0, 2]], g[[0, 2]])
    torch.testing.assert_close(found.value[[0, 2]], exact, rtol=1e-8, atol=1e-8)


def test_nothing_to_solve_and_nothing_to_save(problem):
    a, g = problem
    g = g.clone()
    g[0], g[1] = 0, torch.inf
    found = GMRES()(act_by(a), g, Stop(rtol=1e-10, atol=0, max_evals=100))
    assert found.result.tolist() == [Result.CONVERGED, Result.NONFINITE, Result.CONVERGED]
    assert found.evals[0] == 0 and not found.value[0].any() and not found.value[1].isfinite().any()


def test_an_exhausted_space_ends_the_solve():
    """A = c I: one product is all there is to learn."""
    g = torch.ones(2, 5, dtype=F64)
    found = GMRES()(lambda v: 0.5 * v, g, Stop(rtol=1e-12, atol=0, max_evals=9))
    assert found.evals.tolist() == [1, 1] and torch.allclose(found.value, 2 * g, rtol=1e-14)
    found = GMRES(memory=2)(lambda v: v, g, Stop(rtol=1e-12, atol=0, max_evals=9))  # I - A = 0: no solution
    assert found.result.tolist() == [Result.MAX_EVALS] * 2 and bool(found.value.isfinite().all())


@pytest.mark.parametrize(
    ("settings", "name"),
    [
        ({"memory": 0}, r"GMRES\.memory"),
        ({"short": 0}, r"GMRES\.short"),
        ({"rate": 1.5}, r"GMRES\.rate"),
    ],
)
def test_settings_that_make_no_sense_are_refused(settings, name):
    with pytest.raises(ValueError, match=name):
        GMRES(**settings)


# ---- short cycles, of samples of at least 1024 numbers


@pytest.fixture(scope="module")
def wide():
    """A = a times I, of spectral radii near 0.05, 0.9 and 0.5: the second is slow."""
    rng = torch.Generator().manual_seed(0)
    a = torch.randn(3, 32, 32, generator=rng, dtype=F64) / 32**0.5 * torch.tensor([0.05, 0.9, 0.5]).view(3, 1, 1)
    return a, torch.randn(3, 1024, generator=rng, dtype=F64)


def act_by_blocks(a):
    return lambda v: (a @ v.view(-1, 32, 32)).flatten(1)


def off_by(a, g, u):
    return (g - u + act_by_blocks(a)(u)).norm(dim=1)


@pytest.mark.parametrize("short", [1, 2, 5])
def test_short_cycles_against_scipy(wide, short):
    a, g = (t[2:] for t in wide)
    m = np.eye(1024) - np.kron(a[0].numpy(), np.eye(32))
    for cycles in (1, 3):
        theirs, _ = scipy.sparse.linalg.gmres(m, g[0].numpy(), restart=short, maxiter=cycles, rtol=1e-15)
        ours = GMRES(short=short)(act_by_blocks(a), g, budget(short * cycles))
        np.testing.assert_allclose(ours.value[0].numpy(), theirs, rtol=1e-9, atol=1e-12)
        assert off(ours.residual, off_by(a, g, ours.value)) < 1e-9


def test_fast_and_slow_samples_are_independent(wide):
    a, g = wide
    stop = Stop(rtol=1e-8, atol=0, max_evals=200)
    for solver in (GMRES(memory=60), GMRES(memory=7), GMRES(short=3)):
        together = solver(act_by_blocks(a), g, stop)
        assert bool(together.converged.all())
        for b in range(3):
            alone = solver(act_by_blocks(a[b : b + 1]), g[b : b + 1], stop)
            assert alone.evals == together.evals[b]
            torch.testing.assert_close(alone.value[0], together.value[b], rtol=1e-11, atol=1e-11)
            assert off_by(a, g, together.value)[b] <= 1.001e-8 * together.value[b].norm()


def test_a_slow_sample_loses_nothing_and_a_fast_one_next_to_nothing(wide):
    a, g = wide
    stop = Stop(rtol=1e-6, atol=0, max_evals=200)
    few, all_of_them = (GMRES(short=short)(act_by_blocks(a), g, stop) for short in (2, 60))
    assert few.evals[1] == all_of_them.evals[1] > 25
    torch.testing.assert_close(few.value[1], all_of_them.value[1], rtol=1e-9, atol=1e-9)
    assert (few.evals - all_of_them.evals).abs().max() <= 2 and few.evals[2] > 12


@pytest.mark.parametrize("rows", [[0, 1, 2], [0, 2], [1]], ids=["mixed", "fast", "slow"])
def test_the_host_waits_for_the_device_once_a_product(wide, rows):
    a, g = (t[rows] for t in wide)
    act, mode = act_by_blocks(a), Waits()

    def counted(v):
        mode.evals += 1
        return act(v)

    with watching(mode):
        found = GMRES(memory=9)(counted, g, Stop(rtol=1e-6, atol=0, max_evals=200))
    assert found.evals.max() == mode.evals and bool(found.converged.all())
    assert set(mode.counts.values()) == {1} and sum(mode.counts.values()) == mode.evals + 1  # and once for ||g||


def test_the_basis_of_fast_samples_is_a_few_states(wide):
    """What is alive while a product is taken: u, the residual's and the caller's g, and the basis."""
    a, g = wide
    bytes_of_a_state, alive = 8 * 1024, []

    def watched(rows):
        act = act_by_blocks(a[rows])
        with Bytes() as memory:

            def seen(v):
                alive.append(memory.alive / (len(rows) * bytes_of_a_state))
                return act(v)

            found = GMRES()(seen, g[rows], Stop(rtol=1e-6, atol=0, max_evals=200))
        most = max(alive)
        alive.clear()
        return most, int(found.evals.max())

    assert watched([0, 2])[0] < 4.2
    most, products = watched([1])
    assert 0.9 * products < most  # the slow one keeps all


@pytest.mark.parametrize("dtype", [torch.float32, F64])
def test_a_singular_system_is_not_called_solved(dtype):
    rng = torch.Generator().manual_seed(3)
    v = torch.randn(6, 6, generator=rng, dtype=F64)
    a = v @ torch.diag(torch.tensor([1.0, 0.5, -0.3, 0.2, 0.7, -0.8], dtype=F64)) @ torch.linalg.inv(v)
    g = torch.randn(2, 6, generator=rng, dtype=F64).to(dtype)
    a, stop = a.to(dtype), Stop(rtol=1e-6 if dtype == torch.float32 else 1e-10, atol=0, max_evals=200)
    assert not GMRES()(lambda u: u @ a.T, g, stop).converged.any()  # u = g + a u has no solution
    assert GMRES()(lambda u: u @ a.T, g - g @ a.T, stop).converged.all()
