"""`Problem`: map, start and arguments; `SolveOptions`: warm start, compaction and observation of a solve."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from implicit.argument_types import check_fields
from implicit.pytree import Flat, Layout, Map, State
from implicit.solution import Adjoint


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
    """Options of a solve other than its solver, stopping criterion and gradient estimator.

    Args:
        batch_dims: 1, each row of the state is a system of its own; 0, the whole state is one.
        trace: record the residual at every evaluation; or a function ``(carry, z, f(z)) -> carry``, folded over the
            evaluations of the solve. The first carry is None, the last one becomes ``Solution.trace``. With `Unrolled`
            the states z and f(z) have a graph; with the other estimators they are detached.
        state: solver state from an earlier ``Solution.state``, to continue with. It is copied, never written to.
        keep_state: put the solver state into ``Solution.state``.
        compact: evaluate f on the running samples only: finished samples are cut out of the state, of the solver
            state and of the tensors in `args` that have one row per sample. A tuple holds one True or False for each
            of `args`. True cuts every tensor in `args` whose first dimension is the batch size, a weight or bias of
            that length included. One more evaluation verifies the answer with the whole `args`; if a sample misses its
            tolerance there, the solve goes on without compaction. Tensors that f closes over are not cut, so batched
            inputs must come through `args`.
        adjoint: first guess of u in the backward pass of `IFT`: an earlier ``Solution.adjoint``, or ``Adjoint()`` if
            there is no earlier solve.
        callback: called with (number of evaluations, (B,) float64 host tensor of residuals, NaN where finished) each
            time residuals are read: at every evaluation, or every `Stop.check_every`-th.
        progress: show a tqdm bar.
    """

    batch_dims: int = 1
    trace: bool | Callable[[Any, State, State], Any] = False
    state: Any = None
    keep_state: bool = False
    compact: bool | tuple[bool, ...] = False
    adjoint: Adjoint | None = None
    callback: Callable[[int, Tensor], None] | None = None
    progress: bool = False

    def __post_init__(self) -> None:
        check_fields(self)

    @property
    def observed(self) -> bool:
        """Whether residuals are needed even without a tolerance."""
        return (bool(self.trace) and not callable(self.trace)) or self.progress or self.callback is not None

    def fold(self) -> "Fold | None":
        """The fold over evaluations, where `trace` is a function.

        Raises:
            ValueError: together with `compact`, which leaves samples out.
        """
        if not callable(self.trace):
            return None
        if self.compact:
            raise ValueError("trace as a function needs the states of all samples: leave compact unset, or trace=True.")
        return Fold(self.trace)


@dataclass
class Fold:
    """A function folded over the evaluations of a solve."""

    step: Callable[[Any, State, State], Any]
    carry: Any = None

    def add(self, layout: Layout, z: Flat, fz: Flat, joint: int = 1) -> None:
        """Fold in an evaluation; a row of z and f(z) holds the states of `joint` samples."""
        states = [layout.unpack(t.reshape(t.shape[0] * joint, -1) if joint > 1 else t) for t in (z, fz)]
        self.carry = self.step(self.carry, *states)
