"""Newton's method with GMRES inside, by Jacobian-vector products alone; for maps where quasi-Newton methods fail.

Setting: r = f(z) - z, J = df/dz at z. Every step solves

    (I - J) d = r,     z' = z + d

to ||(I - J) d - r|| <= forcing ||r||, by GMRES from d = 0: Arnoldi's method builds an orthonormal basis V of the Krylov
space with (I - J) V_k = V_{k+1} H, and d = V y, y = argmin || ||r|| e_1 - H y ||  (Saad and Schultz, SIAM J. Sci. Stat.
Comput. 7(3), 1986; Dembo, Eisenstat and Steihaug, SIAM J. Numer. Anal. 19(2), 1982).

One evaluation a step: a sample in the midst of GMRES proposes the z where it is and aims the evaluation along its
newest basis vector, so that J v comes with f(z). Each sample is where it is in its own GMRES, whatever the others do.
"""

import functools
from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from implicit.pytree import Flat, norm
from implicit.solvers.base import AbstractSolver, Evaluator, Point
from implicit.solvers.history_buffer import HistoryBuffer

_PLAIN = -2  # instead of a slot: the next step is plain


@dataclass(frozen=True)
class NewtonKrylovState:
    """GMRES of every sample at its z: `slot` products asked for, none (0) where a new step begins."""

    z: Flat
    basis: HistoryBuffer
    hessenberg: Float[Tensor, "B M K"]
    slot: Int[Tensor, " B"]
    passes: int = 0  # evaluations that were aimed: no sample has more basis vectors


