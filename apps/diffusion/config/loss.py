"""Options of the training loss: timesteps, weights, and the terms of a fixed-point layer."""

import math
from dataclasses import dataclass
from typing import ClassVar, Literal

from apps.diffusion.config.checks import positive, within

Distribution = Literal["uniform", "logit_normal"]


@dataclass(frozen=True, kw_only=True)
class LossConfig:
    """Training loss: distribution and weights of the timesteps (training/weighting.py), and optional terms of an FPDM's
    loss (training/penalties.py).
    """

    SECTION: ClassVar[str] = "loss"
    FIXED_POINT: ClassVar[tuple[str, ...]] = ("residual", "jacobian", "early", "reuse", "start_noise")

    timesteps: Distribution = "uniform"
    """Distribution of the timesteps; logit_normal (arXiv 2403.03206) draws the middle of the schedule more often."""
    location: float = 0.0
    """Mean m of the normal distribution of logit_normal; a mean above 0 prefers noisier timesteps."""
    scale: float = 1.0
    """Standard deviation of the normal distribution of logit_normal."""
    weighting: Literal["uniform", "min_snr"] = "uniform"
    """Weight of the squared error at a timestep: uniform (1), or min_snr (arXiv 2303.09556), which is 0 at a timestep
    of pure noise.
    """
    gamma: float = 5.0
    """Signal-to-noise ratio above which the weight of min_snr no longer grows."""
    residual: float = 0.0
    """Weight of the squared relative residual of the fixed point; FPDM only."""
    jacobian: float = 0.0
    """Weight of the Jacobian penalty of the fixed-point layer (arXiv 2106.14342); FPDM only."""
    early: float = 0.0
    """Weight of the squared distance between the prediction after one iteration and the prediction from the solution:
    any-time training by self-distillation (arXiv 2604.09168); FPDM only.
    """
    reuse: float = 0.0
    """Weight of the same distance if the one iteration starts from the solution at a noisier timestep, as solves do in
    sampling with `--sampling.reuse on`; FPDM only.
    """
    start_noise: float = 0.0
    """Standard deviation of noise added to the start of each solve, relative to the RMS of the start (arXiv
    2605.21488); FPDM only.
    """

    def __post_init__(self) -> None:
        for name, option, value in (
            ("location", "timesteps", "logit_normal"),
            ("scale", "timesteps", "logit_normal"),
            ("gamma", "weighting", "min_snr"),
        ):
            if getattr(self, option) != value and getattr(self, name) != getattr(type(self), name):
                raise ValueError(f"--loss.{name} needs --loss.{option} {value}; give both, or leave --loss.{name} out.")
        within(self, 0, math.inf, *self.FIXED_POINT)
        positive(self, "scale", "gamma")
        if not math.isfinite(self.location):
            raise ValueError(f"--loss.location must be finite, got {self.location}.")
