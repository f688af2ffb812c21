"""Fourteen problems z = f(z) with a known answer, for tests of solvers.

Every map is per sample: z is (B, N) and sample b depends on row b alone. The answer is found in float64 by Newton's
method on the dense Jacobian (linear maps: one solve), to a relative residual below 1e-13. Each problem also has the
spectrum of the Jacobian at the answer. No solver of the package is used.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cache
from typing import Any

import torch
from jaxtyping import Complex, Float
from torch import Tensor

F64 = torch.float64


@dataclass
class Problem:
    """A map with its fixed point, counting its own evaluations.

    Call it as f: ``fixed_point(problem, problem.z0, *problem.args)``.

    Attributes:
        name: the name of the problem, as in `problem(name)`.
        map: f(z, *args), z ``(B, N)``.
        z0: ``(B, N)`` the starting state.
        args: tensors with one row per sample, for maps that differ between samples.
        solution: ``(B, N)`` the fixed point, in float64, exact to 1e-12.
        spectrum: ``(B, N)`` eigenvalues of df/dz at the solution.
        calls: evaluations of f so far.
        samples: evaluations of single samples so far.
    """

    name: str
    map: Callable[..., Tensor]
    z0: Float[Tensor, "B N"]
    solution: Float[Tensor, "B N"]
    spectrum: Complex[Tensor, "B N"]
    args: tuple[Tensor, ...] = ()
    calls: int = field(default=0, compare=False)
    samples: int = field(default=0, compare=False)

    def __call__(self, z: Tensor, *args: Tensor) -> Tensor:
        """f(z, *args), counted."""
        self.calls += 1
        self.samples += z.shape[0]
        return self.map(z, *args)

    @property
    def radius(self) -> Float[Tensor, " B"]:
        """(B,) spectral radius of the Jacobian at the solution."""
        return self.spectrum.abs().amax(dim=1)

    def residual(self, z: Float[Tensor, "B N"]) -> Float[Tensor, " B"]:
        """(B,) ||f(z) - z|| / ||f(z)||, in float64 whatever z's dtype; not counted."""
        z = z.to(F64)
        fz = self.map(z, *(a.to(F64) for a in self.args))
        return (fz - z).norm(dim=1) / fz.norm(dim=1)

    def to(self, dtype: torch.dtype) -> "Problem":
        """The same problem for states of another dtype, with its counters at 0."""
        args = tuple(a.to(dtype) for a in self.args)
        return Problem(self.name, self.map, self.z0.to(dtype), self.solution, self.spectrum, args)


def problems(dtype: torch.dtype = F64) -> list[Problem]:
    """All fourteen problems, with their counters at 0."""
    return [problem(name, dtype) for name in _MAKERS]


def problem(name: str, dtype: torch.dtype = F64) -> Problem:
    """The problem of this name.

    Raises:
        ValueError: there is no problem of that name.
    """
    if name not in _MAKERS:
        raise ValueError(f"There is no problem {name!r}; choose one of {', '.join(_MAKERS)}.")
    return _solved(name).to(dtype)


@cache
def _solved(name: str) -> Problem:
    """The problem with its answer, by Newton from a guess near it."""
    map, z0, guess, args = _MAKERS[name]()
    z = guess.clone()
    eye = torch.eye(z.shape[1], dtype=F64)
    for _ in range(50):
        r = map(z, *args) - z
        if float((r.norm(dim=1) / z.norm(dim=1)).max()) < 1e-15:
            break
        z = z + torch.linalg.solve(eye - jacobian(map, z, args), r)
    spectrum = torch.linalg.eigvals(jacobian(map, z, args))
    return Problem(name, map, z0, z, spectrum, args)


def jacobian(
    map: Callable[..., Tensor], z: Float[Tensor, "B N"], args: tuple[Tensor, ...] = ()
) -> Float[Tensor, "B N N"]:
    """Dense df/dz of every sample."""
    rows = [torch.autograd.functional.jacobian(lambda x, b=b: _row(map, x, args, b), z[b]) for b in range(len(z))]
    return torch.stack(rows)  # pyright: ignore[reportArgumentType]


