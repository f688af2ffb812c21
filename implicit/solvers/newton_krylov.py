"""Newton's method with GMRES inside, by Jacobian-vector products alone; for maps where quasi-Newton methods fail.

Setting: r = f(z) - z, J = df/dz at z. Every step solves

    (I - J) d = r,     z' = z + d

to ||(I - J) d - r|| <= forcing ||r||, by GMRES from d = 0: Arnoldi's method builds an orthonormal basis V of the Krylov
space with (I - J) V_k = V_{k+1} H, and d = V y, y = argmin || ||r|| e_1 - H y ||  (Saad and Schultz, SIAM J. Sci. Stat.
Comput. 7(3), 1986; Dembo, Eisenstat and Steihaug, SIAM J. Numer. Anal. 19(2), 1982).

The loop makes one evaluation per step: while GMRES runs, a sample proposes its present z, with its newest basis vector
v as the tangent, so that J v comes with f(z). The GMRES of each sample is independent of the others.
"""

import functools
from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch
from jaxtyping import Bool, Int
from torch import Tensor

from implicit.argument_types import check_fields
from implicit.linear.arnoldi import orthogonalize
from implicit.linear.hessenberg import HessenbergSystem
from implicit.pytree import Flat, norm, scaled_norm
from implicit.solvers.base import AbstractSolver, Point, check_at_least
from implicit.solvers.history_buffer import HistoryBuffer

_PLAIN = -2  # `slot` of a sample whose next step is plain


@dataclass(frozen=True)
class NewtonKrylovState:
    """GMRES of every sample at its z; `slot` is the number of products requested, 0 where a Newton step begins."""

    z: Flat
    basis: HistoryBuffer
    system: HessenbergSystem
    slot: Int[Tensor, " B"]
    passes: int = 0  # evaluations with a tangent so far, at least the number of basis vectors of any sample


@dataclass(frozen=True)
class NewtonKrylov(AbstractSolver[NewtonKrylovState]):
    """Newton-GMRES: each step costs one evaluation and as many Jacobian-vector products as GMRES takes.

    Products are taken by forward mode or, where an operator of f has none, by differentiating backward mode twice;
    each counts as one evaluation. `Unrolled` refuses this solver, since its steps have no graph. Memory: a growing
    number of states, at most min(`inner`, N) + 6 for a sample of N numbers.

    Args:
        inner: largest number of Krylov vectors per Newton step, >= 1; N of them always suffice.
        forcing: relative accuracy of the linear solves, in (0, 1).
        safeguard: reset to the best iterate after a blow-up; where the residual stalls, plain steps.
    """

    inner: int = 40
    forcing: float = 0.01
    safeguard: bool = True

    def __post_init__(self) -> None:
        check_fields(self)
        check_at_least(self, 1, "inner")
        if not 0 < self.forcing < 1:
            raise ValueError(f"NewtonKrylov.forcing must lie in (0, 1), got {self.forcing}.")

    def init(self, point: Point) -> NewtonKrylovState:
        rows, numbers = point.z.shape
        columns = min(self.inner, numbers)
        system = HessenbergSystem.empty(columns, point.z.new_ones(rows))
        slot = torch.zeros(rows, dtype=torch.int64, device=point.z.device)
        return NewtonKrylovState(point.z, HistoryBuffer(columns), system, slot)

    @property
    def differentiable(self) -> bool:
        return False

    @property
    def patience(self) -> int:
        return 3 * self.inner if self.safeguard else 0

    def restart(self, point: Point, state: NewtonKrylovState, mask: Bool[Tensor, "B 1"]) -> NewtonKrylovState:
        return replace(
            state,
            basis=state.basis.clear(mask),
            system=state.system.reset(mask[:, 0], torch.ones_like(state.system.rho)),
            slot=state.slot.masked_fill(mask[:, 0], _PLAIN),
        )

    def step(self, point: Point, state: NewtonKrylovState) -> tuple[Flat, Flat | None, NewtonKrylovState]:
        with torch.no_grad():
            return self._step(point, state)

    def _step(self, point: Point, state: NewtonKrylovState) -> tuple[Flat, Flat | None, NewtonKrylovState]:
        last, z, columns = point.remaining <= 1, point.z, state.basis.capacity
        size = scaled_norm(point.r)
        # a sample whose z was moved, by the loop's safeguard or by a Newton step, begins a new GMRES
        plain = state.slot == _PLAIN
        slot = torch.where(plain, -1, state.slot * (z == state.z).all(dim=1))
        broken = ~size.isfinite() | (size == 0)
        v = point.r.masked_fill(broken.unsqueeze(1), 0) / size.masked_fill(broken, 1).unsqueeze(1)
        proposed = torch.where(plain.unsqueeze(1) | last, point.fz, z)
        basis, system = state.basis, state.system
        if point.product is not None:
            going = slot > 0
            w, system, exhausted = _extend(basis, system, slot, point.product)
            # GMRES ends where it is accurate enough, or where more vectors would not help
            rest = system.rho.abs()
            spent = exhausted | ~rest.isfinite() | (slot == columns)
            done = going & ((rest <= self.forcing) | spent | last)
            good = done & rest.isfinite()
            # the Newton step by the solution of GMRES, or a plain step if GMRES has failed
            c = (system.y[:, : basis.rows] * size.unsqueeze(1)).masked_fill(~good.unsqueeze(1), 0)
            proposed = torch.where(done.unsqueeze(1), point.fz, proposed)
            proposed = torch.where(good.unsqueeze(1), basis.add(z, c.unsqueeze(1)), proposed)
            v = torch.where(going.unsqueeze(1), w.masked_fill(done.unsqueeze(1), 0), v)
            slot = torch.where(done, -1, slot)
        if last:
            return proposed, None, replace(state, z=z, slot=torch.zeros_like(slot))
        # the newest vector joins the basis and is the tangent of the next evaluation
        basis = _write(basis.reserve(min(state.passes, columns - 1), v), slot, v)
        system = system.reset(slot == 0, torch.ones_like(system.rho))
        return proposed, v, NewtonKrylovState(z, basis, system, slot + 1, state.passes + 1)