@dataclass(frozen=True)
class NewtonKrylov(AbstractSolver[NewtonKrylovState]):
    """Newton-GMRES: each step costs one evaluation and as many Jacobian-vector products as GMRES takes.

    Products are taken by forward mode or, where an operator of f has none, by differentiating backward mode twice;
    each counts as one evaluation. Not differentiable through `Unrolled`. Memory grows to at most `inner` + 6 states.

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

    def init(self, point: Point) -> NewtonKrylovState:
        rows, device = point.z.shape[0], point.z.device
        hessenberg = torch.zeros(rows, self.inner + 1, self.inner, dtype=torch.float64, device=device)
        slot = torch.zeros(rows, dtype=torch.int64, device=device)
        return NewtonKrylovState(point.z, HistoryBuffer(self.inner), hessenberg, slot)

    @property
    def patience(self) -> int:
        return 3 * self.inner if self.safeguard else 0

    def restart(self, point: Point, state: NewtonKrylovState, mask: Bool[Tensor, "B 1"]) -> NewtonKrylovState:
        return replace(state, slot=state.slot.masked_fill(mask[:, 0], _PLAIN))

    def step(self, f: Evaluator, point: Point, state: NewtonKrylovState) -> tuple[Flat, NewtonKrylovState]:
        with torch.no_grad():
            return self._step(f, point, state)

    def _step(self, f: Evaluator, point: Point, state: NewtonKrylovState) -> tuple[Flat, NewtonKrylovState]:
        last, z = f.left <= 1, point.z
        size = torch.linalg.vector_norm(point.r, dim=1, dtype=torch.float64).to(z.dtype)  # squares stay in range
        # whose z was moved, by the loop's safeguard or by a step, begins anew
        plain = state.slot == _PLAIN
        slot = torch.where(plain, -1, state.slot * (z == state.z).all(dim=1))
        broken = ~size.isfinite() | (size == 0)
        v = point.r.masked_fill(broken.unsqueeze(1), 0) / size.masked_fill(broken, 1).unsqueeze(1)
        basis, hessenberg, proposed = (
            state.basis,
            state.hessenberg,
            torch.where(plain.unsqueeze(1) | last, point.fz, z),
        )
        if f.pushed is not None:
            going = slot > 0
            w, hessenberg = _arnoldi(basis, hessenberg, slot, f.pushed)
            y, rest = _least_squares(hessenberg[:, : basis.rows + 1, : basis.rows])
            spent = (w == 0).all(dim=1) | ~rest.isfinite() | (slot == self.inner)  # more vectors would not help
            done = going & ((rest <= self.forcing) | spent | last)
            good = done & rest.isfinite()
            c = (y * size.double().unsqueeze(1)).masked_fill(~good.unsqueeze(1), 0).to(z.dtype)
            proposed = torch.where(done.unsqueeze(1), point.fz, proposed)
            proposed = torch.where(good.unsqueeze(1), basis.add(z, c.unsqueeze(1)), proposed)
            v = torch.where(going.unsqueeze(1), w.masked_fill(done.unsqueeze(1), 0), v)
            slot = torch.where(done, -1, slot)
        if last:
            return proposed, replace(state, z=z, slot=torch.zeros_like(slot))
        basis = _write(basis.room(min(state.passes, self.inner - 1), v), slot, v)
        hessenberg = hessenberg.masked_fill((slot == 0).view(-1, 1, 1), 0)
        f.aim(v)
        return proposed, NewtonKrylovState(z, basis, hessenberg, slot + 1, state.passes + 1)


def _arnoldi(
    basis: HistoryBuffer, hessenberg: Float[Tensor, "B M K"], slot: Int[Tensor, " B"], pushed: Flat
) -> tuple[Flat, Float[Tensor, "B M K"]]:
    """The next basis vector, 0 where the space is exhausted, and H with its column number slot - 1, where slot > 0."""
    w = _read(basis, slot - 1) - pushed
    column = hessenberg.new_zeros(hessenberg.shape[:2])
    before = norm(w)
    known = torch.arange(basis.rows, device=w.device) < slot.unsqueeze(1)
    for _ in range(2):  # twice for accuracy
        h = basis.dot(w).masked_fill(~known.unsqueeze(1), 0)
        column[:, : basis.rows] += h.squeeze(1)
        w = basis.add(w, h, -1)
    after = norm(w)
    exhausted = ~(after > 10 * torch.finfo(w.dtype).eps * before) | ~after.isfinite()
    w = w.masked_fill(exhausted.unsqueeze(1), 0) / after.masked_fill(exhausted, 1).unsqueeze(1)
    place = torch.arange(column.shape[1], device=w.device) == slot.unsqueeze(1)
    column = torch.where(place, after.masked_fill(exhausted, 0).double().unsqueeze(1), column)
    here = place[:, 1:].unsqueeze(1) & (slot > 0).view(-1, 1, 1)
    return w, torch.where(here, column.unsqueeze(2), hessenberg)


def _places(
    basis: HistoryBuffer, slot: Int[Tensor, " B"]
) -> Iterator[tuple[Tensor, Int[Tensor, "B 1 N"], Bool[Tensor, "B 1"]]]:
    """Every block, the index of row `slot` of every sample in it, and who has that row there."""
    for block in basis.blocks:
        at = slot.clamp(0, block.shape[1] - 1)
        yield block, at.view(-1, 1, 1).expand(-1, 1, block.shape[2]), (at == slot).unsqueeze(1)
        slot = slot - block.shape[1]


def _read(basis: HistoryBuffer, slot: Int[Tensor, " B"]) -> Flat:
    """Row `slot` of every sample, another of each; 0 where there is none."""
    parts = [torch.where(here, block.gather(1, at)[:, 0], 0) for block, at, here in _places(basis, slot)]
    return functools.reduce(torch.add, parts)


def _write(basis: HistoryBuffer, slot: Int[Tensor, " B"], v: Flat) -> HistoryBuffer:
    """The basis with row `slot` of every sample, another of each, set to v; nothing where there is none."""
    for block, at, here in _places(basis, slot):
        block.scatter_(1, at, torch.where(here, v, block.gather(1, at)[:, 0]).unsqueeze(1))
    return basis


def _least_squares(h: Float[Tensor, "B M K"]) -> tuple[Float[Tensor, "B K"], Float[Tensor, " B"]]:
    """argmin ||e_1 - H y|| and its value; columns of zeros get the weight 0."""
    normal = h.mT @ h
    diagonal = normal.diagonal(dim1=1, dim2=2)
    diagonal.masked_fill_(diagonal == 0, 1)
    y = torch.linalg.solve_ex(normal, h[:, 0].unsqueeze(2))[0]
    rest = -(h @ y).squeeze(2)
    rest[:, 0] += 1
    return y.squeeze(2), torch.linalg.vector_norm(rest, dim=1)
