"""Anderson, iterate by iterate, against the textbook written with dense least squares."""

import pytest
import torch

from implicit import Anderson, AndersonGS, Broyden, Picard, SolveOptions, Stop, fixed_point, iterate
from implicit.solvers.base import Point
from implicit.testing import problem
from tests.helpers import FREE, smooth, visited

F64 = torch.float64


def textbook(f, z0, memory, damping, evals, start=1):
    """Type II by lstsq on explicit columns, one sample at a time."""
    runs = []
    for b in range(len(z0)):
        zs, fs = [z0[b]], [f(z0)[b]]
        for k in range(1, evals):
            rs = [fz - z for z, fz in zip(zs, fs, strict=True)]
            low = max(0, len(zs) - memory)
            z, r = fs[-1], rs[-1]
            if k >= start and len(zs) - low > 1:
                dr = torch.stack([rs[i + 1] - rs[i] for i in range(low, len(zs) - 1)], dim=1)
                df = torch.stack([fs[i + 1] - fs[i] for i in range(low, len(zs) - 1)], dim=1)
                gamma = torch.linalg.lstsq(dr, r.unsqueeze(1)).solution.squeeze(1)
                z, r = z - df @ gamma, r - dr @ gamma
            zs.append(z - damping * r)
            full = z0.clone()
            full[b] = zs[-1]
            fs.append(f(full)[b])
        runs.append(torch.stack(zs))
    return torch.stack(runs, dim=1)


@pytest.mark.parametrize(("memory", "damping", "start"), [(2, 0, 1), (3, 0, 1), (5, 0, 1), (4, 0.3, 1), (4, 0, 4)])
def test_every_iterate_is_the_textbooks(memory, damping, start):
    f, z0 = smooth()
    got = torch.stack(visited(f, z0, Anderson(memory, damping=damping, start=start), 14))
    torch.testing.assert_close(got, textbook(f, z0, memory, damping, 14, start), rtol=1e-7, atol=1e-7)


def test_gram_schmidt_gives_the_same_iterates_as_long_as_all_pairs_are_kept():
    f, z0 = smooth()
    got = torch.stack(visited(f, z0, AndersonGS(20, drop=0.0), 11))
    torch.testing.assert_close(got, textbook(f, z0, 20, 0, 11), rtol=1e-8, atol=1e-8)


def test_on_a_symmetric_map_three_pairs_do_what_all_do():
    p = problem("linear 0.9")
    few, all_ = (visited(lambda z: p.map(z, *p.args), p.z0, AndersonGS(m), 30) for m in (3, 40))
    torch.testing.assert_close(torch.stack(few), torch.stack(all_), rtol=1e-6, atol=1e-6)


def test_memory_one_is_picard():
    f, z0 = smooth()
    assert torch.equal(torch.stack(visited(f, z0, Anderson(1), 9)), torch.stack(visited(f, z0, Picard(), 9)))
    damped = torch.stack(visited(f, z0, Anderson(1, damping=0.4), 9))
    torch.testing.assert_close(damped, torch.stack(visited(f, z0, Picard(0.4), 9)))


def test_the_gram_matrix_is_that_of_the_columns():
    f, z0 = smooth()
    memory = iterate(f, z0, Anderson(4), Stop(max_evals=9, **FREE), options=SolveOptions(keep_state=True)).state
    true = memory.dr.rows @ memory.dr.rows.mT
    torch.testing.assert_close(memory.gram.products, true, rtol=1e-12, atol=1e-15)


@pytest.mark.parametrize("solver", [Anderson(6), AndersonGS(6), Broyden(6)], ids=lambda s: type(s).__name__)
def test_the_inverse_estimate_is_the_adjoint_of_what_a_step_does(solver):
    f, z0 = smooth()
    memory = iterate(f, z0, solver, Stop(max_evals=9, **FREE), options=SolveOptions(keep_state=True)).state
    a, b = torch.randn(2, *z0.shape, generator=torch.Generator().manual_seed(3), dtype=F64)
    point = Point(z0 * 0, a)
    hb = solver.inverse_transpose(memory, b)  # before the step, which writes into the memory
    ha, _, _ = solver.step(point, solver.resume(point, memory))
    torch.testing.assert_close((ha * b).sum(1), (a * hb).sum(1))
    assert not torch.allclose(ha, a)


@pytest.mark.parametrize(
    ("one", "other"),
    [
        (Anderson(4), Anderson(4, ridge=0.1)),
        (Anderson(4), Anderson(4, damping=0.3)),
        (AndersonGS(4), AndersonGS(4, drop=0.9)),
    ],
    ids=repr,
)
def test_a_warm_start_has_the_options_of_the_solver_that_continues(one, other):
    f, z0 = smooth()
    state = iterate(f, z0, one, Stop(max_evals=6, **FREE), options=SolveOptions(keep_state=True)).state
    stop, options = Stop(max_evals=5, **FREE), SolveOptions(state=state)
    same, changed = (iterate(f, z0, solver, stop, options=options).value for solver in (one, other))
    assert not torch.equal(same, changed)


def test_bad_arguments_are_named():
    for make, name in (
        (lambda: Anderson(0), "memory"),
        (lambda: Anderson(damping=1.0), "damping"),
        (lambda: Anderson(ridge=0.0), "ridge"),
        (lambda: Anderson(start=0), "start"),
        (lambda: AndersonGS(0), "memory"),
        (lambda: AndersonGS(drop=1.0), "drop"),
    ):
        with pytest.raises(ValueError, match=name):
            make()


def test_columns_that_repeat_each_other():
    x = torch.ones(2, 3, dtype=F64)
    stop = Stop(rtol=1e-12)
    found = fixed_point(lambda z: 0.5 * z + x, torch.zeros_like(x), solver=Anderson(ridge=1e-300), stop=stop)
    assert found.converged.all()
    torch.testing.assert_close(found.value, 2 * x)
