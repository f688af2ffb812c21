"""Random seeds: every random number of a run is a function of (seed, purpose, position) only.

A run therefore continues exactly where it stopped although no generator's state is saved, and the number of random
numbers drawn for one purpose does not change those of another. Two functions make random numbers:

    generator         a torch generator on the CPU, seeded by a hash of (seed, purpose, position)
    normal, uniform   computed on any device by the counter-based generator Philox4x32-10 (Salmon et al. 2011, "Parallel
                      random numbers: as easy as 1, 2, 3"), all positions at once:

        words(i, j) = Philox(key = hash(seed, purpose), counter = (j, lane, i mod 2^32, i div 2^32)),   four of 32 bits

with i the position, j the block of four numbers, and lane 0 for normal and 1 for uniform numbers. The words, and with
them the uniform numbers, are equal on all devices; normal numbers (by Box and Muller) are equal up to the rounding of
log, cos and sin.
"""

import enum
import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

_WORD = 0xFFFFFFFF
_MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
_KEY_STEPS = (0x9E3779B9, 0xBB67AE85)
_ROUNDS = 10


class Stream(enum.IntEnum):
    """Purpose of random numbers; different streams are independent."""

    WEIGHTS = 0  # the model's initial weights
    ORDER = 1  # order of the training images
    STEP = 2  # timesteps, noise and dropped labels of one training step
    SOLVE = 3  # number of iterations of the gradient estimator
    SAMPLE = 4  # noise of one generated image
    CLASSIFIER = 5  # training of the classifiers that score images
    AUGMENTATION = 6  # augmentation of an image in an epoch: horizontal flip, noise of a VAE's latent
    START = 7  # noise of the start of a solve in training
    PROBES = 8  # probes of the Jacobian penalty
    EARLIER = 9  # noisier timestep whose solution starts a solve in training


def generator(seed: int, stream: Stream, position: int = 0) -> torch.Generator:
    """A CPU generator that depends on the three arguments only. The arguments are hashed, so that generators of
    adjacent positions are independent.
    """
    word = np.random.SeedSequence((seed, int(stream), position)).generate_state(1, np.uint64)[0]
    return torch.Generator().manual_seed(int(word >> np.uint64(1)))


def normal(seed: int, stream: Stream, positions: Int[Tensor, " B"], shape: Sequence[int]) -> Float[Tensor, "B ..."]:
    """Standard normal numbers (B, *shape), float32, on the device of `positions`; row b depends on (seed, stream,
    positions[b]) only.
    """
    count = math.prod(shape)
    words = _words(seed, stream, positions, -(-count // 4), lane=0).float()
    # Box-Muller: sqrt(-2 log u) (cos, sin)(2 pi v), u in (0, 1], v in [0, 1]
    radius = (-2 * ((words[:2] + 1) * 2.0**-32).log()).sqrt()
    angle = words[2:] * (2 * math.pi * 2.0**-32)
    numbers = torch.cat([radius * angle.cos(), radius * angle.sin()])  # (4, B, blocks)
    return numbers.permute(1, 2, 0).flatten(1)[:, :count].unflatten(1, tuple(shape))


def uniform(seed: int, stream: Stream, positions: Int[Tensor, " B"], count: int) -> Float[Tensor, "B count"]:
    """Numbers uniform in [0, 1), (B, count), float32, on the device of `positions`; row b depends on (seed, stream,
    positions[b]) only.
    """
    words = _words(seed, stream, positions, -(-count // 4), lane=1)
    return ((words >> 8).float() * 2.0**-24).permute(1, 2, 0).flatten(1)[:, :count]


def _words(
    seed: int, stream: Stream, positions: Int[Tensor, " B"], blocks: int, lane: int
) -> Int[Tensor, "4 B blocks"]:
    """32-bit words of the blocks 0 ... blocks - 1 of each position, as int64."""
    first, second = np.random.SeedSequence((seed, int(stream))).generate_state(2, np.uint32).tolist()
    i = positions[:, None].expand(-1, blocks)
    j = torch.arange(blocks, device=positions.device).expand_as(i)
    return philox(torch.stack([j, torch.full_like(i, lane), i & _WORD, i >> 32]), (first, second))


def philox(counter: Int[Tensor, "4 ..."], key: tuple[int, int]) -> Int[Tensor, "4 ..."]:
    """Philox4x32-10: four words of 32 bits for each counter of four words; words are int64 below 2^32.

    A round: (a, b, c, d) -> (hi(m1 c) ^ b ^ k0, lo(m1 c), hi(m0 a) ^ d ^ k1, lo(m0 a)). `even` holds the pair (a, c),
    `odd` the pair (b, d). Products wrap around at 64 bits, which keeps both 32-bit halves.
    """
    second = torch.arange(2, device=counter.device).view(2, *[1] * (counter.ndim - 1))  # 0 for a and b, 1 for c and d
    factor, keys, step = (x + (y - x) * second for x, y in (_MULTIPLIERS, key, _KEY_STEPS))
    even, odd = counter[0::2], counter[1::2]
    for n in range(_ROUNDS):
        product = even * factor
        high, low = product >> 32 & _WORD, product & _WORD
        even, odd = high.flip(0) ^ odd ^ (keys + n * step & _WORD), low.flip(0)
    return torch.stack([even, odd], dim=1).flatten(0, 1)


@contextmanager
def drawing_from(source: torch.Generator) -> Iterator[None]:
    """Within the block, code that draws from torch's global CPU generator (such as `nn.Linear`) draws from `source`.

    Afterwards the global generator has the state that it had before.
    """
    with torch.random.fork_rng(devices=[]):
        torch.set_rng_state(source.get_state())
        yield
