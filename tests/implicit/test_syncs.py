"""How often the host waits for the device during a solve, counted on a CPU.

A call waits, were its tensors on a GPU, if it reads a value (``item``, ``bool``, ``numpy``, ``cpu``), makes a tensor
whose shape depends on values (``nonzero``, a mask as an index), or moves host memory to the device without
``non_blocking``. These calls are counted as Python sees them, with tensors from numpy taken for host memory.
"""

import pytest
import torch

from implicit import Picard, Stop, fixed_point
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
