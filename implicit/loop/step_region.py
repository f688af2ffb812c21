"""Parts of the loop of a fixed count, in compiled graphs as a region that is compiled once and called repeatedly.

torch.compile unrolls the loop of a fixed count, so its time would grow with the number of evaluations. What happens
between two evaluations of f is therefore a nested region of the graph: regions with the same operators share one body,
of which code is generated once. A region writes into the histories in place, as the step does in eager mode. f stays in
the graph around the regions.
"""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from implicit.solvers.base import AbstractSolver
from implicit.torch_internals import nested_region, nested_regions_supported


def region_state(solver: AbstractSolver[Any], z: Tensor, state: Any) -> Any:
    """`solver.region_state(state)` where a graph with regions is being compiled, else None.

    `left` is its inverse.

    A step that autograd may record is no region, since PyTorch cannot differentiate a region that writes into its
    inputs.
    """
    if not nested_regions_supported(z) or torch.is_grad_enabled():
        return None
    return solver.region_state(state)


def left(state: Any) -> Any:
    """The state of a solver after regions, with the slots of its history as numbers."""
    return state if getattr(state, "position", None) is None else replace(state, position=None)


def in_region(part: Callable[..., Any], state: Any, *args: Any) -> tuple[tuple[Any, ...], Any]:
    """part(state, *args), which returns (results, state after them), as a region.

    The tensors of `state` and `args` must not share memory. The results are new tensors or None, and so are the fields
    of the state that `part` replaces; a field may be one of the results.
    """
    results, changed, same = nested_region(_body, part, state, *args)
    return results, replace(state, **changed, **{name: results[number] for name, number in same.items()})


def _body(part: Callable[..., Any], state: Any, *args: Any) -> tuple[tuple[Any, ...], dict[str, Any], dict[str, int]]:
    """The body of the region, which must return no input and no tensor twice.

    Returns the results, the fields of the state that have changed, and those of them that are one of the results, by
    its number. Dynamo traces this at every evaluation: walking through all tensors would take more time than the step.
    """
    results, new = part(state, *args)
    changed, same = {}, {}
    for name in state.__dataclass_fields__:
        value = getattr(new, name)
        if value is getattr(state, name):
            continue
        found = [number for number in range(len(results)) if results[number] is value]
        if value is not None and found:
            same[name] = found[0]
        else:
            changed[name] = value
    return results, changed, same
