"""Best iterates: the evaluated z of smallest ||f(z) - z|| of every sample, and a second attempt from its start.

A point of small residual need not lie near a fixed point: f may be undefined beside it, or ||f(z) - z|| may have a
minimum there that is not zero. Such a sample begins again at z0 with other steps (`implicit.staged_safeguard`). The
best iterate of the first attempt is set aside, and returned if the second one does not find a better one.
"""

import numpy as np
import torch
from torch import Tensor

from implicit.pytree import Flat, to_device
from implicit.solvers.base import Point

LISTS = 64  # samples up to which Python lists are quicker than arrays
PATIENCE = 10  # evaluations without a new smallest residual before rounding error is assumed
_ROUNDING = 25.0  # residuals below this many eps ||f(z)|| count as rounding, below 4 times it after 3 times PATIENCE


class BestIterates:
    """The best iterate of every sample, f there, and the norms measured there.

    Where all samples improve at once, `advance` keeps what was read as it is; `flush` writes it into the arrays.

    Args:
        z0: where the samples begin.
        relative: whether `residual` and `size` are relative, so that `absolute` needs arrays of its own.

    Attributes:
        z: (B, N) the best iterates.
        fz: (B, N) f there.
        residual: (B,) the smallest ||f(z) - z||, as the criterion measures it.
        size: (B,) ||f(z)|| with it.
        since: (B,) number of the evaluation that gave it.
        absolute: the smallest absolute ||f(z) - z|| of the whole row, and ||f(z)|| with it.
        least: `residual`, or what `advance` has read since.
        oldest: the smallest of `since` likewise.
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
        self._sizes: list[float] | np.ndarray | None = None  # ||f(z)|| with `least`, if not yet in `size`
        self._first: Point | None = None  # the best iterates of first attempts, and the arrays that belong to them
        self._record: tuple[np.ndarray, ...] = ()

    # ---- points read

    def advance(self, point: Point, r: list[float] | np.ndarray, s: list[float] | np.ndarray, calls: int) -> None:
        """Take `point` as the best iterate of every sample."""
        self.z, self.fz = point.z, point.fz
        self.least, self._sizes, self.oldest = r, s, calls

    def flush(self) -> None:
        """Write what `advance` has kept into the arrays."""
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
        """Take `point`, which holds the samples `rows`, as the best iterate of those in `better`."""
        if not better.any():
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
        """Take in the absolute norms of the samples `rows`, of which those in `live` count."""
        if self.absolute[0] is self.residual:
            return
        least = live & (r < self.absolute[0][rows])
        for kept, new in zip(self.absolute, (r, s), strict=True):
            kept[rows[least]] = new[least]

    def at_rounding(self, rows: np.ndarray, calls: int, eps: float) -> np.ndarray:
        """Which of `rows` have come to rounding error, and not improved for some of `calls` evaluations."""
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
        """Keep the best iterates of the samples in `which` as those of a first attempt, and begin the second one.

        `calls` evaluations were made so far; a point of them that is read later belongs to the first attempt.
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
        self.begun_at[which] = calls

    def take_back(self, which: np.ndarray) -> None:
        """End the second attempt of the samples in `which`: of both best iterates the one of smaller residual."""
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
        """What belongs to the best iterates."""
        own = () if self.absolute[0] is self.residual else self.absolute
        return (self.residual, self.size, self.since, *own)

    def _take(self, which: np.ndarray, point: Point) -> None:
        mask = to_device(which, self.z.device).unsqueeze(1)
        self.z, self.fz = torch.where(mask, point.z, self.z), torch.where(mask, point.fz, self.fz)

    def _rows(self, x: Tensor, rows: np.ndarray) -> Tensor:
        return x if len(rows) == len(self.since) else x[to_device(rows, x.device)]
