"""Newton's method with GMRES inside, by Jacobian-vector products alone; for maps where quasi-Newton methods fail.

Setting: r = f(z) - z, J = df/dz at z. Every step solves

    (I - J) d = r,     z' = z + d

to ||(I - J) d - r|| <= forcing ||r||, by GMRES from d = 0: Arnoldi's method builds an orthonormal basis V of the Krylov
space with (I - J) V_k = V_{k+1} H, and d = V y, y = argmin || ||r|| e_1 - H y ||  (Saad and Schultz, SIAM J. Sci. Stat.
Comput. 7(3), 1986; Dembo, Eisenstat and Steihaug, SIAM J. Numer. Anal. 19(2), 1982).
"""

from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from implicit.solvers.base import AbstractSolver, Evaluator, Point
from implicit.state import Flat, norm


@dataclass(frozen=True)
class NewtonKrylov(AbstractSolver[None]):
    """Newton-GMRES: each step costs one evaluation and as many Jacobian-vector products as GMRES takes.

    Products are taken by forward mode or, where an operator of f has none, by differentiating backward mode twice;
    each counts as one evaluation. Each sample keeps the step it had when it was content; the products go on until all
    are (the host looks at every one) or the budget is spent: batch-mates share the count of evaluations, here alone.
    Not differentiable through `Unrolled`. Memory: `inner` + 6 states.

    Args:
        inner: largest number of Krylov vectors a step, >= 1.
        forcing: relative accuracy of the linear solves, in (0, 1).
        safeguard: go back to the best point after a blow-up, and to plain steps where nothing is gained.
    """

    inner: int = 40
    forcing: float = 0.01
    safeguard: bool = True

    def __post_init__(self) -> None:
        if self.inner < 1:
            raise ValueError(f"NewtonKrylov.inner must be at least 1, got {self.inner}.")
        if not 0 < self.forcing < 1:
            raise ValueError(f"NewtonKrylov.forcing must lie in (0, 1), got {self.forcing}.")

    def init(self, point: Point) -> None:
        return None

    @property
    def patience(self) -> int:
        return 3 * self.inner if self.safeguard else 0

    def step(self, f: Evaluator, point: Point, memory: None) -> tuple[Flat, None]:
        with torch.no_grad():
            size = norm(point.r)
            basis = [point.r / size.clamp_min(torch.finfo(size.dtype).tiny).unsqueeze(1)]
            hessenberg = torch.zeros(len(size), self.inner + 1, self.inner, dtype=torch.float64, device=size.device)
            y, running = hessenberg[:, :0, 0], torch.ones_like(size, dtype=torch.bool)
            for k in range(min(self.inner, f.left - 1)):
                w = basis[k] - f.push(point.z, basis[k])
                w = _orthogonalise(w, basis, hessenberg[:, :, k])
                basis.append(w)
                better, rest = _least_squares(hessenberg[:, : k + 2, : k + 1])
                y = torch.where(running.unsqueeze(1), better, torch.nn.functional.pad(y, (0, 1)))
                spent = (hessenberg[:, k + 1, k] == 0) | ~rest.isfinite()  # more vectors would not help
                running = running & (rest > self.forcing) & ~spent
                if not bool(running.any()):
                    break
            if not y.shape[1]:
                return point.fz, None
            step = torch.stack(basis[: y.shape[1]], dim=2) @ (y.to(size.dtype) * size.unsqueeze(1)).unsqueeze(2)
            return point.z + step.squeeze(2), None


def _orthogonalise(w: Flat, basis: list[Flat], column: Float[Tensor, "B K"]) -> Flat:
    """w made orthonormal to the basis, twice for accuracy; its coefficients are added to `column`."""
    before = norm(w)
    for _ in range(2):
        for i, v in enumerate(basis):
            h = torch.linalg.vecdot(v, w)
            column[:, i] += h
            w = w - h.unsqueeze(1) * v
    after = norm(w)
    broken = after <= 10 * torch.finfo(w.dtype).eps * before  # the Krylov space is exhausted
    after = after.masked_fill(broken, 0)
    column[:, len(basis)] = after
    return torch.where(broken.unsqueeze(1), 0.0, w / torch.where(broken, 1.0, after).unsqueeze(1))


def _least_squares(h: Float[Tensor, "B M K"]) -> tuple[Float[Tensor, "B K"], Float[Tensor, " B"]]:
    """argmin ||e_1 - H y|| and its value; columns of zeros get the weight 0."""
    normal = h.mT @ h
    normal.diagonal(dim1=1, dim2=2).add_(1e-200)
    y = torch.linalg.solve_ex(normal, h[:, 0].unsqueeze(2))[0]
    rest = -(h @ y).squeeze(2)
    rest[:, 0] += 1
    return y.squeeze(2), torch.linalg.vector_norm(rest, dim=1)
