"""How often the host waits for the device during a solve, counted on a CPU.

A call waits, were its tensors on a GPU, if it reads a value (``item``, ``bool``, ``numpy``, ``cpu``), makes a tensor
whose shape depends on values (``nonzero``, a mask as an index), or moves host memory to the device without
``non_blocking``. These calls are counted as Python sees them, with tensors from numpy taken for host memory.
"""

import warnings

import pytest
import torch

from implicit import IFT, Picard, Stop, Unrolled, fixed_point
from implicit.loop import observation
from implicit.testing import problem
from tests.helpers import Waits, watching
from tests.helpers import each_solver as each

BUDGET = 18


def waits(solver, stop, name="one hard of 16"):
    """The count of calls that wait, while the solve runs: those after its last evaluation apart."""
    p, mode = problem(name), Waits()

    def f(z, *args):
        mode.evals += 1
        return p.map(z, *args)

    with torch.no_grad(), watching(mode):
        found = fixed_point(f, p.z0, *p.args, solver=solver, stop=stop)
    last = mode.counts.pop(mode.evals, 0)
    return mode, last, found


@each
def test_a_fixed_count_never_waits(solver):
    mode, last, _ = waits(solver, Stop(rtol=0, atol=0, max_evals=BUDGET))
    assert mode.evals == BUDGET
    assert not mode.counts and last == 0


@each
@pytest.mark.parametrize("name", ["one hard of 16", "non-normal"])
def test_a_tolerance_waits_once_an_evaluation(solver, name):
    """Also where samples finish, are held, or are sent back by the safeguard."""
    mode, last, found = waits(solver, Stop(rtol=1e-3, atol=0, max_evals=40), name)
    assert found.evals.max() > 10 and max(mode.counts.values()) <= 1
    assert last <= 1


@each
def test_reading_seldom_waits_seldom(solver):
    mode, _, found = waits(solver, Stop(rtol=1e-9, atol=0, max_evals=BUDGET, check_every=6))
    assert set(mode.counts) <= set(range(6, BUDGET, 6)) and max(mode.counts.values()) <= 1
    assert (found.evals % 6 == 0).all()


@each
def test_a_late_look_is_at_what_the_device_did_one_evaluation_ago(solver):
    mode, _, found = waits(solver, Stop(rtol=1e-3, atol=0, max_evals=BUDGET, late=True))
    assert found.evals.max() > 10 and mode.fresh <= 1 and max(mode.counts.values()) <= 1


def test_a_look_that_is_not_late_is_seen():
    mode, *_ = waits(Picard(), Stop(rtol=1e-3, atol=0, max_evals=BUDGET))
    assert mode.fresh == BUDGET


class Arrival:
    """A copy from a device of which nothing has arrived before the host waits: memory holds NaN until then."""

    def __init__(self, source):
        self.source, self.host = source, torch.full_like(source, torch.nan)

    def synchronize(self):
        self.host.copy_(self.source)


@each
@pytest.mark.parametrize("couples", [False, True], ids=["", "coupled"])
@pytest.mark.parametrize(
    "options", [{}, {"late": True}, {"late": True, "check_every": 3}, {"max_evals": 5}, {"norm": "max"}], ids=str
)
@pytest.mark.parametrize("graph", [False, True], ids=["no graph", "graph"])
def test_norms_are_read_after_their_arrival(solver, couples, options, graph, monkeypatch):
    p, grad = problem("one hard of 16"), Unrolled() if graph and solver.differentiable else IFT()

    def f(z, *args):
        fz = p.map(z, *args)
        return fz + 0.1 * fz.mean(0, keepdim=True) if couples else fz

    def run():
        with warnings.catch_warnings(), torch.set_grad_enabled(graph):
            warnings.simplefilter("ignore")
            stop = Stop(**{"rtol": 1e-4, "atol": 0, "max_evals": 60, **options})
            args = tuple(a.clone().requires_grad_(graph) for a in p.args)
            return fixed_point(f, p.z0, *args, solver=solver, stop=stop, grad=grad)

    expected = run()
    monkeypatch.setattr(observation, "on_host", lambda t: False)
    monkeypatch.setattr(observation, "copy_to_host", lambda t: ((late := Arrival(t)).host, late))
    found = run()
    assert found.result.tolist() == expected.result.tolist() and found.evals.tolist() == expected.evals.tolist()
    assert torch.equal(found.residual, expected.residual) and torch.equal(found.value, expected.value)
