"""Batches whose order is a function of (seed, images seen) only, and the loader that reads them ahead of time.

The k-th image of a run is entry `k mod n` of the random permutation of epoch `k div n`. A run can therefore stop and
continue at any image, on any number of processes, although no state of the loader is saved. Each process loads its own
part of a batch only.
"""

from collections.abc import Iterator
from functools import lru_cache

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Sampler

from apps.diffusion.data.dataset import ImageDataset
from apps.diffusion.rng import Stream, generator


def order(n: int, seed: int, start: int, count: int) -> list[int]:
    """Numbers of the `start`-th to `(start + count - 1)`-th image of a run, in a dataset of `n` images."""
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
        n: number of images of the dataset.
        batch: images of a batch, over all processes.
        seed: random seed of the order.
        start: number of images that the run has seen before.
        rank: number of this process.
        world: number of processes; each process gets `batch / world` images of every batch.

    Raises:
        ValueError: the dataset is empty, `batch` is not divisible by `world`, or `rank` is not below `world`.
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
        """The rows of a batch that this process loads."""
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
        dataset: the dataset of the images.
        batches: the sampler of the batches.
        workers: number of processes that read ahead of time; 0: this process reads a batch when it is needed.
        pin_memory: whether batches are in page-locked memory, from which a GPU copies asynchronously.

    Raises:
        ValueError, OSError: an image cannot be read, in this process or in a worker.
    """
    loader = DataLoader(
        dataset,  # pyright: ignore[reportArgumentType]
        batch_sampler=batches,
        num_workers=workers,
        pin_memory=pin_memory,
        generator=torch.Generator(),  # for the workers' seeds, which otherwise come from the global generator
    )
    return _plain_errors(iter(loader))


def _plain_errors(batches: Iterator[list[Tensor]]) -> Iterator[list[Tensor]]:
    """The batches; an error of a worker has the worker's message, to which DataLoader adds the worker's traceback."""
    while True:
        try:
            batch = next(batches)
        except (ValueError, OSError) as error:
            kind, text = type(error), str(error)
            if "DataLoader worker" not in text:
                raise
            raise kind(text.strip().splitlines()[-1].removeprefix(f"{kind.__name__}: ")) from None
        except RuntimeError as error:
            if "DataLoader worker" not in str(error):
                raise
            raise OSError(
                "A process of --data.workers ended unexpectedly, perhaps for lack of memory; lower --data.workers"
            ) from None
        yield batch
