"""What a run can be told about its fixed point: the solver, the stopping rule, and what autograd sees.

A field here has the meaning and the default of the object of `implicit` by the same name, unless it says otherwise.
"""

from __future__ import annotations

from dataclasses import dataclass

from .limits import at_least, within


@dataclass(frozen=True, kw_only=True)
class Picard:
    """The naive iteration, z' = damping z + (1 - damping) f(z)."""

    damping: float = 0.0
    """Share of the old iterate that is kept."""

    def __post_init__(self) -> None:
        within(self, 0, 1, "damping")


@dataclass(frozen=True, kw_only=True)
class Anderson:
    """Anderson acceleration."""

    memory: int = 5
    """Iterates that are mixed."""
    damping: float = 0.0
    """Share of the old iterates that is kept."""

    def __post_init__(self) -> None:
        at_least(self, 1, "memory")
        within(self, 0, 1, "damping")


@dataclass(frozen=True, kw_only=True)
class Broyden:
    """Broyden's method with a limited memory."""

    memory: int = 20
    """Rank-one terms that are kept."""

    def __post_init__(self) -> None:
        at_least(self, 1, "memory")


@dataclass(frozen=True, kw_only=True)
class StochasticJFB:
    """S-JFB: n ~ U{0..N} iterations without a graph, then m ~ U{1..M} with one, drawn at every step."""

    N: int = 12
    """Most iterations without a graph."""
    M: int = 12
    """Most iterations with one."""

    def __post_init__(self) -> None:
        at_least(self, 0, "N")
        at_least(self, 1, "M")


@dataclass(frozen=True, kw_only=True)
class JFB:
    """Solve without a graph, then backpropagate through the last steps only."""

    steps: int = 1
    """Evaluations with a graph."""

    def __post_init__(self) -> None:
        at_least(self, 1, "steps")


@dataclass(frozen=True, kw_only=True)
class IFT:
    """The exact gradient, by the implicit function theorem."""


@dataclass(frozen=True, kw_only=True)
class Unrolled:
    """Backpropagate through the whole solve."""


@dataclass(frozen=True, kw_only=True)
class Stop:
    """When a training solve is good enough: |f(z) - z| <= atol + rtol |f(z)|. S-JFB draws its iterations and
    asks nothing of this.
    """

    rtol: float = 1e-3
    """Relative tolerance."""
    atol: float = 0.0
    """Absolute tolerance."""
    max_evals: int = 20
    """Most evaluations of the layer."""

    def __post_init__(self) -> None:
        at_least(self, 0, "rtol", "atol")
        at_least(self, 1, "max_evals")


Solver = Picard | Anderson | Broyden
Grad = StochasticJFB | JFB | IFT | Unrolled
