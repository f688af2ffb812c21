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
from typing import Any, NamedTuple

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from implicit.argument_types import check_fields
from implicit.linear.secant_systems import (
    all_independent,
    dependent,
    leave_out,
    not_finite,
    promised,
    solution,
    split,
    with_diagonal,
)
from implicit.linear.secant_window import SecantWindow
from implicit.pytree import Flat, to_device, to_host
from implicit.solvers.base import (
    AbstractSolver,
    Point,
    check_at_least,
    check_history,
    may_skip,
    on_host,
    power_of_two,
    quiet,
    to_mask,
    to_tensor,
    where,
)
from implicit.solvers.history_buffer import position, rows_written
from implicit.torch_internals import constant

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
_KEPT = 0.4  # share of the last fall that the next one must reach
_SAFE_EXPONENT = 20  # the unit is 1 for numbers between 2^-20 and 2^20


@dataclass(frozen=True)
class MultisecantState:
    """The last point, the pairs of differences, and what the next step compares its residual with.

    All vectors are multiplied by `unit`, a power of two that keeps their squares in range; None: all units are 1.
    `size` is ||r|| of the last point, `promise` the ||r||^2 that its mixture promised, `mu` the ridge; `ratio` and
    `fall` are rho_k and 1 - rho_k / rho_{k-1} of the plain steps at the start, for the samples marked in `plain`.

    On a CPU, unless autograd records, the operators for rare cases are left out where no sample needs them: `eased` if
    no sample has a ridge or is in the cautious stage, `settled` if none is in its plain steps.
    """

    fz: Flat
    r: Flat
    window: SecantWindow
    strict: Bool[Tensor, "B 1"]
    size: Float[Tensor, "B 1"]
    promise: Float[Tensor, "B 1"]
    mu: Float[Tensor, "B 1"]
    plain: Bool[Tensor, "B 1"]
    ratio: Float[Tensor, "B 1"]
    fall: Float[Tensor, "B 1"]
    unit: Float[Tensor, "B 1"] | None
    fresh: bool = True  # before the first step of a solve, when no pair can be formed yet
    eased: bool = True
    settled: bool = False
    retreated: Bool[Tensor, "B 1"] | None = None  # samples reset just before, whose ||r|| gives no rho_k
    position: Int[Tensor, "1"] | None = None  # the number of pairs so far, if it is a tensor: the window is full then


