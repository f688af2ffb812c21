"""The largest batch whose training step fits into the memory of a GPU, from the peak memory at several batches."""

from collections.abc import Callable
from dataclasses import dataclass

GIB = 2**30
CARDS = {"80 GB": 80e9, "16 GB": 16e9}
"""Nominal memory of GPUs in bytes; the memory of the CUDA context and fragmentation are not subtracted."""


@dataclass(frozen=True)
class Case:
    """One training step."""

    network: str
    batch: int
    estimator: str = ""
    checkpointed: bool = False
    precision: str = "fp32"

    @property
    def row(self) -> tuple[str, str, str, str]:
        return self.network, self.estimator, "checkpointed" if self.checkpointed else "", self.precision


def largest_batch(peaks: dict[int, int], capacity: float) -> int:
    """The largest batch that fits, by the line through the peaks at the two largest batches.

    The two largest batches are used, because at a small batch the peak may be in the optimizer's step, which does not
    depend on the batch.
    """
    (a, low), (b, high) = sorted(peaks.items())[-2:]
    slope = (high - low) / (b - a)
    return max(0, int((capacity - (low - slope * a)) // slope))


def searched(peaks: dict[int, int], capacity: float, peak: Callable[[int], int]) -> tuple[int, dict[int, int]]:
    """The largest batch that fits, and the peaks at this batch and at one sample more, which prove it.

    The peak is a maximum of lines in the batch, hence convex. The chord between a batch that fits and one that does not
    fit therefore gives a batch that fits, and the line through the two largest batches gives an upper bound.

    Args:
        peaks: known peaks of at least two batches.
        capacity: memory of the GPU in bytes.
        peak: function that returns the peak at a batch.
    """
    known = {0: 0, **peaks}
    while True:
        low = max(batch for batch, size in known.items() if size <= capacity)
        above = [batch for batch, size in known.items() if size > capacity]
        if not above:
            guess = max(low, largest_batch(peaks, capacity)) + 1
        elif min(above) == low + 1:
            return low, {low: known[low], low + 1: known[low + 1]}
        else:
            high = min(above)
            step = (capacity - known[low]) / (known[high] - known[low]) * (high - low)
            guess = min(max(low + int(step), low + 1), high - 1)
        known[guess] = peak(guess)
