"""Batches whose order is a function of (seed, images seen) alone, and the loader that reads them ahead.

The k-th image of a run is number `k mod n` of the permutation drawn for epoch `k div n`. So a run may stop and go on
anywhere, on any number of processes, and no loader's state has to be saved. Of each batch a process loads its own part.
Everything random that a training step needs is drawn with the images: for sample k of a batch a generator is seeded by
(seed, images seen before the batch, k), and gives the noise and two uniform numbers, for the timestep and for label
dropout. They are the same on any number of processes, with any number of workers, and on any device.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import lru_cache
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler

from apps.diffusion.data.dataset import ImageDataset
from apps.diffusion.rng import Stream, generator, seeds


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


class Batch(NamedTuple):
    """This process's part of a training batch.

    Attributes:
        x: images (b, C, H, W).
        y: labels (b,); zeros without classes.
        noise: standard normal, (b, C, H, W).
        level: uniform in [0, 1), (b,) float64, for the timestep.
        dropout: uniform in [0, 1), (b,) float64: a label is dropped where this is below the share of dropped labels.
    """

    x: Tensor
    y: Tensor
    noise: Tensor
    level: Tensor
    dropout: Tensor


class _SeededSampler(Sampler[list[tuple[tuple[int, int], int]]]):
    """The keys of a `BatchSampler`, each with the seed of its sample's generator."""

    def __init__(self, batches: BatchSampler) -> None:
        self.batches = batches

    def __iter__(self) -> Iterator[list[tuple[tuple[int, int], int]]]:
        b = self.batches
        for step, keys in enumerate(b):
            words = seeds(b.seed, Stream.STEP, b.start + step * b.batch, b.batch)
            yield list(zip(keys, words[b.part], strict=True))


class _TrainingSamples(Dataset[tuple[Tensor, int, Tensor, Tensor, Tensor]]):
    """One sample of a training step by its key and seed."""

    def __init__(self, dataset: ImageDataset) -> None:
        self.dataset = dataset

    def __getitem__(self, index: Any) -> tuple[Tensor, int, Tensor, Tensor, Tensor]:
        key, word = index
        x, y = self.dataset[key]
        own = torch.Generator().manual_seed(word)
        level, dropout = torch.rand(2, generator=own, dtype=torch.float64)
        return x, y, torch.randn(x.shape, generator=own), level, dropout


def _collate(samples: list[tuple[Tensor, int, Tensor, Tensor, Tensor]]) -> Batch:
    x, y, noise, level, dropout = zip(*samples, strict=True)
    return Batch(torch.stack(x), torch.tensor(y), torch.stack(noise), torch.stack(level), torch.stack(dropout))


def training_batches(
    dataset: ImageDataset, batches: BatchSampler, *, workers: int = 0, pin_memory: bool = False
) -> Iterator[Batch]:
    """The training batches of this process, without end.

    Args:
        dataset: of the images.
        batches: which of them.
        workers: processes that read ahead; 0 reads in this process when a batch is asked for.
        pin_memory: page-locked memory, from which a GPU copies while it computes.
    """
    loader = DataLoader(
        _TrainingSamples(dataset),
        batch_sampler=_SeededSampler(batches),
        collate_fn=_collate,
        num_workers=workers,
        pin_memory=pin_memory,
        generator=torch.Generator(),  # the loader draws its workers' seeds from it, not from the global generator
    )
    return iter(loader)
