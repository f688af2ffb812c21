"""A published fixed-point problem: map, start, published stopping test, answer and source.

Setting: z is a (B, N) matrix with one system per row; row b of f(z) depends only on row b of z and of `args`. The
problem is z = f(z). The residual of a row is r = f(z) - z.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor

F64 = torch.float64


@dataclass(frozen=True)
class Problem:
    """A map z = f(z, *args) of a public collection.

    Usage: ``fixed_point(problem.f, problem.z0, *problem.args)``. Constants of f have the dtype of z; `to` gives the
    problem in another dtype.

    Attributes:
        name: the name in tables.
        f: f(z, *args), z ``(B, N)``; differentiable if the mathematical map is.
        z0: ``(B, N)`` the published start.
        source: where the problem is published.
        args: tensors with one row per sample, for maps that differ between samples.
        rtol: relative tolerance of the stopping test, on ||r|| <= atol + rtol ||f(z)||.
        atol: absolute tolerance of the stopping test.
        norm: the norm of that test.
        answer: computes the fixed point ``(B, N)`` by another method than fixed-point iteration; None if there is no
            such method, and only the residual can be checked.
        accept: decides whether a point of zero residual is a solution of the problem; None: every such point is.
    """

    name: str
    f: Callable[..., Tensor]
    z0: Tensor
    source: str
    args: tuple[Tensor, ...] = ()
    rtol: float = 1e-8
    atol: float = 0.0
    norm: Literal["euclidean", "max"] = "euclidean"
    answer: Callable[[], Tensor] | None = None
    accept: Callable[[Tensor], bool] | None = None

    def to(self, dtype: torch.dtype) -> "Problem":
        """The same problem for states of another dtype."""
        return replace(self, z0=self.z0.to(dtype), args=tuple(a.to(dtype) for a in self.args))

    def excess(self, z: Tensor, fz: Tensor) -> Tensor:
        """``(B,)`` residual over its tolerance, in float64: at most 1 where the stopping test is met."""
        order = 2 if self.norm == "euclidean" else float("inf")
        z, fz = z.to(F64), fz.to(F64)
        size = torch.linalg.vector_norm(fz - z, ord=order, dim=1)
        return size / (self.atol + self.rtol * torch.linalg.vector_norm(fz, ord=order, dim=1))

    def residual(self, z: Tensor) -> Tensor:
        """``(B,)`` residual over its tolerance at z, with f evaluated in float64."""
        with torch.no_grad():
            z = z.to(F64)
            return self.excess(z, self.f(z, *(a.to(F64) for a in self.args)))


def like(t: Tensor, z: Tensor) -> Tensor:
    """The constant t in the dtype and on the device of z."""
    return t.to(z)


def row(*numbers: float) -> Tensor:
    """One system of the given numbers: ``(1, N)`` in float64."""
    return torch.tensor([numbers], dtype=F64)


def generator(seed: int) -> torch.Generator:
    """A generator with this seed, for the data of one problem."""
    return torch.Generator().manual_seed(seed)


def normal(seed: int, *shape: int) -> Tensor:
    """Standard normal numbers in float64."""
    return torch.randn(*shape, generator=generator(seed), dtype=F64)


def uniform(seed: int, *shape: int) -> Tensor:
    """Numbers uniform on [0, 1) in float64."""
    return torch.rand(*shape, generator=generator(seed), dtype=F64)


def bisect(function: Callable[[float], float], low: float, high: float) -> float:
    """The root, to rounding, of a function that has different signs at `low` and `high`."""
    positive = function(high) > 0
    for _ in range(200):
        middle = (low + high) / 2
        if (function(middle) > 0) == positive:
            high = middle
        else:
            low = middle
    return (low + high) / 2
