"""Random seeds: every random number of a run is a function of (seed, purpose, position) and of nothing else.

A generator is made from these three where it is needed. So no generator's state has to be saved for a run to go on
exactly where it stopped, and two uses of randomness never shift each other.
"""

from __future__ import annotations

import enum
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch


class Stream(enum.IntEnum):
    """Purpose of random numbers; different streams are independent."""

    WEIGHTS = 0  # the model's first weights
    ORDER = 1  # in which order images are shown
    STEP = 2  # timesteps, noise and dropped labels of one training step
    SOLVE = 3  # how many iterations the estimator runs
    SAMPLE = 4  # one generated image
    CLASSIFIER = 5  # the classifier that scores
    AUGMENTATION = 6  # how an epoch shows an image: mirrored or not, which latent of its distribution


def generator(seed: int, stream: Stream, position: int = 0) -> torch.Generator:
    """A CPU generator that depends on the three arguments alone (they are hashed, so near ones are
    independent).
    """
    return torch.Generator().manual_seed(seeds(seed, stream, position, 1)[0])


def seeds(seed: int, stream: Stream, position: int, count: int) -> list[int]:
    """`count` seeds of generators that depend on the other three arguments and their place in the list alone."""
    words = np.random.SeedSequence((seed, int(stream), position)).generate_state(count, np.uint64)
    return (words >> np.uint64(1)).tolist()


@contextmanager
def drawing_from(source: torch.Generator) -> Iterator[None]:
    """Within the block, code that draws from torch's global CPU generator (such as `nn.Linear`) draws from `source`.

    Afterwards the global generator has the state that it had before.
    """
    with torch.random.fork_rng(devices=[]):
        torch.set_rng_state(source.get_state())
        yield
