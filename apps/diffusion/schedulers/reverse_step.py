"""One step of the reverse process, from timestep t to the next entry s < t of an explicit array of timesteps.

With x_0 and eps computed from the prediction, and a = 1, b = 0 at the end of the array (s = -1),

    btilde = (b_s / b_t)^2 beta,                  beta = 1 - (a_t / a_s)^2
    mean   = a_s x_0 + sqrt(b_s^2 - eta^2 btilde) eps
    x_s    = mean + eta sqrt(btilde) z,           z ~ N(0, 1)

eta = 0 is DDIM (Song et al. 2021, arXiv 2010.02502, equation 12), eta = 1 is DDPM's ancestral step (Ho et al. 2020,
arXiv 2006.11239, equation 7). If the network predicts a variance, it replaces btilde in the ancestral step. The step
into s = -1 adds no noise. In a rectified flow eta is 0, and the mean is Euler's step of dx/dsigma = u,
x_s = x_t + (sigma_s - sigma_t) u.

diffusers' own DDIM and DDPM steps take s = t - T // n, which differs from the array if n does not divide T or the
spacing is "linspace". Therefore this file makes these steps and Euler's, with the scheduler's levels a, b. Other
diffusers schedulers (DPM-Solver++, ...) store the array and make their own steps.
"""

import copy
import inspect
import math
import warnings
from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import torch
from diffusers.schedulers.scheduling_ddim import DDIMScheduler
from diffusers.schedulers.scheduling_ddpm import DDPMScheduler
from torch import Tensor

from apps.diffusion.schedulers.noise_levels import clean_and_noise, is_flow, levels, network_time, prediction_kind


