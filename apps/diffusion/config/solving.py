"""What a run can be told about its fixed point: the solver, the stopping rule, and what autograd sees.

A field here has the meaning and the default of the object of `implicit` by the same name, unless it says otherwise.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from apps.diffusion.config.ranges import at_least, within


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
class AndersonGS:
    """Anderson acceleration by Gram-Schmidt, with a long memory."""

    memory: int = 30
    """Pairs that are kept."""

    def __post_init__(self) -> None:
        at_least(self, 1, "memory")


@dataclass(frozen=True, kw_only=True)
class Broyden:
    """Broyden's method with a limited memory."""

    memory: int = 20
    """Secant pairs that are kept."""
    search: int = 0
    """How often a step that makes the residual grow may be halved."""

    def __post_init__(self) -> None:
        at_least(self, 1, "memory")
        at_least(self, 0, "search")


@dataclass(frozen=True, kw_only=True)
class BadBroyden:
    """Broyden's bad method: the smallest change of the inverse."""

    memory: int = 20
    """Rank-one terms that are kept."""

    def __post_init__(self) -> None:
        at_least(self, 1, "memory")


@dataclass(frozen=True, kw_only=True)
class NewtonKrylov:
    """Newton's method, each step by GMRES."""

    inner: int = 40
    """Most Jacobian-vector products of a step."""
    forcing: float = 0.01
    """Relative residual of the linear problem that ends a step."""

    def __post_init__(self) -> None:
        at_least(self, 1, "inner")
        within(self, 0, 1, "forcing")


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

    rtol: float | None = None
    """Relative tolerance of the linear problem in the backward pass; left out, that of the arithmetic."""
    on_failure: Literal["warn", "raise", "ignore"] = "warn"
    """What to do when it does not converge."""

    def __post_init__(self) -> None:
        at_least(self, 0, "rtol")


@dataclass(frozen=True, kw_only=True)
class Phantom:
    """Solve without a graph, then backpropagate through a few damped steps."""

    steps: int = 5
    """Steps with a graph."""
    damping: float = 0.5
    """Share of the old iterate that they keep."""

    def __post_init__(self) -> None:
        at_least(self, 1, "steps")
        within(self, 0, 1, "damping")


@dataclass(frozen=True, kw_only=True)
class Neumann:
    """The first terms of the inverse's series, in the memory of one evaluation."""

    terms: int = 5
    """Terms of the series."""

    def __post_init__(self) -> None:
        at_least(self, 1, "terms")


@dataclass(frozen=True, kw_only=True)
class SHINE:
    """The forward solver's own estimate of the inverse; needs one that remembers (anderson, anderson-gs, broyden,
    bad-broyden).
    """

    refine: int = 0
    """Fixed-point steps on top of the estimate."""
    fallback: float | None = 1.3
    """Largest growth of a sample's gradient before it falls back to JFB's; None: never."""

    def __post_init__(self) -> None:
        at_least(self, 0, "refine")
        if self.fallback is not None and not self.fallback > 0:
            raise ValueError(f"SHINE.fallback must be positive or None, got {self.fallback}.")


@dataclass(frozen=True, kw_only=True)
class Reversible:
    """A reversible iteration of its own, run backwards in the backward pass; leave the solver at picard."""

    beta: float = 0.5
    """Share of the new value in a step."""
    on_drift: Literal["warn", "raise", "ignore"] = "warn"
    """What to do when the way back was lost to rounding."""
    tolerance: float = 1e-3
    """Largest estimated relative error of a sample's gradient that passes."""

    def __post_init__(self) -> None:
        if not 0 < self.beta < 1:
            raise ValueError(f"Reversible.beta must lie in (0, 1), got {self.beta}.")
        if not self.tolerance > 0:
            raise ValueError(f"Reversible.tolerance must be positive, got {self.tolerance}.")


@dataclass(frozen=True, kw_only=True)
class Unrolled:
    """Backpropagate through the whole solve."""

    checkpoint: bool = False
    """Keep the input of every evaluation alone, and evaluate again in the backward pass."""


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


Solver = Picard | Anderson | AndersonGS | BadBroyden | Broyden | NewtonKrylov
Grad = StochasticJFB | JFB | IFT | Phantom | Neumann | SHINE | Reversible | Unrolled


def check_pair(grad: Grad, solver: Solver) -> None:
    """Raises ValueError where an estimator cannot work with a solver, or would pay no heed to it."""
    if isinstance(grad, SHINE) and not isinstance(solver, Anderson | AndersonGS | BadBroyden | Broyden):
        raise ValueError(
            f"SHINE multiplies by its solver's estimate of the inverse, and {type(solver).__name__} has none; take "
            "solver:anderson, solver:anderson-gs, solver:broyden or solver:bad-broyden."
        )
    if isinstance(grad, Reversible) and solver != Picard():
        raise ValueError(
            f"Reversible is an iteration of its own, and {type(solver).__name__} would play no part; leave the "
            "solver at solver:picard."
        )
