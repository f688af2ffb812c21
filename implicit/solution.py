"""Result of a solve: the value, and for each sample its status with advice."""

import enum
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, fields
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from implicit.torch_internals import register_pytree


class Result(enum.IntEnum):
    """How the solve of one sample ended."""

    CONVERGED = 0
    MAX_EVALS = 1
    NONFINITE = 2
    STALLED = 3
    NONDETERMINISTIC = 4
    STOPPED = 5

    @property
    def message(self) -> str:
        """What happened and what to do about it."""
        return _MESSAGES[self]


_MESSAGES = {
    Result.CONVERGED: "The residual is within the tolerance.",
    Result.MAX_EVALS: (
        "The budget of evaluations was spent before the residual met the tolerance: raise Stop.max_evals, loosen "
        "Stop.rtol, or use a stronger solver (Anderson, Broyden, NewtonKrylov); where f takes one row of the state "
        "into another, pass batch_dims=0."
    ),
    Result.NONFINITE: (
        "f returned NaN or infinity, or the norm of f(z) overflowed; the value is the best finite iterate: check f at "
        "the starting point, damp the solver, or use a wider dtype."
    ),
    Result.STALLED: (
        "The residual has reached the rounding error of the state's dtype and no longer improves: loosen Stop.rtol "
        "and Stop.atol, or use a wider dtype."
    ),
    Result.NONDETERMINISTIC: (
        "f gives two values at one z, so it has no fixed point to converge to: draw dropout masks and other noise once "
        "before the solve, and put layers that change as they are called (spectral_norm, BatchNorm) into eval mode."
    ),
    Result.STOPPED: "Stop.when ended the sample before its residual met the tolerance.",
}


class NotConverged(RuntimeError):
    """Raised by `Solution.check` when a sample did not converge."""


class Adjoint:
    """u of the backward pass of `IFT`, a first guess of u for the next solve of a related problem.

    u = g + J^T u, with g = dL/dz* and J = df/dz at z*. `fixed_point` reads the object given as ``adjoint=`` and leaves
    it as it is. ``solution.adjoint`` is a new object: it holds the same value until the backward pass of that solution
    stores its own u. If the next batch holds other samples, select their rows: ``Adjoint(u[index])``.

    Attributes:
        value: u, with the structure, shapes and dtypes of the state; None if there is no guess.
    """

    def __init__(self, value: Any = None) -> None:
        self.value = value

    def __repr__(self) -> str:
        return "Adjoint()" if self.value is None else "Adjoint(<u of a backward pass>)"


@dataclass(frozen=True, kw_only=True, repr=False)
class Solution:
    """The outcome of a fixed-point solve of a batch of B independent systems.

    Attributes:
        value: the answer, with the structure, shapes and dtypes of the starting state. With a tolerance it is the z
            with the smallest residual, the best finite iterate. Without tolerance (``rtol = atol = 0``) it is f(z) of
            the last evaluation. Estimators that take further steps with a graph return the end of these steps.
        residual: (B,) norm of f(z) - z at z = `value`; without tolerance, of the last step, which led to `value`. If f
            couples samples and the budget ends before one converges, the residual of each sample was measured beside
            the iterates of the others in that evaluation, not beside their returned values.
        result: (B,) a `Result` code for every sample (int8). Without tolerance no sample of a batch of several is
            CONVERGED, since f is not evaluated at the value.
        evals: (B,) how often f was evaluated for this sample (int64): at most `Stop.max_evals` times by the solve, plus
            those that verify the answer or a difference (about five, and one for each Newton-Krylov step of the
            safeguard if f is rounded otherwise beside a Jacobian-vector product) and those of the estimator.
        trace: (evaluations, B) residual at each evaluation, NaN once a sample has finished; the last carry if `trace`
            was a function; None unless requested.
        state: the solver state at the end, for a warm start of a related problem; None unless requested.
        adjoint: u of the backward pass once it has run; None unless ``adjoint=`` was given.
        scale: (B,) norm of f at the start, to which the tolerance of a fixed point of zero refers.
        aux: the second output of f at `value`; None without `has_aux`.

    With a whole-state system (``batch_dims=0``) B is 1.
    """

    value: Any
    residual: Float[Tensor, " B"]
    result: Int[Tensor, " B"]
    evals: Int[Tensor, " B"]
    trace: Any = None
    state: Any = None
    scale: Float[Tensor, "B ..."] | None = None
    aux: Any = None
    adjoint: Adjoint | None = None

    def __repr__(self) -> str:
        """One line: the number of samples of each `Result`, the largest residual and the evaluations."""
        ends = Counter(Result(code).name for code in self.result.tolist())
        how = ", ".join(f"{count} {name}" for name, count in ends.items()) or "no samples"
        worst = float(self.residual.max()) if len(self.residual) else 0.0
        evals = int(self.evals.max()) if len(self.evals) else 0
        return f"Solution({how}; largest residual {worst:.3g}, evals {evals}; the answer is .value)"

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Refuse to be an argument of PyTorch's functions and modules; the error names `solution.value`.

        Raises:
            TypeError: always.
        """
        name = getattr(func, "__name__", str(func))
        raise TypeError(f"{name} got a Solution, which is not a tensor: pass its answer, solution.value.")

    @property
    def converged(self) -> Bool[Tensor, " B"]:
        """(B,) True where the tolerance was met."""
        return self.result == Result.CONVERGED

    def check(self) -> "Solution":
        """Return self if every sample converged, or was ended by `Stop.when`.

        Raises:
            NotConverged: naming the samples, how each group of them ended, and what to do.
        """
        good = self.converged | (self.result == Result.STOPPED)
        if bool(good.all()):
            return self
        parts = []
        for code in (Result.NONFINITE, Result.STALLED, Result.NONDETERMINISTIC, Result.MAX_EVALS):
            rows = torch.nonzero(self.result == code).flatten().tolist()
            if rows:
                worst = float(self.residual[rows].max())
                shown = ", ".join(map(str, rows[:10])) + (", ..." if len(rows) > 10 else "")
                parts.append(f"{code.name}: samples {shown} (largest residual {worst:.3g}). {code.message}")
        bad = int((~good).sum())
        raise NotConverged(f"{bad} of {len(self.result)} samples did not converge. " + " ".join(parts))


def _flatten(solution: Solution) -> tuple[list[Any], list[str]]:
    parts = {f.name: getattr(solution, f.name) for f in fields(solution)}
    names = [name for name, part in parts.items() if part is not None]
    return [parts[name] for name in names], names


def _unflatten(parts: Iterable[Any], names: list[str]) -> Solution:
    solution = object.__new__(Solution)  # without __init__, since the parts may be placeholders of a transform
    given = dict(zip(names, parts, strict=True))
    for f in fields(Solution):
        object.__setattr__(solution, f.name, given.get(f.name))
    return solution


register_pytree(Solution, _flatten, _unflatten)  # so that torch.vmap returns a Solution
