"""The tolerance at every size of the state and in every norm, where squares underflow too."""

from typing import Any

import pytest
import torch

from implicit import (
    IFT,
    JFB,
    AndersonGS,
    Picard,
    Result,
    Stop,
    fixed_point,
)
from tests.helpers import F64, each_solver, relative, solve

TIGHT = Stop(rtol=1e-6, max_evals=300)


@each_solver
@pytest.mark.parametrize("size", [1e6, 1.0, 1e-3, 1e-6, 1e-30])
def test_rtol_alone_decides_at_every_size(solver, size):
    def f(z):
        return 0.9 * z + 0.1 * size

    found = solve(f, torch.zeros(1, 2, dtype=F64), solver=solver, stop=Stop(rtol=1e-12, max_evals=500))
    assert found.converged.all() and (relative(f, found.value) <= 1.01e-12).all()


@each_solver
@pytest.mark.parametrize(
    ("dtype", "size"), [(torch.float32, 1e30), (torch.float32, 1e-30), (F64, 1e250), (F64, 1e-250)]
)
def test_states_at_the_ends_of_the_range(solver, dtype, size):
    generator = torch.Generator().manual_seed(0)
    a, b = torch.randn(6, 6, dtype=F64, generator=generator), torch.randn(2, 6, dtype=F64, generator=generator)
    a *= 0.8 / torch.linalg.matrix_norm(a, 2)

    def f(z):
        return z @ a.T.to(dtype) + (b * size).to(dtype)

    found = solve(f, torch.zeros(2, 6, dtype=dtype), solver=solver, stop=Stop(rtol=1e-5, max_evals=200))
    assert found.converged.all()
    exact = torch.linalg.solve(torch.eye(6, dtype=F64) - a, b.T).T
    torch.testing.assert_close(found.value.double() / size, exact, rtol=1e-3, atol=1e-3)


@each_solver
def test_a_solution_of_zero_is_found(solver):
    for dtype in (F64, torch.float32):
        found = solve(
            lambda z: 0.5 * torch.sin(z), torch.ones(3, 2, dtype=dtype), solver=solver, stop=Stop(max_evals=150)
        )
        assert found.converged.all() and found.value.abs().max() < 1e-6


def test_small_leaves_meet_the_tolerance_of_their_own():
    def f(state):
        return {"pressure": 0 * state["pressure"] + 1e6, "share": 0.9 * state["share"] + 0.1}

    z0 = {"pressure": torch.zeros(1, 1), "share": torch.zeros(1, 1)}
    together = solve(f, z0, solver=Picard(), stop=Stop(rtol=1e-4, max_evals=200))
    apart = solve(f, z0, solver=Picard(), stop=Stop(rtol=1e-4, max_evals=200, norm="leaf"))
    assert together.converged.all() and abs(float(together.value["share"]) - 1) > 0.5
    assert apart.converged.all() and abs(float(apart.value["share"]) - 1) < 2e-3
    assert float(apart.residual) <= 1e-4


@pytest.mark.parametrize("norm", ["euclidean", "rms", "max", "leaf"])
def test_each_norm_is_the_one_of_its_name(norm):
    f, n = (lambda z: 0.5 * z + 1), 50
    found = solve(f, torch.zeros(2, n, dtype=F64), solver=Picard(), stop=Stop(rtol=0, atol=1e-3, norm=norm))
    r = f(found.value) - found.value
    sizes = {"euclidean": r.norm(dim=1), "rms": r.norm(dim=1) / n**0.5, "max": r.abs().amax(1), "leaf": r.norm(dim=1)}
    torch.testing.assert_close(found.residual, sizes[norm])
    assert (found.residual <= 1e-3).all() and (found.residual > 4e-4).all()


def test_a_norm_that_does_not_exist_is_named():
    unknown: Any = "l2"
    with pytest.raises(Exception, match="norm"):  # a ValueError, where the tests do not check types before
        Stop(norm=unknown)


def test_a_fixed_count_claims_nothing_where_squares_underflow():
    b = torch.full((1, 4), 1e-24)
    found = solve(lambda z: b - z, torch.zeros(1, 4), solver=Picard(), stop=Stop(rtol=0, max_evals=7))
    assert not found.converged.any() and float(found.residual) == pytest.approx(2e-24, rel=1e-5)


@pytest.mark.parametrize("scale", [1e-20, 1e-22, 1e-24, 1e-36])
@pytest.mark.parametrize("solver", [Picard(), AndersonGS()])
@pytest.mark.parametrize("grad", [IFT(), JFB(3)])
@pytest.mark.parametrize("stop", [Stop(rtol=1e-4, max_evals=20), Stop(rtol=0, atol=0, max_evals=20)])
def test_claims_where_squares_underflow(scale, solver, grad, stop):
    b = scale * torch.arange(1.0, 8.0)[None]
    b.requires_grad_()
    solution = fixed_point(lambda z: b - z, torch.zeros(1, 7), solver=solver, grad=grad, stop=stop)
    value = solution.value.detach().double()
    off = (b.detach().double() - 2 * value).norm()
    assert solution.result.item() != Result.NONDETERMINISTIC
    if solution.result.item() == Result.CONVERGED:
        assert off <= max(2 * stop.rtol, 1e-6) * b.detach().double().norm()
    elif stop.has_tolerance:
        assert solution.residual.item() == pytest.approx(off.item(), rel=1e-4)
