"""What a solve returns: the value, and per sample how it went and what to do about it."""

import enum
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor


class Result(enum.IntEnum):
    """How the solve of one sample ended."""

    CONVERGED = 0
    MAX_EVALS = 1
    NONFINITE = 2
    STALLED = 3

    @property
    def message(self) -> str:
        """What happened and what to do about it."""
        return _MESSAGES[self]


_MESSAGES = {
    Result.CONVERGED: "The residual is within the tolerance.",
    Result.MAX_EVALS: (
        "The budget of evaluations was spent before the residual met the tolerance: raise Stop.max_evals, loosen "
        "Stop.rtol, or use a stronger solver (Anderson, Broyden, NewtonKrylov)."
    ),
    Result.NONFINITE: (
        "f returned NaN or infinity, or its norm overflowed; the value is the best finite iterate: check f at the "
        "starting point, damp the solver, or use a wider dtype."
    ),
    Result.STALLED: (
        "The residual has reached the rounding error of the state's dtype and no longer improves: loosen Stop.rtol "
        "and Stop.atol, or use a wider dtype."
    ),
}


class NotConverged(RuntimeError):
    """Raised by `Solution.check` when a sample did not converge."""


@dataclass(frozen=True, kw_only=True)
class Solution:
    """The outcome of a fixed-point solve of a batch of B independent systems.

    Attributes:
        value: the answer, with the structure, shapes and dtypes of the starting state. With a tolerance, a converged
            sample holds the very z whose residual is reported; any other holds f(z) of its best finite z. Without
            tolerance (``rtol = atol = 0``) it is f(z) of the last evaluation.
        residual: (B,) Euclidean norm of f(z) - z, at the z that `value` belongs to.
        result: (B,) a `Result` code for every sample (int8).
        evals: (B,) how often f was evaluated for this sample (int64).
        trace: (evaluations, B) residual at each evaluation, NaN once a sample has finished; None unless asked for.
        state: the solver's memory at the end, for a warm start of a related problem; None unless asked for.

    With a whole-state system (``batch_dims=0``) B is 1.
    """

    value: Any
    residual: Float[Tensor, " B"]
    result: Int[Tensor, " B"]
    evals: Int[Tensor, " B"]
    trace: Float[Tensor, "evaluations B"] | None = None
    state: Any = None

    @property
    def converged(self) -> Bool[Tensor, " B"]:
        """(B,) True where the tolerance was met."""
        return self.result == Result.CONVERGED

    def check(self) -> "Solution":
        """Return self if every sample converged.

        Raises:
            NotConverged: naming the samples, how each group of them ended, and what to do.
        """
        if bool(self.converged.all()):
            return self
        parts = []
        for code in (Result.NONFINITE, Result.STALLED, Result.MAX_EVALS):
            rows = torch.nonzero(self.result == code).flatten().tolist()
            if rows:
                worst = float(self.residual[rows].max())
                shown = ", ".join(map(str, rows[:10])) + (", ..." if len(rows) > 10 else "")
                parts.append(f"{code.name}: samples {shown} (largest residual {worst:.3g}). {code.message}")
        bad = int((~self.converged).sum())
        raise NotConverged(f"{bad} of {len(self.result)} samples did not converge. " + " ".join(parts))
