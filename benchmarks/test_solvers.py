"""Time of a solve to 1e-6 on an adaLN block and on tanh layers, by our solvers and torchdeq's (`pytest benchmarks`).

Each problem is a group. `python -m benchmarks.solvers.evaluations` counts evaluations on all fourteen problems.
"""

import pytest
import torch
from torchdeq.solver import anderson_solver, broyden_solver, fixed_point_iter

from implicit import Anderson, AndersonGS, Broyden, Multisecant, NewtonKrylov, Picard, Stop, iterate
from implicit.testing import problem

STOP = Stop(rtol=1e-6, atol=0, max_evals=300)
OURS = {type(s).__name__: s for s in (Picard(), Anderson(), AndersonGS(), Multisecant(), Broyden(), NewtonKrylov())}
PEERS = {"torchdeq plain": fixed_point_iter, "torchdeq Anderson": anderson_solver, "torchdeq Broyden": broyden_solver}


@pytest.fixture(params=["adaLN block", "tanh layers"])
def solvable(request, benchmark):
    benchmark.group = request.param
    return problem(request.param)


@pytest.mark.parametrize("name", OURS)
def test_ours(solvable, name, benchmark):
    with torch.no_grad():
        solution = benchmark(iterate, solvable, solvable.z0, OURS[name], STOP, args=solvable.args)
    benchmark.extra_info |= {
        "evaluations": int(solution.evals.max()),
        "relative residual": float(solvable.residual(solution.value).max()),
    }
    solution.check()


@pytest.mark.parametrize("name", PEERS)
def test_peer(solvable, name, benchmark):
    def solve():
        return PEERS[name](lambda z: solvable(z, *solvable.args), solvable.z0, max_iter=300, tol=1e-6, stop_mode="rel")

    with torch.no_grad():
        value = benchmark(solve)[0]
    benchmark.extra_info["relative residual"] = residual = float(solvable.residual(value).max())
    assert residual < 0.1  # torchdeq stops by the norm of the batch, so single samples may miss 1e-6
