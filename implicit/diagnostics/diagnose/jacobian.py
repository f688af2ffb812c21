"""Kind of fixed point by the Jacobian J at it: contractive, oscillating or expanding; non-normal; kinked.

The first three kinds are defined in `condition`. Two more conditions are measured:

    non-normal    T = max_k ||(J^T)^k q|| / r^k, with q random and r the rate at which these norms grow for large k, or
                  about the spectral radius where that is known exactly. For normal J the norms are log-convex in k, so
                  that T <= 1; T is the factor by which a residual can grow beyond its final rate.
    kinked        D(h) = ||f(z + h d) - 2 f(z) + f(z - h d)|| / (h ||d||) for random d, the difference of the one-sided
                  slopes. If f is differentiable D(h) falls like h; at a kink D(h) does not fall.

Ritz values of a strongly non-normal J may be far outside its spectrum although their residuals are small. Hence a
radius of at least 1 does not count where plain iteration from a point beside the solution comes nearer to it.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from implicit.diagnostics.diagnose.condition import Condition, Finding
from implicit.diagnostics.diagnose.map_checks import normal, size_or
from implicit.diagnostics.diagnose.solver_trials import SolverRow
from implicit.diagnostics.spectral_radius import Spectrum
from implicit.evaluation import FlatMap
from implicit.pytree import Flat, PerSample, norm
from implicit.solvers import Picard

_BORDER = 0.02  # the kind is uncertain if the spectral radius or real part differs from 1 by at most this
_LOOSE = 0.1  # a larger relative error of the leading Ritz value is added to the border
_INSIDE = 1 - 1e-12  # the radius taken where plain iteration leads back to the solution
_TRANSIENT, _CLEAR = 10.0, 20.0  # J is strongly non-normal from the first T on, and certainly from the second on
_DEFECT = 0.05  # largest log-rate beyond the radius at k of about 60, which powers of a defective J reach: 3 / k
_SLOWEST = 0.1  # smallest r: with a faster decay a transient ends within a few steps
_STEPS = (1e-2, 1e-4)  # h, in units of the state's root mean square
_KINK, _FALL = 0.05, 0.5  # at a kink D(1e-4) is at least this share of the slopes' sum, and this share of D(1e-2)
COARSEST = 1e-4  # largest rounding error of a dtype in which a kink can be seen
_OVER = 10.0  # a second difference counts if it exceeds this multiple of the residual, which may be rounding of f
_FLAT = 0.1  # the slopes' sum is taken to be at least this


@dataclass(frozen=True, eq=False)
class Kinds:
    """Per sample: the spectral radius, the largest real part, min |1 - lambda| and the transient growth T."""

    radius: PerSample
    real: PerSample
    gap: PerSample
    transient: PerSample

    @classmethod
    def of(cls, spectrum: Spectrum) -> "Kinds":
        """The kinds by the Ritz values and the growth of the powers of J."""
        values, growth = spectrum.values, spectrum.growth
        real = values.real.nan_to_num(nan=-torch.inf).amax(dim=1)
        gap = (1 - values).abs().nan_to_num(nan=torch.inf).amin(dim=1)
        exact = torch.where(spectrum.error == 0, spectrum.radius.log(), torch.nan)
        transient = torch.stack([_transient(*row) for row in zip(growth.cpu(), exact.tolist(), strict=True)])
        return cls(spectrum.radius, real, gap, transient)

    def attracting(self, mask: Tensor, growth: Tensor) -> "Kinds":
        """The samples in `mask` attract plain iteration: the radius is below 1, and T is at least max ||(J^T)^k q||."""
        radius = torch.where(mask, self.radius.clamp(max=_INSIDE), self.radius)
        real = torch.where(mask, self.real.clamp(max=_INSIDE), self.real)
        largest = growth.nan_to_num(nan=-torch.inf).amax(dim=1).clamp_min(0).exp()
        transient = torch.where(mask, torch.maximum(self.transient, largest), self.transient)
        return Kinds(radius, real, self.gap, transient)


def _transient(growth: Tensor, exact: float) -> Tensor:
    """T of one sample from log ||(J^T)^k q||, k = 1 .. K, and the logarithm of the radius, NaN if that is not exact."""
    known = growth[torch.isfinite(growth)]
    count = len(known)
    if count < 2:
        return growth.new_ones(())
    final = max(1, count // 4)
    vanishes = count < len(growth) and bool(torch.isneginf(growth[count]))
    rate = growth.new_full((), -torch.inf) if vanishes else (known[-1] - known[-1 - final]) / final
    rate = rate if math.isnan(exact) else rate.clamp(exact, exact + _DEFECT)
    rate = rate.clamp_min(math.log(_SLOWEST))
    steps = torch.arange(1, count + 1, dtype=growth.dtype, device=growth.device)
    return (known - steps * rate).amax().clamp_min(0).exp()


def kind(kinds: Kinds, spectrum: Spectrum, found: Tensor, attracted: Tensor) -> list[Finding]:
    """One finding per kind of fixed point in the batch, and one for the samples with a strongly non-normal J.

    Args:
        kinds: result of `Kinds.of` for the spectrum.
        spectrum: the spectrum of J at the best iterates.
        found: (B,) whether the best iterates are fixed points.
        attracted: (B,) whether a radius of at least 1 was refuted by plain iteration.
    """
    known, found = torch.isfinite(kinds.radius), found.cpu()
    expanding = known & (kinds.real >= 1)
    oscillating = known & ~expanding & (kinds.radius >= 1)
    contractive = known & ~expanding & ~oscillating
    findings = []
    for condition, mask, what, number in (
        (Condition.EXPANDING, expanding, "largest real part of an eigenvalue", kinds.real),
        (Condition.OSCILLATING, oscillating, "spectral radius", kinds.radius),
        (Condition.CONTRACTIVE, contractive, "spectral radius", kinds.radius),
    ):
        if not bool(mask.any()):
            continue
        # the leading Ritz value differs from an eigenvalue of a normal J by at most its residual
        loose = torch.where(spectrum.error > _LOOSE, spectrum.error * spectrum.radius, 0.0)
        doubt = (number - 1).abs() <= loose + _BORDER
        if condition is Condition.OSCILLATING:
            doubt |= (kinds.real - 1).abs() <= loose + _BORDER
        certain = ~doubt & found & ~attracted
        evidence = f"{what} of df/dz {_span(spectrum.radius[mask] if number is kinds.radius else number[mask])}"
        if bool(attracted[mask].any()):
            evidence += ", and yet plain iteration beside the solution leads back to it or stays"
        if not bool(found[mask].all()):
            evidence += ", at the best iterate, which is no fixed point"
        findings.append(Finding.of(condition, evidence, mask, bool(certain[mask].all())))
    strong = known & (kinds.transient >= _TRANSIENT)
    if bool(strong.any()):
        worst = kinds.transient[strong]
        evidence = f"powers of df/dz exceed their final rate {_span(worst)} times"
        certain = bool((worst >= _CLEAR).all() and found[strong].all())
        findings.append(Finding.of(Condition.NON_NORMAL, evidence, strong, certain))
    return findings


def kind_from_iterations(rows: Sequence[SolverRow]) -> list[Finding]:
    """The kind of fixed point by the iterations that converged, plain or damped, for an f without a derivative."""
    able = {row.solver: row for row in rows if row.samples and row.converged == row.samples}
    if not able:
        return []
    samples = tuple(range(next(iter(able.values())).samples))
    for solver, condition in ((Picard(), Condition.CONTRACTIVE), (Picard(0.5), Condition.OSCILLATING)):
        if solver in able:
            evidence = f"{able[solver].name} converged in {able[solver].most} evaluations"
            return [Finding(condition, evidence, samples, certain=False)]
    return [Finding(Condition.EXPANDING, f"only {', '.join(r.name for r in able.values())} converged", samples, False)]


def kinks(f: FlatMap, z: Flat, found: Tensor, scale: Flat) -> list[Finding]:
    """Whether f has a kink at z, by D(h) for two directions d and two steps h: nine evaluations.

    Every tensor of the state is measured in units of its scale.

    Args:
        f: the map.
        z: the best iterates.
        found: (B,) whether they are fixed points.
        scale: (B, N) root mean square of a typical state, taken where z is 0 beside it.
    """
    fz, scale = f(z), size_or(z, scale, f.layout)
    rounding = 20 * f.layout.eps * (norm(fz / scale) + norm(z / scale)) + _OVER * norm((fz - z) / scale)
    differences, shares = [], []
    for h in _STEPS:
        worst = torch.zeros(len(z), dtype=z.dtype, device=z.device)
        share = torch.zeros_like(worst)
        for seed in (3, 4):
            # D(h), 0 if it is within the rounding error of f, and its share of the slopes on both sides
            step = h * normal(z, seed)
            ahead, behind = ((f(z + side * scale * step) - fz) / scale for side in (1, -1))
            second = norm(ahead + behind)
            second = torch.where(second > rounding, second, 0.0).nan_to_num(nan=0.0)
            worst = torch.maximum(worst, second / norm(step))
            share = torch.maximum(share, second / (norm(ahead) + norm(behind)).clamp_min(_FLAT * norm(step)))
        differences.append(worst)
        shares.append(share)
    kinked = (shares[1] >= _KINK) & (differences[1] >= _FALL * differences[0])
    if not bool(kinked.any()):
        return []
    evidence = f"one-sided slopes of f at the fixed point differ by {_span(shares[1][kinked])} of their sum"
    return [Finding.of(Condition.KINKED, evidence, kinked, bool(found[kinked].all()))]


def _span(numbers: Tensor) -> str:
    low, high = float(numbers.min()), float(numbers.max())
    return f"{high:.3g}" if f"{low:.3g}" == f"{high:.3g}" else f"{low:.3g} to {high:.3g}"