def _extend(
    basis: HistoryBuffer, system: HessenbergSystem, slot: Int[Tensor, " B"], product: Flat
) -> tuple[Flat, HessenbergSystem, Bool[Tensor, " B"]]:
    """(next basis vector, H with column number slot - 1, whether the Krylov space is exhausted), where slot > 0."""
    w = _read(basis, slot - 1) - product
    before = norm(w)
    used = torch.arange(basis.rows, device=w.device) < slot.unsqueeze(1)
    h, w, after = orthogonalize(w, basis, used)
    eps = torch.finfo(w.dtype).eps
    exhausted = ~(after > 10 * eps * before) | ~after.isfinite()
    w = w.masked_fill(exhausted.unsqueeze(1), 0) / after.masked_fill(exhausted, 1).unsqueeze(1)
    column = torch.nn.functional.pad(h, (0, system.y.shape[1] - h.shape[1]))
    system = system.add(column, after.masked_fill(exhausted, 0), slot - 1, slot > 0, 4 * eps)
    return w, system, exhausted


def _places(
    basis: HistoryBuffer, slot: Int[Tensor, " B"]
) -> Iterator[tuple[Tensor, Int[Tensor, "B 1 N"], Bool[Tensor, "B 1"]]]:
    """(block, index of row slot[b] of every sample b in it, which samples have that row in it) for every block."""
    for block in basis.blocks:
        at = slot.clamp(0, block.shape[1] - 1)
        yield block, at.view(-1, 1, 1).expand(-1, 1, block.shape[2]), (at == slot).unsqueeze(1)
        slot = slot - block.shape[1]


def _read(basis: HistoryBuffer, slot: Int[Tensor, " B"]) -> Flat:
    """Row slot[b] of every sample b; 0 where the basis has no such row."""
    parts = [torch.where(here, block.gather(1, at)[:, 0], 0) for block, at, here in _places(basis, slot)]
    return functools.reduce(torch.add, parts)


def _write(basis: HistoryBuffer, slot: Int[Tensor, " B"], v: Flat) -> HistoryBuffer:
    """The basis with row slot[b] of every sample b set to v; unchanged where the basis has no such row."""
    for block, at, here in _places(basis, slot):
        block.scatter_(1, at, torch.where(here, v, block.gather(1, at)[:, 0]).unsqueeze(1))
    return basis
