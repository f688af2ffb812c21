"""The keywords of the diffusers pipeline as sampling options, and its generator as a seed."""

import secrets
from collections.abc import Sequence
from typing import Any, TypedDict, Unpack

import numpy as np
import torch

from apps.diffusion.config.checks import check_word
from apps.diffusion.config.sampling import Allocation, OptionError, ParallelSolver, Sampler, SamplingOptions, Start
from apps.diffusion.config.serialization import from_plain
from apps.diffusion.sampling.plan import as_integer, as_integers, as_number
from apps.diffusion.sampling.warm_start import Reuse
from implicit import AbstractSolver

_KEYWORDS = {"steps": "num_inference_steps", "guidance": "guidance_scale"}


class SamplingKeywords(TypedDict, total=False):
    """Sampling options of a call of the pipeline, by keyword; None leaves an option at the pipeline's default.

    Attributes:
        num_inference_steps: number of timesteps.
        timesteps: explicit timesteps, decreasing, instead of num_inference_steps and the scheduler's spacing.
        guidance_scale: scale of classifier-free guidance; 1: no guidance.
        guidance_channels: number of channels that are guided, counted from the first; default: all.
        guidance_interval: lowest and highest timestep with guidance, such as (200, 800); default: all timesteps.
        iterations: iterations of the fixed-point layer, one number or one per timestep; FPDM only.
        block_passes: budget per image in evaluations of a transformer block, instead of iterations, spent exactly; for
            a DiT the budget determines the number of timesteps.
        macs: budget per image in multiply-accumulates, instead of iterations; FPDM only.
        seconds: budget per image in seconds on this machine; needs allocation "measured". FPDM only.
        allocation: distribution of a budget, or of iterations times timesteps, over the timesteps
            (sampling/iteration_budget.py); "measured": by residual curves (sampling/residual_curves.py).
        solver: solver of the fixed-point layer; FPDM only.
        reuse: start of each solve: False or "off", True or "on" (the previous timestep's solution), "blended",
            "extrapolated", "history" (the previous timestep's solution and solver state), or a `Reuse`; FPDM only.
        sampler: name of a sampler, as in the sampling command; default: the pipeline's scheduler.
        eta: stochasticity of DDIM, 0 to 1.
        parallel: solve for all timesteps at once, by "picard" iteration (True) or triangular "anderson" acceleration;
            for ddim, ddpm and flow (sampling/parallel.py).
        parallel_rtol: relative tolerance of the trajectory in parallel sampling; default: 1e-3.
        window: number of timesteps that parallel sampling solves for at once; default: all.
    """

    num_inference_steps: int | None
    timesteps: Sequence[int] | None
    guidance_scale: float | None
    guidance_channels: int | None
    guidance_interval: Sequence[int] | None
    iterations: int | Sequence[int] | None
    block_passes: int | None
    macs: float | None
    seconds: float | None
    allocation: Allocation | None
    solver: AbstractSolver[Any] | None
    reuse: bool | str | Reuse | None
    sampler: Sampler | None
    eta: float | None
    parallel: bool | ParallelSolver | None
    parallel_rtol: float | None
    window: int | None


def options_of(**keywords: Unpack[SamplingKeywords]) -> SamplingOptions:
    """The keywords of a call as sampling options; a number may be a scalar of numpy or torch.

    Raises:
        TypeError: a keyword does not exist.
        ValueError: a value is not allowed.
    """
    known = SamplingKeywords.__annotations__
    unknown = [name for name in keywords if name not in known]
    if unknown:
        raise TypeError(f"There is no keyword {', '.join(unknown)}; the sampling options are {', '.join(known)}.")
    names = {spelled: name for name, spelled in _KEYWORDS.items()}
    given: dict[str, Any] = {names.get(name, name): value for name, value in keywords.items() if value is not None}
    if isinstance(given.get("parallel"), bool):
        given |= {"parallel": "picard"} if given.pop("parallel") else {}
    for name in ("steps", "block_passes", "guidance_channels", "window"):
        if name in given:
            given[name] = as_integer(keyword(name), given[name], 1)
    for name in ("guidance", "macs", "seconds", "eta", "parallel_rtol"):
        if name in given:
            given[name] = as_number(keyword(name), given[name])
    for name, least in (("iterations", 1), ("timesteps", 0), ("guidance_interval", 0)):
        if name in given:
            given[name] = as_integers(name, given[name], least)
            if not given[name]:
                raise ValueError(f"{name} is an empty list; leave it out.")
    if len(interval := given.get("guidance_interval", (0, 0))) != 2:
        raise ValueError(f"guidance_interval={interval} must be two timesteps, low and high.")
    reuse = given.get("reuse")
    if isinstance(reuse, bool):
        given["reuse"] = "on" if reuse else "off"
    elif isinstance(reuse, Reuse):
        del given["reuse"]
    words_of = {"reuse": Start, "allocation": Allocation, "sampler": Sampler, "parallel": ParallelSolver}
    for name, words in words_of.items():
        if name in given:
            check_word(name, given[name], words)
    try:
        return SamplingOptions(**given)
    except OptionError as error:
        raise ValueError(error.spelled(keyword)) from None


def pipeline_options(values: dict[str, Any]) -> SamplingOptions:
    """The sampling options in a pipeline's model_index.json, where iterations may be a number, reuse a boolean or a
    word, and the solver a dict of its fields.
    """
    values = {name: tuple(value) if isinstance(value, list) else value for name, value in values.items()}
    values = {name: value for name, value in values.items() if value is not None}
    if isinstance(values.get("iterations"), int):
        values["iterations"] = (values["iterations"],)
    if isinstance(values.get("reuse"), bool):
        values["reuse"] = "on" if values["reuse"] else "off"
    if "solver" in values:
        values["solver"] = from_plain(AbstractSolver, values["solver"], "solver")
    return SamplingOptions(**values)


def keyword(name: str) -> str:
    """The keyword of a call for the sampling option `name`."""
    return _KEYWORDS.get(name, name)


def seed_of(generator: torch.Generator | int | None) -> int:
    """The seed of a call, of which all noise of the call is a function; None draws a random seed."""
    if generator is None:
        return secrets.randbits(62)
    if isinstance(generator, torch.Generator):
        return int(torch.randint(2**62, (), generator=generator, device=generator.device))
    if isinstance(generator, np.integer):
        generator = int(generator)
    if isinstance(generator, bool) or not isinstance(generator, int) or generator < 0:
        raise ValueError(
            f"generator={generator!r} must be one torch.Generator, or a seed of at least 0; each image of a call has "
            "its own noise with one generator."
        )
    return generator
