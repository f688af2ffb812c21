"""The assignment of samples to batches, in the two modes of sampler.py."""

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True)
class Batch:
    """Samples that are computed together.

    Attributes:
        samples: number of the sample in each row.
        positions: positions of the requested samples in the caller's list of indices.
        rows: rows of the requested samples, in the order of `positions`.
    """

    samples: list[int]
    positions: list[int]
    rows: list[int]

    def labels(self, labels: Tensor) -> Tensor:
        """The label of each row; a row that is not requested gets the label of the first requested sample."""
        y = labels[self.positions[0]].repeat(len(self.samples))
        y[self.rows] = labels[self.positions]
        return y


def batches(indices: Sequence[int], labels: Tensor | None, chunk: int, reproducible: bool) -> list[Batch]:
    """The batches of requested samples.

    Args:
        indices: numbers of the samples.
        labels: (N,) class of each sample; None without classes.
        chunk: largest number of samples in a batch.
        reproducible: whether batches are complete chunks, in which sample i has row i mod `chunk`.

    Raises:
        ValueError: there is no index, an index is negative, `chunk` is below 1, or the numbers of labels and indices
            differ.
    """
    if chunk < 1:
        raise ValueError(f"chunk={chunk} holds no sample; give 1 or more.")
    if not indices or min(indices) < 0:
        raise ValueError(f"indices={list(indices)} must hold at least one number, and no negative number.")
    if labels is not None and labels.shape != (len(indices),):
        raise ValueError(f"labels has shape {tuple(labels.shape)} for {len(indices)} indices; give one for each.")
    if not reproducible:
        parts = [list(range(len(indices)))[first : first + chunk] for first in range(0, len(indices), chunk)]
        return [Batch([indices[p] for p in part], part, list(range(len(part)))) for part in parts]
    groups: dict[int, list[int]] = {}
    for position, index in enumerate(indices):
        groups.setdefault(index // chunk, []).append(position)
    return [
        Batch(list(range(group * chunk, (group + 1) * chunk)), positions, [indices[p] % chunk for p in positions])
        for group, positions in groups.items()
    ]
