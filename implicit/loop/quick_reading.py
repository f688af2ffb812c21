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
        count = len(seen.rows)
        if count <= LISTS:
            r, s = (t.tolist() for t in seen.sizes)
            clear = all([new > self.rtol * size + low for new, size, low in zip(r, s, self.low, strict=True)])
            clear = clear and max(r, default=0.0) <= self.high and max(s, default=0.0) <= self.high
            gained = sum([new < old for new, old in zip(r, best.least, strict=True)])
        else:
            r, s = (as_array(t) for t in seen.sizes)
            clear = bool((r > self.rtol * s + self.low).all() and (np.maximum(r, s) <= self.high).all())
            gained = int(np.count_nonzero(r < best.least))
        if not clear or not quiet or seen.calls <= best.last_begun:
            return False
        if gained < count:
            return not gained and not safeguarded and seen.calls - best.oldest < PATIENCE
        best.advance(seen.point, r, s, seen.calls)
        return True
