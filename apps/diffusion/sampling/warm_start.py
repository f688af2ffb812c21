"""Where a timestep's solve starts: from the solutions of the timesteps before it.

    z0 = (1 - share) x + share (z_1 + extrapolation (z_1 - z_2))

with x the fresh start (the output of the pre-blocks), z_1 the solution one timestep earlier and z_2 that of
two earlier (z_1 where there is none). The first timestep starts fresh.

With `history` the solver goes on with its state too: the pairs of differences by which Anderson's or Broyden's method
approximates (I - df/dz)^-1 at one timestep serve as the first approximation at the next.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True, kw_only=True)
class Reuse:
    """The rule above. `Reuse()` starts from the previous solution.

    Args:
        share: 0 (fresh start) to 1 (no fresh start).
        extrapolation: 0 (the last solution) to 1 (the line through the last two).
        history: carry the solver's state from timestep to timestep; of no effect for Picard, which has none.

    Raises:
        ValueError: one of them outside [0, 1].
    """

    share: float = 1.0
    extrapolation: float = 0.0
    history: bool = False

    def __post_init__(self) -> None:
        for name in ("share", "extrapolation"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"Reuse.{name}={getattr(self, name)} must lie in [0, 1].")

    def start(self, solutions: Sequence[Tensor]) -> Tensor | Callable[[Tensor], Tensor] | None:
        """What an FPDM takes as `start`, given the last solutions, newest last (two are enough)."""
        if not solutions or self.share == 0:
            return None
        last = solutions[-1]
        guess = last + self.extrapolation * (last - solutions[-2]) if len(solutions) > 1 else last
        if self.share == 1:
            return guess
        return lambda fresh: (1 - self.share) * fresh + self.share * guess


def reuse_rule(start: bool | str | Reuse, share: float = 0.5, extrapolation: float = 1.0) -> Reuse | None:
    """The rule by its word: False or "off", True or "on", "blended", "extrapolated", "history"; None: a fresh start.

    Raises:
        ValueError: there is no such word.
    """
    if isinstance(start, Reuse):
        return start
    word = ("off", "on")[start] if isinstance(start, bool) else start
    rules = {
        "off": None,
        "on": Reuse(),
        "blended": Reuse(share=share),
        "extrapolated": Reuse(extrapolation=extrapolation),
        "history": Reuse(history=True),
    }
    if word not in rules:
        raise ValueError(f"reuse={start!r} is unknown; choose one of {', '.join(rules)}.")
    return rules[word]
