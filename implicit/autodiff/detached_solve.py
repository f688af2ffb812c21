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
    """The solution without derivatives, inside or outside of a transform, in memory of its own, see `own_memory`."""
    if functorch.active():
        return functorch.solve(problem, solver, stop, options).solution
    with torch.no_grad():
        solved = iterate(problem.f, problem.z0, solver, stop, args=problem.args, options=options)
        return replace(solved, value=own_memory(solved.value, problem))


def own_memory(value: State, problem: Problem) -> State:
    """The value; a tensor of it in the memory of z0 or args is copied.

    f may return its input, as in a solve that begins at its answer, or one of its arguments.
    """
    if torch.compiler.is_compiling() or functorch.active():
        return value
    others = {memory(t) for t in tensors((problem.z0, problem.args)) if t.layout is torch.strided}
    return map_tensors(lambda t: t.clone() if memory(t) in others else t, value)
