"""First-order methods of convex optimization as fixed-point maps: gradient, proximal and splitting steps.

The maps have kinks where a constraint becomes active or a soft threshold becomes 0. The answers are computed by FISTA
and a linear system on the support (lasso), by Newton's method, or by a linear system.
"""

from collections.abc import Callable

import torch
from scipy.optimize import nnls
from torch import Tensor

from benchmarks.problems.problem import F64, Problem, like, normal, uniform


def optimization() -> list[Problem]:
    """Nine maps."""
    return [
        _ista("ISTA lasso", normal(20, 60, 100), 0.1),
        _ista("ISTA, correlated lasso", _correlated(40, 60, 0.8, 21), 0.05),
        _admm(),
        _douglas_rachford(),
        _alternating_projections(),
        _logistic_regression(),
        _nonnegative_least_squares(),
        _plug_and_play(),
        _nonnegative_factorization(),
    ]


def soft(x: Tensor, threshold: float) -> Tensor:
    """The soft threshold: sign(x) max(|x| - threshold, 0)."""
    return torch.sign(x) * (x.abs() - threshold).clamp(min=0)


def _correlated(rows: int, columns: int, correlation: float, seed: int) -> Tensor:
    common = normal(seed, rows, 1)
    return correlation**0.5 * common + (1 - correlation) ** 0.5 * normal(seed + 1000, rows, columns)


def _data(a: Tensor, samples: int, seed: int) -> Tensor:
    """Right-hand sides y = A x + noise of sparse x."""
    truth = normal(seed, samples, a.shape[1]) * (uniform(seed + 1, samples, a.shape[1]) < 0.1)
    return truth @ a.T + 0.01 * normal(seed + 2, samples, len(a))


def lasso_answer(a: Tensor, y: Tensor, penalty: Tensor) -> Tensor:
    """argmin ||A x - y||^2 / 2 + penalty ||x||_1: FISTA finds the support, a linear system the values on it."""
    step = 1 / float(torch.linalg.matrix_norm(a, 2)) ** 2
    x, w, t = torch.zeros(len(y), a.shape[1], dtype=F64), torch.zeros(len(y), a.shape[1], dtype=F64), 1.0
    for _ in range(3000):
        before, x = x, w - step * (w @ a.T - y) @ a
        x = torch.sign(x) * (x.abs() - step * penalty).clamp(min=0)
        # restart the momentum if it increases the objective
        t = 1.0 if float(((w - x) * (x - before)).sum()) > 0 else t
        new = (1 + (1 + 4 * t * t) ** 0.5) / 2
        w, t = x + (t - 1) / new * (x - before), new
    for row, target, level in zip(x, y, penalty[:, 0], strict=True):
        s = row != 0
        row[s] = torch.linalg.solve(a[:, s].T @ a[:, s], a[:, s].T @ target - level * torch.sign(row[s]))
    return x


def _ista(name: str, a: Tensor, share: float) -> Problem:
    """Proximal gradient steps for the lasso; the penalty is `share` times the smallest penalty with the answer 0."""
    y = _data(a, 3, 22)
    penalty = share * (y @ a).abs().amax(1, keepdim=True)
    step = 1 / float(torch.linalg.matrix_norm(a, 2)) ** 2

    def f(x: Tensor, y: Tensor, penalty: Tensor) -> Tensor:
        m = like(a, x)
        x = x - step * (x @ m.T - y) @ m
        return torch.sign(x) * (x.abs() - step * penalty).clamp(min=0)

    z0 = torch.zeros(3, a.shape[1], dtype=F64)
    source = "I. Daubechies et al., 2004; A. Beck and M. Teboulle, 2009"
    return Problem(name, f, z0, source, (y, penalty), answer=lambda: lasso_answer(a, y, penalty))


def _admm() -> Problem:
    """ADMM for the lasso in its state (z, u), penalty parameter 1 on a normalized matrix."""
    a = normal(25, 50, 80) / 50**0.5
    y = _data(a, 3, 26)
    penalty = 0.1 * (y @ a).abs().amax(1, keepdim=True)
    inverse = torch.linalg.inv(a.T @ a + torch.eye(80, dtype=F64))

    def f(state: Tensor, right: Tensor, penalty: Tensor) -> Tensor:
        z, u = state.chunk(2, dim=1)
        x = (right + z - u) @ like(inverse, z)
        z = torch.sign(x + u) * ((x + u).abs() - penalty).clamp(min=0)
        return torch.cat((z, u + x - z), dim=1)

    def answer() -> Tensor:
        x = lasso_answer(a, y, penalty)
        return torch.cat((x, (y - x @ a.T) @ a), dim=1)

    source = "S. Boyd et al., 2011, section 6.4"
    return Problem("ADMM lasso", f, torch.zeros(3, 160, dtype=F64), source, (y @ a, penalty), answer=answer)


def _douglas_rachford() -> Problem:
    """Douglas-Rachford splitting for basis pursuit: min ||x||_1 subject to A x = y."""
    a = normal(28, 20, 50)
    truth = normal(29, 2, 50) * (uniform(30, 2, 50) < 0.08)
    y = truth @ a.T
    pseudo = torch.linalg.pinv(a)

    def f(z: Tensor, y: Tensor) -> Tensor:
        m, p = like(a, z), like(pseudo, z)
        x = soft(z, 0.2)
        w = 2 * x - z
        return z + w + (y - w @ m.T) @ p.T - x

    source = "P.-L. Lions and B. Mercier, 1979; basis pursuit"
    return Problem("Douglas-Rachford", f, torch.zeros(2, 50, dtype=F64), source, (y,))


