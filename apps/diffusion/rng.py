"""Every random number of a run is a function of (seed, what it is for, where the run stands), and of nothing
else.

A generator is made afresh from those three where it is needed. So no generator's state has to be saved for a
run to go on exactly where it was cut off, and two uses of randomness can never shift one another.
"""

from __future__ import annotations

import enum
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch


class Stream(enum.IntEnum):
    """What randomness is used for; different streams are independent."""

    WEIGHTS = 0  # the model's first weights
    ORDER = 1  # in which order images are shown
    STEP = 2  # timesteps, noise and dropped labels of one training step
    SOLVE = 3  # how many iterations the estimator runs
    SAMPLE = 4  # one generated image
    CLASSIFIER = 5  # the classifier that scores
    VIEW = 6  # how an epoch shows an image: mirrored or not, which latent of its distribution


def generator(seed: int, stream: Stream, position: int = 0) -> torch.Generator:
    """A CPU generator that depends on the three arguments alone (they are hashed, so near ones are
    independent).
    """
    word = np.random.SeedSequence((seed, int(stream), position)).generate_state(1, np.uint64)[0]
    return torch.Generator().manual_seed(int(word >> np.uint64(1)))


@contextmanager
def drawing_from(source: torch.Generator) -> Iterator[None]:
    """Within the block, code that draws from torch's global CPU generator (such as `nn.Linear`) draws from
    `source`.

    The global generator is left as it was found.
    """
    with torch.random.fork_rng(devices=[]):
        torch.set_rng_state(source.get_state())
        yield
