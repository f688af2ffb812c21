"""Broyden's (good) method: a quasi-Newton iteration on g(z) = f(z) - z = 0, from residuals alone.

H_k approximates -(dg/dz)^-1 and starts as the identity, so the first step is Picard's. With s = z_k - z_{k-1} and
y = r_k - r_{k-1} the update is the smallest change of the Jacobian with the secant equation H y = -s:

    H_k = (I + u_{k-1} s_{k-1}^T) H_{k-1},    u = -(s + H_{k-1} y) / (s^T H_{k-1} y),    z_{k+1} = z_k + H_k r_k

(Broyden, Math. Comp. 19, 1965). After a full step s_k = H_k r_k this makes u_{k-1} = s_k / ||s_{k-1}||^2, so the steps
themselves are all that must be kept, one vector per evaluation (Kelley, "Solving Nonlinear Equations with Newton's
Method", 2003, chapter 4): with c_j = s_j^T x_j / ||s_j||^2,

    x_0 = x,    x_{j+1} = x_j + c_j s_{j+1},    H_k x = x_{k-1}  with all factors but the newest,
    s_k = H_k r_k = x_{k-1} / (1 - c_{k-1})  for x = r_k

The inner products of the steps turn the recursion into one small triangular system,

    (T - D) (-c) = S x,    S_j = s_j^T,    D_jj = ||s_j||^2,    T_ji = s_j^T s_{i+1} for i < j

With a line search only the part t_j of s_j is taken, and s_{j+1} above becomes s_{j+1} + (t_j - 1) s_j throughout
(ibid., where t is lambda): a step is halved as long as ||r|| would grow.
"""

from dataclasses import dataclass, replace

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.nn.functional import pad

from implicit.argument_types import check_fields
from implicit.pytree import Flat, norm
from implicit.solvers.base import AbstractSolver, Point, check_at_least, check_history, on_host, to_mask
from implicit.solvers.history_buffer import (
    HistoryBuffer,
    Slot,
    coefficient,
    in_place,
    position,
    put,
)

_NOISE = 0.75  # a factor 1 - c up to eps to this power consists of rounding errors; division by it would blow them up


@dataclass(frozen=True)
class BroydenState:
    """The last residual, the `count` steps so far, and T - D, whose upper triangle is not used.

    Row j of `system` holds s_j^T s_i for i = 0 .. j and then -D_jj: T - D begins in column 1.
    """

    r: Flat
    steps: HistoryBuffer
    system: Float[Tensor, "B K K+1"]
    count: int = 0
    short: Float[Tensor, "B 1 K"] | None = None  # t - 1 of every step; None: full steps
    fresh: bool = False  # after `resume`: the newest residual is not the result of the last step, which was not taken
    position: Int[Tensor, "1"] | None = None  # `count`, if it is a tensor

    @property
    def slot(self) -> Slot:
        """The row of the next step."""
        return self.count if self.position is None else self.position

    @property
    def used(self) -> int:
        """Rows that a step takes part in: those from `count` on are not in use, and their c is 0."""
        return self.count if self.position is None else self.steps.rows


