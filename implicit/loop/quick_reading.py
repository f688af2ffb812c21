"""The quick reading of residuals: no sample finishes or needs the safeguard, and all samples or no sample improved.

Only the record of smallest residuals has to be updated then, which costs a tenth of a whole reading.
"""

import numpy as np

from implicit.loop.best_iterates import LISTS, PATIENCE, BestIterates
from implicit.loop.observation import Observation, as_array
from implicit.stopping import Criterion


class QuickReading:
    """The quick reading for one criterion."""

    def __init__(self, criterion: Criterion) -> None:
        self.rtol = criterion.stop.rtol
        # atol and what the first f(z) adds to the tolerance
        low = criterion.stop.atol + self.rtol * criterion.smallest * criterion.first + criterion.tiny
        self.low: list[float] | np.ndarray = low.tolist() if len(low) <= LISTS else low
        self.high = 1 / criterion.tiny  # squares of larger numbers may leave the range of the dtype

    def take(self, seen: Observation, best: BestIterates, quiet: bool, safeguarded: bool) -> bool:
        """Enter `seen` into `best` and return True; or return False, without a change, if the whole reading is needed.

        Args:
            seen: the norms of this evaluation.
            best: the best iterates of all samples.
            quiet: whether no new smallest residual in this evaluation can change a decision of the safeguard.
            safeguarded: whether the solve has a safeguard.
        """
        if not quiet or seen.calls <= best.last_begun:
            return False
        count, gained, (r, s) = len(seen.rows), 0, seen.sizes
        if count <= LISTS:
            r, s = r.tolist(), s.tolist()
            for new, size, low, old in zip(r, s, self.low, best.least, strict=True):
                if not (self.rtol * size + low < new <= self.high and size <= self.high):
                    return False
                gained += new < old
        else:
            r, s = as_array(r), as_array(s)
            if not ((r > self.rtol * s + self.low).all() and (np.maximum(r, s) <= self.high).all()):
                return False
            gained = int(np.count_nonzero(r < best.least))
        if gained < count:
            return not gained and not safeguarded and seen.calls - best.oldest < PATIENCE
        best.advance(seen.point, r, s, seen.calls)
        return True
