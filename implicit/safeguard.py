"""The safeguard of accelerated solvers: back to the best point, and plain iterations where acceleration gains nothing.

For every sample, on the host, from residuals that the loop reads anyway:

    blown up      ||r|| > 1e3 times the smallest so far, or not finite: go back to the best point, forget the
                  history (so that the next step is plain). Not finite again at once: the sample has failed.
    no progress   the smallest residual has not halved within `patience` evaluations: back to the best point, and
                  plain steps z' = f(z) from there. If those do not halve it within 6 `patience`, back to
                  acceleration, with twice the patience.

In a solve without a tolerance nothing is read, so nothing is guarded.
"""

import numpy as np

_BLOWN = 1e3
_HALF = 0.5
_PLAIN = 6  # patience with plain steps, in that of accelerated ones


class Safeguard:
    """Which samples take plain steps (`plain`) and which must go back to their best point (`back`)."""

    def __init__(self, size: int, patience: int) -> None:
        self.patience = np.full(size, patience)
        self.plain = np.zeros(size, dtype=bool)
        self.back = np.zeros(size, dtype=bool)
        self.waiting = False  # whether `back` holds a sample
        self.retried = np.zeros(size, dtype=bool)
        self.tried = False  # whether `retried` holds a sample
        self.mark = np.full(size, np.inf)  # the smallest residual when the present trial began
        self.begun = False
        self.due = np.full(size, patience)
        self.next_due = patience

    def calm(self, calls: int) -> bool:
        """Whether the guard has nothing to say to residuals that are all the smallest so far."""
        return self.begun and calls < self.next_due and not self.tried

    def take(self) -> np.ndarray:
        """Who must go back, once."""
        back, self.back, self.waiting = self.back, np.zeros_like(self.back), False
        return back

    def _send(self, rows: np.ndarray) -> None:
        if len(rows):
            self.back[rows] = self.waiting = True

    def forgives(self, rows: np.ndarray, broken: np.ndarray, best: np.ndarray) -> np.ndarray:
        """Of the samples whose f(z) is not finite, those that may go back and try again."""
        again = broken & ~self.retried[rows] & np.isfinite(best[rows]) & ~self.plain[rows]
        self.retried[rows] = broken
        self.tried = bool(self.retried.any())
        self._send(rows[again])
        return again

    def watch(self, rows: np.ndarray, r: np.ndarray, best: np.ndarray, calls: int) -> None:
        """Take in the residuals r of `rows` and the smallest ones of all samples."""
        if not self.begun:
            self.mark, self.begun = best.copy(), True
        blown = (r > _BLOWN * best[rows]) & ~self.plain[rows]
        self._send(rows[blown])
        if calls < self.next_due:
            return
        due = rows[calls >= self.due[rows]]
        gained = best[due] <= _HALF * self.mark[due]
        stuck = due[~gained]
        self.patience[stuck[self.plain[stuck]]] *= 2
        self.plain[stuck] ^= True
        self._send(stuck)
        self.mark[due] = best[due]
        self.due[due] = calls + self.patience[due] * np.where(self.plain[due] & ~np.isin(due, due[gained]), _PLAIN, 1)
        self.next_due = int(self.due[rows].min(initial=np.iinfo(np.int64).max))
