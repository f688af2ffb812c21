"""Warm starts: the solve at a timestep starts from the solutions at the previous timesteps.

    z0 = (1 - share) x + share (z_1 + extrapolation (z_1 - z_2))

with x the output of the pre-blocks, z_1 the solution at the previous timestep and z_2 the solution at the timestep
before that (z_1 at the second timestep). At the first timestep z0 = x.

With `history` the solver state is carried over too: the pairs of differences by which Anderson's or Broyden's method
approximates (I - df/dz)^-1 at one timestep are the initial approximation at the next timestep.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True, kw_only=True)
class Reuse:
    """The rule above. `Reuse()` starts from the previous solution.

    Args:
        share: weight of the earlier solutions, 0 (x only) to 1 (earlier solutions only).
        extrapolation: 0 (the last solution) to 1 (the line through the last two solutions, one timestep further).
        history: whether the solver state is carried from timestep to timestep; without effect for Picard, which has no
            state.

    Raises:
        ValueError: `share` or `extrapolation` is outside [0, 1].
    """

    share: float = 1.0
    extrapolation: float = 0.0
    history: bool = False

    def __post_init__(self) -> None:
        for name in ("share", "extrapolation"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"Reuse.{name}={getattr(self, name)} must lie in [0, 1].")

    def start(self, solutions: Sequence[Tensor]) -> Tensor | Callable[[Tensor], Tensor] | None:
        """The argument `start` of an FPDM: z0, a function of x, or None for z0 = x.

        Args:
            solutions: solutions at the previous timesteps, newest last; at most the last two are used.
        """
        if not solutions or self.share == 0:
            return None
        last = solutions[-1]
        guess = last + self.extrapolation * (last - solutions[-2]) if len(solutions) > 1 else last
        if self.share == 1:
            return guess
        return lambda fresh: (1 - self.share) * fresh + self.share * guess


def reuse_rule(word: str, share: float, extrapolation: float) -> Reuse | None:
    """The rule of the option `reuse`. The rule None starts every solve from x.

    Raises:
        ValueError: the word is unknown.
    """
    rules = {
        "off": None,
        "on": Reuse(),
        "blended": Reuse(share=share),
        "extrapolated": Reuse(extrapolation=extrapolation),
        "history": Reuse(history=True),
    }
    if word not in rules:
        raise ValueError(f"reuse={word!r} is unknown; choose one of {', '.join(rules)}.")
    return rules[word]
