"""Twenty-three classical systems F(x) = 0, posed as fixed points z = z - F(z).

They are the problems of test_nonlin (J. Burkardt) and SciML's NonlinearProblemLibrary.jl: those of Moré, Garbow and
Hillstrom, ACM Trans. Math. Softw. 7(1), 1981 (MGH below), and others from textbooks. Each problem is one system with
the state (1, n); the stopping test is ||F(x)||_2 <= tolerance.

Watson's system follows the equations of MGH (problem 20, the gradient of its sum of squares halved). The code of
NonlinearProblemLibrary.jl has x_1^2 and x_2^2 instead of x_1 x_2 and x_1^2, and adds to an output array that it does
not set to zero. The counts published with that code are therefore for another function.
"""

import math
from collections.abc import Callable

import torch
from torch import Tensor

from benchmarks.problems.problem import F64, Problem, row

Columns = Callable[[Tensor], Tensor]
SOURCE = "NonlinearProblemLibrary.jl (test_nonlin), problem {}"


def systems(atol: float = 1e-8) -> list[Problem]:
    """The twenty-three systems in the published order, with the stopping test ||F||_2 <= atol.

    Raises:
        ValueError: atol is not positive.
    """
    if not atol > 0:
        raise ValueError(f"atol must be positive, got {atol}.")
    made = []
    for number, (name, (function, start, solution)) in enumerate(_SYSTEMS.items(), 1):
        answer = None if solution is None else (lambda x=solution: x)
        source = SOURCE.format(number)
        made.append(Problem(name, _posed(function), start, source, rtol=0.0, atol=atol, answer=answer))
    return made


def _posed(function: Columns) -> Columns:
    """z - F(z)."""
    return lambda z: z - function(z)


def _stack(*columns: Tensor) -> Tensor:
    return torch.stack(columns, dim=1)


def _index(z: Tensor) -> Tensor:
    """1, ..., n in the dtype of z."""
    return torch.arange(1, z.shape[1] + 1, dtype=z.dtype, device=z.device)


def _rosenbrock(x: Tensor) -> Tensor:
    return torch.cat((1 - x[:, :1], 10 * (x[:, 1:] - x[:, :-1] ** 2)), dim=1)


def _powell_singular(x: Tensor) -> Tensor:
    a, b, c, d = x.unbind(1)
    return _stack(a + 10 * b, math.sqrt(5) * (c - d), (b - 2 * c) ** 2, math.sqrt(10) * (a - d) ** 2)


def _powell_badly_scaled(x: Tensor) -> Tensor:
    a, b = x.unbind(1)
    return _stack(1e4 * a * b - 1, torch.exp(-a) + torch.exp(-b) - 1.0001)


def _wood(x: Tensor) -> Tensor:
    a, b, c, d = x.unbind(1)
    p, q = b - a**2, d - c**2
    return _stack(
        -200 * a * p - (1 - a),
        200 * p + 20.2 * (b - 1) + 19.8 * (d - 1),
        -180 * c * q - (1 - c),
        180 * q + 20.2 * (d - 1) + 19.8 * (b - 1),
    )


def _helical_valley(x: Tensor) -> Tensor:
    a, b, c = x.unbind(1)
    # angle in turns: atan(b/a) / 2 pi, half a turn more where a < 0, a quarter on the axis a = 0
    arc = torch.atan(b / torch.where(a == 0, torch.ones_like(a), a)) / (2 * math.pi)
    turns = torch.where(a == 0, 0.25 * torch.sign(b), torch.where(a < 0, arc + 0.5, arc))
    return _stack(10 * (c - 10 * turns), 10 * ((a**2 + b**2).sqrt() - 1), c)