class Reverse:
    """The steps of one batch through an explicit array of timesteps.

    Args:
        scheduler: a diffusers scheduler, which is copied and never changed.
        timesteps: the array of timesteps, decreasing.
        eta: stochasticity, 0 (deterministic) to 1 (ancestral); DDIM only.

    Raises:
        ValueError: the array is not decreasing or leaves the schedule, eta is out of range or given for another
            scheduler than DDIM, or the scheduler cannot follow an explicit array.
    """

    def __init__(self, scheduler: Any, timesteps: Sequence[int], *, eta: float = 0.0) -> None:
        train_steps = scheduler.config["num_train_timesteps"]
        decreasing = all(a > b for a, b in pairwise(timesteps))
        if not timesteps or not decreasing or timesteps[0] >= train_steps or timesteps[-1] < 0:
            raise ValueError(
                f"timesteps={list(timesteps)} must fall strictly and lie between {train_steps - 1} and 0; "
                "`timesteps.timesteps` makes such an array."
            )
        if not 0 <= eta <= 1 or (eta and not isinstance(scheduler, DDIMScheduler)):
            raise ValueError(
                f"eta={eta} does not fit {type(scheduler).__name__}; give 0 to 1 for DDIM, and 0 for other schedulers."
            )
        self.timesteps = tuple(int(t) for t in timesteps)
        self.previous = (*self.timesteps[1:], -1)
        self.scheduler: Any = copy.deepcopy(scheduler)
        flow = is_flow(scheduler)
        self.closed_form = flow or isinstance(scheduler, DDIMScheduler | DDPMScheduler)
        self.eta = eta if flow or isinstance(scheduler, DDIMScheduler) else 1.0
        visited = torch.tensor(self.timesteps, device="cpu")
        self.times: Sequence[float] = network_time(scheduler, visited).tolist() if flow else self.timesteps
        if self.closed_form:
            a, b = torch.stack(levels(scheduler, visited, torch.float64)).tolist()
            self.a, self.b = (*a, 1.0), (*b, 0.0)
            self.kind = prediction_kind(scheduler)
        else:
            follow(self.scheduler, self.timesteps)

    def start(self, noise: Tensor) -> Tensor:
        """The noisiest x, from standard normal noise."""
        return noise if self.closed_form else noise * float(self.scheduler.init_noise_sigma)

    def input(self, k: int, x: Tensor) -> Tensor:
        """The input of the network at step k."""
        return x if self.closed_form else self.scheduler.scale_model_input(x, self.scheduler.timesteps[k])

    def step(self, k: int, prediction: Tensor, x: Tensor, generators: Sequence[torch.Generator]) -> Tensor:
        """x after the k-th step.

        Args:
            k: number of the step.
            prediction: the network's prediction at the k-th timestep.
            x: (B, C, H, W) at the k-th timestep.
            generators: CPU generators, one per sample, for the noise of the step.
        """
        if not self.closed_form:
            prediction = prediction.to(x.dtype)
            accepted = inspect.signature(self.scheduler.step).parameters
            drawn: dict[str, Any] = {"generator": list(generators)} if "generator" in accepted else {}
            mean_part = prediction[:, : x.shape[1]]
            return self.scheduler.step(mean_part, self.scheduler.timesteps[k], x, **drawn, return_dict=False)[0]
        noise = fresh_noise(x, generators) if self.adds_noise(k) else None
        return self.step_with(k, prediction, x, noise)

    def adds_noise(self, k: int) -> bool:
        """Whether the k-th step, in closed form, adds noise."""
        return self.previous[k] >= 0 and bool(self.eta)

    def step_with(self, k: int, prediction: Tensor, x: Tensor, noise: Tensor | None) -> Tensor:
        """x after the k-th step as a function of x and the prediction, in closed form; `noise` is ignored if the step
        adds no noise.
        """
        mean, sigma = self.moments(k, prediction.to(x.dtype), x)
        return mean + sigma * noise if noise is not None and self.adds_noise(k) else mean

    def gain(self, k: int) -> float:
        """Derivative in x of the k-th step, in closed form, at a fixed prediction and without clipping."""
        clean, noise = clean_and_noise(0.0, 1.0, self.a[k], self.b[k], self.kind)
        return self.a[k + 1] * clean + self._kept(k) * noise

    def _variances(self, k: int) -> tuple[float, float]:
        """beta and btilde of the k-th step."""
        beta = 1 - (self.a[k] / self.a[k + 1]) ** 2
        return beta, (self.b[k + 1] / self.b[k]) ** 2 * beta

    def _kept(self, k: int) -> float:
        """Factor of eps in the mean after the k-th step."""
        return max(self.b[k + 1] ** 2 - self.eta**2 * self._variances(k)[1], 0.0) ** 0.5

    def moments(self, k: int, prediction: Tensor, x: Tensor) -> tuple[Tensor, Tensor | float]:
        """Mean and standard deviation of x after the k-th step, in closed form."""
        config = self.scheduler.config
        beta, small = self._variances(k)
        mean_part, variance_part = prediction[:, : x.shape[1]], prediction[:, x.shape[1] :]
        clean, noise = clean_and_noise(mean_part, x, self.a[k], self.b[k], self.kind)
        if config.get("clip_sample"):
            clean = clean.clamp(-config["clip_sample_range"], config["clip_sample_range"])
            noise = (x - self.a[k] * clean) / self.b[k]
        mean = self.a[k + 1] * clean + self._kept(k) * noise
        if config.get("variance_type") != "learned_range" or small == 0:
            return mean, self.eta * small**0.5
        if not variance_part.shape[1]:
            raise ValueError(
                "The scheduler expects a learned variance, but the network does not predict one; build the network "
                "with learn_sigma=True, or the scheduler with learn_sigma=False."
            )
        share = (variance_part + 1) / 2
        return mean, (0.5 * (share * math.log(beta) + (1 - share) * math.log(small))).exp()


def follow(scheduler: Any, timesteps: Sequence[int]) -> None:
    """Sets a scheduler that makes its own steps to an explicit array of timesteps.

    A scheduler that does not accept an array gets the number of timesteps.

    Raises:
        ValueError: the scheduler's timesteps then differ from the array.
    """
    explicit = "timesteps" in inspect.signature(scheduler.set_timesteps).parameters
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # numpy 2 warns about np.array(tensor) in diffusers
        if explicit and scheduler.order == 1:
            scheduler.set_timesteps(timesteps=list(timesteps))
        elif scheduler.order == 1:
            scheduler.set_timesteps(len(timesteps))
    if [round(float(t)) for t in scheduler.timesteps] != list(timesteps):
        raise ValueError(
            f"{type(scheduler).__name__} cannot follow an explicit array of timesteps, and its own timesteps differ "
            f"from {list(timesteps)}; use ddim, ddpm or dpm++."
        )


def fresh_noise(x: Tensor, generators: Sequence[torch.Generator]) -> Tensor:
    """Standard normal noise with the shape, dtype and device of x (B, C, H, W); the noise of sample b comes from
    generator b. The noise is drawn on the CPU in float32 and copied to the device asynchronously.
    """
    noise = torch.stack([torch.randn(x.shape[1:], generator=g, device=g.device) for g in generators])
    return (noise.pin_memory() if x.is_cuda else noise).to(x.device, x.dtype, non_blocking=True)
