"""Noise schedules, as diffusers schedulers.

    x_t = sqrt(abar_t) x_0 + sqrt(1 - abar_t) eps,     abar_t = prod_{s <= t} (1 - beta_s),     t = 0 ... T - 1
    v   = sqrt(abar_t) eps - sqrt(1 - abar_t) x_0

Rectified flow has other levels of image and noise, and no betas: see noise_levels.py.

Zero terminal SNR (Lin et al. 2024, arXiv 2305.08891) rescales the betas so that abar_{T-1} = 0: the last x_t is pure
noise, like the x from which sampling starts. At T - 1 the image x_0 can be computed from v but not from eps (0/0), and
sampling has to start at T - 1.
"""

import inspect
import math
import warnings
from typing import Any, Literal

import diffusers
from diffusers.schedulers.scheduling_ddim import DDIMScheduler
from diffusers.schedulers.scheduling_ddpm import DDPMScheduler
from diffusers.schedulers.scheduling_dpmsolver_multistep import DPMSolverMultistepScheduler
from diffusers.schedulers.scheduling_flow_match_euler_discrete import FlowMatchEulerDiscreteScheduler

from apps.diffusion.config.checks import check_word
from apps.diffusion.config.network import Betas, Prediction, check_zero_snr
from apps.diffusion.config.sampling import Spacing
from apps.diffusion.config.training import Config
from apps.diffusion.schedulers.noise_levels import is_flow, starts_at_noise

Kind = Literal["ddim", "ddpm", "dpm++", "flow"]

# samplers of diffusion: diffusers schedulers that accept explicit timesteps
SAMPLERS = {
    "ddim": "DDIMScheduler",
    "ddpm": "DDPMScheduler",
    "dpm++": "DPMSolverMultistepScheduler",
    "dpm++-single": "DPMSolverSinglestepScheduler",
    "unipc": "UniPCMultistepScheduler",
    "lms": "LMSDiscreteScheduler",
    "euler": "EulerDiscreteScheduler",
    "euler-ancestral": "EulerAncestralDiscreteScheduler",
}


def make_scheduler(
    kind: Kind = "ddpm",
    *,
    prediction: Prediction = "v_prediction",
    zero_snr: bool = True,
    spacing: Spacing = "trailing",
    learn_sigma: bool = False,
    betas: Betas = "linear",
    beta_start: float = 1e-4,
    beta_end: float = 0.02,
    train_steps: int = 1000,
    clip: float | None = None,
    shift: float = 1.0,
) -> Any:
    """A diffusers scheduler: DDIMScheduler, DDPMScheduler, DPMSolverMultistepScheduler (order 2), or
    FlowMatchEulerDiscreteScheduler for a rectified flow.

    Args:
        kind: the sampler. Training uses only the noise levels, which are equal for all samplers of diffusion, and
            passes "ddpm". "flow" uses `train_steps` and `shift` only.
        prediction: the network's prediction: v, eps or x_0 ("sample").
        zero_snr: whether the betas are rescaled to abar = 0 at the last timestep.
        spacing: spacing of the timesteps in sampling; see `timesteps`.
        learn_sigma: whether the network predicts the variance too (C further channels), for ancestral sampling.
        betas: "linear" between beta_start and beta_end, "scaled_linear" (linear in the roots), or the cosine schedule.
        train_steps: T.
        clip: bound of |x_0| at each step of "ddim" and "ddpm"; None for latents, which are unbounded.
        shift: shift c of a rectified flow, see noise_levels.py.

    Raises:
        ValueError: an argument is out of range, or two arguments exclude each other.
    """
    check_word("kind", kind, Kind)
    check_word("prediction", prediction, Prediction)
    check_word("spacing", spacing, Spacing)
    check_word("betas", betas, Betas)
    check_zero_snr(zero_snr, prediction, spacing)
    if train_steps < 2 or not 0 < beta_start <= beta_end < 1:
        raise ValueError(
            f"train_steps={train_steps}, beta_start={beta_start}, beta_end={beta_end} make no noise "
            "schedule; give at least 2 steps and 0 < beta_start <= beta_end < 1."
        )
    _check_fit(kind, clip, shift)
    if kind == "flow":
        return FlowMatchEulerDiscreteScheduler(num_train_timesteps=train_steps, shift=shift)
    common: dict[str, Any] = {
        "num_train_timesteps": train_steps,
        "beta_start": beta_start,
        "beta_end": beta_end,
        "beta_schedule": betas,
        "prediction_type": prediction,
        "rescale_betas_zero_snr": zero_snr,
        "timestep_spacing": spacing,
    }
    if kind == "dpm++":
        return DPMSolverMultistepScheduler(**common, solver_order=2)
    common |= {"clip_sample": clip is not None, "clip_sample_range": clip or 1.0}
    if kind == "ddim":
        return DDIMScheduler(**common)
    return DDPMScheduler(**common, variance_type="learned_range" if learn_sigma else "fixed_small")


