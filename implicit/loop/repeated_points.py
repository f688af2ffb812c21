"""Samples evaluated at one z twice: a residual that differs by more than rounding shows coupling, or noise in f."""

from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Bool

from implicit.loop.best_iterates import BestIterates
from implicit.loop.observation import Observation
from implicit.pytree import Flat, to_host
from implicit.solution import Result
from implicit.stopping import Criterion

REPEATABLE = 100.0  # two evaluations of f at one z may differ by this many eps ||f(z)||
Rows = Bool[np.ndarray, " rows"]


@dataclass(frozen=True)
class Repeats:
    """Samples that were evaluated at their best iterate again, sorted by the second residual.

    Attributes:
        kept: converged samples that meet the tolerance again, and other samples with a finite residual.
        rounded: converged samples that miss the tolerance with the same residual up to rounding.
        lost: converged samples whose residual has changed and exceeds the tolerance.
        moved: running and stalled samples whose residual has changed.
    """

    kept: Rows
    rounded: Rows
    lost: Rows
    moved: Rows


def compare_repeats(
    seen: Observation, best: BestIterates, code: np.ndarray, measured: tuple[np.ndarray, ...], criterion: Criterion
) -> Repeats:
    """Compare the `measured` (residual, size, tolerance) of `seen` with those of the best iterates.

    `code` holds the `Result` of the samples of `seen`, -1 for running ones.
    """
    (r, s, tolerance), rows, stop = measured, seen.rows, criterion.stop
    converged, residual = code == Result.CONVERGED, best.residual[rows]
    same = repeats(criterion, residual, r, np.maximum(s, best.size[rows]))
    # with `Stop.late` a better iterate may have been read after this point was made
    held = seen.held & (best.since[rows] < seen.calls - (stop.check_every if stop.late else 0))
    above = held & ~(r <= tolerance) & converged
    moved = held & ~same & ((code < 0) | (code == Result.STALLED)) & np.isfinite(residual)
    kept = seen.held & np.where(converged, r <= tolerance, np.isfinite(r))
    return Repeats(kept, above & same, above & ~same, moved)


def repeats(criterion: Criterion, before: np.ndarray, now: np.ndarray, size: np.ndarray) -> np.ndarray:
    """Where two residuals at one z, with f(z) of this `size`, are the same up to rounding."""
    with np.errstate(invalid="ignore"):  # two residuals may both be infinite
        return np.abs(now - before) <= REPEATABLE * criterion.layout.eps * size


def differs(criterion: Criterion, a: Flat, b: Flat) -> bool:
    """Whether a and b, values of f at one z, differ by more than rounding in a row where both are finite."""
    with torch.no_grad():
        off, size = to_host(criterion.measure(a - b)), to_host(criterion.measure(b))
    with np.errstate(all="ignore"):
        return bool((off > REPEATABLE * criterion.layout.eps * size).any())
