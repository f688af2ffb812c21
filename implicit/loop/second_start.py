"""A second attempt from the start of the solve, for samples whose best iterate leads nowhere.

A point of small residual need not lie near a fixed point: f may be undefined beside it, or ||f(z) - z|| may have a
minimum there that is not zero. Such a sample begins again at z0 with other steps (`implicit.staged_safeguard`). The
best iterate of the first attempt is kept, and returned if the second one does not find a better one.
"""

import numpy as np
import torch

from implicit.pytree import Flat, to_device
from implicit.solvers.base import Point


class SecondStart:
    """z0 of every sample and, once samples have begun again, their best iterates before.

    A record is a tuple of (B,) arrays that belong to the best iterates, their residuals first.

    Args:
        z0: where the samples began.
    """

    def __init__(self, z0: Flat) -> None:
        self.z0 = z0
        self.best = Point(z0, z0)
        self.record: tuple[np.ndarray, ...] = ()

    def begin(self, which: np.ndarray, best: Point, record: tuple[np.ndarray, ...]) -> None:
        """Set the best iterates of the samples in `which` aside; the next ones count as their first."""
        self.record = self.record or tuple(np.full_like(x, np.inf if x is record[0] else 0) for x in record)
        self.best = _where(which, best, self.best)
        for kept, x in zip(self.record, record, strict=True):
            kept[which] = x[which]
        record[0][which] = np.inf

    def end(self, which: np.ndarray, best: Point, record: tuple[np.ndarray, ...]) -> Point:
        """The best iterates, those set aside for the samples of `which` that have found none of smaller residual."""
        if not self.record:
            return best
        back = which & (self.record[0] < record[0])
        for kept, x in zip(self.record, record, strict=True):
            x[back] = kept[back]
        self.record[0][which] = np.inf
        return _where(back, self.best, best) if back.any() else best


def _where(which: np.ndarray, a: Point, b: Point) -> Point:
    mask = to_device(which, a.z.device).unsqueeze(1)
    return Point(torch.where(mask, a.z, b.z), torch.where(mask, a.fz, b.fz))
