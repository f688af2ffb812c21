"""Operators of a step, and the rare ones that are left out on a CPU where no sample needs them."""

import pytest
import torch

from benchmarks.harness import OperatorCounter
from implicit import Anderson, AndersonGS, Multisecant, Stop, iterate
from implicit.testing import problems
from tests.helpers import visited

F64 = torch.float64


@pytest.mark.parametrize("solver", [AndersonGS(), AndersonGS(3), Multisecant()], ids=repr)
@pytest.mark.parametrize("dtype", [F64, torch.float32])
def test_operators_left_out_and_a_graph_change_no_bit(dtype, solver, monkeypatch):
    """On a CPU operators for rare cases are left out; on another device, or while autograd records, they all run."""

    def seen(p):
        return visited(lambda z: p(z, *p.args).detach(), p.z0, solver, 40)

    with torch.no_grad():
        read = {p.name: seen(p) for p in problems(dtype)}
    recorded = {p.name: seen(p) for p in problems(dtype)}
    monkeypatch.setattr("implicit.solvers.base.host_readable", lambda *tensors: False)
    with torch.no_grad():
        unread = {p.name: seen(p) for p in problems(dtype)}
    for name, points in read.items():
        torch.testing.assert_close(recorded[name], points, rtol=0, atol=0, equal_nan=True, msg=name)
        torch.testing.assert_close(unread[name], points, rtol=0, atol=0, equal_nan=True, msg=name)


COUNTED = [
    (Anderson(6, safeguard=False), 1),
    (Anderson(6, safeguard=False), 5),
    (AndersonGS(6, safeguard=False), 1),
    (AndersonGS(6, safeguard=False), 5),
    (Multisecant(), 1),
    (Multisecant(6, safeguard=False), 1),
]


@pytest.mark.parametrize(("solver", "batch"), COUNTED, ids=repr)
def test_a_step_takes_few_operators_on_a_cpu(solver, batch):
    """Besides the three of f, in a solve of a usual map; a third of the 45 that torchdeq's Anderson takes."""
    w = 0.5 * torch.linalg.qr(torch.randn(64, 64, generator=torch.Generator().manual_seed(0)))[0]
    with torch.no_grad(), OperatorCounter() as counter:
        stop = Stop(rtol=1e-30, atol=0, max_evals=30)
        iterate(lambda z: torch.tanh(z @ w + 0.1), torch.zeros(batch, 64), solver, stop)
    assert counter.count / 30 - 3 <= 15.2