def _alternating_projections() -> Problem:
    """Projections on two affine subspaces with a smallest angle of 0.05: a linear map, slow."""
    n, m = 60, 20
    q = torch.linalg.qr(normal(31, n, n))[0]
    angle = torch.linspace(0.05, 1.5, m, dtype=F64).unsqueeze(1)
    one = q[:m]
    two = torch.cos(angle) * q[:m] + torch.sin(angle) * q[m : 2 * m]

    def f(z: Tensor, point: Tensor) -> Tensor:
        u, v = like(one, z), like(two, z)
        z = point + ((z - point) @ v.T) @ v
        return (z @ u.T) @ u + like(q[-1], z)

    point = normal(32, 3, n)

    def answer() -> Tensor:
        eye = torch.eye(n, dtype=F64)
        matrix = (two.T @ two) @ (one.T @ one)
        shift = (point - point @ two.T @ two) @ one.T @ one + q[-1]
        return torch.linalg.solve(eye - matrix.T, shift.T).T

    return Problem("Alternating projections", f, normal(33, 3, n), "J. von Neumann, 1933", (point,), answer=answer)


def _newton(gradient: Callable[[Tensor], Tensor], x: Tensor, steps: int = 50) -> Tensor:
    """Newton's method for a gradient of one vector."""
    for _ in range(steps):
        hessian = torch.autograd.functional.jacobian(gradient, x)
        x = x - torch.linalg.solve(hessian, gradient(x))  # pyright: ignore[reportArgumentType]
    return x


def _logistic_regression() -> Problem:
    """Gradient descent with step 1 / L on a logistic regression with a small ridge, badly scaled columns."""
    x = normal(34, 200, 15) * torch.logspace(-1.5, 0, 15, dtype=F64)
    label = (uniform(35, 3, 200) < torch.sigmoid(normal(36, 3, 15) @ x.T)).to(F64)
    step = 1 / (float(torch.linalg.matrix_norm(x, 2)) ** 2 / 800 + 1e-4)

    def gradient(w: Tensor, label: Tensor) -> Tensor:
        return (torch.sigmoid(w @ like(x, w).T) - label) @ like(x, w) / 200 + 1e-4 * w

    def answer() -> Tensor:
        return torch.stack([_newton(lambda w, y=y: gradient(w, y), torch.zeros(15, dtype=F64)) for y in label])

    def f(w: Tensor, label: Tensor) -> Tensor:
        return w - step * gradient(w, label)

    source = "gradient descent, step 1 / L"
    return Problem("Logistic regression", f, torch.zeros(3, 15, dtype=F64), source, (label,), answer=answer)


def _nonnegative_least_squares() -> Problem:
    """Projected gradient steps for min ||A x - y||^2 / 2 subject to x >= 0."""
    a = uniform(37, 40, 25)
    y = normal(38, 3, 40) + 2
    step = 1 / float(torch.linalg.matrix_norm(a, 2)) ** 2

    def f(x: Tensor, y: Tensor) -> Tensor:
        return (x - step * (x @ like(a, x).T - y) @ like(a, x)).clamp(min=0)

    def answer() -> Tensor:
        return torch.stack([torch.from_numpy(nnls(a.numpy(), target.numpy())[0]) for target in y])

    source = "projected gradient, step 1 / L"
    return Problem("Nonnegative least squares", f, torch.zeros(3, 25, dtype=F64), source, (y,), answer=answer)


def _plug_and_play() -> Problem:
    """Proximal gradient for deblurring, a network of fixed random weights in place of the proximal map."""
    n = 64
    distance = torch.arange(n)[:, None] - torch.arange(n)[None, :]
    blur = torch.exp(-(distance.to(F64) ** 2) / 8)
    blur = blur / blur.sum(1, keepdim=True)
    w = normal(39, n, n)
    w = w / torch.linalg.matrix_norm(w, 2)
    y = torch.cumsum(normal(40, 2, n), dim=1) / 4 @ blur.T

    def f(x: Tensor, y: Tensor) -> Tensor:
        m, v = like(blur, x), like(w, x)
        x = x - (x @ m.T - y) @ m
        return 0.98 * (x - 0.5 * torch.relu(x @ v.T) @ v)

    source = "S. Venkatakrishnan et al., 2013"
    return Problem("Plug and play", f, torch.zeros(2, n, dtype=F64), source, (y,))


def _nonnegative_factorization() -> Problem:
    """Lee and Seung's multiplicative updates of X = W H, columns of W scaled to sum 1; state (W, H)."""
    rows, columns, rank = 12, 15, 3
    x = uniform(41, rows, rank) @ uniform(42, rank, columns) + 0.01 * uniform(43, rows, columns)

    def f(state: Tensor) -> Tensor:
        target = like(x, state)
        w, h = state[:, : rows * rank].unflatten(1, (rows, rank)), state[:, rows * rank :].unflatten(1, (rank, columns))
        h = h * (w.mT @ target) / (w.mT @ w @ h + 1e-12)
        w = w * (target @ h.mT) / (w @ h @ h.mT + 1e-12)
        scale = w.sum(1, keepdim=True)
        return torch.cat(((w / scale).flatten(1), (h * scale.mT).flatten(1)), dim=1)

    z0 = torch.cat((uniform(44, 1, rows * rank) / rows, uniform(45, 1, rank * columns) * 2), dim=1)
    return Problem("NMF, multiplicative", f, z0, "D. Lee and H. Seung, 2001")