def _check_fit(kind: Kind, clip: float | None, shift: float) -> None:
    """Raises ValueError if `clip` or `shift` does not fit the kind of scheduler."""
    if clip is not None and (clip <= 0 or kind == "dpm++"):
        raise ValueError(f"clip={clip} does not fit kind={kind!r}; give a positive bound to ddim or ddpm, or None.")
    if not 0 < shift < math.inf or (shift != 1 and kind != "flow"):
        raise ValueError(f"shift={shift} does not fit kind={kind!r}; give a positive number to flow, or leave it at 1.")


def scheduler_of(config: Config) -> Any:
    """The scheduler of a run, with its noise schedule and prediction target: DDPM's with the run's spacing of
    timesteps, or that of a rectified flow.

    For pixels, predictions of x_0 are clipped to [-1, 1]; for latents, which are unbounded, they are not clipped.
    """
    noise = config.schedule
    if noise.kind == "rectified_flow":
        return make_scheduler("flow", train_steps=noise.timesteps, shift=noise.shift)
    return make_scheduler(
        "ddpm",
        prediction=noise.prediction,
        zero_snr=noise.zero_snr,
        spacing=config.sampling.value("spacing"),
        learn_sigma=config.model.learn_sigma,
        betas=noise.betas,
        beta_start=noise.beta_start,
        beta_end=noise.beta_end,
        train_steps=noise.timesteps,
        clip=None if config.data.source == "latents" else 1.0,
    )


def same_noise(scheduler: Any, name: str) -> Any:
    """The scheduler of the sampler `name` with the noise schedule, prediction and spacing of `scheduler`, and for
    "ddim" and "ddpm" its bound of |x_0| (none, if its class has no such option) and learned variance.

    Args:
        scheduler: a scheduler from `make_scheduler` or from this function.
        name: one of SAMPLERS, or "flow" for the scheduler of a rectified flow.

    Raises:
        ValueError: the sampler is unknown, or cannot work with zero terminal SNR.
    """
    choices = ("flow",) if is_flow(scheduler) else tuple(SAMPLERS)
    if name not in choices:
        process = "a rectified flow" if is_flow(scheduler) else "a diffusion"
        raise ValueError(f"{name!r} is no sampler of {process}; choose one of {', '.join(choices)}.")
    config = scheduler.config
    if is_flow(scheduler):
        return FlowMatchEulerDiscreteScheduler.from_config(config)
    kind = getattr(diffusers, SAMPLERS[name])
    accepted = inspect.signature(kind.__init__).parameters
    if starts_at_noise(scheduler) and "rescale_betas_zero_snr" not in accepted:
        raise ValueError(
            f"The sampler {name} divides by zero at a timestep of pure noise, which this network was trained with "
            "(zero_snr); choose ddim, ddpm, dpm++, unipc or euler."
        )
    shared = ["num_train_timesteps", "beta_start", "beta_end", "beta_schedule", "trained_betas", "prediction_type"]
    shared += ["rescale_betas_zero_snr", "timestep_spacing"]
    options: dict[str, Any] = {}
    if name in ("ddim", "ddpm"):
        options["clip_sample"] = False  # the default of diffusers, True, is wrong for latents
        shared += ["clip_sample", "clip_sample_range"]
        if config.get("variance_type") == "learned_range":
            shared += ["variance_type"]
    options |= {key: config[key] for key in shared if key in accepted and key in config}
    if name == "dpm++-single":
        options["lower_order_final"] = True
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # numpy 2 warns about np.array(tensor) in diffusers
        made = kind(**options)
    if "timestep_spacing" in config:  # dpm++-single has no such option, and a saved pipeline keeps the spacing
        made.register_to_config(timestep_spacing=config["timestep_spacing"])
    return made
