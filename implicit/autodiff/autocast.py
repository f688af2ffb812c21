"""Mixed precision: f under the autocast state of the forward pass whenever it is evaluated, all else without.

A solver's own sums and products would lose to bfloat16 what they gain, and a backward pass evaluates f again where
autocast is usually off.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from implicit.pytree import Layout, Map, State, leaves, rebuild


@dataclass(frozen=True)
class Autocast:
    """f under autocast to `dtype`; its results in the dtypes of the state."""

    f: Map
    kind: str  # of device
    dtype: torch.dtype

    def __call__(self, z: State, *args: object) -> State:
        with torch.autocast(self.kind, dtype=self.dtype):
            out = self.f(z, *args)
        return rebuild(z, iter([_cast(t, like) for t, like in zip(leaves(out, z), leaves(z), strict=True)]))

    @property
    def eps(self) -> float:
        """Relative rounding error of an evaluation."""
        return torch.finfo(self.dtype).eps


def _cast(t: Tensor, like: Tensor) -> Tensor:
    return t.to(like.dtype) if t.is_floating_point() and like.is_floating_point() else t


def rounding(f: Map, layout: Layout) -> float:
    """Relative rounding error of an evaluation of f on a state of this layout."""
    return max(layout.eps, f.eps) if isinstance(f, Autocast) else layout.eps


def as_now(f: Map, kind: str) -> Map:
    """f, to be evaluated at any time as if under the autocast state of now."""
    return Autocast(f, kind, torch.get_autocast_dtype(kind)) if torch.is_autocast_enabled(kind) else f
