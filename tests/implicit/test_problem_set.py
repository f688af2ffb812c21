"""Claims, costs and independence of samples on the problems of `implicit.testing`."""

import pytest
import torch

from implicit import Anderson, AndersonGS, Broyden, Picard, Stop, fixed_point
from implicit.testing import problem, problems
from tests.helpers import F64, solve
from tests.helpers import each_solver as each


@pytest.mark.parametrize("dtype", [F64, torch.float32])
@each
def test_no_false_claim_on_any_problem(solver, dtype):
    rtol = 1e-10 if dtype == F64 else 1e-5
    for p in problems(dtype):
        found = solve(p, p.z0, *p.args, solver=solver, stop=Stop(rtol=rtol, atol=0, max_evals=40))
        limit = rtol * (1.01 if dtype == F64 else 1.2)
        assert (p.residual(found.value)[found.converged] <= limit).all(), p.name
        assert p.calls <= 41, p.name  # one evaluation may verify the claims beside a sample without one


@pytest.mark.parametrize(("dtype", "rtol", "bound"), [(F64, 1e-10, 433), (torch.float32, 1e-5, 270)])
def test_the_default_solver_solves_all_fourteen(dtype, rtol, bound):
    evals = 0
    for p in problems(dtype):
        found = solve(p, p.z0, *p.args, stop=Stop(rtol=rtol, atol=0, max_evals=300))
        assert found.converged.all(), p.name
        evals += p.calls
    assert evals <= bound


@pytest.mark.parametrize(
    "name", ["linear 0.5", "non-normal", "tanh layers", "Bratu", "H 0.99", "adaLN block", "cosine"]
)
def test_the_default_beats_plain_iteration_where_that_converges(name):
    plain, ours = problem(name), problem(name)
    stop = Stop(rtol=1e-10, atol=0, max_evals=150)
    assert solve(plain, plain.z0, *plain.args, solver=Picard(), stop=stop).converged.all()
    assert solve(ours, ours.z0, *ours.args, stop=stop).converged.all() and ours.calls < plain.calls


@pytest.mark.parametrize("solver", [Anderson(), AndersonGS(5), Broyden()], ids=repr)
def test_a_safeguarded_solver_is_little_slower_than_plain_iteration_where_it_fails(solver):
    """A memory shorter than the transient of a non-normal map is of no use: one trial is paid for, not several."""
    p, stop = problem("non-normal"), Stop(rtol=1e-10, atol=0, max_evals=300)
    found = solve(p, p.z0, *p.args, solver=solver, stop=stop)
    assert found.converged.all() and p.calls <= 130 + solver.patience + 10  # plain iteration takes 130


@pytest.mark.parametrize("memory", [3, 5, 10])
def test_the_safeguard_ends_a_stall_on_the_non_normal_map(memory):
    p = problem("non-normal")
    stop = Stop(rtol=1e-10, atol=0, max_evals=300)
    with torch.no_grad():
        free = fixed_point(p, p.z0, *p.args, solver=Anderson(memory, safeguard=False), stop=stop)
        safe = fixed_point(p, p.z0, *p.args, solver=Anderson(memory), stop=stop)
    assert not free.converged.any() and safe.converged.all()
    assert float(p.residual(free.value).max()) > 1e-2 and float(p.residual(safe.value).max()) < 1e-9


@each
def test_an_answer_does_not_depend_on_batch_mates(solver):
    p = problem("one hard of 16")
    stop = Stop(rtol=1e-8, atol=0, max_evals=150)
    whole = solve(p, p.z0, *p.args, solver=solver, stop=stop)
    for rows in (slice(3, 4), slice(7, 10)):
        part = solve(p, p.z0[rows], *(a[rows] for a in p.args), solver=solver, stop=stop)
        torch.testing.assert_close(part.value, whole.value[rows], rtol=1e-6, atol=1e-7)
        easy = whole.converged[rows]
        assert (part.evals - whole.evals[rows])[easy].abs().max() <= 1
