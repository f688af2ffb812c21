"""The multisecant method (Anderson acceleration of type I) over a long, filtered window. The default solver.

Setting: r_k = f(z_k) - z_k. With the differences of the last points as columns,

    dR = [..., r_k - r_{k-1}],    dF likewise of f(z),    dZ = dF - dR likewise of z,

the approximate inverse of I - df/dz that fits every pair of the window and is the identity beyond it gives

    dZ^T (r_k - dR gamma) = 0,    z_{k+1} = f(z_k) - dF gamma

(Fang and Saad, "Two classes of multisecant methods for nonlinear acceleration", Numer. Linear Algebra Appl. 16, 2009,
section 2.4: the type-I member of the Anderson family). On a linear map of N numbers this takes N + 1 evaluations.

Old pairs of a map that is not linear contradict the new ones, and nearly dependent columns amplify rounding errors. The
columns of dR are therefore taken newest first, and a column whose angle to the span of the newer ones has a sine below
`filter` is left out (Pollock and Rebholz, "Filtering for Anderson acceleration", SIAM J. Sci. Comput. 45(4), 2023). The
sines are the pivots of the Cholesky factor of the Gram matrix of the normalized columns.

A type-I residual may be far above the smallest one that the pairs allow, as that of FOM is above that of GMRES where
GMRES stagnates. Where ||r_k - dR gamma|| exceeds `_FAR` times its minimum, the step is therefore that of type II, the
least-squares mixture (Walker and Ni, SIAM J. Numer. Anal. 49(4), 2011). Both small systems are solved as one batch.

Where ||r_k|| exceeds both 0.99 ||r_{k-1}|| and twice the residual ||r_{k-1} - dR gamma|| that the pairs promised, the
linear model has failed. That sample goes on with a strict filter (sine 0.1) and, as long as mu exceeds its first value,
with the mixture of type II and a relative ridge mu, as in a Levenberg-Marquardt method:

    gamma = argmin ||r_k - dR gamma||^2 + mu sum_i (||dR_i|| gamma_i)^2,    mu <- max(100 mu, 1e-4), else mu <- mu / 5

Above mu = 1 the history is dropped; below 1e-13 mu becomes 0, which ends the strict filter.

The first steps are plain, z' = f(z), as long as they gain more each time: rho_k = ||r_k|| / ||r_{k-1}|| falls, and the
falls do not get small. On a normal linear contraction rho_k never falls: one plain step is taken, which spans the same
Krylov space. On a map that converges faster than linearly (a step of Newton's method, say) the ratios fall to 0, and no
extrapolation of the past differences would come close to plain iteration. The steps stay plain too as long as each step
settles a number: r_i = 0 exactly for an entry z_i that the step before still changed. On a map whose numbers depend on
one another along a graph without cycles (a triangular matrix, shortest paths, the value of a game on a tree) plain
iteration is exact after as many steps as the graph is deep, and no mixture is. At most `_SETTLING` plain steps are
taken for this reason, and numbers that settle at 0 do not count, since ReLU and thresholds set numbers to 0 on any map.
"""

from dataclasses import dataclass, replace

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from implicit.argument_types import check_fields
from implicit.linear.secant_systems import mixtures, pairs_in_use, put_cross
from implicit.pytree import Flat
from implicit.solvers.base import AbstractSolver, Point, check_at_least, check_history
from implicit.solvers.history_buffer import HistoryBuffer, put

_NOISE = 2  # a difference of residuals of at most this many eps ||f(z)|| consists of rounding errors
_FLAT = 0.75  # as does one of at most eps to this power times the difference of f(z): f is a translation along it
_FAR = 1.05  # the step is of type II if the residual of type I exceeds this multiple of the smallest one
_TRUST = 2.0  # the model has failed if ||r|| exceeds this multiple of the promised residual
_STILL = 0.99  # and this share of the last ||r||
_LOW, _UP, _DOWN, _NONE = 1e-4, 100.0, 0.2, 1e-13  # mu: first value, growth and decay factor, value that becomes 0
_AFTER, _RESET = 1e-2, 10.0  # mu after a reset to the best iterate: least value, growth factor
_STRICT = 0.1  # the filter in the safeguard's cautious stage and after a failure of the model
_PLAIN_STEPS = 15  # largest number of plain steps at the start that gain more each time
_SETTLING = 256  # largest number of plain steps at the start that each settle a number
_CONTRACTION, _FAST = 0.9, 0.65  # largest rho for a second plain step, and for the steps after the second
_FALL, _QUICK, _QUICK_FALL = 1e-3, 0.3, 0.1  # least fall 1 - rho_k / rho_{k-1}; for a rho below _QUICK, _QUICK_FALL
_SAFE_EXPONENT = 20  # the unit is 1 for numbers between 2^-20 and 2^20
_KEPT = 0.4  # share of the last fall that the next one must reach


