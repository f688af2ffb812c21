"""Distribution and weights of the timesteps in training.

Timesteps: with u uniform in (0, 1) and T timesteps, t = floor(T q(u)), where q is the quantile function of the chosen
distribution,

    uniform         q(u) = u
    logit-normal    q(u) = sigmoid(m + s Phi^-1(u))          Esser et al. 2024, arXiv 2403.03206, section 3.1

so that stratified u stay stratified.

Weights: with SNR = abar_t / (1 - abar_t), the min-SNR rule (Hang et al. 2023, arXiv 2303.09556, equation 8) counts the
squared error of x_0 min(SNR, g) times. The errors of the other predictions are multiples of that one,
|x_0 error|^2 = |eps error|^2 / SNR = |v error|^2 / (SNR + 1), hence the weight of the predicted quantity's error:

    x_0: min(SNR, g)        eps: min(SNR, g) / SNR        v: min(SNR, g) / (SNR + 1)
"""

from __future__ import annotations

from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor

Distribution = Literal["uniform", "logit_normal"]


def quantile(
    u: Float[Tensor, " B"], distribution: Distribution, location: float = 0.0, scale: float = 1.0
) -> Float[Tensor, " B"]:
    """q(u) in [0, 1) for u in [0, 1): the share of the timesteps below the drawn one.

    Raises:
        ValueError: an unknown distribution.
    """
    if distribution == "uniform":
        return u
    if distribution == "logit_normal":
        # at u = 0 the normal quantile is -inf and q is 0; the largest double below 1 bounds q from above
        below_one = 1 - torch.finfo(u.dtype).eps
        return torch.sigmoid(location + scale * torch.special.ndtri(u)).clamp(max=below_one)
    raise ValueError(f"timesteps={distribution!r} is unknown; choose uniform or logit_normal.")


def min_snr(abar: Float[Tensor, " B"], prediction: str, gamma: float) -> Float[Tensor, " B"]:
    """The weights of the squared errors of `prediction` at timesteps with these abar.

    Args:
        abar: share of the image's variance, 0 at zero terminal SNR.
        prediction: v_prediction, epsilon or sample, as in diffusers.
        gamma: g; 5 in the paper.
    """
    # in terms of abar, which is finite where SNR is not: min(SNR, g) (1 - abar) = min(abar, g (1 - abar))
    capped = torch.minimum(abar, gamma * (1 - abar))
    if prediction == "v_prediction":  # 1 / (SNR + 1) = 1 - abar
        return capped
    if prediction == "epsilon":  # 1 / SNR = (1 - abar) / abar
        return capped / abar
    return capped / (1 - abar)
