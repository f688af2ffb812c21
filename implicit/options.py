"""`Problem`: what is solved; `SolveOptions`: how a solve is run and observed, apart from when it stops."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from implicit.pytree import Map, State


@dataclass(frozen=True)
class Problem:
    """z = f(z, *args), to be solved from z0.

    Attributes:
        f: the map.
        z0: the starting state, ``(B, *)`` tensors.
        args: passed on to f.
    """

    f: Map
    z0: State
    args: tuple[Any, ...] = ()


@dataclass(frozen=True, kw_only=True)
class SolveOptions:
    """How a solve is run and observed, apart from when it stops.

    Args:
        batch_dims: 1, each row of the state is a system of its own; 0, the whole state is one.
        trace: record the residual at every evaluation.
        state: solver state from an earlier ``Solution.state``, to continue with. It is copied, never written to.
        keep_state: put the solver state into ``Solution.state``.
        compact: evaluate f on the samples still running only: finished ones are cut out of the state, of the solver
            state and of the tensors in `args` that have one row per sample. A tuple holds one True or False for each
            of `args`. True cuts every tensor in `args` whose first dimension is the batch size, a weight or bias of
            that length included; the answer is verified with the whole `args` either way, for one evaluation more,
            and solved without compaction where it does not hold. What f closes over is not cut, so batched inputs
            must come through `args`.
        callback: called with (number of evaluations, (B,) float64 host tensor of residuals, NaN where finished) each
            time residuals are read: at every evaluation, or every `Stop.check_every`-th.
        progress: show a tqdm bar.
    """

    batch_dims: int = 1
    trace: bool = False
    state: Any = None
    keep_state: bool = False
    compact: bool | tuple[bool, ...] = False
    callback: Callable[[int, Tensor], None] | None = None
    progress: bool = False

    @property
    def observed(self) -> bool:
        """Whether residuals are needed even without a tolerance."""
        return self.trace or self.progress or self.callback is not None
