"""Kind of fixed point by the Jacobian J at it: contractive, oscillating or expanding; non-normal; kinked.

The first three kinds are defined in `condition`. Two more conditions are measured:

    non-normal    T = max_k ||(J^T)^k q|| / r^k, with q random and r the rate at which these norms grow for large k. For
                  normal J the norms are log-convex in k, so that T <= 1; T is the factor by which a residual can grow
                  beyond its final rate.
    kinked        D(h) = ||f(z + h d) - 2 f(z) + f(z - h d)|| / (h ||d||) for random d, the difference of the one-sided
                  slopes. If f is differentiable D(h) falls like h; at a kink D(h) does not fall.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from implicit.diagnostics.diagnose.condition import Condition, Finding
from implicit.diagnostics.diagnose.map_checks import normal, root_mean_square
from implicit.diagnostics.diagnose.solver_trials import SolverRow
from implicit.diagnostics.spectral_radius import Spectrum
from implicit.evaluation import FlatMap
from implicit.pytree import Flat, PerSample, norm
from implicit.solvers import Picard

_BORDER = 0.02  # the kind is uncertain if the spectral radius or real part differs from 1 by at most this
_LOOSE = 0.1  # the kind is uncertain if the relative error of the leading Ritz value is larger
_TRANSIENT, _CLEAR = 10.0, 20.0  # J is strongly non-normal from the first T on, and certainly from the second on
_SLOWEST = 0.1  # smallest r: with a faster decay a transient ends within a few steps
_STEPS = (1e-2, 1e-3)  # h, in units of the state's root mean square
_KINK, _FALL = 0.05, 0.5  # at a kink D(1e-3) is at least this share of the slopes' sum, and this share of D(1e-2)
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
        return cls(spectrum.radius, real, gap, torch.stack([_transient(row) for row in growth.cpu()]).to(real.device))


def _transient(growth: Tensor) -> Tensor:
    """T of one sample from log ||(J^T)^k q||, k = 1 .. K."""
    known = growth[torch.isfinite(growth)]
    count = len(known)
    if count < 2:
        return growth.new_ones(())
    final = max(1, count // 4)
    vanishes = count < len(growth) and bool(torch.isneginf(growth[count]))
    rate = growth.new_full((), -torch.inf) if vanishes else (known[-1] - known[-1 - final]) / final
    rate = rate.clamp_min(math.log(_SLOWEST))
    steps = torch.arange(1, count + 1, dtype=growth.dtype, device=growth.device)
    return (known - steps * rate).amax().clamp_min(0).exp()


def kind(kinds: Kinds, spectrum: Spectrum, found: Tensor) -> list[Finding]:
    """One finding per kind of fixed point in the batch, and one for the samples with a strongly non-normal J.

    Args:
        kinds: result of `Kinds.of` for the spectrum.
        spectrum: the spectrum of J at the best iterates.
        found: (B,) whether the best iterates are fixed points.
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
        doubt = (number - 1).abs() <= _BORDER
        if condition is Condition.OSCILLATING:
            doubt |= (kinds.real - 1).abs() <= _BORDER
        certain = ~doubt & (spectrum.error <= _LOOSE) & found
        evidence = f"{what} of df/dz {_span(number[mask])}"
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


def kinks(f: FlatMap, z: Flat, found: Tensor) -> list[Finding]:
    """Whether f has a kink at z, by D(h) for two directions d and two steps h: nine evaluations."""
    fz = f(z)
    scale = root_mean_square(z)
    scale = torch.where(scale > 10 * f.layout.eps, scale, root_mean_square(fz).clamp_min(1e-3)).unsqueeze(1)
    differences, shares = [], []
    for h in _STEPS:
        worst = torch.zeros(len(z), dtype=z.dtype, device=z.device)
        share = torch.zeros_like(worst)
        for seed in (3, 4):
            # D(h), 0 if it is within the rounding error of f, and its share of the slopes on both sides
            step = h * scale * normal(z, seed)
            ahead, behind = f(z + step) - fz, f(z - step) - fz
            second = norm(ahead + behind)
            second = torch.where(second > 20 * f.layout.eps * (norm(fz) + norm(z)), second, 0.0).nan_to_num(nan=0.0)
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
