"""Maps of each kind at any size, with the conditions that hold for them: (f, z0, args, stop, conditions)."""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from implicit import Stop
from implicit.diagnostics import Condition

F64 = torch.float64
C = Condition


@dataclass
class Known:
    """A map with the conditions that hold for it."""

    f: Callable[..., Tensor]
    z0: Tensor
    args: tuple[Any, ...]
    conditions: set[Condition]
    stop: Stop = field(default_factory=Stop)


def _orthogonal(n: int) -> Callable[[Tensor], Tensor]:
    """A symmetric orthogonal matrix, as a reflection: z - 2 v <v, z>."""
    v = torch.randn(n, generator=torch.Generator().manual_seed(7), dtype=F64)
    v = v / v.norm()

    def reflect(z: Tensor) -> Tensor:
        return z if n == 1 else z - 2 * (z @ v.to(z.dtype)).unsqueeze(1) * v.to(z.dtype)

    return reflect


def _center(n: int, batch: int, dtype: torch.dtype) -> Tensor:
    """The fixed point, away from 0."""
    return 1 + torch.randn(batch, n, generator=torch.Generator().manual_seed(8), dtype=F64).abs().to(dtype)


def symmetric(values: Tensor, n: int) -> Callable[[Tensor, Tensor], Tensor]:
    """c + Q diag(values) Q (z - c): eigenvalues `values`, repeated to n."""
    q = _orthogonal(n)
    whole = values.repeat(-(-n // len(values)))[:n]
    return lambda z, c: c + q(q(z - c) * whole.to(z.dtype))


def contractive(n: int, batch: int, dtype: torch.dtype) -> Known:
    linear = symmetric(torch.tensor([0.6, -0.5, 0.3, 0.1], dtype=F64), n)
    c = _center(n, batch, dtype)
    return Known(lambda z, c: c + torch.tanh(linear(z, c) - c), torch.zeros_like(c), (c,), {C.CONTRACTIVE})


def slow(n: int, batch: int, dtype: torch.dtype) -> Known:
    c = _center(n, batch, dtype)
    f = symmetric(torch.tensor([0.95, 0.5, -0.9], dtype=F64), n)
    return Known(f, torch.zeros_like(c), (c,), {C.CONTRACTIVE})


def oscillating(n: int, batch: int, dtype: torch.dtype) -> Known:
    c = _center(n, batch, dtype)
    f = symmetric(torch.tensor([-1.6, 0.4, -0.7], dtype=F64), n)
    return Known(f, torch.zeros_like(c), (c,), {C.OSCILLATING})


def rotating(n: int, batch: int, dtype: torch.dtype) -> Known:
    """Complex pairs 1.2 exp(+-100 degrees i)."""
    c = _center(n, batch, dtype)
    turn = torch.tensor(1.7453292519943295, dtype=F64)
    block = 1.2 * torch.stack([torch.stack([turn.cos(), -turn.sin()]), torch.stack([turn.sin(), turn.cos()])])

    def f(z: Tensor, c: Tensor) -> Tensor:
        return c + ((z - c).unflatten(1, (-1, 2)) @ block.to(z.dtype)).flatten(1)

    return Known(f, torch.zeros_like(c), (c,), {C.OSCILLATING})


def expanding(n: int, batch: int, dtype: torch.dtype) -> Known:
    c = _center(n, batch, dtype)
    f = symmetric(torch.tensor([1.8, 0.3, -0.5], dtype=F64), n)
    return Known(f, torch.zeros_like(c), (c,), {C.EXPANDING})


def non_normal(n: int, batch: int, dtype: torch.dtype) -> Known:
    """Blocks ((0.5, 20), (0, 0.4))."""
    c = _center(n, batch, dtype)
    block = torch.tensor([[0.5, 0.0], [20.0, 0.4]], dtype=F64)

    def f(z: Tensor, c: Tensor) -> Tensor:
        return c + ((z - c).unflatten(1, (-1, 2)) @ block.to(z.dtype)).flatten(1)

    return Known(f, torch.zeros_like(c), (c,), {C.CONTRACTIVE, C.NON_NORMAL})


def kinked(n: int, batch: int, dtype: torch.dtype) -> Known:
    q, c = _orthogonal(n), _center(n, batch, dtype)
    return Known(lambda z, c: c + 0.5 * q(q(z - c).abs()), torch.zeros_like(c), (c,), {C.CONTRACTIVE, C.KINKED})


def noisy(n: int, batch: int, dtype: torch.dtype) -> Known:
    dropout = torch.nn.Dropout(0.3)
    c = _center(n, batch, dtype)
    return Known(lambda z, c: 0.5 * dropout(z) + c, torch.zeros_like(c), (c,), {C.NOISY})


def coupled(n: int, batch: int, dtype: torch.dtype) -> Known:
    known = contractive(n, batch, dtype)
    return Known(
        lambda z, c: 0.8 * known.f(z, c) + 0.1 * z.mean(dim=0), known.z0, known.args, {C.CONTRACTIVE, C.COUPLED}
    )


def several(n: int, batch: int, dtype: torch.dtype) -> Known:
    z0 = torch.full((batch, n), 0.7, dtype=dtype)
    return Known(lambda z: torch.tanh(2 * z), z0, (), {C.CONTRACTIVE, C.SEVERAL_FIXED_POINTS})


def at_start(n: int, batch: int, dtype: torch.dtype) -> Known:
    """tanh layers without an input: 0 is the fixed point and the start."""
    linear = symmetric(torch.tensor([0.6, -0.5, 0.3, 0.1], dtype=F64), n)
    z0 = torch.zeros(batch, n, dtype=dtype)
    return Known(lambda z: torch.tanh(linear(z, torch.zeros_like(z))), z0, (), {C.CONTRACTIVE, C.STARTS_AT_EQUILIBRIUM})


def at_center(n: int, batch: int, dtype: torch.dtype) -> Known:
    known = contractive(n, batch, dtype)
    return Known(known.f, known.args[0].clone(), known.args, {C.CONTRACTIVE, C.STARTS_AT_EQUILIBRIUM})


def below_rounding(n: int, batch: int, dtype: torch.dtype) -> Known:
    known = contractive(n, batch, dtype)
    known.stop = Stop(rtol=0.1 * torch.finfo(dtype).eps)
    known.conditions.add(C.BELOW_ROUNDING)
    return known


MAPS = [
    contractive,
    slow,
    oscillating,
    rotating,
    expanding,
    non_normal,
    kinked,
    noisy,
    coupled,
    several,
    at_start,
    at_center,
    below_rounding,
]
EVEN = {rotating, non_normal}  # of 2x2 blocks