@dataclass(frozen=True)
class MultisecantState:
    """The last point, the pairs of differences, and the two small systems.

    A row of `df` and of `dr` is a pair dF_i and dR_i; `inverse` holds 1 / ||dR_i||, or 0 for a pair that is not in use.
    Norms and products are those of vectors multiplied by `unit`, a power of two that keeps their squares in range.
    `systems` holds <dZ_i, dR_j> and <dR_i, dR_j> of the pairs divided by ||dR_i||. `size` is ||r|| of the last point,
    `bound` the ||r|| of the next point above which the model has failed, `mu` the ridge; `ratio` and `fall` are rho_k
    and 1 - rho_k / rho_{k-1} of the plain steps at the start, for the samples marked in `plain`.
    """

    fz: Flat
    r: Flat
    df: HistoryBuffer
    dr: HistoryBuffer
    inverse: Float[Tensor, "B K"]
    systems: Float[Tensor, "B 2 K K"]
    strict: Bool[Tensor, "B 1"]
    size: Float[Tensor, "B 1"]
    bound: Float[Tensor, "B 1"]
    mu: Float[Tensor, "B 1"]
    plain: Bool[Tensor, "B 1"]
    ratio: Float[Tensor, "B 1"]
    fall: Float[Tensor, "B 1"]
    unit: Float[Tensor, "B 1"]
    count: int = 0
    fresh: bool = True  # before the first step of a solve, when no pair can be formed yet
    retreated: Bool[Tensor, "B 1"] | None = None  # samples reset just before, whose ||r|| gives no rho_k


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
        check_fields(self)
        check_at_least(self, 1, "memory")
        if self.filter is not None and not 0 < self.filter < 1:
            raise ValueError(f"Multisecant.filter must lie in (0, 1), got {self.filter}.")

    @property
    def patience(self) -> int:
        return 25 if self.safeguard else 0

    def stall_after(self, numbers: int) -> int:
        # on a linear map with N up to the window a gain is certain only after all N + 1 evaluations
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
        unit = _unit(point)
        size = _norm(unit * point.r)
        zero, one = torch.zeros_like(size), torch.ones_like(size)
        return MultisecantState(
            fz=point.fz,
            r=point.r,
            df=HistoryBuffer(window),
            dr=HistoryBuffer(window),
            inverse=point.z.new_zeros(rows, window),
            systems=point.z.new_zeros(rows, 2, window, window),
            strict=zero > 0,
            size=size,
            bound=torch.full_like(size, torch.inf),
            mu=zero,
            plain=one > 0,
            ratio=one,
            fall=zero,
            unit=unit,
        )

    def resume(self, point: Point, state: MultisecantState) -> MultisecantState:
        check_history(state.dr.capacity, min(self.memory, point.z.shape[1]))
        no = torch.zeros_like(state.strict)
        return replace(state, fz=point.fz, r=point.r, strict=no, plain=no, fresh=True)

    def restart(self, point: Point, state: MultisecantState, mask: Bool[Tensor, "B 1"]) -> MultisecantState:
        return replace(
            state,
            fz=torch.where(mask, point.fz, state.fz),
            r=torch.where(mask, point.r, state.r),
            df=state.df.clear(mask),
            dr=state.dr.clear(mask),
            inverse=state.inverse.masked_fill(mask, 0),
            systems=state.systems.masked_fill(mask[:, :, None, None], 0),
            bound=state.bound.masked_fill(mask, torch.inf),
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

        With `Stop.late` the history may hold pairs of a point that is not finite: then it is cleared.
        """
        if state.count:
            state = self.restart(point, state, mask & ~(state.df.is_finite() & state.dr.is_finite()))
        seen = mask & failed.fz.isfinite().all(dim=1, keepdim=True) & failed.z.isfinite().all(dim=1, keepdim=True)
        fz, r = torch.where(mask, point.fz, state.fz), torch.where(mask, point.r, state.r)
        size = _norm(state.unit * point.r)
        return replace(
            state,
            fz=torch.where(seen, failed.fz, fz),
            r=torch.where(seen, failed.r, r),
            strict=cautious,
            size=torch.where(mask, size, state.size),
            bound=state.bound.masked_fill(mask, torch.inf),
            mu=torch.where(mask, (_RESET * state.mu).clamp_min(_AFTER), state.mu),
            plain=state.plain & (~mask | (_norm(state.unit * failed.r) <= size)),
            retreated=mask,
        )

    def step(self, point: Point, state: MultisecantState) -> tuple[Flat, None, MultisecantState]:
        if state.fresh and not state.count:
            size = _norm(state.unit * point.r)
            return point.fz, None, replace(state, fz=point.fz, r=point.r, size=size, fresh=False)
        before = state
        if state.fresh:
            scaled = state.unit * point.r
            products = _products(state, scaled.unsqueeze(1))[:, 0]
            state = replace(state, fz=point.fz, r=point.r, size=_norm(scaled), fresh=False)
        else:
            products, state = self._append(point, state)
        # the ridge grows if the residual is above the bound that the last mixture promised, else it decays
        mu = torch.where(state.size > before.bound, (_UP * state.mu).clamp_min(_LOW), _DOWN * state.mu)
        systems = state.systems.masked_fill((mu > 1)[:, :, None, None], 0)
        state = replace(state, systems=systems, mu=torch.threshold(mu.clamp_max(1), _NONE, 0))
        # the mixture; r and the columns have norm 1 here
        used = products.shape[2]
        # (a residual of 0 is divided by 1, since the derivative of a division by 0 would be NaN)
        size = state.size.masked_fill(state.size <= torch.finfo(mu.dtype).tiny ** 0.5, 1)
        inverse = state.inverse[:, :used]
        cosines = products * (inverse / size).unsqueeze(1)
        y, promised = mixtures(systems[:, :, :used, :used], cosines, self._in_use(state, used), state.mu)
        # type II where the model has failed, and where the residual of type I is far from the smallest
        one, two = promised[:, :1], promised[:, 1:]
        far = one - _FAR**2 * two > torch.finfo(mu.dtype).eps
        second = (state.size > before.size) | ((state.mu > _LOW) & ~state.strict) | far
        gamma = torch.where(second, y[:, 1], y[:, 0])
        bound = (_TRUST**2 * torch.where(second, two, one)).clamp_min(_STILL**2).sqrt()
        if state.count <= max(_PLAIN_STEPS, min(_SETTLING, point.z.shape[1])):
            state = _still_plain(point, state, before)
            gamma, bound = gamma.masked_fill(state.plain, 0), bound.masked_fill(state.plain, torch.inf)
        z = state.df.add(point.fz, (size * inverse * gamma).unsqueeze(1), -1)
        return z, None, replace(state, bound=bound * size, retreated=None)

    def _append(self, point: Point, state: MultisecantState) -> tuple[Float[Tensor, "B 2 K"], MultisecantState]:
        """The products of r with dZ and dR, and the state with the newest pair in the place of the oldest."""
        slot = state.count % state.dr.capacity
        df = state.df.reserve(slot, point.r).set_difference(slot, point.fz, state.fz)
        dr = state.dr.reserve(slot, point.r).set_difference(slot, point.r, state.r)
        # a pair that consists of rounding errors is not used
        vectors = state.unit.unsqueeze(2) * torch.stack((point.r, df.row(slot), dr.row(slot)), dim=1)
        size, far, own = torch.linalg.vector_norm(vectors.detach(), dim=2, keepdim=True).unbind(dim=1)
        eps = torch.finfo(own.dtype).eps
        noise = own <= torch.maximum(_NOISE * eps * _norm(state.unit * point.fz), eps**_FLAT * far)
        if torch.is_grad_enabled() and vectors.requires_grad:
            # the same norm, with a derivative
            length = vectors[:, 2].square().sum(dim=1, keepdim=True).masked_fill(noise, 1)
            length = length.clamp_min(torch.finfo(own.dtype).tiny).sqrt()
            own = own * (length / length.detach())
        own = own.masked_fill(noise, torch.inf).reciprocal()
        inverse = put(state.inverse.unsqueeze(2), slot, own).squeeze(2)
        new = replace(
            state,
            fz=point.fz,
            r=point.r,
            df=df,
            dr=dr,
            inverse=inverse,
            size=size,
            count=state.count + 1,
            fresh=False,
        )
        # products of r, dF and dR with dZ and dR, in one pass over the window
        products = _products(new, vectors)
        scale = (own * inverse[:, : products.shape[3]]).unsqueeze(1)
        column, by_dr = products[:, 2] * scale, products[:, 1, 1] * scale[:, 0]
        row = torch.stack((by_dr - column[:, 1], column[:, 1]), dim=1)
        return products[:, 0], replace(new, systems=put_cross(state.systems, slot, row, column))

    def _in_use(self, state: MultisecantState, used: int) -> Bool[Tensor, "B K"]:
        """Which pairs pass the filter."""
        gram = state.systems[:, 1, :used, :used]
        tolerance = self.filter or torch.finfo(gram.dtype).eps ** (1 / 6)
        least = torch.where(state.strict | (state.mu > 0), max(tolerance, _STRICT), tolerance)
        return pairs_in_use(gram, state.count % used, tolerance, least)

    def inverse_transpose(self, state: MultisecantState, g: Flat) -> Flat:
        """H^T g, with H r = r - dF gamma(r): g - dZ (dZ^T dR)^-T dF^T g."""
        if not state.count:
            return g
        used = min(state.count, state.dr.capacity)
        left_out = ~self._in_use(state, used)
        matrix = state.systems[:, 0, :used, :used]
        matrix = matrix.masked_fill(left_out.unsqueeze(1) | left_out.unsqueeze(2), 0)
        rows = matrix.abs().amax(dim=2, keepdim=True)
        rows = torch.where(rows > 0, rows, 1)
        matrix = matrix / rows + torch.diag_embed(left_out.to(matrix.dtype))
        # dF^T g
        inverse = (state.unit * state.inverse[:, :used]).unsqueeze(2)
        right = state.df.products(g.unsqueeze(1), used).mT * inverse
        right = right.masked_fill(left_out.unsqueeze(2), 0)
        y = torch.linalg.solve_ex(matrix.mT, right)[0] / rows * inverse
        c = torch.where(y.isfinite().all(dim=1, keepdim=True), y, 0).mT
        return state.dr.add(state.df.add(g, c, -1), c)


def _products(state: MultisecantState, x: Float[Tensor, "B P N"]) -> Float[Tensor, "B P 2 K"]:
    """<x_p, dZ_i> and <x_p, dR_i> in units, reading the pairs once; x is multiplied by the unit already."""
    used = min(state.count, state.dr.capacity)
    by_df, by_dr = state.df.products(x, used), state.dr.products(x, used)
    return torch.stack((by_df - by_dr, by_dr), dim=2) * state.unit[:, :, None, None]


def _norm(x: Flat) -> Float[Tensor, "B 1"]:
    return torch.linalg.vector_norm(x.detach(), dim=1, keepdim=True)


def _unit(point: Point) -> Float[Tensor, "B 1"]:
    """A power of two near 1 / max(|r|, |f(z)|), or 1 for numbers whose squares are far from the ends of the range."""
    vectors = torch.cat((point.r.detach(), point.fz.detach(), point.z.new_zeros(point.z.shape[0], 1)), dim=1)
    tiny = torch.finfo(vectors.dtype).tiny
    largest = vectors.abs().amax(dim=1, keepdim=True)
    exponent = torch.log2(largest.clamp(tiny, 1 / tiny)).round()
    safe = (exponent.abs() <= _SAFE_EXPONENT) | ~largest.isfinite()
    return torch.exp2(-exponent.masked_fill(safe, 0))


def _still_plain(point: Point, state: MultisecantState, before: MultisecantState) -> MultisecantState:
    """The state with `plain`, which marks the samples whose steps remain plain, `ratio` and `fall`."""
    settles = ((point.r == 0) & (before.r * point.z != 0)).any(dim=1, keepdim=True)
    settles = settles & (state.size <= before.size)
    # rho_k and its fall
    ratio = state.size / before.size
    fall = 1 - ratio / state.ratio
    if state.count > _PLAIN_STEPS:
        stays = settles
    elif state.count == 1:
        stays, fall = settles | (ratio <= _CONTRACTION), state.fall
    else:
        least = torch.where(ratio < _QUICK, _QUICK_FALL, _FALL)
        stays = settles | (ratio <= _FAST) & (fall >= torch.maximum(_KEPT * state.fall, least))
    if (same := before.retreated) is not None:
        stays, ratio, fall = stays | same, torch.where(same, state.ratio, ratio), torch.where(same, state.fall, fall)
    return replace(state, plain=state.plain & stays, ratio=ratio, fall=fall)
