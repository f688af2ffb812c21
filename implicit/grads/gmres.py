"""GMRES for the linear systems of backward passes: no method reaches the same residual in fewer products.

Setting: u = g + A u, M = I - A. Arnoldi's method builds orthonormal columns V of span{g, M g, ..., M^(k-1) g}, one
product a column, with

    M V_k = V_{k+1} H,     u = V_k y,     y = argmin || beta e_1 - H y ||,     beta = ||g||

H is (k+1) x k, upper Hessenberg. With Q the product of the Givens rotations that make it triangular, Q H = [R; 0] and
Q beta e_1 = [t; rho]: y = R^-1 t, and |rho| is the residual. Q and R^-1 grow by one row and column a product.

(Saad and Schultz, "GMRES", SIAM J. Sci. Stat. Comput. 7(3), 1986.)
"""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from implicit.judge import Stop
from implicit.solution import Result, Solution
from implicit.solvers.history import Ring
from implicit.state import Flat, norm

_RUNNING = np.int8(-1)


@dataclass(frozen=True)
class GMRES:
    """GMRES(`memory`) for u = g + A u; every sample is a system of its own and keeps the answer that contented it.

    A sample is content when ||g - (I - A) u|| <= atol + rtol ||u||. The residual is the recurrence's, which costs no
    product, and is never called smaller than rounding, `eps` ||u||: a tolerance below that ends as `STALLED`. Products
    are taken for all samples until the last is content; the host looks at each (`Stop.check_every` and `Stop.late`
    play no part). Memory: as many states as products, at most `memory`, and four more.

    Args:
        memory: products before it starts over from the residual, >= 1.
    """

    memory: int = 60

    def __post_init__(self) -> None:
        if self.memory < 1:
            raise ValueError(f"GMRES.memory must be at least 1, got {self.memory}.")

    def __call__(self, act: Callable[[Flat], Flat], g: Flat, stop: Stop, eps: float = 0.0) -> Solution:
        """Solve u = g + act(u) for a linear `act` with rounding errors of `eps`, relative.

        A sample whose products are not finite has its g for a value.
        """
        books = _Books(_host(norm(g)), stop, max(eps, torch.finfo(g.dtype).eps))
        u, r = torch.zeros_like(g), g
        while books.open:
            u, r = self._cycle(act, u, r, books)
        lost = torch.from_numpy(books.code == Result.NONFINITE).to(g.device).unsqueeze(1)
        return books.solution(torch.where(lost, g, u))

    def _cycle(self, act: Callable[[Flat], Flat], u: Flat, r: Flat, books: "_Books") -> tuple[Flat, Flat]:
        """Up to `memory` products: the new u and its residual."""
        basis, fit = Ring(self.memory + 1), _LeastSquares(_host(norm(r)))
        v, y = _unit(r, norm(r)), np.zeros((len(r), 0))
        books.size = _host(norm(u))
        for k in range(self.memory):
            basis = basis.room(k, v).put(k, v)
            w, h = _orthogonalise(v - act(v), basis)
            length = norm(w)
            fit.add(_host(torch.cat((h[:, : k + 1], length.unsqueeze(1)), dim=1)))
            y = np.where(books.running[:, None], fit.y, np.pad(y, ((0, 0), (0, 1))))
            books.judge(fit)
            v = _unit(w, length)
            if not books.open:
                break
        u = basis.add(u, _coefficients(y, basis, u))
        if not books.open:
            return u, r
        basis = basis.room(self.memory, v).put(self.memory, v)
        left = np.where(books.running[:, None], fit.rho[:, None] * fit.q[:, -1], 0.0)
        return u, basis.add(torch.zeros_like(u), _coefficients(left, basis, u))


def _orthogonalise(w: Flat, basis: Ring) -> tuple[Flat, Tensor]:
    """w without its part in the span of the basis (0 if only rounding is left), and the coefficients of that part."""
    before = norm(w)
    h = basis.dot(w)
    w = basis.add(w, h, -1)
    again = basis.dot(w)  # once more: then it is orthogonal to rounding error
    w = basis.add(w, again, -1)
    spent = norm(w) <= 4 * torch.finfo(w.dtype).eps * before
    return w.masked_fill(spent.unsqueeze(1), 0), (h + again).squeeze(1)


