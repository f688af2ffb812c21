"""The multisecant method (Anderson acceleration of type I) over a long, filtered window. The default solver.

Setting: r_k = f(z_k) - z_k. With the differences of the last points as columns,

    dR = [..., r_k - r_{k-1}],    dF likewise of f(z),    dZ = dF - dR likewise of z,

the approximate inverse of I - df/dz that fits every pair of the window and is the identity beyond it gives

    dZ^T (r_k - dR gamma) = 0,    z_{k+1} = f(z_k) - dF gamma

(Fang and Saad, "Two classes of multisecant methods for nonlinear acceleration", Numer. Linear Algebra Appl. 16, 2009,
section 2.4: the type-I member of the Anderson family). On a linear map of N numbers it ends in N + 1 evaluations.

Old pairs of a map that is not linear contradict the new ones, and nearly dependent columns amplify rounding errors. The
columns of dR are therefore taken newest first, and one whose angle to the span of the newer ones has a sine below
`filter` is left out (Pollock and Rebholz, "Filtering for Anderson acceleration", SIAM J. Sci. Comput. 45(4), 2023). The
sines are the pivots of the Cholesky factor of the Gram matrix of the normalized columns.

A type-I residual may be far above the smallest one that the pairs allow, as that of FOM is above that of GMRES where
GMRES stagnates. Where ||r_k - dR gamma|| exceeds `_FAR` times its minimum, the step is therefore that of type II, the
least-squares mixture (Walker and Ni, SIAM J. Numer. Anal. 49(4), 2011). Both small systems are solved as one batch.

Where ||r_k|| exceeds both ||r_{k-1}|| and twice the residual ||r_{k-1} - dR gamma|| that the pairs promised, the linear
model has failed. That sample goes on with a strict filter (sine 0.1) and, as long as mu exceeds its first value, with
the mixture of type II and a relative ridge mu, as in a Levenberg-Marquardt method:

    gamma = argmin ||r_k - dR gamma||^2 + mu sum_i (||dR_i|| gamma_i)^2,    mu <- max(100 mu, 1e-4), else mu <- mu / 5

Above mu = 1 the history is dropped, and where mu has decayed below 1e-13 the sample is as before.

The first steps are plain, z' = f(z), as long as they gain more each time: rho_k = ||r_k|| / ||r_{k-1}|| falls, and does
so faster. On a normal linear contraction rho_k never falls, so that one plain step is taken there, which spans the same
Krylov space; on a map that converges faster than linearly (a step of Newton's method, say) the ratios fall to 0, and
no extrapolation of the past differences would come close to plain iteration.
"""

from dataclasses import dataclass, replace

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from implicit.pytree import Flat
from implicit.solvers.base import AbstractSolver, Point
from implicit.solvers.history_buffer import HistoryBuffer, put

_NOISE = 2  # a difference of residuals within that many eps of f(z) consists of rounding errors
_FAR = 1.05  # a residual of type I of that many times the smallest is not taken
_TRUST = 2.0  # a residual of that many times the promised one is a failure of the model
_LOW, _UP, _DOWN, _NONE = 1e-4, 100.0, 0.2, 1e-13  # the ridge's first value, its factors, and what counts as 0
_AFTER, _RESET = 1e-2, 10.0  # the ridge after a reset to the best iterate: its least value, and its factor
_STRICT = 0.1  # the filter of samples in the safeguard's cautious stage and after a failure of the model
_PLAIN_STEPS = 15  # plain steps at the start, at most
_CONTRACTION, _FAST = 0.9, 0.65  # the largest ratio after which they begin, and go on
_FALL, _QUICK, _QUICK_FALL = 1e-3, 0.3, 0.1  # the least relative fall of the ratio; that of ratios below _QUICK
_KEPT = 0.4  # the share of the last relative fall that the next one must reach


