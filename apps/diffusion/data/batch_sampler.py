"""Batches whose order is a function of (seed, images seen) alone, and the loader that reads them ahead.

The k-th image of a run is number `k mod n` of the permutation drawn for epoch `k div n`. So a run may stop and go on
anywhere, on any number of processes, and no loader's state has to be saved. Of each batch a process loads its own part.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import lru_cache

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Sampler

from apps.diffusion.data.dataset import ImageDataset
from apps.diffusion.rng import Stream, generator


def order(n: int, seed: int, start: int, count: int) -> list[int]:
    """Numbers of the images that a run sees as its `start`-th to `start + count - 1`-th, of a dataset of `n`."""
    seen: list[int] = []
    while count > 0:
        epoch, position = divmod(start, n)
        part = _permutation(n, seed, epoch)[position : position + count].tolist()
        seen += part
        start, count = start + len(part), count - len(part)
    return seen


@lru_cache(maxsize=2)
def _permutation(n: int, seed: int, epoch: int) -> Tensor:
    return torch.randperm(n, generator=generator(seed, Stream.ORDER, epoch))


class BatchSampler(Sampler[list[tuple[int, int]]]):
    """Endless batches of keys (number, epoch) for a dataset: `DataLoader(dataset, batch_sampler=BatchSampler(...))`.

    Args:
        n: images of the dataset.
        batch: images of a batch, over all processes.
        seed: of the order.
        start: images that the run has seen before.
        rank: number of this process.
        world: number of processes, each of which gets `batch / world` images of every batch.

    Raises:
        ValueError: an empty dataset, or a batch that `world` does not divide.
    """

    def __init__(self, n: int, batch: int, seed: int = 0, start: int = 0, rank: int = 0, world: int = 1) -> None:
        if n < 1 or batch < 1 or start < 0 or not 0 <= rank < world or batch % world:
            raise ValueError(
                f"n={n}, batch={batch}, start={start}, rank={rank}, world={world} describe no batches; give n and "
                "batch of at least 1, a batch that world divides, and a rank below world."
            )
        self.n, self.batch, self.seed, self.start, self.rank, self.world = n, batch, seed, start, rank, world

    @property
    def part(self) -> slice:
        """The rows of a batch that are this process's."""
        share = self.batch // self.world
        return slice(self.rank * share, (self.rank + 1) * share)

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        seen = self.start
        while True:
            numbers = order(self.n, self.seed, seen, self.batch)
            keys = [(number, (seen + k) // self.n) for k, number in enumerate(numbers)]
            yield keys[self.part]
            seen += self.batch


def training_batches(
    dataset: ImageDataset, batches: BatchSampler, *, workers: int = 0, pin_memory: bool = False
) -> Iterator[list[Tensor]]:
    """The training batches of this process, without end: images (b, C, H, W) and labels (b,).

    Args:
        dataset: of the images.
        batches: which of them.
        workers: processes that read ahead; 0: batches are read in this process, when they are needed.
        pin_memory: page-locked memory, from which a GPU copies while it computes.
    """
    loader = DataLoader(
        dataset,  # pyright: ignore[reportArgumentType]
        batch_sampler=batches,
        num_workers=workers,
        pin_memory=pin_memory,
        generator=torch.Generator(),  # the loader draws its workers' seeds from it, not from the global generator
    )
    return iter(loader)