def _row(map: Callable[..., Tensor], x: Tensor, args: tuple[Tensor, ...], b: int) -> Tensor:
    return map(x.unsqueeze(0), *(a[b : b + 1] for a in args)).squeeze(0)


Made = tuple[Callable[..., Tensor], Tensor, Tensor, tuple[Tensor, ...]]


def _randn(seed: int, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=F64)


def _orthogonal(seed: int, n: int) -> Tensor:
    return torch.linalg.qr(_randn(seed, n, n))[0]


def _linear(matrix: Tensor, seed: int, batch: int = 4) -> Made:
    n = len(matrix)
    b = _randn(seed, batch, n)
    answer = torch.linalg.solve(torch.eye(n, dtype=F64) - matrix, b.T).T

    def f(z: Tensor, b: Tensor) -> Tensor:
        return z @ matrix.to(z).T + b

    return f, torch.zeros(batch, n, dtype=F64), answer, (b,)


def _symmetric(radius: float, n: int = 48) -> Made:
    """Symmetric, eigenvalues evenly spread over [-radius, radius]."""
    q = _orthogonal(1, n)
    return _linear(q @ torch.diag(torch.linspace(-radius, radius, n, dtype=F64)) @ q.T, 2)


def _nonnormal(n: int = 32) -> Made:
    """A Jordan-like contraction: 0.5 on the diagonal, 0.6 above it; its powers grow before they shrink."""
    return _linear(0.5 * torch.eye(n, dtype=F64) + 0.6 * torch.diag(torch.ones(n - 1, dtype=F64), 1), 3)


def _tanh(gain: float = 1.0, n: int = 64, batch: int = 4) -> Made:
    """Two tanh layers with input injection."""
    w1, w2 = gain * _orthogonal(4, n), gain * _orthogonal(5, n)
    x = _randn(6, batch, n)

    def f(z: Tensor, x: Tensor) -> Tensor:
        return torch.tanh(torch.tanh(z @ w1.to(z)) @ w2.to(z) + x)

    start = torch.zeros(batch, n, dtype=F64)
    return f, start, _iterated(f, start, (x,), 200), (x,)


def _repelling(n: int = 32, batch: int = 4) -> Made:
    """tanh(z) W + x with eigenvalues of W in [-4.4, 0.4]: Picard cannot approach its fixed point."""
    q = _orthogonal(7, n)
    w = q @ torch.diag(torch.linspace(-4.4, 0.4, n, dtype=F64)) @ q.T
    x = 0.3 * _randn(8, batch, n)

    def f(z: Tensor, x: Tensor) -> Tensor:
        return torch.tanh(z) @ w.to(z) + x

    start = torch.zeros(batch, n, dtype=F64)
    return f, start, _iterated(lambda z, x: 0.7 * z + 0.3 * f(z, x), start, (x,), 400), (x,)