@dataclass(frozen=True)
class MultisecantState:
    """The last point, the pairs of differences, and the products that the small systems are made of.

    `size` is ||r|| of the last point, `promised` the residual that its mixture promised, `mu` the ridge, `ratio` and
    `fall` are rho_k and 1 - rho_k / rho_{k-1} of the plain steps at the start, where `plain` holds. `gram` holds
    <dR_i, dR_j>, with a zero diagonal entry for pairs not in use; `mixed` holds <dF_i, dR_j>.
    """

    fz: Flat
    r: Flat
    df: HistoryBuffer
    dr: HistoryBuffer
    gram: Float[Tensor, "B K K"]
    mixed: Float[Tensor, "B K K"]
    strict: Bool[Tensor, "B 1"]
    size: Float[Tensor, "B 1"]
    promised: Float[Tensor, "B 1"]
    mu: Float[Tensor, "B 1"]
    plain: Bool[Tensor, "B 1"]
    ratio: Float[Tensor, "B 1"]
    fall: Float[Tensor, "B 1"]
    pairs: int = 0
    fresh: bool = True  # the last point is not from this solve: it makes no pair with the next one


@dataclass(frozen=True)
class Multisecant(AbstractSolver[MultisecantState]):
    """Anderson acceleration of type I with at most `memory` pairs per sample, and never more than N.

    Memory grows with the steps taken, to at most 2 memory + 12 states.

    Args:
        memory: number of pairs kept, >= 1.
        filter: sine of the angle below which an older pair is left out, in (0, 1); None takes eps^(1/6): 2e-3 for
            float64 histories, 7e-2 for float32.
        safeguard: reset to the best iterate after a blow-up; where the residual stalls, a strict filter, then plain
            steps, then Newton-Krylov steps (`implicit.staged_safeguard`).
    """

    memory: int = 60
    filter: float | None = None
    safeguard: bool = True

    def __post_init__(self) -> None:
        if self.memory < 1:
            raise ValueError(f"Multisecant.memory must be at least 1, got {self.memory}.")
        if self.filter is not None and not 0 < self.filter < 1:
            raise ValueError(f"Multisecant.filter must lie in (0, 1), got {self.filter}.")

    @property
    def patience(self) -> int:
        return 25 if self.safeguard else 0

    def stall_after(self, numbers: int) -> int:
        # a linear map of no more numbers than the window gains nothing for sure before the last of them
        return (
            max(self.patience, numbers + 5)
            if self.safeguard and 20 <= numbers <= min(45, self.memory)
            else self.patience
        )

    @property
    def has_cautious_stage(self) -> bool:
        return True

    def init(self, point: Point) -> MultisecantState:
        rows, numbers = point.z.shape
        window = min(self.memory, numbers)
        gram, empty = point.z.new_zeros(rows, window, window), HistoryBuffer(window)
        size = _norm(point.r)
        endless = torch.full_like(size, torch.inf)
        strict, mu = torch.zeros_like(size, dtype=torch.bool), torch.zeros_like(size)
        window = (point.fz, point.r, empty, empty, gram, gram.clone(), strict)
        return MultisecantState(*window, size, endless, mu, ~strict, torch.ones_like(size), mu.clone())

    def resume(self, point: Point, state: MultisecantState) -> MultisecantState:
        window = min(self.memory, point.z.shape[1])
        if state.dr.capacity != window:
            raise ValueError(f"state must come from a solver with memory={self.memory}, got {state.dr.capacity}.")
        no = torch.zeros_like(state.strict)
        return replace(state, fz=point.fz, r=point.r, strict=no, plain=no, fresh=True)

    def restart(self, point: Point, state: MultisecantState, mask: Bool[Tensor, "B 1"]) -> MultisecantState:
        lost = mask.unsqueeze(2)
        return replace(
            state,
            fz=torch.where(mask, point.fz, state.fz),
            r=torch.where(mask, point.r, state.r),
            df=state.df.clear(mask),
            dr=state.dr.clear(mask),
            gram=state.gram.masked_fill(lost, 0),
            mixed=state.mixed.masked_fill(lost, 0),
            promised=state.promised.masked_fill(mask, torch.inf),
            mu=state.mu.masked_fill(mask, 0),
            plain=state.plain & ~mask,
        )

    def retreat(
        self,
        point: Point,
        failed: Point,
        state: MultisecantState,
        mask: Bool[Tensor, "B 1"],
        cautious: Bool[Tensor, "B 1"],
    ) -> MultisecantState:
        """The history is kept; the next pair is the difference of the best point and the one that failed.

        Where residuals are read late, pairs of a point that is not finite may be in it: it is lost then.
        """
        if state.pairs:
            state = self.restart(point, state, mask & ~(state.df.is_finite() & state.dr.is_finite()))
        seen = mask & failed.fz.isfinite().all(dim=1, keepdim=True) & failed.z.isfinite().all(dim=1, keepdim=True)
        fz, r = torch.where(mask, point.fz, state.fz), torch.where(mask, point.r, state.r)
        fz, r = torch.where(seen, failed.fz, fz), torch.where(seen, failed.r, r)
        return replace(
            state,
            fz=fz,
            r=r,
            strict=cautious,
            size=torch.where(mask, _norm(point.r), state.size),
            promised=state.promised.masked_fill(mask, torch.inf),
            mu=torch.where(mask, (_RESET * state.mu).clamp_min(_AFTER), state.mu),
            plain=state.plain & ~mask,
        )

    def step(self, point: Point, state: MultisecantState) -> tuple[Flat, None, MultisecantState]:
        size = _norm(point.r)
        if state.fresh and not state.pairs:
            return point.fz, None, replace(state, fz=point.fz, r=point.r, size=size, fresh=False)
        if state.fresh:
            now = replace(state, fz=point.fz, r=point.r, fresh=False)
            by_df, by_dr = state.df.dot(point.r), state.dr.dot(point.r)
        else:
            now, by_df, by_dr = self._append(point, state)
        now = _trust(replace(now, size=size), state.size)
        used = min(now.pairs, now.dr.capacity)
        gamma, promised = self._weights(now, by_df[:, :, :used], by_dr[:, :, :used], size > state.size)
        if now.pairs <= _PLAIN_STEPS:
            now = _superlinear(now, state.size)
            gamma, promised = gamma.masked_fill(now.plain, 0), promised.masked_fill(now.plain, torch.inf)
        return now.df.add(point.fz, gamma.unsqueeze(1), -1), None, replace(now, promised=promised)

    def _append(
        self, point: Point, state: MultisecantState
    ) -> tuple[MultisecantState, Float[Tensor, "B 1 K"], Float[Tensor, "B 1 K"]]:
        """The state with the newest pair, dF^T r and dR^T r."""
        slot = state.pairs % state.dr.capacity
        df, dr = state.df.reserve(slot, point.r), state.dr.reserve(slot, point.r)
        # the newest pair takes the place of the oldest
        new = torch.stack((point.r, point.r - state.r, point.fz - state.fz), dim=1)
        df, dr = df.set(slot, new[:, 2]), dr.set(slot, new[:, 1])
        # all products with r and with the newest pair in one pass over each window
        by_dr, by_df = dr.products(new), df.products(new[:, :2])
        row, k = by_dr[:, 1], by_dr.shape[2]
        # a pair of rounding errors alone is none
        size = row[:, slot].detach()
        far = torch.maximum(_norm(point.fz), _norm(new[:, 2]))[:, 0]
        noise = (_NOISE * torch.finfo(new.dtype).eps * far) ** 2
        real = (size > noise.clamp_min(torch.finfo(new.dtype).tiny)) & size.isfinite()
        none = ~real.unsqueeze(1)
        row, down, across = (x.masked_fill(none, 0) for x in (row, by_dr[:, 2], by_df[:, 1]))
        now = replace(
            state,
            fz=point.fz,
            r=point.r,
            df=df,
            dr=dr,
            gram=_put_cross(state.gram, slot, row, row, k),
            mixed=_put_cross(state.mixed, slot, down, across, k),
            pairs=state.pairs + 1,
        )
        return now, by_df[:, :1], by_dr[:, :1]

    def _weights(
        self,
        state: MultisecantState,
        by_df: Float[Tensor, "B 1 K"],
        by_dr: Float[Tensor, "B 1 K"],
        grew: Bool[Tensor, "B 1"],
    ) -> tuple[Float[Tensor, "B K"], Float[Tensor, "B 1"]]:
        """gamma, 0 for pairs left out and where the system is singular, and ||r - dR gamma||."""
        used = by_dr.shape[2]
        unit, keep = self._kept(state, used)
        left_out = ~keep
        unit = unit.masked_fill(left_out, 0)
        # products of normalized columns, 0 for pairs left out
        scale = unit.unsqueeze(1) * unit.unsqueeze(2)
        gram, mixed = (m[:, :used, :used] * scale for m in (state.gram, state.mixed))
        by_dr, by_dz = by_dr[:, 0] * unit, (by_df - by_dr)[:, 0] * unit
        # type I, and type II with the ridge, in one batch; 1 on the diagonal for pairs left out
        matrix = torch.cat((mixed - gram, gram))
        ridge = torch.cat((left_out, left_out + state.mu))
        matrix = matrix + torch.diag_embed(ridge)
        # rows in one unit, for pivots are chosen between rows
        rows = matrix.detach().abs().amax(dim=2, keepdim=True).clamp_min(torch.finfo(gram.dtype).tiny)
        y = _solution(matrix / rows, torch.cat((by_dz, by_dr)).unsqueeze(2) / rows)
        one, two = y.unflatten(0, (2, -1)).unbind()
        with torch.no_grad():
            # ||r - dR y||^2 of both
            both = torch.cat((one, two), dim=2)
            inner = gram @ both - 2 * by_dr.unsqueeze(2)
            square = state.size**2 + (both * inner).sum(dim=1)
            promised = square.clamp_min(0).sqrt().split(1, dim=1)
            floor = torch.finfo(gram.dtype).eps ** 0.5 * state.size
            # type II where the model has failed, and where the residual of type I is far from the smallest
            second = grew | ((state.mu > _LOW) & ~state.strict) | (promised[0] > _FAR * promised[1] + floor)
        gamma = torch.where(second, two[:, :, 0], one[:, :, 0])
        return gamma * unit, torch.where(second, promised[1], promised[0])

    def _kept(self, state: MultisecantState, used: int) -> tuple[Float[Tensor, "B K"], Bool[Tensor, "B K"]]:
        """1 / ||dR_i||, and which pairs pass the filter."""
        diagonal = state.gram[:, :used, :used].diagonal(dim1=1, dim2=2)
        there = diagonal > 0
        unit = diagonal.masked_fill(~there, torch.inf).rsqrt()
        # newest first
        turn, gram, scale = state.pairs % used, state.gram[:, :used, :used].detach(), unit.detach()
        cosines = _newest_first(gram * scale.unsqueeze(1) * scale.unsqueeze(2), turn, 1, 2)
        # the pivots are the squared sines; a small ridge keeps the factorization going past a dependent column
        tolerance = self.filter or torch.finfo(gram.dtype).eps ** (1 / 6)
        ridge = 0.01 * tolerance**2
        cosines.diagonal(dim1=1, dim2=2).fill_(1 + ridge)
        factor = torch.linalg.cholesky_ex(cosines)[0]
        sine = _newest_first(factor.diagonal(dim1=1, dim2=2), -turn, 1)
        strict = state.strict | (state.mu > 0)
        return unit, there & (sine > tolerance) & ~(strict & (sine <= _STRICT))

    def inverse_transpose(self, state: MultisecantState, g: Flat) -> Flat:
        """H^T g, with H r = r - dF gamma(r): g - dZ (dZ^T dR)^-T dF^T g."""
        if not state.pairs:
            return g
        used = min(state.pairs, state.dr.capacity)
        unit, keep = self._kept(state, used)
        both = keep.unsqueeze(1) & keep.unsqueeze(2)
        matrix = torch.where(both, (state.mixed[:, :used, :used] - state.gram[:, :used, :used]) * unit.unsqueeze(1), 0)
        rows = matrix.abs().amax(dim=2, keepdim=True)
        rows = torch.where(rows > 0, rows, 1)
        matrix = matrix / rows + torch.diag_embed((~keep).to(matrix.dtype))
        right = torch.where(keep, state.df.dot(g)[:, 0, :used] * unit, 0).unsqueeze(2)
        y = torch.linalg.solve_ex(matrix.mT, right)[0] / rows
        c = torch.where(y.isfinite().all(dim=1, keepdim=True), y, 0).mT
        return state.dr.add(state.df.add(g, c, -1), c, 1)


