"""The solve without derivatives that every estimator begins with: the value only, inside or outside of torch.func."""

from dataclasses import replace
from typing import Any

import torch

from implicit.autodiff import functorch
from implicit.iterate import iterate
from implicit.options import Problem, SolveOptions
from implicit.pytree import State, map_tensors, tensors
from implicit.solution import Solution
from implicit.solvers.base import AbstractSolver
from implicit.stopping import Stop
from implicit.torch_internals import memory


def solve_detached(problem: Problem, solver: AbstractSolver[Any], stop: Stop, options: SolveOptions) -> Solution:
    """The solution without derivatives, inside or outside of a transform, in memory that it does not share with z0."""
    if functorch.active():
        return functorch.solve(problem, solver, stop, options).solution
    with torch.no_grad():
        solved = iterate(problem.f, problem.z0, solver, stop, args=problem.args, options=options)
        return replace(solved, value=_own_memory(solved.value, problem.z0))


def _own_memory(value: State, z0: State) -> State:
    """The value; a tensor of it that is z0 itself, as in a solve that begins at its answer, is copied."""
    if torch.compiler.is_compiling():
        return value
    starts = {memory(t) for t in tensors(z0)}
    return map_tensors(lambda t: t.clone() if memory(t) in starts else t, value)
