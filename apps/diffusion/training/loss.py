"""Training loss of a diffusion model, a pure function of the batch and of the randomness of the step.

    L = mean w_t ( model(x_t, t, y') - target )^2,      x_t = a_t x_0 + b_t eps

with t drawn by the trainer, levels a, b and target (v, eps, x_0, or u of a rectified flow) by the scheduler
(noise_levels.py), and y' the label, or the null class where it is dropped. w_t is 1, or the min-SNR weight of
weighting.py.

For a network that also predicts its variance, as rho in C further channels, the variational bound is added (Nichol &
Dhariwal 2021, arXiv 2102.09672, equations 13 to 16):

    log var_t = a log beta_t + (1 - a) log btilde_t,   a = (rho + 1) / 2
    btilde_t = beta_t (1 - abar_{t-1}) / (1 - abar_t)
    L_vb = KL( N(mean_q, btilde_t) || N(mean, var_t) ) for t > 0;   -log N(x_0; mean, var_0) for t = 0

in bits per value. btilde_0 is 0, so btilde_1 replaces it. The mean is detached, so that the gradient of L_vb reaches
the predicted variance only.

In distillation the targets are the predictions of a trained network, the teacher, in all channels, a learned variance
included:

    L = mean ( model(x_t, t, y') - teacher(x_t, t, y') )^2
"""

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from apps.diffusion.models.fpdm import Start
from apps.diffusion.schedulers.noise_levels import (
    clean_and_noise,
    levels,
    network_time,
    noisy_image,
    prediction_kind,
    target,
)
from apps.diffusion.training.penalties import Penalties
from apps.diffusion.training.weighting import min_snr
from implicit import AbstractGrad, AbstractSolver, Solution, Stop


@dataclass(frozen=True, kw_only=True)
class TrainingNoise:
    """The randomness of one training step.

    Attributes:
        noise: (B, C, H, W) eps.
        t: (B,) timesteps.
        dropped: (B,) true where the null class replaces the label.
        positions: (B,) number of each image in the run, the counter of further random numbers; None: no such numbers.
    """

    noise: Float[Tensor, "B C H W"]
    t: Int[Tensor, "B"]
    dropped: Bool[Tensor, "B"]
    positions: Int[Tensor, "B"] | None = None

    def to(self, device: torch.device | str) -> "TrainingNoise":
        """A copy on another device."""
        return self._mapped(lambda tensor: tensor.to(device))

    def part(self, rows: slice) -> "TrainingNoise":
        """The randomness of the samples `rows` of the batch."""
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
    penalty: Penalties | None = None
    earlier: Int[Tensor, "B"] | None = None
    """Noisier timesteps; `penalty` starts from the solutions there. None: `penalty` needs no such solutions."""


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
    scheduler: Any,
    null_class: int | None = None,
    gamma: float | None = None,
    solve: TrainingSolve | None = None,
    teacher: Callable[..., Tensor] | None = None,
) -> Loss:
    """The training loss of `model` on clean latents `x0` with labels `y` (None: unconditional).

    Args:
        noise: the step's randomness, on the device of `x0`.
        scheduler: noise schedule and prediction type (`noise_schedule.make_scheduler("ddpm")` or `"flow"`).
        null_class: the label that replaces dropped labels; None is allowed if no label of the batch is dropped.
        gamma: largest SNR of the min-SNR weight; None: the weight is 1. The variational bound is never weighted.
        solve: the solve of an FPDM; None for any other model.
        teacher: network whose predictions replace the target; the weight is then 1 at all timesteps. None: no teacher.

    Raises:
        ValueError: a label is to be dropped and `null_class` is None, or the shapes of noise and images differ.
    """
    if noise.noise.shape != x0.shape or noise.t.shape != x0.shape[:1]:
        shapes = f"noise has the shape {tuple(noise.noise.shape)}, x0 {tuple(x0.shape)}"
        raise ValueError(f"{shapes}; draw noise for this batch.")
    if y is not None and null_class is not None:
        y = torch.where(noise.dropped, null_class, y)
    elif y is not None and bool(noise.dropped.any()):
        raise ValueError("noise.dropped drops labels, but null_class is None; give the model's null class.")
    solve = _with_earlier(model, x0, y, noise, scheduler, solve)
    noisy, time = noisy_image(scheduler, x0, noise.noise, noise.t), network_time(scheduler, noise.t)
    prediction, solution, penalty = _predict(model, noisy, time, y, solve)
    if teacher is not None:
        with torch.no_grad():
            learned = teacher(noisy, time, y)
        error = (prediction.to(x0.dtype) - learned.to(x0.dtype)).square().flatten(1).mean(1)
        return Loss(total=error.mean() + penalty, error=error.detach(), solution=solution)
    mean_part, variance_part = prediction[:, : x0.shape[1]], prediction[:, x0.shape[1] :]
    error = (mean_part.to(x0.dtype) - target(scheduler, x0, noise.noise, noise.t)).square().flatten(1).mean(1)
    weighted = error
    if gamma is not None:
        weighted = error * min_snr(*levels(scheduler, noise.t), prediction_kind(scheduler), gamma).to(error.dtype)
    total, bound = weighted.mean(), None
    if variance_part.shape[1]:
        bound = variational_bound(mean_part.detach(), variance_part, x0, noisy, noise.t, scheduler)
        total, bound = total + bound.mean(), bound.detach()
    return Loss(total=total + penalty, error=error.detach(), bound=bound, solution=solution)