def _watson(x: Tensor) -> Tensor:
    j = _index(x)
    t = (torch.arange(1, 30, dtype=F64) / 29).to(x).unsqueeze(1)
    # r_i = p'(t_i) - p(t_i)^2 - 1 for the polynomial p of coefficients x
    slope = x[:, 1:] @ ((j[1:] - 1) * t ** (j[1:] - 2)).T
    value = x @ (t ** (j - 1)).T
    rest = slope - value**2 - 1
    # the gradient of sum r_i^2 / 2
    both = (j - 1) * t ** (j - 2).clamp(min=0) - 2 * value.unsqueeze(2) * t ** (j - 1)
    gradient = (rest.unsqueeze(2) * both).sum(1)
    a, b = x[:, 0], x[:, 1]
    last = b - a**2 - 1
    return torch.cat((_stack(a - 2 * a * last, last) + gradient[:, :2], gradient[:, 2:]), dim=1)


def _chebyquad(x: Tensor) -> Tensor:
    n = x.shape[1]
    # means of the Chebyshev polynomials T_1, ..., T_n by their recurrence, less their integrals over [-1, 1] halved
    before, now, means = torch.ones_like(x), x, []
    for i in range(1, n + 1):
        means.append(now.mean(1) + (1 / (i * i - 1) if i % 2 == 0 else 0))
        before, now = now, 2 * x * now - before
    return _stack(*means)


def _brown_almost_linear(x: Tensor) -> Tensor:
    n = x.shape[1]
    return torch.cat((x[:, :-1] + x.sum(1, keepdim=True) - (n + 1), x.prod(1, keepdim=True) - 1), dim=1)


def _shifted(x: Tensor) -> tuple[Tensor, Tensor]:
    """x_{k-1} and x_{k+1}, 0 beyond the ends."""
    zero = torch.zeros_like(x[:, :1])
    return torch.cat((zero, x[:, :-1]), dim=1), torch.cat((x[:, 1:], zero), dim=1)


def _discrete_boundary_value(x: Tensor) -> Tensor:
    h = 1 / (x.shape[1] + 1)
    left, right = _shifted(x)
    return 2 * x + 0.5 * h**2 * (x + _index(x) * h + 1) ** 3 - left - right


def _discrete_integral_equation(x: Tensor) -> Tensor:
    h = 1 / (x.shape[1] + 1)
    t = _index(x) * h
    cube = (x + t + 1) ** 3
    k = torch.minimum(t[:, None], t[None, :]) * (1 - torch.maximum(t[:, None], t[None, :]))
    # both sums of the published equation hold the term j = k
    twice = torch.diag(t * (1 - t))
    return x + h / 2 * (cube @ (k + twice).T)


def _trigonometric(x: Tensor) -> Tensor:
    n, cos = x.shape[1], torch.cos(x)
    return n - cos.sum(1, keepdim=True) + _index(x) * (1 - cos) - torch.sin(x)


def _variably_dimensioned(x: Tensor) -> Tensor:
    j = _index(x)
    s = (j * (x - 1)).sum(1, keepdim=True)
    return x - 1 + j * s * (1 + 2 * s**2)


def _broyden_tridiagonal(x: Tensor) -> Tensor:
    left, right = _shifted(x)
    return (3 - 2 * x) * x + 1 - left - 2 * right


def _broyden_banded(x: Tensor) -> Tensor:
    k = _index(x)
    apart = k[None, :] - k[:, None]
    band = ((apart >= -5) & (apart <= 1) & (apart != 0)).to(x)
    return x * (2 + 5 * x**2) + 1 - (x * (1 + x)) @ band.T


def _square_root(target: Tensor) -> Columns:
    """X X - A for an m x m matrix X, row by row."""
    m = len(target)

    def function(x: Tensor) -> Tensor:
        matrix = x.unflatten(1, (m, m))
        return (matrix @ matrix - target.to(x)).flatten(1)

    return function


def _dennis_schnabel(x: Tensor) -> Tensor:
    a, b = x.unbind(1)
    return _stack(a + b - 3, a**2 + b**2 - 9)


def _over(x: Tensor) -> Tensor:
    """(1 - exp(-x^2)) / x, 0 at 0."""
    safe = torch.where(x == 0, torch.ones_like(x), x)
    return torch.where(x == 0, torch.zeros_like(x), -torch.expm1(-(safe**2)) / safe)


