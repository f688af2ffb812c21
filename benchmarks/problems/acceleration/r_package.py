"""The twelve problems of the R package FixedPoint (S. Baumann and M. Klymak, CRAN; vignette section 5, tests).

The package compares nine methods by the number of iterations until max |f(z) - z| < 1e-10 (gas diffusion 1e-4, prices
1e-13). The data of the perceptron and of the prices come from R's generator.
"""

import math
from dataclasses import replace

import torch
from torch import Tensor

from benchmarks.problems.acceleration.consumption import consumption
from benchmarks.problems.acceleration.random_numbers import RRandom
from benchmarks.problems.problem import F64, Problem, bisect, like, row

SOURCE = "R package FixedPoint, tests/testthat/test_{}.R"


def r_package() -> list[Problem]:
    """The twelve problems, in the order of the published table."""
    return [
        _babylonian("Babylonian (1)", torch.tensor([[100.0]], dtype=F64), row(6)),
        _babylonian("Babylonian (100)", torch.arange(1.0, 101, dtype=F64).unsqueeze(0), None),
        _cosine(),
        _cube_root(),
        _line(),
        _simple_vector(),
        _gas_diffusion(),
        _perceptron("Perceptron", modified=False),
        _perceptron("Modified perceptron", modified=True),
        _prices(),
        _perpetual_put(),
        consumption("Consumption smoothing", SOURCE.format("ValueFunctionProblem"), "max", 1e-10, straight=True),
    ]


def _problem(name: str, f, z0: Tensor, file: str, answer=None, atol: float = 1e-10) -> Problem:
    return Problem(name, f, z0, SOURCE.format(file), (), 0.0, atol, "max", answer)


def _babylonian(name: str, squares: Tensor, start: Tensor | None) -> Problem:
    def f(t: Tensor) -> Tensor:
        return 0.5 * (t + like(squares, t) / t)

    return _problem(name, f, squares if start is None else start, "Babylon", squares.sqrt)


def _cosine() -> Problem:
    def answer() -> Tensor:
        return row(bisect(lambda x: math.cos(x) - x, 0, 1))

    return _problem("cos", torch.cos, row(0.3), "Cosine", answer)


def _cube_root() -> Problem:
    def f(x: Tensor) -> Tensor:
        return torch.sign(x) * x.abs() ** (1 / 3)

    start = row(0.3, 0.4, 0.5, 0.6, 0.7, 0.8)
    return _problem("x^(1/3)", f, start, "CubicRoot", lambda: torch.ones(1, 6, dtype=F64))


def _line() -> Problem:
    start = row(0.3, 0.4, 0.5, 0.6, 0.7, 0.8)
    answer = torch.full((1, 6), 95 * 18 / 96, dtype=F64)
    return _problem("95 (18 - x)", lambda x: 95 * (18 - x), start, "LinearRoot", lambda: answer)


def _simple_vector() -> Problem:
    def f(x: Tensor) -> Tensor:
        a, b = x.unbind(1)
        return torch.stack((0.5 * (a + b).abs().sqrt(), 1.5 * a + 0.5 * b), dim=1)

    return _problem("Simple vector", f, row(0.3, 900), "SimpleCrossVectorDependent", lambda: row(1, 3))


