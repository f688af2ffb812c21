"""Forms in which a problem may be given: f with a second output, and several starts a sample.

`has_aux`   f returns (f(z), aux). The solve uses f(z) alone. f is evaluated once more at the value returned, so that
            aux belongs to exactly that value and has the graph of the value and of f's parameters. A sample of a
            fixed count whose f is not finite at its value would put NaN into that graph: its aux is that of its start.
`starts`    z0 has S starts for every sample. The problem is solved from each start without a graph, and then with the
            gradient estimator from the start whose answer has the smallest residual.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from implicit.autodiff.detached_solve import solve_detached
from implicit.autodiff.failed_samples import failed, finite
from implicit.options import Problem, SolveOptions
from implicit.pytree import Layout, Map, State, leaves, map_tensors, rebuild, tensors
from implicit.solution import Solution
from implicit.solvers.base import AbstractSolver
from implicit.stopping import Stop
from implicit.torch_internals import has_derivative


@dataclass(frozen=True)
class Main:
    """f(z) of an f that returns (f(z), aux)."""

    f: Map

    def __call__(self, z: State, *args: Any) -> State:
        return self.both(z, *args)[0]

    def both(self, z: State, *args: Any) -> tuple[State, Any]:
        """(f(z), aux).

        Raises:
            ValueError: f does not return a tuple of two.
        """
        out = self.f(z, *args)
        if not isinstance(out, tuple) or len(out) != 2:
            given = f"a tuple of {len(out)}" if isinstance(out, tuple) else f"a {type(out).__name__}"
            raise ValueError(f"With has_aux f must return a tuple (f(z), aux), got {given}.")
        return out

    def with_aux(self, solution: Solution, problem: Problem, stop: Stop, batch_dims: int) -> Solution:
        """The solution with the second output of f at its value, which takes one more evaluation.

        f was not evaluated at the value of a fixed count. Where it is not finite there, aux is that of the start.
        """
        image, aux = self.both(solution.value, *problem.args)
        solution = replace(solution, aux=aux, evals=solution.evals + 1)
        if not any(map(has_derivative, tensors(aux))):
            return solution
        layout = Layout.of(problem.z0, batch_dims)
        lost = ~finite(layout.pack(image))
        if not failed(lost, stop):
            return solution
        z = torch.where(lost, layout.pack(problem.z0).detach(), layout.pack(solution.value))
        return replace(solution, aux=self.both(layout.unpack(z), *problem.args)[1], evals=solution.evals + 1)


def all_starts(
    z0: State | Callable[[torch.Generator | None], State], starts: int, generator: torch.Generator | None
) -> list[State]:
    """The starting states: slices of a state with a leading axis, or results of a function of `generator`.

    Raises:
        TypeError: z0 is a `Solution`.
        ValueError: `starts` is below 1, or not the length of the leading axis; a generator without a function to draw.
    """
    if isinstance(z0, Solution):
        raise TypeError("z0 must be a tensor or a nest of tensors, got a Solution: pass solution.value.")
    if starts < 1:
        raise ValueError(f"starts must be at least 1, got {starts}.")
    # dynamo cannot ask whether a dict is callable
    if not isinstance(z0, Tensor) and type(z0) not in (tuple, list, dict) and callable(z0):
        return [z0(generator) for _ in range(starts)]
    if generator is not None:
        raise ValueError("generator is for a z0 that is a function of it, got a state: leave generator unset.")
    if starts == 1:
        return [z0]
    sizes = {t.shape[0] if t.ndim else 0 for t in leaves(z0)}
    if sizes != {starts}:
        raise ValueError(
            f"With starts={starts} every tensor of z0 must have a leading axis of that length, got {sorted(sizes)}: "
            "stack the starts, or pass a function of a generator."
        )
    return [map_tensors(lambda t, s=s: t[s], z0) for s in range(starts)]


def best_start(
    f: Map,
    z0s: list[State],
    args: tuple[Any, ...],
    solver: AbstractSolver[Any],
    stop: Stop,
    options: SolveOptions,
) -> tuple[State, Tensor | int]:
    """(the start with the smallest residual of every sample; (B,) evaluations of the solves from all starts).

    Raises:
        ValueError: several starts with a solver state to continue with, which belongs to one start.
    """
    if len(z0s) == 1:
        return z0s[0], 0
    if options.state is not None:
        raise ValueError("state continues from one start: leave it unset with starts.")
    plain = SolveOptions(batch_dims=options.batch_dims, compact=options.compact)
    solved = [solve_detached(Problem(f, z0, args), solver, stop, plain) for z0 in z0s]
    residual = torch.stack([s.residual.detach().nan_to_num(nan=torch.inf, posinf=torch.inf) for s in solved])
    best = residual.argmin(dim=0)
    evals = torch.stack([s.evals for s in solved]).sum(dim=0)
    if not options.batch_dims:
        best = best.reshape(())
    layout = Layout.of(z0s[0], options.batch_dims)

    def choose(*ts: Tensor) -> Tensor:
        index = best.reshape(1, *best.shape, *[1] * (ts[0].ndim - best.ndim)).expand(1, *ts[0].shape)
        return torch.stack(ts).gather(0, index)[0]

    parts = [leaves(z0, layout.like) for z0 in z0s]
    return rebuild(z0s[0], iter([choose(*ts) for ts in zip(*parts, strict=True)])), evals
