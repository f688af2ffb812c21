"""Fixed-point problems of the literature on acceleration: problems with published counts, and further families.

`published_maps` has the published sizes and stopping tests. `acceleration` is a collection of about fifty problems of
moderate size with one relative tolerance in the Euclidean norm, for the comparison of solvers.
"""

from dataclasses import replace

from benchmarks.problems.acceleration.dynamics import dynamics
from benchmarks.problems.acceleration.linear_maps import linear_maps
from benchmarks.problems.acceleration.optimization import optimization
from benchmarks.problems.acceleration.r_package import r_package
from benchmarks.problems.acceleration.simulation_codes import simulation_codes
from benchmarks.problems.acceleration.speedmapping import fixed_point_test_problems
from benchmarks.problems.acceleration.statistics import statistics
from benchmarks.problems.problem import Problem


def published_maps() -> list[Problem]:
    """The problems of KINSOL, SIRIUS, the R package FixedPoint and FixedPointTestProblems.jl, with the published sizes
    and stopping tests.
    """
    return [*simulation_codes(), *r_package(), *fixed_point_test_problems()]


def acceleration(rtol: float = 1e-8) -> list[Problem]:
    """The collection; the stopping test of every problem is ||f(z) - z||_2 <= rtol ||f(z)||_2.

    Raises:
        ValueError: rtol is not positive.
    """
    if not rtol > 0:
        raise ValueError(f"rtol must be positive, got {rtol}.")
    # without the perceptrons, which move by constant steps, and without a second map of consumption smoothing
    made = [*simulation_codes(), *r_package()[:-1], *fixed_point_test_problems(side=40)]
    made += [*linear_maps(), *optimization(), *statistics(), *dynamics()]
    return [replace(p, rtol=rtol, atol=0.0, norm="euclidean") for p in made if "erceptron" not in p.name]
