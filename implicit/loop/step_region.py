"""What a fixed count does between two evaluations, in compiled graphs as a region that is traced and compiled once.

torch.compile unrolls the loop of a fixed count, so its time would grow with the number of evaluations. All that happens
between two evaluations of f is therefore a nested region of the graph. Dynamo traces it at the first evaluation alone,
and code of its body is generated once; f stays in the graph around the regions. A region takes and returns tensors: of
the solver's state it returns those that a step replaces, and writes into the histories in place, as in eager mode.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields, is_dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from implicit.pytree import Flat, rebuild, tensors
from implicit.solvers.base import AbstractSolver, Point
from implicit.torch_internals import constant_numbers, nested_region, nested_regions_supported, region_body, region_key

_OF_POINT = ("fz", "r")  # fields of a state which are those of the last point, so that a region need not return them


@dataclass(frozen=True)
class StepRegion:
    """`part` and the solver state before the first region, whose tensors give way to those of each region.

    `part(state, before, *given)` returns (results, the next state), where `before` is the last point. The results are
    new tensors, and so are the fields of the state that are tensors, but for f(z) and r of the last point.
    """

    part: Callable[..., tuple[tuple[Tensor, ...], Any]]
    state: Any
    replaced: tuple[str, ...]
    """The fields of the state that every step replaces."""
    key: int

    @property
    def histories(self) -> dict[str, Any]:
        """The fields of the state that every step writes into."""
        found = {field.name: getattr(self.state, field.name) for field in fields(self.state)}
        return {name: value for name, value in found.items() if is_dataclass(value)}

    def values(self) -> list[Tensor]:
        """The tensors of the state for the first region; one tensor in two fields would be one input of the body."""
        return [getattr(self.state, name).clone() for name in self.replaced] + tensors(self.histories)

    def filled(self, before: Point, values: Sequence[Tensor]) -> Any:
        """The state with other tensors."""
        given = iter(values)
        found = {name: next(given) for name in self.replaced} | rebuild(self.histories, given)
        found |= {name: getattr(before, name) for name in _OF_POINT if hasattr(self.state, name)}
        return replace(self.state, **found)

    def __call__(self, z: Flat, fz: Flat, given: tuple[Tensor, ...], values: list[Tensor]) -> tuple[Any, list[Tensor]]:
        """(results, values for the next region); the tensors given must not share memory."""
        out, replaced = nested_region(self._body, self.key, len(given), z, fz, *given, *values), len(self.replaced)
        return out[: len(out) - replaced], [*out[len(out) - replaced :], *values[replaced:]]

    @region_body
    def _body(self, key: int, count: int, z: Flat, fz: Flat, *rest: Tensor) -> tuple[Tensor, ...]:
        before = Point(z, fz)
        old = self.filled(before, rest[count:])
        results, new = self.part(old, before, *rest[:count])
        pairs = [(getattr(new, name), getattr(old, name)) for name in self.replaced]
        return *results, *[a.clone() if a is b else a for a, b in pairs]  # no result may be an argument


def step_region(
    part: Callable[..., tuple[tuple[Tensor, ...], Any]], solver: AbstractSolver[Any], z: Tensor, state: Any, steps: int
) -> StepRegion | None:
    """`part(solver, ...)` as a region for `steps` steps, where a graph has regions and the solver has one; else None.

    A step that autograd may record is no region, since PyTorch cannot differentiate a region that writes into its
    inputs.
    """
    if not nested_regions_supported(z) or torch.is_grad_enabled():
        return None
    state = solver.region_state(state, steps)
    if state is None:
        return None
    found = [field.name for field in fields(state) if isinstance(getattr(state, field.name), Tensor)]
    part = partial(part, constant_numbers(solver, float))
    return StepRegion(part, state, tuple([name for name in found if name not in _OF_POINT]), region_key())
