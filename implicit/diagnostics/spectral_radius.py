"""The largest eigenvalues of df/dz by Arnoldi's method, matrix-free.

Setting: J = df/dz at z. J^T has the eigenvalues of J, and its products are vector-Jacobian products. Arnoldi's method
(`implicit.linear.arnoldi`) gives an orthonormal basis Q of m vectors with

    J^T Q = Q H + h_{m+1,m} q_{m+1} e_m^T

The eigenvalues t of the small H (Ritz values) approach those of J from the outside of the spectrum inwards, complex
pairs and pairs +-t included; with H s = t s the vector Q s has the residual |h_{m+1,m} s_m| (Saad, "Numerical Methods
for Large Eigenvalue Problems", 2nd edition, 2011, section 6.2). H also gives the powers (J^T)^k q_1 = Q H^k e_1.
"""

import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Complex, Float
from torch import Tensor

from implicit.argument_types import check_arguments
from implicit.autodiff.vjp import linearize
from implicit.evaluation import FlatMap
from implicit.linear.arnoldi import orthogonalize
from implicit.pytree import Flat, Layout, Map, PerSample, State, norm
from implicit.solvers.history_buffer import HistoryBuffer

_CHECK = 5  # number of products between two computations of the Ritz values
_POWERS = 60  # largest k of the powers (J^T)^k q if the basis spans all that J^T can reach from q


@dataclass(frozen=True, eq=False)
class Spectrum:
    """Ritz values of df/dz, on the host.

    Attributes:
        values: (B, m) Ritz values, the largest modulus first; NaN if a sample needed fewer than m products.
        error: (B,) residual of the leading Ritz pair, relative to its modulus; 0 if the basis spans all that J^T can
            reach from the start. A bound on the error of the radius for normal J, an estimate otherwise.
        growth: (B, K) log ||(J^T)^k q|| for the random unit start q and k = 1 .. K; NaN if the basis is too small.
    """

    values: Complex[Tensor, "B m"]
    error: Float[Tensor, " B"]
    growth: Float[Tensor, "B K"]

    @property
    def radius(self) -> Float[Tensor, " B"]:
        """(B,) the spectral radius: Picard's iteration converges if it is below 1, by this factor per step."""
        return self.values[:, 0].abs()


def spectral_radius(
    f: Map,
    z: State,
    *args: Any,
    products: int = 100,
    tol: float = 1e-3,
    batch_dims: int = 1,
    generator: torch.Generator | None = None,
) -> Float[Tensor, " B"]:
    """(B,) spectral radius of df/dz at z, in float64 on the host; see `spectrum` for the arguments.

    Warns (RuntimeWarning) if `tol` was not met within the budget of products.

    Example:
        >>> import torch
        >>> from implicit.diagnostics import spectral_radius
        >>> turn = 0.9 * torch.tensor([[0.5, -0.75**0.5], [0.75**0.5, 0.5]])  # eigenvalues 0.9 exp(+-i pi / 3)
        >>> spectral_radius(lambda z: z @ turn, torch.ones(1, 2)).item()
        0.9000...
    """
    found = spectrum(f, z, *args, products=products, tol=tol, batch_dims=batch_dims, generator=generator)
    loose = ~(found.error <= tol)
    if loose.any():
        warnings.warn(
            f"The spectral radius of {int(loose.sum())} of {len(loose)} samples is known to a residual of "
            f"{float(found.error.max()):.1g} only, not {tol:g}: raise products or tol.",
            RuntimeWarning,
            stacklevel=2,
        )
    return found.radius


def spectrum(
    f: Map,
    z: State,
    *args: Any,
    products: int = 100,
    tol: float = 1e-3,
    batch_dims: int = 1,
    generator: torch.Generator | None = None,
) -> Spectrum:
    """The outer eigenvalues of df/dz at z, per sample.

    Cost: one evaluation of f and at most `products` vector-Jacobian products; memory: one state per product. No tensor
    gets a gradient or `requires_grad`. The result of a sample does not depend on the others.

    Args:
        f: the map f(z, *args).
        z: the point, ``(B, *)`` tensors; usually ``fixed_point(...).value``.
        args: passed on to f.
        products: largest number of products, >= 1; N of them always suffice in exact arithmetic.
        tol: a sample has converged when its leading Ritz pair has this residual, relative to its modulus.
        batch_dims: 0 makes the whole state one system.
        generator: generator of the start, which is the same for all samples; None: a fixed start.

    Raises:
        ValueError: `fixed_point` would refuse f or z, or an argument is out of range.
    """
    check_arguments(spectrum, {"f": f, "products": products, "tol": tol, "generator": generator})
    if products < 1:
        raise ValueError(f"products must be at least 1, got {products}.")
    if not tol > 0:
        raise ValueError(f"tol must be positive, got {tol}.")
    layout = Layout.of(z, batch_dims)
    y, act = linearize(FlatMap(f, args, layout), layout.pack(z))
    rng = generator or torch.Generator().manual_seed(0)
    start = torch.randn(y.shape[1], generator=rng, device=rng.device, dtype=torch.float64)
    start = (start / start.norm()).to(layout.dtype).to(layout.device).expand(y.shape)
    with torch.no_grad():
        return _arnoldi(act, start, min(products, y.shape[1]), tol)


