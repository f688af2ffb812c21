"""Distribution and weights of the timesteps in training.

Timesteps: with u uniform in (0, 1) and T timesteps, t = floor(T q(u)), where q is the quantile function of the chosen
distribution,

    uniform         q(u) = u
    logit-normal    q(u) = sigmoid(m + s Phi^-1(u))          Esser et al. 2024, arXiv 2403.03206, section 3.1

Stratified u give stratified timesteps, since q is monotonic.

Weights: with SNR = (a_t / b_t)^2 of x_t = a_t x_0 + b_t eps, the min-SNR rule (Hang et al. 2023, arXiv 2303.09556,
equation 8) weights the squared error of x_0 by min(SNR, g). The errors of the other predictions are multiples of the
error of x_0, |x_0 error|^2 = |eps error|^2 / SNR = b^2 |v error|^2 = b^2 |u error|^2, with u the velocity of a
rectified flow, and b^2 = 1 / (SNR + 1) in diffusion. The weight of the squared error of each prediction is therefore

    x_0: min(SNR, g)        eps: min(SNR, g) / SNR        v, u: min(SNR, g) b^2
"""

import torch
from jaxtyping import Float
from torch import Tensor

from apps.diffusion.config.checks import check_word
from apps.diffusion.config.loss import Distribution


def quantile(
    u: Float[Tensor, " B"], distribution: Distribution, location: float = 0.0, scale: float = 1.0
) -> Float[Tensor, " B"]:
    """q(u) in [0, 1) for u in [0, 1); the timestep is floor(T q(u)).

    Raises:
        ValueError: an unknown distribution.
    """
    check_word("timesteps", distribution, Distribution)
    if distribution == "uniform":
        return u
    # at u = 0 the normal quantile is -inf and q is 0; the largest number below 1 bounds q from above
    below_one = 1 - torch.finfo(u.dtype).eps
    return torch.sigmoid(location + scale * torch.special.ndtri(u)).clamp(max=below_one)


def min_snr(a: Float[Tensor, " B"], b: Float[Tensor, " B"], prediction: str, gamma: float) -> Float[Tensor, " B"]:
    """The weights (B,) of the squared errors of `prediction`.

    Args:
        a: (B,) level of the image at each timestep, 0 at zero terminal SNR.
        b: (B,) level of the noise at each timestep.
        prediction: v_prediction, epsilon, sample or flow_prediction, as in diffusers.
        gamma: g; 5 in the paper.
    """
    # min(SNR, g) b^2 = min(a^2, g b^2); the right side is finite even if the SNR is infinite
    capped = torch.minimum(a.square(), gamma * b.square())
    if prediction == "sample":
        return capped / b.square()
    return capped / a.square() if prediction == "epsilon" else capped
