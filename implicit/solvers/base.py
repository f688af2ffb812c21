"""What a solver is: a rule that proposes the next iterate from the points seen so far.

A solver never evaluates the stopping rule, never counts and never touches a sample that has finished: that is the
loop's work (`implicit.iterate`), one for all solvers. All vectors are (B, N): row b belongs to sample b, and nothing a
solver does may mix rows.
"""

import abc
from typing import Generic, Protocol, TypeVar, runtime_checkable

from jaxtyping import Bool
from torch import Tensor

from implicit.pytree import Flat

S = TypeVar("S")


class Point:
    """An iterate and what f said about it: z, f(z) and the residual r = f(z) - z (made when first asked for)."""

    __slots__ = ("_r", "fz", "z")

    def __init__(self, z: Flat, fz: Flat) -> None:
        self.z, self.fz = z, fz
        self._r: Flat | None = None

    @property
    def r(self) -> Flat:
        """f(z) - z, (B, N)."""
        if self._r is None:
            self._r = self.fz - self.z
        return self._r


@runtime_checkable
class Evaluator(Protocol):
    """f as solvers see it, on (B, N) matrices. Every call is counted against the budget."""

    def __call__(self, z: Flat) -> Flat:
        """f(z)."""
        ...

    def aim(self, v: Flat) -> None:
        """Take J v, J = df/dz, along with the next evaluation, in place of f(z) alone; it counts once."""
        ...

    @property
    def pushed(self) -> Flat | None:
        """J v at the point evaluated last, if that evaluation was aimed."""
        ...

    @property
    def left(self) -> int:
        """How many more evaluations the budget allows."""
        ...


class AbstractSolver(abc.ABC, Generic[S]):
    """Subclasses are frozen dataclasses whose fields are their configuration.

    `S` is the memory the solver carries from step to step: tensors whose first dimension is the batch, in a
    dataclass, tuple, list or dict; or None.
    """

    @abc.abstractmethod
    def init(self, point: Point) -> S:
        """The memory after the first evaluation."""

    def resume(self, point: Point, state: S) -> S:
        """The memory after the first evaluation of a solve that goes on with the memory of an earlier, related one.

        `memory` is a private copy. By default nothing carries over.
        """
        return self.init(point)

    @property
    def patience(self) -> int:
        """Evaluations without progress after which the loop's safeguard (`implicit.safeguard`) steps in; 0: never."""
        return 0

    def restart(self, point: Point, state: S, mask: Bool[Tensor, "B 1"]) -> S:
        """The memory with the history of the samples in `mask` forgotten; they go on from `point`."""
        return state

    @abc.abstractmethod
    def step(self, f: Evaluator, point: Point, state: S) -> tuple[Flat, S]:
        """Propose the next iterate, which the loop will evaluate, and the memory that goes with it.

        `f` is there for solvers that need Jacobian-vector products, which come with the loop's evaluations. Tensors of
        `point` may be kept but never written to.
        """

    def inverse_transpose(self, state: S, g: Flat) -> Flat:
        """H^T g, for solvers whose memory holds an approximate inverse H of I - df/dz.

        Raises:
            ValueError: this solver's memory holds none.
        """
        raise ValueError(f"{type(self).__name__} keeps no approximate inverse: use Broyden or Anderson.")