def _arnoldi(act: Callable[[Flat], Flat], start: Flat, products: int, tol: float) -> Spectrum:
    rows, eps = start.shape[0], torch.finfo(start.dtype).eps
    basis, q = HistoryBuffer(products), start
    host: dict[str, Any] = {"device": "cpu"}  # where H, Ritz values and errors are
    h = torch.zeros(rows, products + 1, products, dtype=torch.float64, **host)
    values = torch.full((rows, products), torch.nan, dtype=torch.complex128, **host)
    error = torch.full((rows,), torch.inf, dtype=torch.float64, **host)
    size = torch.zeros(rows, dtype=torch.int64, **host)  # dimension reached
    running = torch.ones(rows, dtype=torch.bool, **host)
    made = 0
    for k in range(products):
        made = k + 1
        # the newest basis vector, its product, and the part of that outside the span of the basis
        basis = basis.reserve(k, q).set(k, q)
        w = act(q)
        whole = norm(w)
        column, w, left = orthogonalize(w, basis)
        left = torch.where(left <= 10 * eps * whole, 0.0, left)  # rounding error: the basis spans the whole product
        found = torch.cat((column[:, : k + 1], torch.stack((left, whole, norm(q)), dim=1)), dim=1).cpu().double()
        q = torch.where(left.unsqueeze(1) > 0, w / left.unsqueeze(1), 0.0).nan_to_num(nan=torch.nan)
        # a column of H
        h[:, : k + 2, k], whole = found[:, : k + 2], found[:, k + 2]
        size += found[:, k + 3] > 0
        if (k + 1) % _CHECK == 0 or k + 1 == products:
            new, residual = _ritz(h[:, : k + 2, : k + 1], size)
            values[:, : k + 1] = torch.where(running.unsqueeze(1), new, values[:, : k + 1])
            error = torch.where(running, residual, error)
            running = running & ~(error <= tol) & torch.isfinite(whole)
            if not running.any():
                break
    return Spectrum(values[:, :made], error, _growth(h[:, : made + 1, :made], size))


def _growth(h: Float[Tensor, "B m1 m"], size: Tensor) -> Float[Tensor, "B K"]:
    """log ||(J^T)^k q|| = log ||H^k e_1||; exact for k below the dimension of the basis, or for all k if it is full."""
    m = h.shape[2]
    square = torch.nan_to_num(h[:, :m])
    last = h.gather(1, size.clamp(max=m).view(-1, 1, 1).expand(-1, 1, m))[:, 0]
    complete = (size < m) | (last.gather(1, (size - 1).clamp(min=0).unsqueeze(1))[:, 0] == 0)
    x = torch.zeros_like(square[:, :, :1])
    x[:, 0] = 1
    total = torch.zeros(len(h), dtype=h.dtype, device=h.device)
    columns = []
    for k in range(1, max(m, _POWERS) + 1):
        x = torch.bmm(square, x)
        norms = x.norm(dim=1, keepdim=True)
        total = total + norms[:, 0, 0].log()
        x = torch.where(norms > 0, x / norms, 0.0)
        columns.append(torch.where(complete | (k < size), total, torch.nan))
    return torch.stack(columns, dim=1)


def _ritz(h: Float[Tensor, "B m1 m"], size: Tensor) -> tuple[Complex[Tensor, "B m"], PerSample]:
    """Eigenvalues of the square part, largest first, and the leading one's relative residual."""
    m = h.shape[2]
    good = torch.isfinite(h).all(dim=2).all(dim=1)
    theta, s = torch.linalg.eig(torch.where(good.view(-1, 1, 1), h[:, :m], 0.0))
    order = theta.abs().argsort(dim=1, descending=True, stable=True)
    theta = theta.gather(1, order)
    residual = h[:, m, m - 1] * s[:, -1].gather(1, order)[:, 0].abs()
    error = torch.where(residual > 0, residual / theta[:, 0].abs(), 0.0)
    known = torch.arange(m, device=size.device) < size.unsqueeze(1)
    theta = torch.where(known & good.unsqueeze(1), theta, torch.nan)
    return theta, torch.where(good, error, torch.nan)
