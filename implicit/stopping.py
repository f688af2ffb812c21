"""Stopping criterion: tolerances, norms and budget of a solve, and the test whether a sample has converged.

Setting: z is an iterate of one sample, r = f(z) - z. The sample has converged when

    ||r||  <=  atol + rtol max(||f(z)||, sqrt(eps) ||f(z_0)||)

z_0 is the start and eps the rounding error of the state's dtype. The second term in the maximum ends the solve of a
sample whose fixed point is zero; the tolerance of any larger state depends on ||f(z)|| alone.

`Criterion.compare` holds this formula; loop/quick_reading.py has it with the constant terms added once. Three parts of
the loop may refuse CONVERGED to a sample that meets this criterion: loop/verification.py (coupled samples, noise in f),
loop/fixed_count.py (no tolerance), and the safeguard (an iterate that runs away, staged_safeguard.py).
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal, get_args

import numpy as np
import torch
from jaxtyping import Bool
from torch import Tensor

from implicit.argument_types import check_fields
from implicit.pytree import Flat, Layout, PerSample, scaled_norm
from implicit.solution import Result

Norm = Literal["euclidean", "rms", "max", "leaf"]
_SAFE = {torch.float32: 1e-15, torch.float64: 1e-150}  # squares in a norm below x or above 1 / x may leave the range


@dataclass(frozen=True, kw_only=True)
class Stop:
    """A sample ends when ``||f(z) - z|| <= atol + rtol ||f(z)||``, or after `max_evals` evaluations.

    ``rtol = atol = 0`` means no tolerance: exactly `max_evals` evaluations, with no synchronization between host and
    device. Where autograd records the solve, one or two booleans are read after it, whether a sample failed, unless
    `late` is set. A fixed point of zero meets any `rtol` once ||f(z)|| is below sqrt(eps) of its first value.

    ============  =======================================================  ==========================================
    norm          of the numbers x_1 .. x_N of a sample                    use it where
    ============  =======================================================  ==========================================
    "euclidean"   (sum x_i^2)^(1/2)                                        the state is one quantity (default)
    "rms"         (sum x_i^2 / N)^(1/2)                                    `atol` is to be the error of a typical entry
    "max"         max abs(x_i)                                             every entry counts, `atol` bounds each
    "leaf"        Euclidean, for every tensor of the state by itself       tensors of the state differ in unit or size
    ============  =======================================================  ==========================================

    A complex number counts as two real ones. With "leaf" every tensor of a nested state has to meet the tolerance, and
    `Solution.residual` is the largest ||r|| / (||f(z)|| + atol / rtol) among them.

    Args:
        rtol: relative tolerance, >= 0.
        atol: absolute tolerance, >= 0, in the unit of the norm.
        max_evals: budget of evaluations of f, >= 1.
        check_every: k, to read the residual at every k-th evaluation and the last one only, since each reading makes
            the host wait for the device. A sample may run up to k - 1 evaluations past its tolerance. The safeguard
            acts at readings. A sample whose f(z) is not finite there is read at every evaluation until it is finite.
        late: read each residual one evaluation after it was computed, when the device has finished it, so that the
            host does not wait; a finished sample costs one evaluation more. Without a tolerance: the host reads
            nothing, so on a device a failed sample may put NaN into the gradients of parameters that samples share.
        norm: the norm of residuals and of f(z), see the table.
        when: a test of the caller beside the residual, such as a halting head or the divergence of two outputs: called
            with (z, f(z)), detached states, at every reading; returns (B,) booleans. A sample for which it returns True
            ends at that z with `Result.STOPPED`, or with CONVERGED if its residual meets the tolerance.
    """

    rtol: float = 1e-4
    atol: float = 0.0
    max_evals: int = 50
    check_every: int = 1
    late: bool = False
    norm: Norm = "euclidean"
    when: Callable[[Any, Any], Tensor] | None = None

    def __post_init__(self) -> None:
        check_fields(self)
        for name in ("rtol", "atol"):
            if not 0 <= getattr(self, name) < float("inf"):
                raise ValueError(f"Stop.{name} must be finite and at least 0, got {getattr(self, name)}.")
        for name in ("max_evals", "check_every"):
            if getattr(self, name) < 1:
                raise ValueError(f"Stop.{name} must be at least 1, got {getattr(self, name)}.")
        if self.norm not in get_args(Norm):
            raise ValueError(f"Stop.norm must be one of {', '.join(get_args(Norm))}, got {self.norm!r}.")

    @property
    def has_tolerance(self) -> bool:
        """Whether a sample can finish before the budget is spent: by a tolerance or by `when`."""
        return self.rtol > 0 or self.atol > 0 or self.when is not None


class Criterion:
    """The test of `Stop` for the rows of a (B, N) matrix.

    A row is the state of one sample, or with `joint` > 1 the states of `joint` samples, one after another.

    Norms are taken on the device in the state's dtype, one per group. A group is the row, with ``norm="leaf"`` every
    tensor in the row, and with `joint` > 1 every sample in the row. Comparisons are made on the host.

    Attributes:
        first: (B, groups) norm of the first f(z), zeros until it is set.
        whole_rows: whether the norms are the Euclidean norms of whole rows.
    """

    def __init__(self, stop: Stop, layout: Layout, joint: int = 1, first: np.ndarray | float = 0.0) -> None:
        self.stop, self.layout, self.joint, self.first = stop, layout, joint, first
        self.widths = layout.widths if stop.norm == "leaf" and len(layout.widths) > 1 else None
        self.grouped = joint > 1 or self.widths is not None
        self.whole_rows = not self.grouped and stop.norm in ("euclidean", "leaf")
        self.smallest = layout.eps**0.5  # share of the first ||f(z)|| below which a state counts as zero
        self.tiny = _SAFE[layout.dtype]

    def measure(self, flat: Flat, *, scaled: bool = False, overwrite: bool = False) -> Tensor:
        """Norms of the groups of every row: (B,) if a row is one group, else (B, groups).

        `scaled` divides by the largest entry first, which keeps squares in the range of the dtype; `overwrite` divides
        `flat` in place.
        """
        x = flat.reshape(flat.shape[0] * self.joint, -1) if self.joint > 1 else flat
        if self.widths is None:
            sizes = _norm(x, self.stop.norm, scaled, overwrite)
        else:
            parts = x.split(list(self.widths), dim=1)
            sizes = torch.stack([_norm(part, self.stop.norm, scaled) for part in parts], dim=1)
        return sizes.reshape(flat.shape[0], self.joint * len(self.widths or (1,))) if self.grouped else sizes

    def compare(self, r: np.ndarray, s: np.ndarray, first: np.ndarray | float) -> tuple[np.ndarray, ...]:
        """(residual, size, tolerance) of every row, (B,) each, from the norms r of f(z) - z and s of f(z)."""
        rtol, atol = self.stop.rtol, self.stop.atol
        with np.errstate(all="ignore"):
            size = np.fmax(s, self.smallest * first)
            if not self.grouped:
                return r, s, atol + rtol * size
            if not rtol:
                return r.max(axis=1, initial=0), s.max(axis=1, initial=0), np.full(len(r), atol)
            relative = np.where(r == 0, 0.0, r / (size + atol / rtol))
            return relative.max(axis=1, initial=0), np.ones(len(r)), np.full(len(r), rtol)

    def stopped(self, z: Flat, fz: Flat) -> Tensor | None:
        """(rows,) whether `Stop.when` is True for all samples of a row; None if no `when` is given.

        Raises:
            ValueError: `when` does not return one boolean per sample.
        """
        if self.stop.when is None:
            return None
        with torch.no_grad():
            rows, numbers = z.shape[0] * self.joint, z.shape[1] // self.joint
            apart = [self.layout.unpack(t.detach().reshape(rows, numbers)) for t in (z, fz)]
            stopped = self.stop.when(*apart)
        if not isinstance(stopped, Tensor) or stopped.dtype != torch.bool or stopped.shape != (rows,):
            given = f"{stopped.dtype} of shape {tuple(stopped.shape)}" if isinstance(stopped, Tensor) else repr(stopped)
            raise ValueError(
                f"Stop.when must return a bool tensor of shape ({rows},), a value per sample, got {given}."
            )
        return stopped.reshape(z.shape[0], self.joint).all(dim=1)

    def samples(self, numbers: np.ndarray) -> np.ndarray:
        """`numbers` of (B, groups) as (B joint,), or (B joint, leaves) with ``norm="leaf"``: a row for every sample."""
        return numbers.reshape(-1, len(self.widths)) if self.widths is not None else numbers.reshape(-1)

    def apart(self) -> "Criterion":
        """The same criterion with a row for every sample."""
        first = self.samples(self.first) if isinstance(self.first, np.ndarray) else self.first
        return Criterion(self.stop, self.layout, 1, first)

    def unsafe(self, sizes: np.ndarray) -> np.ndarray:
        """Where squares in plain norms may have left the range of the dtype."""
        return ~((sizes >= self.tiny) & (sizes <= 1 / self.tiny)) & (self.stop.norm != "max")


def classify(residual: np.ndarray, tolerance: np.ndarray) -> np.ndarray:
    """(B,) `Result` codes: CONVERGED within the tolerance, NONFINITE for NaN and infinity, MAX_EVALS for the rest."""
    code = np.where(residual <= tolerance, np.int8(Result.CONVERGED), np.int8(Result.MAX_EVALS))
    return np.where(np.isfinite(residual), code, np.int8(Result.NONFINITE))


def require_tolerance_alone(stop: Stop, function: str) -> None:
    """Refuse what a function that compares Euclidean residuals with `rtol` and `atol` would ignore.

    Raises:
        ValueError: `stop` has another norm, or a test of the caller.
    """
    if stop.norm != "euclidean" or stop.when is not None:
        name = "norm" if stop.norm != "euclidean" else "when"
        raise ValueError(
            f"{function} tests Euclidean residuals against rtol and atol alone: leave Stop.{name} at its default, or "
            "use fixed_point."
        )


def classify_count(fixed: Bool[Tensor, " B"], failed: Bool[Tensor, " B"]) -> Tensor:
    """(B,) `Result` codes of a solve without a tolerance, whose value is f(z) of the last evaluation.

    `fixed` marks samples with f(z) = z. In a batch of one sample its value is that z, so it has converged. In a larger
    batch the other samples have moved in the same step, and f may couple them.
    """
    alone = fixed.shape[0] == 1  # len() would fix the size of a batch that torch.export keeps open
    ended = torch.where(fixed, int(Result.CONVERGED if alone else Result.MAX_EVALS), int(Result.MAX_EVALS))
    return torch.where(failed, int(Result.NONFINITE), ended).to(torch.int8)


def _norm(x: Flat, kind: Norm, scaled: bool, overwrite: bool = False) -> PerSample:
    ord = torch.inf if kind == "max" else 2
    sizes = scaled_norm(x, ord, overwrite=overwrite) if scaled else torch.linalg.vector_norm(x, ord=ord, dim=1)
    return sizes * x.shape[1] ** -0.5 if kind == "rms" else sizes