@dataclass(frozen=True)
class Broyden(AbstractSolver[BroydenState]):
    """Broyden with at most `memory` secant pairs per sample.

    When the history is full it restarts from the newest pair, so the newest secant equation always holds. (Later pairs
    are wrong without the earlier ones that they were computed with: dropping one pair at a time diverges on slow linear
    maps. scipy's truncated SVD takes about as many evaluations, and a factorization per step.) A pair whose direction
    is lost to rounding (s^T H y = 0) is left out for that sample. Memory: a growing number of states, at most
    `memory` + 3.

    Args:
        memory: number of secant pairs kept, >= 1.
        safeguard: reset to the best iterate after a blow-up; where the residual stalls, plain steps, then Newton-Krylov
            steps (`implicit.staged_safeguard`).
        search: number of times that a step which makes the residual grow may be halved, >= 0, for each sample by
            itself; every trial costs an evaluation and a row of the history. For maps whose full steps overshoot. A
            residual that grows a thousandfold is a blow-up, which the safeguard resets if it is on.
    """

    memory: int = 20
    safeguard: bool = True
    search: int = 0

    def __post_init__(self) -> None:
        check_fields(self)
        check_at_least(self, 1, "memory")
        check_at_least(self, 0, "search")

    @property
    def _rows(self) -> int:
        return self.memory + 2  # the steps before and after the pairs, and room for the pair of a restart

    def init(self, point: Point) -> BroydenState:
        short = point.r.new_zeros(point.r.shape[0], 1, self._rows) if self.search else None
        return BroydenState(point.r, HistoryBuffer(self._rows), self._blank(point.r), short=short)

    def _blank(self, r: Flat) -> Float[Tensor, "B K K+1"]:
        """T - D for steps that are all zero, which makes every c zero."""
        eye = pad(torch.eye(self._rows, dtype=r.dtype, device=r.device), (1, 0))
        return (-torch.finfo(r.dtype).tiny * eye).repeat(r.shape[0], 1, 1)

    def resume(self, point: Point, state: BroydenState) -> BroydenState:
        check_history(state.steps.capacity - 2, self.memory)
        short = state.short
        if self.search and short is None:
            short = point.r.new_zeros(point.r.shape[0], 1, self._rows)
        return replace(state, r=point.r, short=short, fresh=True)

    def region_state(self, state: BroydenState, steps: int) -> BroydenState | None:
        if self.search:
            return None
        history = state.steps.one_block(self._rows, state.r)
        return replace(state, steps=history, position=position(state.count, state.r))

    def after_regions(self, state: BroydenState, steps: int) -> BroydenState:
        count = state.count
        for _ in range(steps):
            count = 3 if count > self.memory else count + 1
        unused = torch.arange(self._rows, device=state.r.device).unsqueeze(1) >= count
        blocks = (state.steps.blocks[0].masked_fill(unused, 0),)
        return replace(state, steps=replace(state.steps, blocks=blocks), count=count, position=None)

    @property
    def patience(self) -> int:
        return max(25, self.memory + 5) if self.safeguard else 0

    def restart(self, point: Point, state: BroydenState, mask: Bool[Tensor, "B 1"]) -> BroydenState:
        return replace(
            state,
            r=torch.where(mask, point.r, state.r),
            steps=state.steps.clear(mask),
            system=torch.where(mask.unsqueeze(2), self._blank(point.r), state.system),
        )

    def step(self, point: Point, state: BroydenState) -> tuple[Flat, None, BroydenState]:
        r = point.r
        # a full history restarts from the newest pair; a step that was not taken forms no pair
        if state.position is not None:
            state = self._keep_newest_pair_if_full(r, state, state.position)
        elif state.count > self.memory:
            state = self._keep_newest_pair(r, state)
        elif state.fresh and state.count:
            state = _drop_pair(state, torch.ones_like(r[:, :1], dtype=torch.bool), r)
        if not state.count:
            return point.fz, None, _append(state, r, r)
        # H r with all factors but the newest
        others = c = _coefficients(state, r)
        if state.position is not None:
            others = c.masked_fill(torch.arange(state.used, device=r.device) >= state.position - 1, 0)
        s = state.steps.add(r, others.narrow(2, 0, others.shape[2] - 1), -1, first=1)
        if state.short is not None:
            s = state.steps.add(s, c * state.short[:, :, : state.count], -1)
        # the newest factor; its pair is dropped where the division would blow up rounding errors
        share = 1 + coefficient(c, state.slot - 1)
        (found,) = on_host(share.detach())
        if (lost := to_mask(abs(found) <= torch.finfo(r.dtype).eps ** _NOISE, share)) is not None:
            state, share = _drop_pair(state, lost, r), share.masked_fill(lost, 1)
        s = s / share
        if state.short is None:
            return point.z + s, None, _append(state, s, r)
        z, state = self._search(point, state, state.short, s)
        return z, None, state

    def _search(
        self, point: Point, state: BroydenState, short: Float[Tensor, "B 1 K"], s: Flat
    ) -> tuple[Flat, BroydenState]:
        """(next z, state): z + s, or if the residual has grown half of the last step, as the newest step again."""
        last = state.count - 1
        d, part = state.steps.row(last), 1 + short[:, :, last]
        grown = ~(norm(point.r) <= norm(state.r)).unsqueeze(1) & (part > 0.5**self.search)
        z = torch.where(grown, point.z - 0.5 * part * d, point.z + s)
        s, r = torch.where(grown, d, s), torch.where(grown, state.r, point.r)
        # the graph of earlier steps holds `short`, which has no gradient itself
        short = short.clone() if _recorded(state, point.r) else short
        now = put(short.mT, last + 1, torch.where(grown, 0.5 * part - 1, 0)).mT
        return z, replace(_append(_drop_pair(state, grown, r), s, r), short=now)

    def _keep_newest_pair(self, r: Flat, state: BroydenState) -> BroydenState:
        """The state with the newest secant pair alone, H_{k-1} = I; u takes a row, since it is not the next step."""
        s, u = _newest_pair(r, state)
        short = None if state.short is None else torch.zeros_like(state.short)
        every = torch.ones_like(r[:, :1], dtype=torch.bool)
        blank = BroydenState(r, state.steps.clear(every), self._blank(r), short=short)
        return _drop_pair(_append(_append(blank, s, r), u, r), every, r)

    def _keep_newest_pair_if_full(self, r: Flat, state: BroydenState, count: Int[Tensor, "1"]) -> BroydenState:
        """`_keep_newest_pair` where a tensor counts the steps; rows after the pair are not cleared, but not used."""
        full, (s, u) = count > self.memory, _newest_pair(r, state)
        # the rows of the pair, or the two after the newest step, which stay zero
        rows = torch.cat((torch.where(full, 0, count), torch.where(full, 1, count + 1)))
        pair = torch.stack((s, u), dim=1).masked_fill(~full, 0)
        state.steps.blocks[0].index_copy_(1, rows, pair)
        system = self._blank(r)
        square = torch.linalg.vecdot(s, s)
        system[:, 0, 0] = square
        system[:, 0, 1] -= square
        system[:, 1, 0] = torch.linalg.vecdot(u, s)
        system[:, 1, 1] = torch.linalg.vecdot(u, u)
        system[:, 1, 2] = -torch.finfo(r.dtype).max
        return replace(state, system=torch.where(full, system, state.system), position=torch.where(full, 2, count))

    def inverse_transpose(self, state: BroydenState, g: Flat) -> Flat:
        """H^T g, without the pair of the last step, after which f was not evaluated yet."""
        pairs = state.steps.rows - 1  # those not in use hold zeros; samples may have used different numbers of them
        if not state.count:
            return g
        dots = state.steps.dot(g)
        ends = dots[:, :, 1:].mT
        if state.short is not None:
            ends = ends + (dots * state.short[:, :, : dots.shape[2]])[:, :, :-1].mT
        c = torch.linalg.solve_triangular(state.system[:, :pairs, 1 : pairs + 1].mT, ends, upper=True).mT
        return state.steps.add(g, c, -1)


