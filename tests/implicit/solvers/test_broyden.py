"""Broyden, iterate by iterate, against dense updates of an explicit Jacobian or inverse."""

import math

import numpy as np
import pytest
import torch
from scipy import optimize

from implicit import BadBroyden, Broyden, SolveOptions, Stop, fixed_point, iterate
from implicit.solvers import Point
from tests.helpers import FREE, smooth, visited

F64 = torch.float64


def dense(f, z0, evals, bad):
    """Good: the Jacobian B of g = f - z is updated and solved with. Bad: its inverse is updated."""
    runs = []
    for b in range(len(z0)):

        def g(z, b=b):
            full = z0.clone()
            full[b] = z
            return f(full)[b] - z

        z, jac = z0[b], -torch.eye(z0.shape[1], dtype=F64)
        inverse, r, zs = jac.clone(), g(z), [z0[b]]
        for _ in range(evals - 1):
            s = -(inverse @ r) if bad else torch.linalg.solve(jac, -r)
            z = z + s
            zs.append(z)
            y, r = g(z) - r, g(z)
            if bad:
                inverse = inverse + torch.outer(s - inverse @ y, y) / (y @ y)
            else:
                jac = jac + torch.outer(y - jac @ s, s) / (s @ s)
        runs.append(torch.stack(zs))
    return torch.stack(runs, dim=1)


@pytest.mark.parametrize("solver", [Broyden(40), BadBroyden(40)], ids=repr)
def test_every_iterate_is_the_dense_updates(solver):
    f, z0 = smooth()
    got = torch.stack(visited(f, z0, solver, 20))
    torch.testing.assert_close(got, dense(f, z0, 20, isinstance(solver, BadBroyden)), rtol=1e-8, atol=1e-8)


def searching(f, z0, evals, halvings):
    """Good Broyden with an explicit Jacobian, whose steps are halved while the residual grows, one sample."""

    def g(z):
        return f(z.unsqueeze(0))[0] - z

    z, jac, zs = z0, -torch.eye(len(z0), dtype=F64), [z0]
    while len(zs) < evals:
        d, t = torch.linalg.solve(jac, -g(z)), 1.0
        zs.append(z + d)
        while g(z + t * d).norm() > g(z).norm() and t > 0.5**halvings and len(zs) < evals:
            t /= 2
            zs.append(z + t * d)
        s, y, z = t * d, g(z + t * d) - g(z), z + t * d
        jac = jac + torch.outer(y - jac @ s, s) / (s @ s)
    return torch.stack(zs)


def steep(n=8):
    """z - f(z) = A z + z^3, and starts near its zero and far from it: full steps overshoot."""
    rng = torch.Generator().manual_seed(0)
    q = torch.linalg.qr(torch.randn(n, n, generator=rng, dtype=F64))[0]
    a = q @ torch.diag(torch.linspace(0.5, 4, n, dtype=F64)) @ q.T
    size = torch.tensor([[0.1], [1.0], [3.0], [10.0]], dtype=F64)
    return lambda z: z - z @ a - z**3, size * torch.randn(4, n, generator=rng, dtype=F64)


@pytest.mark.parametrize("halvings", [1, 10])
def test_every_trial_of_the_search_is_the_dense_updates(halvings):
    f, z0 = steep()
    z0 = z0[:3]
    got = torch.stack(visited(f, z0, Broyden(40, search=halvings, safeguard=False), 14), dim=1)
    for b, row in enumerate(z0):
        torch.testing.assert_close(got[b], searching(f, row, 14, halvings), rtol=1e-6, atol=1e-7)


def test_the_search_solves_what_full_steps_do_not_each_sample_by_itself():
    f, z0 = steep()
    stop = Stop(rtol=0, atol=1e-8, max_evals=150)
    full = iterate(f, z0, Broyden(safeguard=False), stop)
    found = iterate(f, z0, Broyden(safeguard=False, search=10), stop).check()
    assert full.converged.tolist() == [True, False, False, False]
    assert float(found.value.abs().max()) < 1e-7
    for b in range(4):
        alone = iterate(f, z0[b : b + 1], Broyden(safeguard=False, search=10), stop)
        assert torch.equal(alone.evals, found.evals[b : b + 1])


def inverse(solver, f, z0, memory):
    """H of every sample, (B, N, N), column by column through its transpose."""
    size = z0.shape[1]
    rows = [solver.inverse_transpose(memory, torch.eye(size, dtype=F64)[i].expand_as(z0)) for i in range(size)]
    return torch.stack(rows, dim=1)  # row i is H^T e_i, that is row i of H


