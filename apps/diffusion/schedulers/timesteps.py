"""The timesteps of sampling, from the noisiest down."""

from collections.abc import Sequence

from apps.diffusion.config.checks import check_word
from apps.diffusion.config.sampling import Spacing


def timesteps(n: int, spacing: Spacing = "trailing", train_steps: int = 1000) -> tuple[int, ...]:
    """The n timesteps of sampling, from the noisiest down: for i = 0 ... n - 1,

        trailing   round(T (n - i) / n) - 1               from T - 1 to a timestep above 0
        linspace   round((T - 1) (n - 1 - i) / (n - 1))   from T - 1 to 0, as in the published sampling of FPDM
        leading    (n - 1 - i) floor(T / n)               from a timestep below T - 1 to 0

    A single timestep is T - 1 (leading: 0).

    Raises:
        ValueError: n is not between 1 and T, or the spacing is unknown.
    """
    if not 1 <= n <= train_steps:
        raise ValueError(f"n={n} steps do not fit a schedule of {train_steps}; give 1 to {train_steps}.")
    check_word("spacing", spacing, Spacing)
    last = train_steps - 1
    if spacing == "trailing":
        return tuple(round(train_steps * i / n) - 1 for i in range(n, 0, -1))
    if spacing == "linspace":
        return tuple(round(last * i / (n - 1)) for i in range(n - 1, -1, -1)) if n > 1 else (last,)
    return tuple(i * (train_steps // n) for i in range(n - 1, -1, -1))


def check_start(timesteps: Sequence[int], zero_snr: bool, train_steps: int = 1000) -> None:
    """Raises ValueError if a network was trained with zero terminal SNR and sampling does not begin at T - 1."""
    if zero_snr and timesteps[0] != train_steps - 1:
        raise ValueError(
            f"The timesteps begin at {timesteps[0]}, but sampling begins with pure noise, and that is timestep "
            f"{train_steps - 1} of this network; put it first."
        )
