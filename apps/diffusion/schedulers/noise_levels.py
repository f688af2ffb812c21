"""Levels of image and noise at each timestep, and the prediction target, for diffusion and for rectified flow.

    x_t = a_t x_0 + b_t eps,     t = 0 ... T - 1

    diffusion        a = sqrt(abar_t)    b = sqrt(1 - abar_t)    predicts v = a eps - b x_0, eps or x_0, at time t
    rectified flow   a = 1 - sigma_t     b = sigma_t             predicts u = eps - x_0 = dx/dsigma, at time T sigma_t

Rectified flow (Liu et al. 2022, arXiv 2209.03003; Lipman et al. 2022, arXiv 2210.02747) joins image and noise by
straight lines. With s = (t + 1) / T, and a shift c that moves timesteps toward the noise (Esser et al. 2024, arXiv
2403.03206, equation 23; c = 1: no shift),

    sigma_t = c s / (1 + (c - 1) s)

so that sigma_{T-1} = 1 is pure noise. A rectified flow has diffusers' FlowMatchEulerDiscreteScheduler, whose sigmas and
times are these.
"""

from typing import Any

import torch
from diffusers.schedulers.scheduling_flow_match_euler_discrete import FlowMatchEulerDiscreteScheduler
from jaxtyping import Float, Int, Num
from torch import Tensor

FLOW = "flow_prediction"
_UNSUPPORTED = (
    "use_dynamic_shifting",
    "use_karras_sigmas",
    "use_exponential_sigmas",
    "use_beta_sigmas",
    "invert_sigmas",
    "stochastic_sampling",
)


def is_flow(scheduler: Any) -> bool:
    """Whether a diffusers scheduler is that of a rectified flow.

    Raises:
        ValueError: the scheduler has options with which sigma_t is not the function at the top of this file.
    """
    if not isinstance(scheduler, FlowMatchEulerDiscreteScheduler):
        return False
    used = [name for name in _UNSUPPORTED if scheduler.config.get(name)]
    if used:
        raise ValueError(
            f"The options {', '.join(used)} of FlowMatchEulerDiscreteScheduler are not supported; turn them off."
        )
    return True


def prediction_kind(scheduler: Any) -> str:
    """The kind of the network's prediction: v_prediction, epsilon, sample, or flow_prediction (u)."""
    return FLOW if is_flow(scheduler) else scheduler.config["prediction_type"]


def starts_at_noise(scheduler: Any) -> bool:
    """Whether the last timestep is pure noise: rectified flow, and diffusion with zero terminal SNR."""
    return is_flow(scheduler) or bool(scheduler.config.get("rescale_betas_zero_snr"))


def levels(
    scheduler: Any, t: Int[Tensor, " B"], dtype: torch.dtype = torch.float32
) -> tuple[Float[Tensor, " B"], Float[Tensor, " B"]]:
    """(a_t, b_t) on the device of t."""
    if is_flow(scheduler):
        sigma = _sigma(scheduler, t, dtype)
        return 1 - sigma, sigma
    abar = scheduler.alphas_cumprod.to(t.device, dtype)[t]
    return abar.sqrt(), (1 - abar).sqrt()


def network_time(scheduler: Any, t: Int[Tensor, " B"]) -> Num[Tensor, " B"]:
    """The time argument of the network at the timesteps t."""
    return scheduler.config["num_train_timesteps"] * _sigma(scheduler, t, torch.float32) if is_flow(scheduler) else t


def noisy_image(
    scheduler: Any, x0: Float[Tensor, "B C H W"], eps: Float[Tensor, "B C H W"], t: Int[Tensor, " B"]
) -> Float[Tensor, "B C H W"]:
    """x_t."""
    a, b = (level.view(-1, 1, 1, 1) for level in levels(scheduler, t, x0.dtype))
    return a * x0 + b * eps


def target(
    scheduler: Any, x0: Float[Tensor, "B C H W"], eps: Float[Tensor, "B C H W"], t: Int[Tensor, " B"]
) -> Float[Tensor, "B C H W"]:
    """The prediction target: v, eps, x_0 or u."""
    match prediction_kind(scheduler):
        case "v_prediction":
            a, b = (level.view(-1, 1, 1, 1) for level in levels(scheduler, t, x0.dtype))
            return a * eps - b * x0
        case "epsilon":
            return eps
        case "sample":
            return x0
        case _:
            return eps - x0


def clean_and_noise(prediction: Any, x: Any, a: Tensor | float, b: Tensor | float, kind: str) -> tuple[Any, Any]:
    """(x_0, eps) of x = a x_0 + b eps, given a prediction of v, eps, x_0 or u; tensors, or numbers."""
    if kind == "v_prediction":
        return a * x - b * prediction, a * prediction + b * x
    if kind == "epsilon":
        return (x - b * prediction) / a, prediction
    if kind == "sample":
        return prediction, (x - a * prediction) / b
    return x - b * prediction, x + a * prediction


def _sigma(scheduler: Any, t: Tensor, dtype: torch.dtype) -> Tensor:
    shift = scheduler.config["shift"]
    share = (t.to(dtype) + 1) / scheduler.config["num_train_timesteps"]
    return shift * share / (1 + (shift - 1) * share)