def _with_earlier(
    model: Callable[..., Any],
    x0: Tensor,
    y: Tensor | None,
    noise: TrainingNoise,
    scheduler: Any,
    solve: TrainingSolve | None,
) -> TrainingSolve | None:
    """`solve` with the solutions at the timesteps `solve.earlier` added to its penalty; `solve` itself without
    `earlier` or a penalty. These solutions take the model's own number of iterations, as in sampling, and no graph.
    """
    if solve is None or solve.earlier is None or solve.penalty is None:
        return solve
    noisy = noisy_image(scheduler, x0, noise.noise, solve.earlier)
    with torch.no_grad():
        _, solution = model(noisy, network_time(scheduler, solve.earlier), y, return_solution=True)
    torch.clear_autocast_cache()  # the cache holds weights that were cast without a graph
    return replace(solve, penalty=replace(solve.penalty, earlier=solution.value))


def _predict(
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


def variational_bound(
    mean_part: Float[Tensor, "B C H W"],
    rho: Float[Tensor, "B C H W"],
    x0: Float[Tensor, "B C H W"],
    noisy: Float[Tensor, "B C H W"],
    t: Int[Tensor, "B"],
    scheduler: Any,
) -> Float[Tensor, "B"]:
    """L_vb of each sample in bits per value (the equations at the top of this file)."""
    abar = scheduler.alphas_cumprod.to(x0.device, torch.float64)
    now = abar[t].view(-1, 1, 1, 1)
    before = torch.where(t > 0, abar[t - 1], 1.0).view(-1, 1, 1, 1)
    beta = 1 - now / before
    small = beta * (1 - before) / (1 - now)
    first = (1 - abar[1] / abar[0]) * (1 - abar[0]) / (1 - abar[1])  # btilde_1
    small = torch.where(small > 0, small, first)
    kind = prediction_kind(scheduler)
    predicted, _ = clean_and_noise(mean_part.double(), noisy.double(), now.sqrt(), (1 - now).sqrt(), kind)
    to_clean = before.sqrt() * beta / (1 - now)  # coefficient of x_0 in the posterior's mean; the term in x_t cancels
    gap = (to_clean * (x0.double() - predicted)).square()
    share = (rho.double() + 1) / 2
    log_var = share * beta.log() + (1 - share) * small.log()
    divergence = 0.5 * (log_var - small.log() + (small + gap) / log_var.exp() - 1)
    # at t = 0 the mean is the predicted x_0 itself
    likelihood = 0.5 * (math.log(2 * math.pi) + log_var + gap / log_var.exp())
    bits = torch.where(t.view(-1, 1, 1, 1) > 0, divergence, likelihood) / math.log(2)
    return bits.flatten(1).mean(1).to(x0.dtype)
