"""Safeguard of accelerated solvers: reset to the best iterate, and plain steps where acceleration gains nothing.

For every sample, on the host, from residuals that the loop reads anyway:

    blown up      ||r|| > 1e3 times the smallest so far, or not finite: reset to the best iterate and clear the
                  history (so that the next step is plain). Not finite again at once: the sample has failed.
    no progress   the smallest residual has not halved within `patience` evaluations: reset to the best iterate, and
                  plain steps z' = f(z) from there. If those do not halve it within 6 `patience`, acceleration again,
                  with twice the patience.

A solve without a tolerance reads no residuals, so it has no safeguard.
"""

import numpy as np

_BLOWN = 1e3
_HALF = 0.5
_PLAIN = 6  # patience with plain steps, in that of accelerated ones


class Safeguard:
    """Which samples take plain steps (`use_picard`) and which are to be reset to their best iterate (`resets`)."""

    def __init__(self, size: int, patience: int) -> None:
        self.patience = np.full(size, patience)
        self.use_picard = np.zeros(size, dtype=bool)
        self.resets = np.zeros(size, dtype=bool)
        self.pending = False  # whether `resets` holds a sample
        self.retried = np.zeros(size, dtype=bool)
        self.tried = False  # whether `retried` holds a sample
        self.mark = np.full(size, np.inf)  # the smallest residual when the present trial began
        self.begun = False
        self.due = np.full(size, patience)
        self.next_due = patience

    def is_quiet(self, calls: int) -> bool:
        """True if no check is due for samples whose residuals are all the smallest so far."""
        return self.begun and calls < self.next_due and not self.tried

    def pop_resets(self) -> np.ndarray:
        """Return and clear the mask of samples to reset."""
        resets, self.resets, self.pending = self.resets, np.zeros_like(self.resets), False
        return resets

    def _schedule_reset(self, rows: np.ndarray) -> None:
        if len(rows):
            self.resets[rows] = self.pending = True

    def allow_retry(self, rows: np.ndarray, broken: np.ndarray, best: np.ndarray) -> np.ndarray:
        """Of the samples whose f(z) is not finite, those that are reset and may try again."""
        again = broken & ~self.retried[rows] & np.isfinite(best[rows]) & ~self.use_picard[rows]
        self.retried[rows] = broken
        self.tried = bool(self.retried.any())
        self._schedule_reset(rows[again])
        return again

    def update(self, rows: np.ndarray, r: np.ndarray, best: np.ndarray, calls: int) -> None:
        """Update from the residuals r of `rows` and the smallest ones of all samples."""
        if not self.begun:
            self.mark, self.begun = best.copy(), True
        blown = (r > _BLOWN * best[rows]) & ~self.use_picard[rows]
        self._schedule_reset(rows[blown])
        if calls < self.next_due:
            return
        due = rows[calls >= self.due[rows]]
        gained = best[due] <= _HALF * self.mark[due]
        stuck = due[~gained]
        self.patience[stuck[self.use_picard[stuck]]] *= 2
        self.use_picard[stuck] ^= True
        self._schedule_reset(stuck)
        self.mark[due] = best[due]
        length = np.where(self.use_picard[due] & ~gained, _PLAIN, 1)
        self.due[due] = calls + self.patience[due] * length
        self.next_due = int(self.due[rows].min(initial=np.iinfo(np.int64).max))
