"""The configuration of a network and of its noise schedule; a part of `training.Config`."""

from dataclasses import dataclass
from typing import ClassVar, Literal

from apps.diffusion.config.checks import at_least, flag, positive

Kind = Literal["fpdm", "dit"]
Size = Literal["tiny", "S", "B", "L", "XL"]
Prediction = Literal["v_prediction", "epsilon", "sample"]
Betas = Literal["linear", "scaled_linear", "squaredcos_cap_v2"]


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """The network: FPDM, with one implicit fixed-point layer, or DiT, the explicit baseline."""

    SECTION: ClassVar[str] = "model"

    kind: Kind = "fpdm"
    """fpdm or dit."""
    size: Size = "tiny"
    """Name of a hidden size, a number of blocks and a number of attention heads; for tiny these are 128, 6 and 4."""
    hidden: int | None = None
    """Hidden size; default: the hidden size of `size`."""
    heads: int | None = None
    """Number of attention heads; default: the number of `size`."""
    depth: int | None = None
    """Number of blocks; default: the number of `size`. DiT only."""
    patch: int = 2
    """Side of a patch in pixels; each patch is one token."""
    mlp_ratio: float = 4.0
    """Width of a block's MLP, as a multiple of the hidden size."""
    pre: int = 1
    """Explicit blocks before the fixed-point layer; FPDM only."""
    post: int = 1
    """Explicit blocks after the fixed-point layer; FPDM only."""
    recurrent_init: float = 1.0
    """Factor on the initial weights by which the fixed-point layer depends on its state z, in [0, 1]: below 1 the layer
    starts as a strong contraction, and with 0 it does not depend on z at first. Loaded weights are never scaled. FPDM
    only.
    """
    condition_on_time: bool = False
    """Condition the explicit blocks on the time as well as the class; FPDM only."""
    learn_sigma: bool = False
    """Predict the variance of the reverse step too, and add the variational bound to the loss."""

    def __post_init__(self) -> None:
        at_least(self, 1, "hidden", "heads", "depth", "patch")
        at_least(self, 0, "pre", "post")
        if not 0 <= self.recurrent_init <= 1:
            raise ValueError(f"--model.recurrent-init must lie in [0, 1], got {self.recurrent_init}; 1 scales nothing.")
        positive(self, "mlp_ratio")
        if self.kind == "fpdm" and self.depth is not None:
            raise ValueError(
                "--model.depth is for DiT only; an FPDM takes its blocks from --model.pre and --model.post."
            )


@dataclass(frozen=True, kw_only=True)
class NoiseSchedule:
    """Noise schedule, and the prediction target of the network."""

    SECTION: ClassVar[str] = "schedule"

    kind: Literal["diffusion", "rectified_flow"] = "diffusion"
    """diffusion, or rectified_flow (arXiv 2209.03003): straight lines between image and noise, with the velocity along
    the line as prediction target. The betas apply to diffusion only.
    """
    shift: float = 1.0
    """Shift of the timesteps of rectified_flow toward the noise (arXiv 2403.03206, equation 23); 1: no shift."""
    betas: Betas = "linear"
    """Form of the schedule of betas."""
    beta_start: float = 1e-4
    """Variance of the noise added by the first timestep; ignored by squaredcos_cap_v2."""
    beta_end: float = 0.02
    """Variance of the noise added by the last timestep, before rescaling to zero terminal SNR; ignored by
    squaredcos_cap_v2.
    """
    timesteps: int = 1000
    """Number of timesteps of the schedule."""
    prediction: Prediction = "v_prediction"
    """Prediction target: velocity (v), noise (epsilon) or image (sample)."""
    zero_snr: bool = True
    """Rescale the betas to a signal-to-noise ratio of zero at the last timestep."""

    def __post_init__(self) -> None:
        at_least(self, 2, "timesteps")
        positive(self, "shift")
        diffusion = ("betas", "beta_start", "beta_end", "prediction", "zero_snr")
        unused = ("shift",) if self.kind == "diffusion" else diffusion
        for name in unused:
            if getattr(self, name) != getattr(type(self), name):
                raise ValueError(f"{flag(self, name)} does not apply to --schedule.kind {self.kind}; leave it out.")
        if not 0 < self.beta_start <= self.beta_end < 1:
            raise ValueError(
                "--schedule.beta-start and --schedule.beta-end must satisfy 0 < start <= end < 1, "
                f"got {self.beta_start} and {self.beta_end}."
            )
        check_zero_snr(self.zero_snr, self.prediction)


def check_zero_snr(zero_snr: bool, prediction: str, spacing: str | None = None) -> None:
    """Raises ValueError if zero terminal SNR is combined with the prediction epsilon or the spacing leading."""
    if zero_snr and prediction == "epsilon":
        raise ValueError(
            "prediction epsilon cannot go with zero terminal SNR (zero_snr): at the last timestep x_t is pure noise, "
            "and the image cannot be computed from eps (0/0). Use v_prediction or sample, or turn zero_snr off "
            "(--schedule.no-zero-snr in training)."
        )
    if zero_snr and spacing == "leading":
        raise ValueError(
            "spacing leading cannot go with zero terminal SNR (zero_snr): the spacing leaves out the last timestep, "
            "where sampling has to start. Use trailing or linspace, or turn zero_snr off "
            "(--schedule.no-zero-snr in training)."
        )