def _one_hard(n: int = 48, batch: int = 16) -> Made:
    """Symmetric linear maps, one per sample: fifteen of spectral radius 0.3, one of 0.995."""
    q = _orthogonal(9, n)
    radius = torch.full((batch,), 0.3, dtype=F64)
    radius[batch // 2] = 0.995
    a = q @ torch.diag_embed(radius[:, None] * torch.linspace(-1, 1, n, dtype=F64)) @ q.T
    b = _randn(10, batch, n)
    answer = torch.linalg.solve(torch.eye(n, dtype=F64) - a, b)

    def f(z: Tensor, a: Tensor, b: Tensor) -> Tensor:
        return torch.baddbmm(b.unsqueeze(2), a, z.unsqueeze(2)).squeeze(2)

    return f, torch.zeros(batch, n, dtype=F64), answer, (a, b)


def _bratu(side: int = 15) -> Made:
    """-Laplace u = c exp(u) on the unit square, 0 on its edge, as u = c (-Laplace)^-1 exp(u)."""
    one = torch.eye(side, dtype=F64)
    second = 2 * one - torch.diag(torch.ones(side - 1, dtype=F64), 1) - torch.diag(torch.ones(side - 1, dtype=F64), -1)
    inverse = torch.linalg.inv((torch.kron(second, one) + torch.kron(one, second)) * (side + 1) ** 2)
    c = torch.tensor([[1.0], [3.0], [4.5]], dtype=F64)

    def f(u: Tensor, c: Tensor) -> Tensor:
        return c * (torch.exp(u) @ inverse.to(u))

    start = torch.zeros(len(c), side * side, dtype=F64)
    return f, start, _iterated(f, start, (c,), 200), (c,)


def _chandrasekhar(c: float, n: int = 100) -> Made:
    """H = 1 / (1 - c/2 int_0^1 m H(v) / (m + v) dv), by the midpoint rule."""
    m = (torch.arange(n, dtype=F64) + 0.5) / n
    kernel = c / (2 * n) * m[:, None] / (m[:, None] + m[None, :])

    def f(h: Tensor) -> Tensor:
        return 1 / (1 - h @ kernel.to(h).T)

    start = torch.ones(1, n, dtype=F64)
    return f, start, _iterated(f, start, (), 200), ()


def _adaln(tokens: int = 8, width: int = 16, batch: int = 2) -> Made:
    """A transformer block whose layer norms are shifted, scaled and gated by a condition, with input injection."""
    d = width
    names = {"qkv": (d, 3 * d), "out": (d, d), "up": (d, 4 * d), "down": (4 * d, d), "inject": (2 * d, d)}
    w = {k: _randn(20 + i, *s) / math.sqrt(s[0]) for i, (k, s) in enumerate(names.items())}
    x, condition = _randn(30, batch, tokens * d), 0.4 * _randn(31, batch, 6, d)

    def f(z: Tensor, x: Tensor, condition: Tensor) -> Tensor:
        p = {k: t.to(z) for k, t in w.items()}
        z, x = z.unflatten(1, (tokens, d)), x.unflatten(1, (tokens, d))
        shift1, scale1, gate1, shift2, scale2, gate2 = condition.unsqueeze(2).unbind(1)
        h = torch.cat((0.5 * z, x), dim=2) @ p["inject"]
        q, k, v = (_normed(h) * (1 + scale1) + shift1).matmul(p["qkv"]).unflatten(2, (3, 2, d // 2)).unbind(2)
        scores = torch.einsum("bthd,bshd->bhts", q, k) / math.sqrt(d // 2)
        mixed = torch.einsum("bhts,bshd->bthd", scores.softmax(dim=3), v).flatten(2)
        h = h + gate1 * (mixed @ p["out"])
        up = torch.nn.functional.gelu((_normed(h) * (1 + scale2) + shift2) @ p["up"])
        return _normed(h + gate2 * (up @ p["down"])).flatten(1)

    start = torch.zeros(batch, tokens * d, dtype=F64)
    return f, start, _iterated(f, start, (x, condition), 500), (x, condition)


def _normed(h: Tensor) -> Tensor:
    return torch.nn.functional.layer_norm(h, h.shape[-1:])


def _cosine() -> Made:
    """z = cos z, one number per sample; three starts."""
    start = torch.tensor([[0.0], [1.0], [2.0]], dtype=F64)
    return torch.cos, start, torch.full((3, 1), 0.7390851332151607, dtype=F64), ()


def _iterated(f: Callable[..., Tensor], z: Tensor, args: tuple[Any, ...], times: int) -> Tensor:
    """f applied `times` times, a first guess for Newton's method."""
    for _ in range(times):
        z = f(z, *args)
    return z


_MAKERS: dict[str, Callable[[], Made]] = {
    "linear 0.5": lambda: _symmetric(0.5),
    "linear 0.9": lambda: _symmetric(0.9),
    "linear 0.99": lambda: _symmetric(0.99),
    "linear 0.999": lambda: _symmetric(0.999),
    "non-normal": _nonnormal,
    "tanh layers": _tanh,
    "repelling": _repelling,
    "one hard of 16": _one_hard,
    "Bratu": _bratu,
    "H 0.5": lambda: _chandrasekhar(0.5),
    "H 0.99": lambda: _chandrasekhar(0.99),
    "H 1-1e-6": lambda: _chandrasekhar(1 - 1e-6),
    "adaLN block": _adaln,
    "cosine": _cosine,
}
