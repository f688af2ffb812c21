"""Several starts of a solve: the solution of smallest residual is returned, for all solvers and estimators."""

import pytest
import torch

from implicit import DEQ, Stop, fixed_point
from tests.helpers import F64, each_estimator, each_solver, half, solve, solver_and

TIGHT = Stop(rtol=1e-10, max_evals=200)


def double_well(z):
    """Fixed points at 0, 1 and -1; f overflows far out."""
    return z + 0.5 * (z - z**3)


@each_solver
def test_of_several_starts_the_smallest_residual_wins(solver):
    good = torch.full((2, 4), 0.8, dtype=F64)
    bad = torch.full((2, 4), torch.nan, dtype=F64)
    z0 = torch.stack([bad, good])
    z0[:, 1] = z0[:, 1].flip(0)  # the second sample has its good start first
    found = solve(double_well, z0, solver=solver, starts=2, stop=TIGHT)
    assert found.converged.all()
    torch.testing.assert_close(found.value, torch.ones(2, 4, dtype=F64))
    alone = solve(double_well, good, solver=solver, stop=TIGHT)
    assert torch.equal(found.value, alone.value)
    assert bool((found.evals > alone.evals).all())


@each_estimator
def test_several_starts_with_every_estimator(estimator):
    w, z0 = torch.tensor(0.5, dtype=F64, requires_grad=True), torch.zeros(3, 6, dtype=F64)
    f, two = lambda z: torch.tanh(w * z) + 0.3, torch.stack([z0, z0 + torch.nan])
    found = fixed_point(f, two, starts=2, stop=TIGHT, **solver_and(estimator))
    alone = fixed_point(f, z0, stop=TIGHT, **solver_and(estimator))
    assert torch.equal(found.value, alone.value)
    grads = [torch.autograd.grad(s.value.sum(), w)[0] for s in (found, alone)]
    torch.testing.assert_close(*grads)


def test_starts_may_be_drawn():
    shapes = []

    def draw(generator):
        z = torch.randn(3, 5, generator=generator, dtype=F64)
        shapes.append(z)
        return {"a": z}

    def f(z):
        return {"a": double_well(z["a"])}

    how = dict(starts=4, stop=TIGHT)
    one = solve(f, draw, generator=torch.Generator().manual_seed(0), **how)
    two = solve(f, draw, generator=torch.Generator().manual_seed(0), **how)
    assert len(shapes) == 8
    assert torch.equal(one.value["a"], two.value["a"])
    layer = DEQ(f)
    assert layer(draw, starts=2, generator=torch.Generator()).value["a"].shape == (3, 5)


def test_several_starts_of_one_system():
    z0 = torch.stack([torch.full((5,), torch.nan), torch.full((5,), 0.7)])
    found = solve(torch.cos, z0, starts=2, batch_dims=0)
    assert found.converged.all() and found.value.shape == (5,)


def test_several_starts_inside_torch_func():
    z0 = torch.stack([torch.full((2, 3), torch.nan, dtype=F64), torch.ones(2, 3, dtype=F64)])

    def total(a):
        return fixed_point(lambda z: a * torch.cos(z), z0, starts=2, stop=TIGHT).value.sum()

    a = torch.tensor(0.5, dtype=F64, requires_grad=True)
    torch.testing.assert_close(torch.func.grad(total)(a.detach()), torch.autograd.grad(total(a), a)[0])
    torch.testing.assert_close(torch.func.vmap(total)(a.detach().reshape(1))[0], total(a.detach()))


def test_impossible_starts_are_refused():
    z0 = torch.zeros(2, 3)
    with pytest.raises(ValueError, match="starts"):
        solve(half, z0, starts=0)
    with pytest.raises(ValueError, match="starts"):
        solve(half, z0.unsqueeze(0), starts=3)
    with pytest.raises(ValueError, match="generator"):
        solve(half, torch.stack([z0, z0]), starts=2, generator=torch.Generator())
    state = solve(half, z0, keep_state=True).state
    with pytest.raises(ValueError, match="state"):
        solve(half, torch.stack([z0, z0]), starts=2, state=state)
