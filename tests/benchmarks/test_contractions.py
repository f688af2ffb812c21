"""Contractions that plain iteration solves: the default needs at most 1.1 times as many evaluations."""

import torch

from benchmarks.solvers.contractions import ALLOWED, count, maps


def test_the_default_is_no_slower_than_plain_iteration_on_contractions():
    """Maps on which plain iteration is exact after finitely many steps among them: shift, triangular, maximum."""
    compared = 0
    for family, f, b in maps(10, 0):
        found = count(f, b, 1e-6)
        if found is not None:
            assert (found[1] <= ALLOWED * found[0]).all(), (family, found)
            compared += 1
    assert compared > 80


def test_a_shift_takes_plain_iteration_as_many_steps_as_it_has_numbers():
    *_, f = (f for family, f, _ in maps(10, 0) if family == "shift")
    found = count(f, torch.zeros(1, 10, dtype=torch.float64), 1e-12)
    assert found is not None and int(found[0]) == 11
