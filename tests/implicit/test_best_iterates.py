"""Best iterates and second attempts, with points that the test passes to the monitor."""

import pytest
import torch

from implicit import Multisecant, Stop
from implicit.convergence import ConvergenceMonitor
from implicit.pytree import Layout
from implicit.solvers.base import Point
from implicit.staged_safeguard import StagedSafeguard
from implicit.stopping import Criterion
from tests.helpers import F64


def point(*sizes: float) -> Point:
    """A point whose rows have residuals of these sizes."""
    z = torch.ones(len(sizes), 3, dtype=F64)
    return Point(z, z + torch.tensor(sizes, dtype=F64)[:, None])


@pytest.mark.parametrize("late", [False, True])
def test_a_point_made_before_a_second_attempt_is_not_its_best(late):
    z0 = torch.zeros(2, 3, dtype=F64)
    criterion = Criterion(Stop(rtol=1e-9, late=late), Layout.of(z0, 1))
    monitor = ConvergenceMonitor(criterion, z0, safeguard=StagedSafeguard(2, 25, 3))
    guard, solver = monitor.safeguard, Multisecant()
    assert guard is not None
    first, second = point(3.0, 3.0), point(2.0, 2.0)
    monitor.observe(first, 1, False)
    state = solver.init(first)
    monitor.observe(second, 2, False)
    guard.starting_over[0], guard.pending = True, True
    guard.resets[0] = True
    monitor.apply_resets(second, state, solver)
    best = monitor.best
    assert torch.equal(monitor.next_iterate(second.fz, second, False)[0], z0[0])
    third = point(5.0, 1.0)
    for calls in (3, 4):
        monitor.observe(third, calls, False)
    best.flush()
    assert best.residual == pytest.approx([5 * 3**0.5, 3**0.5])
    # the first attempt had the better one, as far as it was read
    monitor.best.take_back(guard.resets | True)
    assert best.residual == pytest.approx([(3 if late else 2) * 3**0.5, 3**0.5])
