"""Mixed precision: every evaluation of f is under the autocast state of the forward pass, the solver under none.

In bfloat16 the rounding errors of the solver's own sums and products would exceed the gain of its steps. A backward
pass evaluates f again when autocast is usually off, and must get the same values.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from implicit.pytree import Layout, Map, State, leaves, rebuild


@dataclass(frozen=True)
class Autocast:
    """f under autocast to `dtype`; its results in the dtypes of the state."""

    f: Map
    kind: str  # type of the device, such as "cuda"
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
    """f, which at any later time is evaluated under the autocast state of this call."""
    return Autocast(f, kind, torch.get_autocast_dtype(kind)) if torch.is_autocast_enabled(kind) else f