def learned(solver, f, z0, evals):
    """The last two points, and the memory that has learned from both."""
    zs = visited(f, z0, solver, evals + 1)
    memory = iterate(f, z0, solver, Stop(max_evals=evals, **FREE), options=SolveOptions(keep_state=True)).state
    memory = solver.step(Point(zs[evals - 1], f(zs[evals - 1])), memory)[2]
    return zs[evals - 2], zs[evals - 1], memory


@pytest.mark.parametrize("solver", [Broyden(4), Broyden(1), BadBroyden(4)], ids=repr)
@pytest.mark.parametrize("evals", [4, 5, 6, 7, 9, 12])
def test_the_newest_secant_equation_holds_after_the_memory_has_wrapped(solver, evals):
    f, z0 = smooth()
    old, new, memory = learned(solver, f, z0, evals)
    s, y = new - old, (f(new) - new) - (f(old) - old)
    hy = torch.einsum("bij,bj->bi", inverse(solver, f, z0, memory), y)
    torch.testing.assert_close(hy, -s, rtol=1e-8, atol=1e-11)


def test_the_inverse_estimate_gives_the_step_that_was_taken():
    """inverse_transpose() against step(), which never forms it."""
    f, z0 = smooth()
    solver = Broyden()
    _, new, memory = learned(solver, f, z0, 8)
    again = visited(f, z0, solver, 9)[8]
    h = inverse(solver, f, z0, memory)
    torch.testing.assert_close(new + torch.einsum("bij,bj->bi", h, f(new) - new), again, rtol=1e-10, atol=1e-12)


def test_a_direction_lost_to_rounding_leaves_its_pair_out():
    """f(z) = z + 1 never changes its residual: s^T H y = 0 at every step, and the steps stay plain."""
    zs = visited(lambda z: z + 1, torch.zeros(2, 3, dtype=F64), Broyden(safeguard=False), 6)
    torch.testing.assert_close(torch.stack(zs)[:, 0, 0], torch.arange(6.0, dtype=F64))


def test_memory_grows_with_the_steps_not_with_the_budget():
    z0 = torch.zeros(1, 2**14, dtype=F64)
    rows = [
        iterate(
            torch.cos, z0, Broyden(100), Stop(max_evals=n, **FREE), options=SolveOptions(keep_state=True)
        ).state.steps.rows
        for n in (1, 5, 12, 20)
    ]
    assert rows == [0, 8, 16, 32]


def test_bad_arguments_are_named():
    with pytest.raises(ValueError, match=r"Broyden\.memory"):
        Broyden(0)
    with pytest.raises(ValueError, match=r"Broyden\.search"):
        Broyden(search=-1)


def scipy_evaluations(a, b, small, reduction, memory):
    """Evaluations that scipy's Broyden takes for ||(a x + b) - x|| <= small; infinity where it fails."""
    calls = 0

    def g(x):
        nonlocal calls
        calls += 1
        return a @ x + b - x

    options = dict(reduction_method=reduction, max_rank=memory, maxiter=400, line_search=None)
    try:
        with np.errstate(all="ignore"):
            optimize.broyden1(g, np.zeros(len(b)), alpha=1.0, f_tol=small, tol_norm=np.linalg.norm, **options)
    except (OverflowError, optimize.NoConvergence):
        return math.inf
    return calls


@pytest.mark.parametrize("memory", [5, 10, 20])
@pytest.mark.parametrize("radius", [0.5, 0.9, 0.97])
def test_a_short_memory_beside_scipys_reductions(radius, memory):
    """A new start keeps up with the SVD and scipy's own new start; dropping the oldest pair does not, or overflows."""
    draw, n = torch.Generator().manual_seed(0), 64
    q = torch.linalg.qr(torch.randn(n, n, generator=draw, dtype=F64))[0]
    a = q @ torch.diag(torch.linspace(-radius, radius, n, dtype=F64)) @ q.T
    b = torch.randn(n, generator=draw, dtype=F64)
    stop = Stop(rtol=1e-8, atol=0, max_evals=400)
    ours = fixed_point(lambda z: z @ a + b, torch.zeros(1, n, dtype=F64), solver=Broyden(memory), stop=stop).check()
    small = 1e-8 * float(ours.value.norm())
    theirs = {way: scipy_evaluations(a.numpy(), b.numpy(), small, way, memory) for way in ("restart", "svd", "simple")}
    assert int(ours.evals) <= 1.25 * min(theirs["restart"], theirs["svd"])
    assert radius < 0.9 or theirs["simple"] > 1.5 * ours.evals