class _Norms(NamedTuple):
    """||r||, the last ||r||, ||f(z)||, and the ||r||^2 that the last mixture promised, as `on_host` gives them."""

    size: Any
    last: Any
    fz: Any
    promise: Any


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
        unit = _unit(point)
        point = _in_unit(point, unit)
        size = point.r_size.unsqueeze(1)
        zero, one = torch.zeros_like(size), torch.ones_like(size)
        return MultisecantState(
            fz=point.fz,
            r=point.r,
            window=SecantWindow.empty(self._pairs(point.z), point.z).at_point(point.fz, point.r),
            strict=zero > 0,
            size=size,
            promise=torch.full_like(size, torch.inf),
            mu=zero,
            plain=one > 0,
            ratio=one,
            fall=zero,
            unit=unit,
        )

    def resume(self, point: Point, state: MultisecantState) -> MultisecantState:
        check_history(state.window.pairs, self._pairs(point.z))
        no, point = torch.zeros_like(state.strict), _in_unit(point, state.unit)
        count = rows_written(state.window.count, state.window.pairs + 1)
        window = replace(state.window, count=count)
        return replace(state, fz=point.fz, r=point.r, window=window, strict=no, plain=no, settled=True, fresh=True)

    def _pairs(self, z: Flat) -> int:
        """The number of pairs kept; as an open number of a graph it would make tracing the loop endless."""
        return constant(min(self.memory, z.shape[1]))

    def region_state(self, state: MultisecantState, steps: int) -> MultisecantState | None:
        if state.fresh:
            return None
        window = state.window.full(steps)
        return replace(state, window=window, eased=False, position=position(state.window.count, state.r))

    def after_regions(self, state: MultisecantState, steps: int) -> MultisecantState:
        if state.unit is not None:  # within regions f(z) and r are those of the point, in its own unit
            state = replace(state, fz=state.unit * state.fz, r=state.unit * state.r)
        window = state.window.with_pairs(self._pairs(state.fz))
        return replace(state, window=window, position=None)

    def restart(self, point: Point, state: MultisecantState, mask: Bool[Tensor, "B 1"]) -> MultisecantState:
        return self._without_pairs(_in_unit(point, state.unit), state, mask)

    def _without_pairs(self, point: Point, state: MultisecantState, mask: Bool[Tensor, "B 1"]) -> MultisecantState:
        fz, r = torch.where(mask, point.fz, state.fz), torch.where(mask, point.r, state.r)
        return replace(
            state,
            fz=fz,
            r=r,
            window=state.window.clear(mask).at_point(fz, r),
            promise=state.promise.masked_fill(mask, torch.inf),
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
        point, failed = _in_unit(point, state.unit), _in_unit(failed, state.unit)
        # from the window, as without a reset: gradients are summed in one order, whatever batch-mates are reset
        if state.fz.requires_grad and not state.fresh:
            state = replace(state, fz=state.window.last(0), r=state.window.last(1))
        if state.window.count:
            state = self._without_pairs(point, state, mask & ~state.window.rows.is_finite())
        seen = mask & failed.fz.isfinite().all(dim=1, keepdim=True) & failed.z.isfinite().all(dim=1, keepdim=True)
        fz, r = torch.where(mask, point.fz, state.fz), torch.where(mask, point.r, state.r)
        fz, r = torch.where(seen, failed.fz, fz), torch.where(seen, failed.r, r)
        size, before = point.r_size.unsqueeze(1), failed.r_size.unsqueeze(1)
        return replace(
            state,
            fz=fz,
            r=r,
            window=state.window.at_point(fz, r),
            strict=cautious,
            size=torch.where(mask, size, state.size),
            promise=state.promise.masked_fill(mask, torch.inf),
            mu=torch.where(mask, (_RESET * state.mu).clamp_min(_AFTER), state.mu),
            plain=state.plain & (~mask | (before <= size)),
            eased=False,
            retreated=mask,
        )

    def step(self, point: Point, state: MultisecantState) -> tuple[Flat, None, MultisecantState]:
        before, plain_step, point = state, point.fz, _in_unit(point, state.unit)
        size = point.r_size.unsqueeze(1)
        if before.fresh and not before.window.count:
            return plain_step, None, replace(before, fz=point.fz, r=point.r, size=size, fresh=False)
        norms = _Norms(*on_host(size, before.size, point.fz_size.unsqueeze(1), before.promise))
        window, square = self._window(point, before, norms)
        state = replace(before, fz=point.fz, r=point.r, window=window, size=size, fresh=False, retreated=None)
        state = _ridge(state, norms)
        if state.position is not None:
            state = replace(state, window=state.window.written_into(before.window), position=state.position + 1)
        if not state.settled and (state.position is not None or state.window.count <= _longest(point)):
            state = _still_plain(point, state, before)
            if may_skip(size):
                plain = to_host(state.plain)
                state = replace(state, settled=not plain.any())
                if plain.all():
                    return plain_step, None, replace(state, promise=torch.full_like(size, torch.inf))
        elif not state.settled:
            state = replace(state, settled=True)
        gamma, promise = self._mixture(state, norms, square)
        z = state.window.add(point.fz, gamma, -1)
        z = z if state.unit is None else z / state.unit
        if not state.settled:
            z, promise = torch.where(state.plain, plain_step, z), promise.masked_fill(state.plain, torch.inf)
        return z, None, replace(state, promise=promise)

    def _window(self, point: Point, before: MultisecantState, norms: _Norms) -> tuple[SecantWindow, Any]:
        """The window with the newest pair, which is erased if it consists of rounding errors; and ||r||^2."""
        if before.fresh:
            window = before.window.resumed(point.fz, point.r)
            return window, window.squares()[0]
        info = torch.finfo(point.r.dtype)
        # about 1 / ||r||; a power of two makes its product with the pair exact, and the limit keeps squares in range
        size, least = norms.size, info.eps * norms.last
        scale = power_of_two(where(size > least, size, least), info.tiny**0.5)
        window = before.window if before.position is None else before.window.moved_up()
        window = window.append(point.fz, point.r, to_tensor(scale, before.size))
        square, far, own = window.squares()
        with quiet(own):
            noise = (own <= (_NOISE * info.eps * norms.fz * scale) ** 2) | (own <= info.eps ** (2 * _FLAT) * far)
        noise = to_mask(noise, before.size)
        return window if noise is None else window.erase_newest(noise), square

    def _left_out(self, state: MultisecantState, gram: Float[Tensor, "B K K"]) -> Bool[Tensor, "B K"] | None:
        """The pairs that do not pass the filter; None if all pass."""
        tolerance = self.filter or torch.finfo(gram.dtype).eps ** (1 / 6)
        usual = state.eased and state.window.whole and may_skip(gram)
        if usual and all_independent(gram, tolerance):
            return None
        least = tolerance
        if not state.eased:
            least = torch.where(state.strict | (state.mu > 0), max(tolerance, _STRICT), tolerance)
        return dependent(gram, state.window.left_out(), tolerance, least)

    def _mixture(
        self, state: MultisecantState, norms: _Norms, square: Any
    ) -> tuple[Float[Tensor, "B K"], Float[Tensor, "B 1"]]:
        """The coefficients of the step, and the squared residual that they promise; `square` is ||r||^2."""
        systems = state.window.systems()
        out = self._left_out(state, systems[:, :, 1, 1:])
        if out is not None:
            systems = leave_out(systems, out)
        right, pairs = split(systems)
        y = solution(with_diagonal(pairs, out, None if state.eased else state.mu), right)
        skips = may_skip(y)
        promise = promised(pairs, right, y, square) if skips else None
        if promise is None or not np.isfinite(promise).all():
            y = y.masked_fill(not_finite(y), 0)
            promise = promised(pairs, right, y, square)
        # type II where the model has failed, and where the residual of type I is far from the smallest
        one, two = promise[:, :1], promise[:, 1:]
        with quiet(one):
            second = (norms.size > norms.last) | (one - _FAR**2 * two > torch.finfo(y.dtype).eps * square)
        if not state.eased:
            mu, strict = on_host(state.mu, state.strict)
            second = second | ((mu > _LOW) & (strict == 0))
        promise = to_tensor(where(second, two, one), state.promise)
        if skips and second.all():
            return y[:, 1], promise
        mask = to_mask(second, promise)
        return y[:, 0] if mask is None else torch.where(mask, y[:, 1], y[:, 0]), promise

    def inverse_transpose(self, state: MultisecantState, g: Flat) -> Flat:
        """H^T g, with H r = r - dF gamma(r): g - dZ (dZ^T dR)^-T dF^T g."""
        if not state.window.count:
            return g
        systems = state.window.systems()
        if (out := self._left_out(state, systems[:, :, 1, 1:])) is not None:
            systems = leave_out(systems, out)
        _, pairs = split(systems)
        # dF^T g
        right = state.window.products(g)
        right = right if out is None else right.masked_fill(out, 0)
        y = solution(with_diagonal(pairs, out, None).mT, torch.stack((right, right), dim=1))[:, 0]
        c = torch.where(y.isfinite().all(dim=1, keepdim=True), y, 0)
        return state.window.add(state.window.add(g, c, -1), c, 1, part=1)


def _in_unit(point: Point, unit: Float[Tensor, "B 1"] | None) -> Point:
    """The point with all vectors multiplied by the unit."""
    return point if unit is None else Point(unit * point.z, unit * point.fz)


def _unit(point: Point) -> Float[Tensor, "B 1"] | None:
    """A power of two near 1 / max(|r|, |f(z)|), or 1 for vectors whose squares are far from the ends of the range."""
    limit = 2.0**_SAFE_EXPONENT
    r_size, fz_size = on_host(point.r_size, point.fz_size)
    size = where(r_size > fz_size, r_size, fz_size)
    unusual = to_mask(~((size >= 1 / limit) & (size <= limit)), point.r_size)
    if unusual is None:
        return None
    vectors = torch.cat((point.r.detach(), point.fz.detach(), point.z.new_zeros(point.z.shape[0], 1)), dim=1)
    tiny = torch.finfo(vectors.dtype).tiny
    largest = vectors.abs().amax(dim=1, keepdim=True)
    exponent = torch.log2(largest.clamp(tiny, 1 / tiny)).round()
    return torch.exp2(-exponent.masked_fill(~(unusual.unsqueeze(1) & largest.isfinite()), 0))


def _ridge(state: MultisecantState, norms: _Norms) -> MultisecantState:
    """The state with the next mu, which grows where the residual exceeds the bound of the last mixture, else decays."""
    with quiet(norms.size):
        failed = (norms.size > _STILL * norms.last) & (norms.size**2 > _TRUST**2 * norms.promise)
    failed = to_mask(failed, state.size)
    if failed is None and state.eased:
        return state
    mu, window = _DOWN * state.mu, state.window
    if failed is not None:
        mu = torch.where(failed, (_UP * state.mu).clamp_min(_LOW), mu)
    if (gone := to_mask(on_host(mu)[0] > 1, mu)) is not None:
        window = window.drop(gone)
    mu = torch.threshold(mu.clamp_max(1), _NONE, 0)
    eased = may_skip(mu) and not any(v.any() for v in on_host(mu, state.strict))
    return replace(state, window=window, mu=mu, eased=eased)


def _longest(point: Point) -> int:
    """Largest number of plain steps at the start."""
    return max(_PLAIN_STEPS, min(_SETTLING, point.z.shape[1]))


def _choose(condition: Any, a: Any, b: Any) -> Any:
    """a if the condition holds, else b, for a condition that is a tensor or not."""
    return torch.where(condition, a, b) if isinstance(condition, Tensor) else a if condition else b


def _still_plain(point: Point, state: MultisecantState, before: MultisecantState) -> MultisecantState:
    """The state with `plain`, which marks the samples whose steps remain plain, `ratio` and `fall`."""
    count = state.window.count if state.position is None else state.position
    first, early = count == 1, count <= _PLAIN_STEPS
    # rho_k and its fall
    ratio = state.size / before.size
    fall = _choose(first, state.fall, 1 - ratio / state.ratio)
    size, last, rho, new, old = on_host(state.size, before.size, ratio, fall, state.fall)
    settles = False
    if not may_skip(point.r) or int(torch.count_nonzero(point.r)) < point.r.numel():
        settles = on_host(((point.r == 0) & (before.r * point.z != 0)).any(dim=1, keepdim=True))[0]
        settles = _choose(count <= _longest(point), (settles != 0) & (size <= last), False)
    gains = (new >= _FALL) & ((rho >= _QUICK) | (new >= _QUICK_FALL)) & (new >= _KEPT * old)
    stays = _choose(early, settles | _choose(first, rho <= _CONTRACTION, (rho <= _FAST) & gains), settles)
    if isinstance(stays, np.ndarray):
        stays = to_device(stays, ratio.device)
    if (same := before.retreated) is not None:
        stays, ratio, fall = stays | same, torch.where(same, state.ratio, ratio), torch.where(same, state.fall, fall)
    return replace(state, plain=state.plain & stays, ratio=ratio, fall=fall)