def _newest_pair(r: Flat, state: BroydenState) -> tuple[Flat, Flat]:
    """s and u of the newest secant pair alone, H_{k-1} = I; u is 0 if the pair is lost to rounding."""
    s, y = state.steps.row(state.slot - 1).clone(), r - state.r  # the row is written before s is read for the last time
    if state.short is not None:
        s = s * (1 + state.short[:, :, state.count - 1])
    scale = torch.linalg.vecdot(s, y).unsqueeze(1)
    size = torch.linalg.vecdot(s, s).unsqueeze(1)
    lost = scale.abs() <= torch.finfo(r.dtype).eps ** _NOISE * size
    return s, (s + y) * (size / scale.masked_fill(lost, -torch.inf).neg())


def _coefficients(state: BroydenState, x: Flat) -> Float[Tensor, "B 1 C"]:
    """-c, the solution of the triangular system."""
    used = state.used
    dots = state.steps.dot(x).narrow(2, 0, used).mT
    if state.position is not None:
        dots = dots.masked_fill(torch.arange(used, device=x.device).unsqueeze(1) >= state.position, 0)
    system = state.system.narrow(1, 0, used).narrow(2, 1, used)
    return torch.linalg.solve_triangular(system, dots, upper=False).mT


def _append(state: BroydenState, s: Flat, r: Flat) -> BroydenState:
    """The solver state with one more step s, made at the residual r."""
    count, slot = state.count, state.slot
    steps = state.steps.reserve(count, s).set(slot, s)
    after = None if state.position is None else state.position + 1
    dots = steps.dot(s).squeeze(1)
    return BroydenState(r, steps, _with_row(state, dots), count + 1, state.short, position=after)


def _with_row(state: BroydenState, dots: Float[Tensor, "B _"]) -> Float[Tensor, "B K K+1"]:
    """T - D with the row of a new step, of which `dots` are the products with all steps."""
    count, system, tiny = state.count, state.system, torch.finfo(dots.dtype).tiny
    if state.position is not None:  # masks, which one loop of a compiled graph applies
        rows, columns = _numbers(system)
        row = pad(dots, (0, 1)).masked_fill(columns > state.position, 0)
        row = torch.where(columns == state.position + 1, -tiny - dots.index_select(1, state.position), row)
        return torch.where(rows == state.position, row.unsqueeze(1), system)
    in_row = not torch.compiler.is_compiling() and in_place(system, dots)
    if in_row:  # the row holds 0 and -tiny, as `_blank` left it
        row = system.select(1, count)
        row.narrow(1, 0, count + 1).copy_(dots.narrow(1, 0, count + 1))
        row.narrow(1, count + 1, 1).sub_(dots.narrow(1, count, 1))
    else:
        row = pad(dots, (0, system.shape[2] - dots.shape[1]))
        row[:, count + 1] = -tiny - dots[:, count]
    if state.short is not None:
        row[:, 1 : count + 1] += state.short[:, 0, :count] * dots[:, :count]
    return system if in_row else put(system, count, row)


def _drop_pair(state: BroydenState, mask: Bool[Tensor, "B 1"], r: Flat) -> BroydenState:
    """The solver state without the pair that begins with the newest step, for the samples in `mask`: its c is 0."""
    system, none = state.system, -torch.finfo(r.dtype).max
    if state.position is not None:
        rows, columns = _numbers(system)
        newest = (rows == state.position - 1) & (columns == state.position)
        return replace(state, system=system.masked_fill(newest & mask.unsqueeze(2), none))
    system = system.clone() if _recorded(state, r) else system
    system[:, state.count - 1, state.count].masked_fill_(mask[:, 0], none)
    return replace(state, system=system, fresh=False)


def _numbers(system: Float[Tensor, "B K K+1"]) -> tuple[Int[Tensor, "K 1"], Int[Tensor, " K+1"]]:
    """The numbers of the rows and columns of T - D."""
    columns = torch.arange(system.shape[2], device=system.device)
    return columns[:-1].unsqueeze(1), columns


def _recorded(state: BroydenState, r: Flat) -> bool:
    """Whether autograd records the step from the residual r."""
    return torch.is_grad_enabled() and (r.requires_grad or state.system.requires_grad)