def _sample_18(x: Tensor) -> Tensor:
    a, b = x.unbind(1)
    return _stack(b**2 * _over(a), a * _over(b))


def _sample_19(x: Tensor) -> Tensor:
    return x * (x**2).sum(1, keepdim=True)


def _double_root(x: Tensor) -> Tensor:
    return x * (x - 5) ** 2


def _freudenstein_roth(x: Tensor) -> Tensor:
    a, b = x.unbind(1)
    return _stack(a - b**3 + 5 * b**2 - 2 * b - 13, a + b**3 + b**2 - 14 * b - 29)


def _boggs(x: Tensor) -> Tensor:
    a, b = x.unbind(1)
    return _stack(a**2 - b + 1, a - torch.cos(0.5 * math.pi * b))


def _chandrasekhar(x: Tensor) -> Tensor:
    n = x.shape[1]
    m = _index(x) / n
    kernel = 0.9 / (2 * n) * m[:, None] / (m[:, None] + m[None, :])
    return x - 1 / (1 - x @ kernel.T)


def _parabola(n: int) -> Tensor:
    t = torch.arange(1, n + 1, dtype=F64) / (n + 1)
    return (t * (t - 1)).unsqueeze(0)


def _jordan(m: int) -> Tensor:
    """1e-4 on the diagonal and 1 at (1, 2): its square root has 0.01 and 50 there."""
    target = 1e-4 * torch.eye(m, dtype=F64)
    target[0, 1] = 1.0
    return target


_ONE = torch.ones(1, 10, dtype=F64)
_SYSTEMS: dict[str, tuple[Columns, Tensor, Tensor | None]] = {
    "Rosenbrock": (_rosenbrock, torch.cat((row(-1.2), _ONE[:, 1:]), dim=1), _ONE),
    "Powell singular": (_powell_singular, row(3, -1, 0, 1), row(0, 0, 0, 0)),
    "Powell badly scaled": (_powell_badly_scaled, row(0, 1), row(1.0981593296998e-5, 9.106146739867)),
    "Wood": (_wood, row(-3, -1, -3, -1), row(1, 1, 1, 1)),
    "Helical valley": (_helical_valley, row(-1, 0, 0), row(1, 0, 0)),
    "Watson": (_watson, row(0, 0), None),
    "Chebyquad": (_chebyquad, row(0, 2 / 3), row(-1 / math.sqrt(3), 1 / math.sqrt(3))),
    "Brown almost linear": (_brown_almost_linear, _ONE / 2, _ONE),
    "Discrete boundary value": (_discrete_boundary_value, _parabola(10), None),
    "Discrete integral equation": (_discrete_integral_equation, _parabola(10), None),
    "Trigonometric": (_trigonometric, _ONE / 10, 0 * _ONE),
    "Variably dimensioned": (_variably_dimensioned, 1 - torch.arange(1, 11, dtype=F64).unsqueeze(0) / 10, _ONE),
    "Broyden tridiagonal": (_broyden_tridiagonal, -_ONE, None),
    "Broyden banded": (_broyden_banded, -_ONE, None),
    "Hammarling 2 x 2": (_square_root(_jordan(2)), row(1, 0, 0, 1), row(0.01, 50, 0, 0.01)),
    "Hammarling 3 x 3": (
        _square_root(_jordan(3)),
        row(1, 0, 0, 0, 1, 0, 0, 0, 1),
        row(0.01, 50, 0, 0, 0.01, 0, 0, 0, 0.01),
    ),
    "Dennis-Schnabel": (_dennis_schnabel, row(1, 5), row(0, 3)),
    "Sample 18": (_sample_18, row(2, 2), row(0, 0)),
    "Sample 19": (_sample_19, row(3, 3), row(0, 0)),
    "x (x - 5)^2": (_double_root, row(1), row(5)),
    "Freudenstein-Roth": (_freudenstein_roth, row(0.5, -2), row(5, 4)),
    "Boggs": (_boggs, row(1, 0), row(0, 1)),
    "Chandrasekhar": (_chandrasekhar, _ONE, None),
}