def _gas_diffusion(side: int = 10) -> Problem:
    """Each square is the mean of itself and its neighbors; 1 at one corner, 0 at the opposite one."""
    n = side * side
    matrix = torch.eye(n, dtype=F64)
    for i in range(n):
        for j in (i - side, i + side, *([i - 1] if i % side else []), *([i + 1] if (i + 1) % side else [])):
            if 0 <= j < n:
                matrix[i, j] = 1
    matrix /= matrix.sum(1, keepdim=True)
    matrix[[0, -1]] = 0
    shift = torch.zeros(1, n, dtype=F64)
    shift[0, 0] = 1

    def f(x: Tensor) -> Tensor:
        return x @ like(matrix, x).T + like(shift, x)

    def answer() -> Tensor:
        return torch.linalg.solve(torch.eye(n, dtype=F64) - matrix, shift.T).T

    start = torch.cat((torch.zeros(1, n // 2, dtype=F64), torch.ones(1, n // 2, dtype=F64)), dim=1)
    return _problem("Gas diffusion", f, start, "DiffussionProcess", answer, 1e-4)


def _perceptron(name: str, modified: bool) -> Problem:
    """One pass of the perceptron's rule over 200 points, with steps of length 1, or sqrt |score| if `modified`."""
    random = RRandom(10)
    first, second = random.normal(100, 4, 2), random.normal(100, 8, 2)
    third, fourth = random.normal(100, -4, 2), random.normal(100, 12)
    points = torch.stack((torch.ones(200, dtype=F64), torch.cat((first, third)), torch.cat((second, fourth))), dim=1)
    labels = torch.cat((-torch.ones(100, dtype=F64), torch.ones(100, dtype=F64)))

    def train(w: Tensor) -> Tensor:
        x, y, at = like(points, w), like(labels, w), 0
        while at < len(x):
            # the next point of the pass that w misclassifies
            wrong = ((x[at:].detach() @ w.detach() > 0) != (y[at:] > 0)).nonzero()
            if not len(wrong):
                break
            at += int(wrong[0, 0])
            score = w[0] + w[1] * x[at, 1] + w[2] * x[at, 2]
            w = w + (-torch.sign(score) * score.abs().sqrt() if modified else y[at]) * x[at]
            at += 1
        return w

    def f(w: Tensor) -> Tensor:
        return torch.stack([train(each) for each in w.unbind(0)])

    def accept(w: Tensor) -> bool:
        # if w is so large that rounding absorbs the steps, w is a fixed point that need not separate the points
        return bool(((w.to(F64) @ points.T > 0) == (labels > 0)).all())

    return replace(_problem(name, f, row(1, 1, 1), "Perceptron", None, 1e-13), accept=accept)


def _prices(households: int = 8, goods: int = 10) -> Problem:
    """Prices of an exchange economy of logarithmic utilities; good 1 is the unit of account."""
    random = RRandom(3112)
    endowments = random.normal(households * goods).exp().reshape(households, goods)
    tastes = random.uniform(households * goods).reshape(households, goods)

    def f(p: Tensor) -> Tensor:
        e, g = like(endowments, p), like(tastes, p)
        spent = (p @ e.T / g.sum(1)) @ g / e.sum(0)
        return spent / spent[:, :1]

    def answer() -> Tensor:
        # total spending on each good is linear in the prices: a Markov chain's stationary vector
        share = (endowments.T / tastes.sum(1)) @ tastes / endowments.sum(0)
        values, vectors = torch.linalg.eig(share.T)
        p = vectors[:, int((values - 1).abs().argmin())].real
        return (p / p[0]).unsqueeze(0)

    return _problem("Equilibrium prices", f, torch.ones(1, goods, dtype=F64), "EquilibriumPrices", answer, 1e-13)


def _perpetual_put(d: float = 0.05, sigma: float = 0.1, ceiling: float = 20.0, strike: float = 10.0) -> Problem:
    """Value of a perpetual American put on a grid of prices; the put is bought back at 1 when the price reaches
    `ceiling`.
    """
    up = (math.exp(d) - math.exp(-sigma)) / (math.exp(sigma) - math.exp(-sigma))
    grid = torch.linspace(0, ceiling, 100, dtype=F64)

    def weights(x: Tensor) -> Tensor:
        """Linear interpolation on the grid, constant beyond it."""
        place = (x / (ceiling / 99)).clamp(0, 99)
        left = place.floor().long().clamp(max=98)
        share = place - left
        out = torch.zeros(len(x), 100, dtype=F64)
        out[torch.arange(len(x)), left] = 1 - share
        out[torch.arange(len(x)), left + 1] = share
        return out

    holding = math.exp(-d) * (up * weights(math.exp(sigma) * grid) + (1 - up) * weights(math.exp(-sigma) * grid))
    holding[-1] = 0
    rebuy = torch.zeros(100, dtype=F64)
    rebuy[-1] = math.exp(-d)

    def f(v: Tensor) -> Tensor:
        return torch.maximum(v @ like(holding, v).T + like(rebuy, v), like((strike - grid).clamp(min=0), v))

    def answer() -> Tensor:
        # policy iteration: solve the linear system of the present choice of holding or exercising
        v, exercise = torch.zeros(100, dtype=F64), (strike - grid).clamp(min=0)
        for _ in range(50):
            hold = (holding @ v + rebuy > exercise).unsqueeze(1)
            matrix = torch.eye(100, dtype=F64) - torch.where(hold, holding, torch.zeros_like(holding))
            v = torch.linalg.solve(matrix, torch.where(hold[:, 0], rebuy, exercise))
        return v.unsqueeze(0)

    start = torch.linspace(strike, 1, 100, dtype=F64).unsqueeze(0)
    return _problem("Perpetual put", f, start, "PerpetualPut", answer)
