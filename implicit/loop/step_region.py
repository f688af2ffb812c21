"""The solver step, in compiled graphs as a region that is compiled once and called at every evaluation.

torch.compile unrolls the loop of a fixed count, so its time would grow with the number of evaluations. The steps are
therefore nested regions of the graph: those with the same operators share one body, of which code is generated once. A
region writes into the histories in place, as the step does in eager mode. f stays in the graph around the regions.
"""

from collections.abc import Callable
from dataclasses import dataclass, fields, is_dataclass, replace
from typing import Any

import torch
from torch import Tensor

from implicit.pytree import Flat, tensors
from implicit.solvers.base import AbstractSolver, Point
from implicit.torch_internals import nested_region, nested_regions_supported


@dataclass(frozen=True)
class _Input:
    """Number of the tensor among the inputs of a region that a result is."""

    number: int


def step(solver: AbstractSolver[Any], point: Point, state: Any, first: bool) -> tuple[Flat, Flat | None, Any]:
    """`solver.step(point, state)`.

    The first step of a solve is no region, since its tensors may share memory (f may return its argument), nor is a
    step that autograd may record, since PyTorch cannot differentiate a region that writes into its inputs.
    """
    regions = not first and nested_regions_supported(point.z) and not torch.is_grad_enabled()
    prepared = solver.region_state(state) if regions else None
    if prepared is None:
        return solver.step(point, state)
    state = prepared
    z, tangent, new = nested_region(_step, solver, point.z, point.fz, point.product, point.remaining, state)
    inputs = [point.fz, *tensors(state)]
    return z, tangent, _replaced(new, _Input, lambda kept: inputs[kept.number])


def _step(
    solver: AbstractSolver[Any], z: Flat, fz: Flat, product: Flat | None, remaining: int, state: Any
) -> tuple[Flat, Flat | None, Any]:
    """The body of the region, which must not return its inputs: an `_Input` takes the place of each."""
    inputs = [fz, *tensors(state)]
    z, tangent, new = solver.step(Point(z, fz, product, remaining), state)

    def result(t: Tensor) -> Any:
        for number, given in enumerate(inputs):
            if t is given:
                return _Input(number)
        return t

    return z, tangent, _replaced(new, Tensor, result)


def _replaced(thing: Any, kind: type, change: Callable[[Any], Any]) -> Any:
    """A nest of dataclasses and tuples with `change` applied to all objects of a type."""
    if isinstance(thing, kind):
        return change(thing)
    if isinstance(thing, tuple):
        return tuple([_replaced(part, kind, change) for part in thing])
    if is_dataclass(thing) and not isinstance(thing, type):
        return replace(thing, **{f.name: _replaced(getattr(thing, f.name), kind, change) for f in fields(thing)})
    return thing
