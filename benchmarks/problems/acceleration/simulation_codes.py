"""Fixed-point problems of simulation codes that publish counts and digits: SUNDIALS KINSOL and SIRIUS.

KINSOL (LLNL, examples/kinsol/serial, BSD-3): `kinAnalytic_fp`, three equations with the answer (1/2, 1, -pi/6), and
`kinRoberts_fp`, one backward Euler step of Robertson's stiff kinetics. Both stop on the max-norm of the residual.
SIRIUS (pull request #584): g(x) = A x - b in 100 unknowns, A = diag(2 + 1/i), with the fixed point 1, from 0.
"""

import math

import torch
from torch import Tensor

from benchmarks.problems.problem import F64, Problem, like, row

KINSOL = "SUNDIALS, examples/kinsol/serial/{}.c"


def simulation_codes() -> list[Problem]:
    """The three of them."""
    return [_analytic(), _roberts(), sirius()]


def _analytic() -> Problem:
    def f(u: Tensor) -> Tensor:
        x, y, z = u.unbind(1)
        first = torch.cos((y - 1) * z) / 3 + 1 / 6
        second = (x**2 + torch.sin(z) + 1.06).sqrt() / 9 + 0.9
        third = -torch.exp(-x * (y - 1)) / 20 - (10 * math.pi - 3) / 60
        return torch.stack((first, second, third), dim=1)

    # the tolerance is 100 times the square root of the unit roundoff
    tolerance = 100 * 2.0**-26
    source = KINSOL.format("kinAnalytic_fp")
    answer = row(0.5, 1, -math.pi / 6)
    return Problem("KINSOL analytic", f, row(0.1, 0.1, -0.1), source, (), 0.0, tolerance, "max", lambda: answer)


def _roberts() -> Problem:
    def f(y: Tensor) -> Tensor:
        a, b, c = y.unbind(1)
        slow, fast = 0.1 * (-0.04 * a + 1e4 * b * c), 0.1 * 3e2 * b**2
        return torch.stack((1 + slow, -slow - fast, fast), dim=1)

    # the program compares with this reference, computed by its authors with a tolerance of 1e-14
    answer = row(9.9678538655358029e-01, 2.9530060962800345e-03, 2.6160735013975683e-04)
    source = KINSOL.format("kinRoberts_fp")
    return Problem("KINSOL Roberts", f, row(1, 0, 0), source, (), 0.0, 1e-10, "max", lambda: answer)


def sirius(n: int = 100) -> Problem:
    """SIRIUS's test of its mixers; the map is expanding, with eigenvalues in (2, 3]."""
    diagonal = 2 + 1 / torch.arange(1, n + 1, dtype=F64)
    shift = diagonal - 1  # b = (A - I) 1

    def f(x: Tensor) -> Tensor:
        return x * like(diagonal, x) - like(shift, x)

    answer = torch.ones(1, n, dtype=F64)
    source = "electronic-structure/SIRIUS pull request 584, test_anderson"
    return Problem("SIRIUS mixer", f, torch.zeros(1, n, dtype=F64), source, (), 0.0, 1e-13, answer=lambda: answer)
