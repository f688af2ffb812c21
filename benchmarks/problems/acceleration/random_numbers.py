"""The pseudo-random numbers of published data sets: those of FixedPointTestProblems.jl and those of R.

FixedPointTestProblems.jl: r <- floor((3685477807 r + 12345) / 65536) mod 32768 from r = 1, u = r / 32768; its period is
at most 32768. Other distributions are quantiles of u.

R (help page Random): `set.seed(s)` scrambles s by 50 steps of x <- 69069 x + 1 mod 2^32, then 625 further values fill
the state of the Mersenne Twister (the first, its position, is replaced by 624). A uniform is a 32-bit output times
2.3283064365386963e-10; a normal is the quantile of (floor(2^27 u1) + u2) / 2^27 ("Inversion").
"""

import math

import numpy as np
import torch
from scipy import stats
from torch import Tensor

# the values of the suite's generator after each of its 32768 states
SUCCESSOR = [(r * 3685477807 + 12345) // 65536 % 32768 for r in range(32768)]


class PortableRandom:
    """The generator of FixedPointTestProblems.jl."""

    def __init__(self) -> None:
        self._r = 1

    def uniform(self, *shape: int) -> Tensor:
        """Uniform numbers, in column-major order as Julia fills arrays."""
        drawn = []
        for _ in range(math.prod(shape)):
            self._r = SUCCESSOR[self._r]
            drawn.append(self._r)
        return torch.from_numpy((np.array(drawn) / 32768).reshape(shape, order="F").copy())

    def normal(self, *shape: int) -> Tensor:
        """Standard normal numbers."""
        return torch.from_numpy(stats.norm.ppf(self.uniform(*shape).numpy()))


class RRandom:
    """R's default generator after ``set.seed(seed)``."""

    def __init__(self, seed: int) -> None:
        for _ in range(50):
            seed = (69069 * seed + 1) % 2**32
        state = []
        for _ in range(625):
            seed = (69069 * seed + 1) % 2**32
            state.append(seed)
        self._twister = np.random.RandomState()
        self._twister.set_state(("MT19937", np.array(state[1:], dtype=np.uint32), 624, 0, 0.0))

    def _raw(self, count: int) -> np.ndarray:
        return self._twister.randint(0, 2**32, size=count, dtype=np.uint32) * 2.3283064365386963e-10

    def uniform(self, count: int) -> Tensor:
        """``runif(count)``."""
        return torch.from_numpy(self._raw(count))

    def normal(self, count: int, mean: float = 0.0, deviation: float = 1.0) -> Tensor:
        """``rnorm(count, mean, deviation)``."""
        pairs = self._raw(2 * count).reshape(count, 2)
        quantile = stats.norm.ppf((np.floor(2**27 * pairs[:, 0]) + pairs[:, 1]) / 2**27)
        return torch.from_numpy(mean + deviation * quantile)
