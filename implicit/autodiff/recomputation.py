"""Evaluation of a function again in the backward pass, with a test that it is the same function as before.

Setting: a checkpoint runs a function a second time. For each row x of every tensor in the first result two numbers are
recorded, ||x|| and w^T x with w_i = cos(i^2); the second run has to give the same numbers up to rounding. The norm
alone does not distinguish the outputs of a normalization layer. If a row holds several tensors of a state, each tensor
has its own two numbers, since a change of a small tensor would be lost beside a large one.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from functools import reduce
from typing import Any

import torch
from torch import Tensor

from implicit.pytree import tensors
from implicit.torch_internals import is_abstract

CHANGED = (
    "f is another map in the backward pass than in the forward pass: a second evaluation at the solution differs from "
    "the first. Something that f reads has changed since the solve: a loop variable of a lambda, an attribute of a "
    "module, a buffer, a weight that was written in place, or the parameters of a torch.func.functional_call that has "
    "ended. Pass it to fixed_point through `args`, or bind it when f is made (lambda z, x=x: ...)."
)
_ROUNDING = 1e3  # two values of one function may differ by this many eps ||x|| in float32 and float64
_COARSE = 8.0  # likewise in narrower dtypes
_INEXACT = ContextVar("inexact", default=False)


@contextmanager
def repeated_inexactly() -> Iterator[None]:
    """Solves in the block record no value to compare: a second run will have an argument that differs by rounding."""
    token = _INEXACT.set(True)
    try:
        yield
    finally:
        _INEXACT.reset(token)


def record(image: Tensor, widths: tuple[int, ...] = ()) -> Tensor | None:
    """The `summary` of a value, with which a second evaluation is compared; None within `repeated_inexactly`."""
    return None if _INEXACT.get() else summary(image, widths)


def require_same_image(again: Tensor, recorded: Tensor, eps: float, widths: tuple[int, ...] = ()) -> None:
    """Compare a second value of a function, whose relative rounding error is eps, with the `summary` of the first.

    Raises:
        RuntimeError: the values differ, so the function has changed.
    """
    require_same_summary(summary(again, widths), recorded, eps)


def require_same_summary(now: Tensor, recorded: Tensor, eps: float) -> None:
    """Compare the summaries of two values of a function.

    Raises:
        RuntimeError: the values differ, so the function has changed.
    """
    if is_abstract(now):
        return
    allowed = _allowed(max(eps, torch.finfo(recorded.dtype).eps)) * recorded[..., :1]
    if bool(((now - recorded).abs() > allowed).any()):
        raise RuntimeError(CHANGED)


def require_same_derivatives(now: list[Tensor | None], then: list[Tensor | None], eps: float) -> None:
    """Compare the derivatives of two evaluations of a function, whose relative rounding error is eps.

    Each derivative may differ by the rounding of the largest, since a single one may be zero but for rounding, as that
    of a bias before a normalization. A transform may add an axis to a tensor, whose derivatives are not compared then.

    Raises:
        RuntimeError: they differ, so the function has changed.
    """
    if any((a is None) != (b is None) for a, b in zip(now, then, strict=True)):
        raise RuntimeError(CHANGED)
    given = zip(now, then, strict=True)
    pairs = [(a, b) for a, b in given if a is not None and b is not None and a.shape == b.shape and b.numel()]
    if not pairs or any(is_abstract(a) for a, _ in pairs):
        return
    eps = max(eps, *(torch.finfo(b.dtype).eps for _, b in pairs))
    largest = reduce(torch.maximum, [_largest(b) for _, b in pairs])
    gap = reduce(torch.maximum, [_largest(a - b) for a, b in pairs])
    if bool(gap > _allowed(eps) * largest):
        raise RuntimeError(CHANGED)


def _largest(t: Tensor) -> Tensor:
    """The largest size of a number of t, in float32 at least, where tolerances do not underflow."""
    size = t.abs().max()
    return size.to(torch.promote_types(size.dtype, torch.float32))


def _allowed(eps: float) -> float:
    """The largest relative difference of two values of one function with rounding error eps."""
    return (_ROUNDING if eps < 1e-6 else _COARSE) * eps


@dataclass(frozen=True)
class Segments:
    """Segments of a solve; autograd keeps only the input of each segment.

    Attributes:
        length: number of evaluations in a segment.
        compare: wraps the first segment, so that its second run raises if it reads other tensors than the first run.
    """

    length: int
    compare: Callable[[Callable[..., Any]], Callable[..., Any]]


class SameValue:
    """A function that is run twice; the second run raises if it gives another value.

    Args:
        function: returns a tensor or a nest of tensors.
        parts: number of entries of a returned tuple that are compared, from the first; None: all.
    """

    def __init__(self, function: Callable[..., Any], parts: int | None = None) -> None:
        self.function, self.parts = function, parts
        self.recorded: list[Tensor] = []

    def __call__(self, *args: Any) -> Any:
        """The value of the function.

        Raises:
            RuntimeError: the value differs from that of the first run.
        """
        out = self.function(*args)
        now = tensors(out if self.parts is None else out[: self.parts])
        for t, recorded in zip(now, self.recorded, strict=False):
            require_same_image(t, recorded, 0.0)
        self.recorded = self.recorded or [summary(t) for t in now]
        return out


def summary(t: Tensor, widths: tuple[int, ...] = ()) -> Tensor:
    """(rows, 2), ||x|| and w^T x of every row x; with several `widths` (rows, parts, 2), of parts of so many columns.

    Zeros for a tensor of integers or booleans.
    """
    t = t.detach()
    if not (t.is_floating_point() or t.is_complex()):
        return torch.zeros(1, 2, device=t.device)
    t = torch.view_as_real(t) if t.is_complex() else t
    rows = t.flatten(1) if t.ndim > 1 else t.reshape(1, -1)
    if len(widths) > 1:
        return torch.stack([summary(part) for part in rows.split(list(widths), dim=1)], dim=1)
    return torch.stack((torch.linalg.vector_norm(rows, dim=1), rows @ fixed_weights(rows)), dim=1)


def fixed_weights(rows: Tensor) -> Tensor:
    """The vector w, in the dtype of the rows x and on their device."""
    return torch.arange(rows.shape[1], dtype=torch.float32, device=rows.device).square().cos().to(rows.dtype)
