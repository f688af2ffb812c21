"""The multisecant method (Anderson acceleration of type I) over a long, filtered window.

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

Where ||r_k|| exceeds both ||r_{k-1}|| and twice the residual ||r_{k-1} - dR gamma|| that the pairs promised, the linear
model has failed. That sample goes on with a strict filter (sine 0.1) and, as long as mu exceeds its first value, with
the mixture of type II and a relative ridge mu, as in a Levenberg-Marquardt method:

    gamma = argmin ||r_k - dR gamma||^2 + mu sum_i (||dR_i|| gamma_i)^2,    mu <- max(100 mu, 1e-4), else mu <- mu / 5

Above mu = 1 the history is dropped, and where mu has decayed below 1e-13 the sample is as before.
"""

from dataclasses import dataclass, replace

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from implicit.pytree import Flat
from implicit.solvers.base import AbstractSolver, Point
from implicit.solvers.history_buffer import HistoryBuffer, put

_NOISE = 2  # a difference of residuals within that many eps of f(z) consists of rounding errors
_TRUST = 2.0  # a residual of that many times the promised one is a failure of the model
_LOW, _UP, _DOWN, _NONE = 1e-4, 100.0, 0.2, 1e-13  # the ridge's first value, its factors, and what counts as 0
_AFTER, _RESET = 1e-2, 10.0  # the ridge after a reset to the best iterate: its least value, and its factor
_STRICT = 0.1  # the filter of samples in the safeguard's cautious stage