def _solution(matrix: Float[Tensor, "S K K"], right: Float[Tensor, "S K 1"]) -> Float[Tensor, "S K 1"]:
    """The solutions of the small systems, 0 for one that is singular, whose derivative would be NaN."""
    if torch.is_grad_enabled() and (matrix.requires_grad or right.requires_grad):
        y = torch.linalg.solve_ex(matrix.detach(), right.detach())[0]
        lost = ~y.isfinite().all(dim=1, keepdim=True)
        eye = torch.eye(matrix.shape[1], dtype=matrix.dtype, device=matrix.device)
        matrix, right = torch.where(lost, eye, matrix), right.masked_fill(lost, 0)
    y = torch.linalg.solve_ex(matrix, right)[0]
    return y.masked_fill(~y.isfinite().all(dim=1, keepdim=True), 0)


def _newest_first(x: Tensor, turn: int, *dims: int) -> Tensor:
    """`x` in the order of age along `dims`, where slot turn - 1 is the newest; with -turn the inverse of that."""
    if not turn:
        return x.flip(dims)
    return x.roll([-turn] * len(dims), dims).flip(dims) if turn > 0 else x.flip(dims).roll([-turn] * len(dims), dims)


def _put_cross(
    matrix: Float[Tensor, "B K K"], slot: int, row: Float[Tensor, "B J"], column: Float[Tensor, "B J"], j: int
) -> Float[Tensor, "B K K"]:
    """`matrix` with the first j entries of row `slot` and of column `slot` replaced."""
    if j < matrix.shape[1]:
        row = torch.nn.functional.pad(row, (0, matrix.shape[1] - j))
        column = torch.nn.functional.pad(column, (0, matrix.shape[1] - j))
    return put(put(matrix, slot, row).mT, slot, column).mT


