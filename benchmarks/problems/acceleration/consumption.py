"""Consumption smoothing: the value of a budget under random tastes, on a grid with a shape-preserving spline.

    V(b) = E max_{0 <= x <= b}  eps x^delta + beta V(b - x + 1),       log eps normal, cut at its 0.0001 quantiles

V is known at 107 budgets and continued by L. Schumaker's quadratic spline (SIAM J. Numer. Anal. 20(4), 1983) with the
slopes of K. Judd (Numerical Methods in Economics, 1998, section 6.11). The published codes take the expectation by
adaptive cubature and the maximum by Brent's method; here by Gauss-Legendre quadrature in log eps and bisection on the
first-order condition, so that the map is smooth.
"""

from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from scipy import stats
from torch import Tensor

from benchmarks.problems.problem import F64, Problem, like

DELTA, BETA, INCOME, NODES = 0.2, 0.95, 1.0, 24


@dataclass(frozen=True)
class Spline:
    """Schumaker's spline of B functions on one grid: an inner knot in every interval, three slopes around it.

    Attributes:
        grid: ``(n,)`` the budgets.
        value: ``(B, n)`` values there.
        slope: ``(B, n)`` slopes there.
        knot: ``(B, n - 1)`` the inner knots.
        inner: ``(B, n - 1)`` the slopes at the inner knots.
        straight: continue by a line beyond the last budget, not by the last parabola.
    """

    grid: Tensor
    value: Tensor
    slope: Tensor
    knot: Tensor
    inner: Tensor
    straight: bool

    def at(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Value and slope at points ``(B, m)``."""
        last = len(self.grid) - 2
        i = (torch.bucketize(x.detach().contiguous(), self.grid, right=True) - 1).clamp(0, last)
        low, high = self.grid[i], self.grid[i + 1]
        left, right = self.slope.gather(1, i), self.slope.gather(1, i + 1)
        knot, inner = self.knot.gather(1, i), self.inner.gather(1, i)
        # the two parabolas: slopes run linearly from left to inner to right
        t, u = x - low, x - knot
        bend, after = (inner - left) / (knot - low), (right - inner) / (high - knot)
        first = self.value.gather(1, i) + left * t + bend / 2 * t**2
        second = self.value.gather(1, i + 1) - right * (high - x) + after / 2 * (high - x) ** 2
        before = x < knot
        value, slope = torch.where(before, first, second), torch.where(before, left + bend * t, inner + after * u)
        if self.straight:
            beyond = x > self.grid[-1]
            value = torch.where(beyond, self.value[:, -1:] + self.slope[:, -1:] * (x - self.grid[-1]), value)
            slope = torch.where(beyond, self.slope[:, -1:].expand_as(slope), slope)
        return value, slope


def schumaker(grid: Tensor, y: Tensor, straight: bool) -> Spline:
    """The spline through y ``(B, n)``."""
    width = torch.diff(grid)
    d = torch.diff(y, dim=1) / width
    length = width * (1 + d**2).sqrt()
    # slopes: means of the neighboring secants weighted with their lengths, 0 at an extremum
    mean = (length[:, :-1] * d[:, :-1] + length[:, 1:] * d[:, 1:]) / (length[:, :-1] + length[:, 1:])
    mean = torch.where(d[:, :-1] * d[:, 1:] > 0, mean, torch.zeros_like(mean))
    slope = torch.cat(((3 * d[:, :1] - mean[:, :1]) / 2, mean, (3 * d[:, -1:] - mean[:, -1:]) / 2), dim=1)
    # inner knots: the middle, or where the slopes cross the secant's
    left, right = slope[:, :-1] - d, slope[:, 1:] - d
    same = left * right >= 0
    share = torch.where(right.abs() < left.abs(), right, left) / torch.where(same, torch.ones_like(d), right - left)
    knot = torch.where(right.abs() < left.abs(), grid[:-1] + width * share, grid[1:] + width * share)
    knot = torch.where(same, (grid[:-1] + width / 2).expand_as(d), knot)
    inner = 2 * d - ((knot - grid[:-1]) * slope[:, :-1] + (grid[1:] - knot) * slope[:, 1:]) / width
    return Spline(grid, y, slope, knot, inner, straight)


def bellman(y: Tensor, grid: Tensor, straight: bool) -> Tensor:
    """The right side of the equation above at all budgets."""
    spline, positive = schumaker(grid, y, straight), grid[1:]
    span = float(stats.norm.ppf(0.9999))
    node, weight = np.polynomial.legendre.leggauss(NODES)
    z = like(torch.from_numpy(span * node), y)
    mass = like(torch.from_numpy(span * weight * stats.norm.pdf(span * node)), y)
    taste, shape = torch.exp(z), (len(y), len(positive), NODES)
    budget = positive[:, None].expand(shape)
    with torch.no_grad():
        # bisection on eps delta x^(delta - 1) = beta V'(b - x + 1); its error enters the value squared
        low, high = torch.zeros_like(budget), budget.clone()
        for _ in range(30):
            x = (low + high) / 2
            rest = (budget - x + INCOME).flatten(1)
            gain = taste * DELTA * x ** (DELTA - 1) - BETA * spline.at(rest)[1].unflatten(1, shape[1:])
            low, high = torch.where(gain > 0, x, low), torch.where(gain > 0, high, x)
        x = (low + high) / 2
    # by the envelope theorem the maximizer is a constant for derivatives
    later = spline.at((budget - x + INCOME).flatten(1))[0].unflatten(1, shape[1:])
    value = ((taste * x**DELTA + BETA * later) * mass).sum(2)
    nothing = BETA * spline.at(torch.full_like(y[:, :1], INCOME))[0]
    return torch.cat((nothing, value), dim=1)


def consumption(name: str, source: str, norm: Literal["euclidean", "max"], atol: float, straight: bool) -> Problem:
    """The problem on its published grid from V = sqrt(b), with the stopping test and continuation of one package."""
    grid = torch.cat((0.015 * torch.arange(67, dtype=F64), 1.05 + 0.05 * torch.arange(40, dtype=F64)))

    def f(y: Tensor) -> Tensor:
        return bellman(y, like(grid, y), straight)

    return Problem(name, f, grid.sqrt().unsqueeze(0), source, (), 0.0, atol, norm)
