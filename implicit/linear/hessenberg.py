"""Least squares with an upper Hessenberg matrix that grows by columns, as in GMRES.

Setting: y = argmin || beta e_1 - M y ||, M is (k+1) x k, upper Hessenberg. With Q the product of the Givens rotations
that make M triangular, Q M = [R; 0] and Q beta e_1 = [t; rho]: y = R^-1 t, and |rho| is the residual. Q, R^-1 and y
grow by one row and column at a time:

    (a, b) = newest column of Q M on and below the diagonal,  p = (a^2 + b^2)^(1/2),  c = a / p,  s = b / p
    R^-1 gets the column (-R^-1 Q m; 1) / p,     y <- y + c rho (that column),     rho <- -s rho

(Saad and Schultz, "GMRES", SIAM J. Sci. Stat. Comput. 7(3), 1986.)
"""

from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from implicit.pytree import PerSample


@dataclass(frozen=True)
class HessenbergSystem:
    """Q, R^-1, y and rho of every sample: at most K columns, of which samples may use different numbers."""

    q: Float[Tensor, "B K1 K1"]
    inverse: Float[Tensor, "B K1 K1"]
    y: Float[Tensor, "B K1"]
    rho: PerSample

    @classmethod
    def empty(cls, columns: int, beta: PerSample) -> "HessenbergSystem":
        """A system without columns, of a capacity of `columns`."""
        eye = torch.diag_embed(beta.new_ones(beta.shape[0], columns + 1))
        return cls(eye, torch.zeros_like(eye), beta.new_zeros(beta.shape[0], columns + 1), beta)

    def reset(self, mask: Bool[Tensor, " B"], beta: PerSample) -> "HessenbergSystem":
        """No columns for the samples in `mask`."""
        eye = torch.diag_embed(torch.ones_like(self.y))
        wide = mask.view(-1, 1, 1)
        return HessenbergSystem(
            torch.where(wide, eye, self.q),
            self.inverse.masked_fill(wide, 0),
            self.y.masked_fill(mask.unsqueeze(1), 0),
            torch.where(mask, beta, self.rho),
        )

    def widen(self, columns: int) -> "HessenbergSystem":
        """The system with a capacity of at least `columns` columns; a capacity that grows at least doubles."""
        capacity = self.y.shape[1] - 1
        if columns <= capacity:
            return self
        old, more = self, max(capacity + 1, columns - capacity)
        wide = HessenbergSystem.empty(capacity + more, old.rho)
        wide.q[:, : capacity + 1, : capacity + 1], wide.inverse[:, : capacity + 1, : capacity + 1] = old.q, old.inverse
        wide.y[:, : capacity + 1] = old.y
        return wide

    def direction(self, k: Int[Tensor, " B"]) -> tuple[Float[Tensor, "B K1"], PerSample]:
        """The unit vector along the residual after k columns: its coefficients of v_1 .. v_k, and that of v_{k+1}."""
        row = self.q.gather(1, k.view(-1, 1, 1).expand(-1, 1, self.q.shape[2]))[:, 0] * self.rho.sign().unsqueeze(1)
        last = row.gather(1, k.unsqueeze(1))
        return row.scatter(1, k.unsqueeze(1), 0), last[:, 0]

    def add(
        self,
        column: Float[Tensor, "B K1"],
        below: PerSample,
        k: Int[Tensor, " B"],
        mask: Bool[Tensor, " B"],
        rounding: float,
    ) -> "HessenbergSystem":
        """Append column number k for the samples in `mask`: `column` down to the diagonal and `below` under it.

        A column that is zero to rounding gets the coefficient 0 and leaves the residual as it is.
        """
        number = torch.ones_like(column).cumsum(dim=1) - 1  # 0, 1, 2 ..
        here, next_row = number == k.unsqueeze(1), number == k.unsqueeze(1) + 1
        # the column after the earlier rotations, and the rotation that makes `below` zero
        turned = torch.bmm(self.q, column.unsqueeze(2)).squeeze(2)
        a = turned.masked_fill(~here, 0).sum(dim=1)
        pivot = torch.hypot(a, below)
        none = pivot <= rounding * (1 + torch.linalg.vector_norm(column, dim=1))
        pivot = pivot.masked_fill(none, torch.inf)
        cos, sin = a / pivot, (below / pivot).masked_fill(none, -1)
        # Q with this rotation
        last = self.q.masked_fill(~here.unsqueeze(2), 0).sum(dim=1)
        row = cos.unsqueeze(1) * last + sin.unsqueeze(1) * next_row
        under = -sin.unsqueeze(1) * last + cos.unsqueeze(1) * next_row
        change, step = mask.view(-1, 1, 1), mask.unsqueeze(1)
        q = torch.where(change & here.unsqueeze(2), row.unsqueeze(1), self.q)
        q = torch.where(change & next_row.unsqueeze(2), under.unsqueeze(1), q)
        # R^-1 and y with one more column
        new = torch.bmm(self.inverse, turned.unsqueeze(2)).squeeze(2)
        new = torch.where(here, -1, new) / -pivot.unsqueeze(1)
        inverse = torch.where(change & here.unsqueeze(1), new.unsqueeze(2), self.inverse)
        y = self.y + torch.where(step, (cos * self.rho).unsqueeze(1) * new, 0)
        return HessenbergSystem(q, inverse, y, torch.where(mask, -sin * self.rho, self.rho))
