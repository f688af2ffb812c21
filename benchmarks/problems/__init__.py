"""Public collections of fixed-point problems and nonlinear systems, written from their equations."""

from benchmarks.problems.acceleration import acceleration as acceleration
from benchmarks.problems.acceleration import published_maps as published_maps
from benchmarks.problems.problem import Problem as Problem
from benchmarks.problems.systems import systems as systems
