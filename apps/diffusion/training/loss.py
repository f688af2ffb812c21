"""Training loss of a diffusion model, a pure function of the batch and of the randomness of the step.

    L = mean w_t ( model(x_t, t, y') - target )^2,      x_t = sqrt(abar_t) x_0 + sqrt(1 - abar_t) eps

with t drawn by the trainer, target = v, eps or x_0 by the scheduler's `prediction_type`, and y' the label, or the null
class where it is dropped. w_t is 1, or the min-SNR weight of weighting.py.

For a network that also predicts its variance, as rho in C further channels, the variational bound is added (Nichol &
Dhariwal 2021, arXiv 2102.09672, equations 13 to 16):

    log var_t = a log beta_t + (1 - a) log btilde_t,   a = (rho + 1) / 2
    btilde_t = beta_t (1 - abar_{t-1}) / (1 - abar_t)
    L_vb = KL( N(mean_q, btilde_t) || N(mean, var_t) ) for t > 0;   -log N(x_0; mean, var_0) for t = 0

in bits per value, with btilde_1 for btilde_0 = 0, and the mean detached, so that its gradient reaches the variance
only.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from diffusers.schedulers.scheduling_ddpm import DDPMScheduler
from jaxtyping import Bool, Float, Int
from torch import Tensor

from apps.diffusion.models.fpdm import Penalty, Start
from apps.diffusion.schedulers.prediction import clean_and_noise
from apps.diffusion.training.weighting import min_snr
from implicit import AbstractGrad, AbstractSolver, Solution, Stop


@dataclass(frozen=True, kw_only=True)
class TrainingNoise:
    """The randomness of one training step: noise (B, C, H, W), timesteps t (B,), dropped labels (B,), and the numbers
    (B,) of the images in the run, from which further random numbers follow.
    """

    noise: Float[Tensor, "B C H W"]
    t: Int[Tensor, "B"]
    dropped: Bool[Tensor, "B"]
    positions: Int[Tensor, "B"] | None = None

    def to(self, device: torch.device | str) -> "TrainingNoise":
        """The same on another device."""
        return self._mapped(lambda tensor: tensor.to(device))

    def part(self, rows: slice) -> "TrainingNoise":
        """The randomness of some samples of the batch."""
        return self._mapped(lambda tensor: tensor[rows])

    def _mapped(self, change: Callable[[Tensor], Tensor]) -> "TrainingNoise":
        changed: dict[str, Any] = {name: None if v is None else change(v) for name, v in vars(self).items()}
        return TrainingNoise(**changed)


@dataclass(frozen=True, kw_only=True)
class TrainingSolve:
    """How an FPDM solves its fixed point in a training step; the fields are arguments of `FPDM.forward`."""

    solver: AbstractSolver[Any]
    grad: AbstractGrad
    stop: Stop
    start: Start | None = None
    penalty: Penalty | None = None


@dataclass(frozen=True, kw_only=True)
class Loss:
    """The loss of a batch.

    Attributes:
        total: scalar, with its graph; the objective.
        error: (B,) mean squared error of each sample, without a graph.
        bound: (B,) bits per value of the variational bound, without a graph; None unless the variance is learned.
        solution: the fixed-point solve of an FPDM.
    """

    total: Tensor
    error: Float[Tensor, "B"]
    bound: Float[Tensor, "B"] | None = None
    solution: Solution | None = None


def loss(
    model: Callable[..., Any],
    x0: Float[Tensor, "B C H W"],
    y: Int[Tensor, "B"] | None,
    noise: TrainingNoise,
    *,
    scheduler: DDPMScheduler,
    null_class: int | None = None,
    gamma: float | None = None,
    solve: TrainingSolve | None = None,
) -> Loss:
    """The training loss of `model` on clean latents `x0` with labels `y` (None: unconditional).

    Args:
        noise: the step's randomness, on the device of `x0`.
        scheduler: noise schedule and prediction type (`noise_schedule.make_scheduler("ddpm")`).
        null_class: the label that replaces dropped ones; needed as soon as one is dropped.
        gamma: of the min-SNR weight; None gives all timesteps the weight 1. The variational bound is never weighted.
        solve: how an FPDM solves; None for any other model.

    Raises:
        ValueError: labels are to be dropped and there is no null class, or shapes do not fit.
    """
    if noise.noise.shape != x0.shape or noise.t.shape != x0.shape[:1]:
        shapes = f"noise has the shape {tuple(noise.noise.shape)}, x0 {tuple(x0.shape)}"
        raise ValueError(f"{shapes}; draw noise for this batch.")
    if y is not None and null_class is not None:
        y = torch.where(noise.dropped, null_class, y)
    elif y is not None and bool(noise.dropped.any()):
        raise ValueError("Labels are to be dropped, but null_class is None; give the model's null class.")
    noisy = scheduler.add_noise(x0, noise.noise, noise.t)  # pyright: ignore[reportArgumentType]
    prediction, solution, penalty = predict(model, noisy, noise.t, y, solve)
    mean_part, variance_part = prediction[:, : x0.shape[1]], prediction[:, x0.shape[1] :]
    error = (mean_part.to(x0.dtype) - target(x0, noise, scheduler)).square().flatten(1).mean(1)
    weighted = error
    if gamma is not None:
        abar = scheduler.alphas_cumprod.to(x0.device)[noise.t]
        weighted = error * min_snr(abar, scheduler.config["prediction_type"], gamma).to(error.dtype)
    total, bound = weighted.mean(), None
    if variance_part.shape[1]:
        bound = variational_bound(mean_part.detach(), variance_part, x0, noisy, noise.t, scheduler)
        total, bound = total + bound.mean(), bound.detach()
    return Loss(total=total + penalty, error=error.detach(), bound=bound, solution=solution)


def predict(
    model: Callable[..., Any], noisy: Tensor, t: Tensor, y: Tensor | None, solve: TrainingSolve | None
) -> tuple[Tensor, Solution | None, Tensor | float]:
    """The prediction for noisy images, the fixed-point solve and the penalty; None and 0 without a solve."""
    if solve is None:
        return model(noisy, t, y), None, 0.0
    prediction, solution, *penalty = model(
        noisy,
        t,
        y,
        solver=solve.solver,
        grad=solve.grad,
        stop=solve.stop,
        start=solve.start,
        penalty=solve.penalty,
        return_solution=True,
    )
    return prediction, solution, sum(penalty)


def target(x0: Tensor, noise: TrainingNoise, scheduler: DDPMScheduler) -> Tensor:
    """Prediction target of the network: v, eps or x_0."""
    match scheduler.config["prediction_type"]:
        case "v_prediction":
            return scheduler.get_velocity(x0, noise.noise, noise.t)  # pyright: ignore[reportArgumentType]
        case "epsilon":
            return noise.noise
        case _:
            return x0


def variational_bound(
    mean_part: Float[Tensor, "B C H W"],
    rho: Float[Tensor, "B C H W"],
    x0: Float[Tensor, "B C H W"],
    noisy: Float[Tensor, "B C H W"],
    t: Int[Tensor, "B"],
    scheduler: DDPMScheduler,
) -> Float[Tensor, "B"]:
    """L_vb of each sample in bits per value (the equations at the top of this file)."""
    abar = scheduler.alphas_cumprod.to(x0.device, torch.float64)
    now = abar[t].view(-1, 1, 1, 1)
    before = torch.where(t > 0, abar[t - 1], 1.0).view(-1, 1, 1, 1)
    beta = 1 - now / before
    small = beta * (1 - before) / (1 - now)
    first = (1 - abar[1] / abar[0]) * (1 - abar[0]) / (1 - abar[1])  # btilde_1
    small = torch.where(small > 0, small, first)
    predicted, _ = clean_and_noise(mean_part.double(), noisy.double(), now, scheduler.config["prediction_type"])
    to_clean = before.sqrt() * beta / (1 - now)  # coefficient of x_0 in the posterior's mean; x_t's cancels
    gap = (to_clean * (x0.double() - predicted)).square()
    share = (rho.double() + 1) / 2
    log_var = share * beta.log() + (1 - share) * small.log()
    divergence = 0.5 * (log_var - small.log() + (small + gap) / log_var.exp() - 1)
    likelihood = 0.5 * (math.log(2 * math.pi) + log_var + gap / log_var.exp())  # at t = 0 the mean is x_0 itself
    bits = torch.where(t.view(-1, 1, 1, 1) > 0, divergence, likelihood) / math.log(2)
    return bits.flatten(1).mean(1).to(x0.dtype)