def _norm(x: Flat) -> Float[Tensor, "B 1"]:
    return torch.linalg.vector_norm(x.detach(), dim=1, keepdim=True)


def _superlinear(state: MultisecantState, last: Float[Tensor, "B 1"]) -> MultisecantState:
    """The state with the samples marked whose plain steps still gain more from step to step."""
    ratio = state.size / last
    fall = 1 - ratio / state.ratio
    if state.pairs == 1:
        plain = state.plain & (ratio <= _CONTRACTION)
    else:
        least = torch.where(ratio < _QUICK, _QUICK_FALL, _FALL)
        plain = state.plain & (ratio <= _FAST) & (fall >= torch.maximum(_KEPT * state.fall, least))
    return replace(state, plain=plain, ratio=ratio, fall=fall if state.pairs > 1 else state.fall)


def _trust(state: MultisecantState, last: Float[Tensor, "B 1"]) -> MultisecantState:
    """The state with the ridge adapted to how well the last mixture's promise was kept."""
    failed = state.size > torch.maximum(_TRUST * state.promised, last)
    mu = torch.where(failed, (_UP * state.mu).clamp_min(_LOW), _DOWN * state.mu)
    lost = mu > 1
    mu = torch.where(lost, 1.0, mu * (mu > _NONE))
    return replace(state, mu=mu, gram=state.gram.masked_fill(lost.unsqueeze(2), 0))