def _unit(w: Flat, length: Tensor) -> Flat:
    return w / torch.where(length > 0, length, 1.0).unsqueeze(1)


def _coefficients(y: np.ndarray, basis: Ring, like: Flat) -> Tensor:
    padded = np.pad(y, ((0, 0), (0, basis.rows - y.shape[1])))
    return torch.from_numpy(padded).to(like.device, like.dtype).unsqueeze(1)


def _host(t: Tensor) -> np.ndarray:
    return t.cpu().numpy().astype(np.float64)


class _LeastSquares:
    """min || beta e_1 - H y || for every sample, as H grows by columns; B samples, k columns, all on the host."""

    def __init__(self, beta: np.ndarray) -> None:
        size = len(beta)
        self.rho = beta  # (B,)
        self.q = np.ones((size, 1, 1))  # (B, k + 1, k + 1)
        self.inverse = np.zeros((size, 0, 0))  # R^-1, (B, k, k)
        self.y = np.zeros((size, 0))  # (B, k)

    def add(self, column: np.ndarray) -> None:
        """Take in the newest column of H, (B, k + 2)."""
        k = self.y.shape[1]
        turned = (self.q @ column[:, :-1, None])[..., 0]
        a, b = turned[:, k], column[:, -1]
        pivot = np.hypot(a, b)
        none = pivot == 0  # a column of zeros: it gets the weight 0 and rho stays
        pivot = np.where(none, np.inf, pivot)
        cos, sin, new = a / pivot, np.where(none, -1.0, b / pivot), 1 / pivot[:, None]
        self.q = np.pad(self.q, ((0, 0), (0, 1), (0, 1)))
        last = self.q[:, k].copy()
        self.q[:, k], self.q[:, k + 1] = cos[:, None] * last, -sin[:, None] * last
        self.q[:, k, k + 1], self.q[:, k + 1, k + 1] = sin, cos
        new = np.concatenate((-(self.inverse @ turned[:, :k, None])[..., 0] * new, new), axis=1)
        self.inverse = np.pad(self.inverse, ((0, 0), (0, 1), (0, 1)))
        self.inverse[:, :, k] = new
        self.y = np.pad(self.y, ((0, 0), (0, 1))) + (cos * self.rho)[:, None] * new
        self.rho = -sin * self.rho


class _Books:
    """How each sample stands."""

    def __init__(self, beta: np.ndarray, stop: Stop, eps: float) -> None:
        self.stop, self.eps = stop, eps
        self.residual, self.size = beta.copy(), np.zeros_like(beta)
        self.evals = np.zeros(len(beta), dtype=np.int64)
        self.products = 0
        self.code = np.where(beta == 0, int(Result.CONVERGED), int(_RUNNING)).astype(np.int8)
        self.code[~np.isfinite(beta)] = Result.NONFINITE

    @property
    def running(self) -> np.ndarray:
        return self.code == _RUNNING

    @property
    def open(self) -> bool:
        """Whether more products are to be taken."""
        return bool(self.running.any()) and self.products < self.stop.max_evals

    def judge(self, fit: _LeastSquares) -> None:
        """Take in what one more product has brought; after a restart ||u|| is that of before."""
        self.products += 1
        running = self.running
        size = np.where(self.size > 0, self.size, np.linalg.norm(fit.y, axis=1))
        floor = self.eps * size
        residual = np.maximum(np.abs(fit.rho), floor)
        self.residual = np.where(running, residual, self.residual)
        self.evals[running] = self.products
        content = residual <= self.stop.atol + self.stop.rtol * size
        for code, which in (
            (Result.STALLED, residual <= floor),
            (Result.CONVERGED, content),
            (Result.NONFINITE, ~np.isfinite(residual)),
        ):
            self.code[running & which] = code

    def solution(self, value: Flat) -> Solution:
        """The books closed."""
        code = np.where(self.running, np.int8(Result.MAX_EVALS), self.code)
        residual, code, evals = (torch.from_numpy(a).to(value.device) for a in (self.residual, code, self.evals))
        return Solution(value=value, residual=residual.to(value.dtype), result=code, evals=evals)
