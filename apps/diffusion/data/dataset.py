"""What a data set is to the trainer: images and labels by index, and how many classes there are.

Training sees image i in epoch e as `draw([i], [e], seed)`: a function of these numbers alone.

The order in which a run sees its images is a function of (seed, number of images seen) alone: the k-th image
of the run is number `k mod n` of the permutation drawn for epoch `k div n`. So a run may stop and go on
anywhere, on any number of processes, and there is no loader whose state would have to be saved.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Protocol

import torch
from torch import Tensor

from apps.diffusion.rng import Stream, generator


class DataSet(Protocol):
    """Images of one shape, by index; `Images`, `folder.Pixels` and `latents.Latents` are such."""

    def __len__(self) -> int: ...

    @property
    def shape(self) -> tuple[int, int, int]:
        """(C, H, W) of one image."""
        ...

    @property
    def num_classes(self) -> int:
        """0 where the images have no classes."""
        ...

    def draw(self, index: Sequence[int], epoch: Sequence[int], seed: int) -> tuple[Tensor, Tensor]:
        """Images (b, C, H, W), float32, and classes (b,): image k as epoch[k] shows it."""
        ...


@dataclass(frozen=True)
class Images:
    """Images `x` (n, C, H, W), float, in [-1, 1], and their classes `y` (n,), integers below `num_classes`.

    `num_classes` = 0 says that the images have no classes; `y` is then ignored.
    """

    x: Tensor
    y: Tensor
    num_classes: int

    def __post_init__(self) -> None:
        if self.x.ndim != 4 or len(self.x) == 0:
            raise ValueError(f"Images have the shape (n, C, H, W) with n > 0, but this has {tuple(self.x.shape)}.")
        if len(self.y) != len(self.x):
            raise ValueError(f"Every image needs one label: there are {len(self.x)} images and {len(self.y)} labels.")
        if self.num_classes and not (0 <= int(self.y.min()) and int(self.y.max()) < self.num_classes):
            raise ValueError(
                f"Labels lie in 0..{self.num_classes - 1}, but these reach from {int(self.y.min())} to "
                f"{int(self.y.max())}; give num_classes as the largest label plus one."
            )

    def __len__(self) -> int:
        return len(self.x)

    def __getitem__(self, index: Sequence[int]) -> tuple[Tensor, Tensor]:
        """The images (b, C, H, W) and labels (b,) at these indices."""
        chosen = torch.as_tensor(index)
        return self.x[chosen], self.y[chosen]

    def draw(self, index: Sequence[int], epoch: Sequence[int], seed: int) -> tuple[Tensor, Tensor]:
        """The same: every epoch shows them alike."""
        return self[index]

    @property
    def shape(self) -> tuple[int, int, int]:
        """(C, H, W) of one image."""
        channels, height, width = self.x.shape[1:]
        return channels, height, width


def order(n: int, seed: int, start: int, count: int) -> list[int]:
    """Indices of the images that a run shows as its `start`-th to `start + count - 1`-th, out of a set of
    `n`.
    """
    shown: list[int] = []
    while count > 0:
        epoch, position = divmod(start, n)
        part = _permutation(n, seed, epoch)[position : position + count].tolist()
        shown += part
        start, count = start + len(part), count - len(part)
    return shown


@lru_cache(maxsize=2)
def _permutation(n: int, seed: int, epoch: int) -> Tensor:
    return torch.randperm(n, generator=generator(seed, Stream.ORDER, epoch))
