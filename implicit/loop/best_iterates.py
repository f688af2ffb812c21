"""Best iterates: the evaluated z of smallest ||f(z) - z|| of every sample, and a second attempt from its start.

A point of small residual need not lie near a fixed point: f may be undefined beside it, or ||f(z) - z|| may have a
minimum there that is not zero. A sample at such a point begins again at z0 with other steps
(`implicit.staged_safeguard`). The best iterate of the first attempt is set aside, and returned if the second attempt
does not find a better one.
"""

import numpy as np
import torch
from torch import Tensor

from implicit.pytree import Flat, to_device
from implicit.solvers.base import Point

LISTS = 64  # samples up to which Python lists are quicker than arrays
PATIENCE = 10  # evaluations without a new smallest residual before rounding error is assumed
_ROUNDING = 25.0  # residuals up to this many eps ||f(z)|| are rounding error; up to 4 times as many after 3 PATIENCE


class BestIterates:
    """The best iterate of every sample, f there, and the norms measured there.

    If all samples improve at once, `advance` keeps the norms as they were read; `flush` writes them into the arrays.

    Args:
        z0: (B, N) the starting states.
        relative: whether the criterion's residuals are relative ones, so that `absolute` needs arrays of its own.

    Attributes:
        z: (B, N) the best iterates.
        fz: (B, N) f at the best iterates.
        residual: (B,) the smallest ||f(z) - z||, as the criterion measures it; behind `least` until `flush`.
        size: (B,) ||f(z)|| at the best iterates.
        since: (B,) numbers of the evaluations at the best iterates.
        absolute: (B,) the smallest absolute ||f(z) - z|| of the whole row, and (B,) ||f(z)|| at the same z.
        least: (B,) the smallest residuals, those that `flush` has yet to write included.
        oldest: the smallest number in `since`, likewise up to date before `flush`.
    """

    def __init__(self, z0: Flat, relative: bool = False) -> None:
        size = len(z0)
        self.start = self.z = self.fz = z0
        self.residual, self.size = np.full(size, np.inf), np.zeros(size)
        self.since = np.zeros(size, dtype=np.int64)
        self.absolute = (np.full(size, np.inf), np.zeros(size)) if relative else (self.residual, self.size)
        self.least: list[float] | np.ndarray = [np.inf] * size
        self.oldest = 0
        self.begun_at = np.zeros(size, dtype=np.int64)  # evaluations made when the second attempt began
        self.last_begun = 0  # the largest number in `begun_at`
        self._sizes: list[float] | np.ndarray | None = None  # ||f(z)|| that `flush` will write into `size`
        self._first: Point | None = None  # the best iterates of first attempts
        self._record: tuple[np.ndarray, ...] = ()  # `_arrays` of first attempts

    # ---- points read

    def advance(self, point: Point, r: list[float] | np.ndarray, s: list[float] | np.ndarray, calls: int) -> None:
        """Take `point` as the best iterate of every sample."""
        self.z, self.fz = point.z, point.fz
        self.least, self._sizes, self.oldest = r, s, calls

    def flush(self) -> None:
        """Write the norms that `advance` has kept into the arrays."""
        if self._sizes is not None:
            self.residual[:], self.size[:], self._sizes = self.least, self._sizes, None
            self.since.fill(self.oldest)

    def refresh(self, calls: int) -> None:
        """Bring `least` and `oldest` up to the arrays after evaluation number `calls`."""
        self.least = self.residual.tolist() if len(self.since) <= LISTS else self.residual
        self.oldest = int(self.since.min(initial=calls))

    def update(
        self, rows: np.ndarray, better: np.ndarray, point: Point, r: np.ndarray, s: np.ndarray, calls: int
    ) -> None:
        """Take `point`, which holds the samples `rows`, as the best iterate of the samples marked in `better`."""
        if not better.any() and len(self.since):  # an empty batch takes the point for its graph
            return
        device = self.z.device
        if len(rows) < len(self.since):
            which, into = (to_device(i, device) for i in (np.flatnonzero(better), rows[better]))
            self.z = self.z.index_copy(0, into, point.z[which])
            self.fz = self.fz.index_copy(0, into, point.fz[which])
        elif better.all():
            self.z, self.fz = point.z, point.fz
        else:
            self._take(better, point)
        kept = rows[better]
        self.residual[kept], self.size[kept], self.since[kept] = r[better], s[better], calls

    def update_absolute(self, rows: np.ndarray, live: np.ndarray, r: np.ndarray, s: np.ndarray) -> None:
        """Enter smaller absolute norms of the samples `rows`, for those marked in `live`."""
        if self.absolute[0] is self.residual:
            return
        least = live & (r < self.absolute[0][rows])
        for kept, new in zip(self.absolute, (r, s), strict=True):
            kept[rows[least]] = new[least]

    def at_rounding(self, rows: np.ndarray, calls: int, eps: float) -> np.ndarray:
        """Which of `rows` have a residual of rounding error that did not improve lately, after `calls` evaluations."""
        floor, age, least = _ROUNDING * eps * self.size[rows], calls - self.since[rows], self.residual[rows]
        return ((age >= PATIENCE) & (least <= floor)) | ((age >= 3 * PATIENCE) & (least <= 4 * floor))

    def of(self, rows: np.ndarray) -> Point:
        """The best iterates of the samples `rows`."""
        return Point(self._rows(self.z, rows), self._rows(self.fz, rows))

    def start_of(self, rows: np.ndarray) -> Flat:
        """z0 of the samples `rows`."""
        return self._rows(self.start, rows)

    # ---- the second attempt

    def set_aside(self, which: np.ndarray, calls: int) -> None:
        """Set the best iterates of the samples in `which` aside as those of a first attempt, and begin the second one.

        A point of the first `calls` evaluations that is read later (`Stop.late`) belongs to the first attempt.
        """
        self.flush()
        if self._first is None:
            self._first = Point(self.z, self.fz)
            self._record = tuple(np.full_like(x, np.inf if i == 0 else 0) for i, x in enumerate(self._arrays))
        mask = to_device(which, self.z.device).unsqueeze(1)
        first = self._first
        self._first = Point(torch.where(mask, self.z, first.z), torch.where(mask, self.fz, first.fz))
        for kept, x in zip(self._record, self._arrays, strict=True):
            kept[which] = x[which]
        self.residual[which] = self.absolute[0][which] = np.inf
        self.begun_at[which] = self.last_begun = calls

    def take_back(self, which: np.ndarray) -> None:
        """End the second attempt of the samples in `which`: the best iterate of smaller residual of both is kept."""
        if self._first is None:
            return
        back = which & (self._record[0] < self.residual)
        for kept, x in zip(self._record, self._arrays, strict=True):
            x[back] = kept[back]
        self._record[0][which] = np.inf
        if back.any():
            self._take(back, self._first)

    @property
    def _arrays(self) -> tuple[np.ndarray, ...]:
        """The host arrays that describe the best iterates."""
        own = () if self.absolute[0] is self.residual else self.absolute
        return (self.residual, self.size, self.since, *own)

    def _take(self, which: np.ndarray, point: Point) -> None:
        mask = to_device(which, self.z.device).unsqueeze(1)
        self.z, self.fz = torch.where(mask, point.z, self.z), torch.where(mask, point.fz, self.fz)

    def _rows(self, x: Tensor, rows: np.ndarray) -> Tensor:
        return x if len(rows) == len(self.since) else x[to_device(rows, x.device)]