@dataclass(frozen=True)
class MultisecantState:
    """The last point, the pairs of differences, and the products that the small systems are made of.

    `size` is ||r|| of the last point, `promised` the residual that its mixture promised, `mu` the ridge. `gram` holds
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
    pairs: int = 0
    fresh: bool = True  # the last point is not from this solve: it makes no pair with the next one


@dataclass(frozen=True)
class Multisecant(AbstractSolver[MultisecantState]):
    """Anderson acceleration of type I with at most `memory` pairs per sample, and never more than N.

    Memory grows with the steps taken, to at most 2 memory + 12 states.

    Args:
        memory: number of pairs kept, >= 1.
        filter: sine of the angle below which an older pair is left out, in (0, 1); None takes eps^(1/5): 7e-4 for
            float64 histories, 4e-2 for float32.
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
        return MultisecantState(point.fz, point.r, empty, empty, gram, gram.clone(), strict, size, endless, mu)

    def resume(self, point: Point, state: MultisecantState) -> MultisecantState:
        window = min(self.memory, point.z.shape[1])
        if state.dr.capacity != window:
            raise ValueError(f"state must come from a solver with memory={self.memory}, got {state.dr.capacity}.")
        return replace(state, fz=point.fz, r=point.r, strict=torch.zeros_like(state.strict), fresh=True)

    def restart(self, point: Point, state: MultisecantState, mask: Bool[Tensor, "B 1"]) -> MultisecantState:
        lost = mask.unsqueeze(2)
        return replace(
            state,
            fz=torch.where(mask, point.fz, state.fz),
            r=torch.where(mask, point.r, state.r),
            df=state.df.clear(mask),
            dr=state.dr.clear(mask),
            gram=state.gram.masked_fill(lost, 0),
            promised=state.promised.masked_fill(mask, torch.inf),
            mu=state.mu.masked_fill(mask, 0),
        )

    def retreat(
        self,
        point: Point,
        failed: Point,
        state: MultisecantState,
        mask: Bool[Tensor, "B 1"],
        cautious: Bool[Tensor, "B 1"],
    ) -> MultisecantState:
        """The history is kept; the next pair is the difference of the best point and the one that failed."""
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
        gamma, promised = self._weights(now, by_df[:, :, :used], by_dr[:, :, :used])
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
        noise = (_NOISE * torch.finfo(new.dtype).eps * _norm(point.fz)[:, 0]) ** 2
        real = (size > noise.clamp_min(torch.finfo(new.dtype).tiny)) & size.isfinite()
        row = torch.where(real.unsqueeze(1), row, 0)
        now = replace(
            state,
            fz=point.fz,
            r=point.r,
            df=df,
            dr=dr,
            gram=_put_cross(state.gram, slot, row, row, k),
            mixed=_put_cross(state.mixed, slot, by_dr[:, 2], by_df[:, 1], k),
            pairs=state.pairs + 1,
        )
        return now, by_df[:, :1], by_dr[:, :1]

    def _weights(
        self, state: MultisecantState, by_df: Float[Tensor, "B 1 K"], by_dr: Float[Tensor, "B 1 K"]
    ) -> tuple[Float[Tensor, "B K"], Float[Tensor, "B 1"]]:
        """gamma, 0 for pairs left out and where the system is singular, and ||r - dR gamma||."""
        used = by_dr.shape[2]
        unit, keep = self._kept(state, used)
        both = keep.unsqueeze(1) & keep.unsqueeze(2)
        gram = torch.where(both, state.gram[:, :used, :used] * unit.unsqueeze(1) * unit.unsqueeze(2), 0)
        mixed = torch.where(both, state.mixed[:, :used, :used] * unit.unsqueeze(1) * unit.unsqueeze(2), 0)
        by_df, by_dr = (torch.where(keep, d[:, 0] * unit, 0) for d in (by_df, by_dr))
        # type I where the model holds, type II with a ridge where it has failed; the identity for pairs left out
        ridged = ((state.mu > _LOW) & ~state.strict).unsqueeze(2)
        eye = torch.eye(used, dtype=gram.dtype, device=gram.device)
        matrix = torch.where(ridged, gram + state.mu.unsqueeze(2) * eye, mixed - gram)
        matrix = torch.where(keep.unsqueeze(2), matrix, eye)
        rhs = torch.where(ridged, by_dr.unsqueeze(2), (by_df - by_dr).unsqueeze(2))
        # rows in one unit, for pivots are chosen between rows
        rows = matrix.detach().abs().amax(dim=2, keepdim=True)
        rows = torch.where(rows > 0, rows, 1)
        y = torch.linalg.solve_ex(matrix / rows, rhs / rows)[0]
        y = torch.where(y.isfinite().all(dim=1, keepdim=True), y, 0)
        with torch.no_grad():
            square = state.size**2 - 2 * torch.bmm(by_dr.unsqueeze(1), y)[:, 0] + torch.bmm(y.mT, gram @ y)[:, 0]
        return y[:, :, 0] * unit, square.clamp_min(0).sqrt()

    def _kept(self, state: MultisecantState, used: int) -> tuple[Float[Tensor, "B K"], Bool[Tensor, "B K"]]:
        """1 / ||dR_i||, and which pairs pass the filter."""
        gram = state.gram[:, :used, :used].detach()
        diagonal = gram.diagonal(dim1=1, dim2=2)
        there = diagonal > 0
        unit = torch.where(there, diagonal, 1).rsqrt()
        # newest first
        order = (state.pairs - 1 - torch.arange(used, device=gram.device)) % used
        cosines = gram * unit.unsqueeze(1) * unit.unsqueeze(2)
        cosines = torch.where(there.unsqueeze(1) & there.unsqueeze(2), cosines, 0)[:, order][:, :, order]
        # the pivots are the squared sines; a small ridge keeps the factorization going past a dependent column
        tolerance = self.filter or torch.finfo(gram.dtype).eps ** 0.2
        ridge = 0.01 * tolerance**2
        cosines.diagonal(dim1=1, dim2=2).fill_(1 + ridge)
        factor = torch.linalg.cholesky_ex(cosines)[0]
        sine = factor.diagonal(dim1=1, dim2=2)[:, torch.argsort(order)]
        least = torch.where(state.strict | (state.mu > 0), max(tolerance, _STRICT), tolerance)
        return unit, there & (sine > least)

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


def _trust(state: MultisecantState, last: Float[Tensor, "B 1"]) -> MultisecantState:
    """The state with the ridge adapted to how well the last mixture's promise was kept."""
    failed = state.size > torch.maximum(_TRUST * state.promised, last)
    mu = torch.where(failed, (_UP * state.mu).clamp_min(_LOW), _DOWN * state.mu)
    lost = mu > 1
    mu = torch.where(lost, 1.0, mu * (mu > _NONE))
    return replace(state, mu=mu, gram=state.gram.masked_fill(lost.unsqueeze(2), 0))
