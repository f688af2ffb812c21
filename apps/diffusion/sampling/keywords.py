"""The keywords of the diffusers pipeline as sampling options, and its generator as a seed."""

from __future__ import annotations

import secrets
from typing import Any, get_args

import numpy as np
import torch

from apps.diffusion.config.sampling import Allocation, OptionError, ParallelSolver, Sampler, SamplingOptions, Start
from apps.diffusion.sampling.options import as_integer, as_integers, as_number
from apps.diffusion.sampling.warm_start import Reuse

_KEYWORDS = {"steps": "num_inference_steps", "guidance": "guidance_scale"}


def options_of(**given: Any) -> SamplingOptions:
    """The keywords of a call as sampling options; numbers may be those of numpy or torch."""
    given = {name: value for name, value in given.items() if value is not None}
    for name in ("steps", "block_passes", "guidance_channels", "window"):
        if name in given:
            given[name] = as_integer(keyword(name), given[name], 1)
    for name in ("guidance", "macs", "seconds", "eta", "parallel_rtol"):
        if name in given:
            given[name] = as_number(keyword(name), given[name])
    for name, least in (("iterations", 1), ("timesteps", 0)):
        if name in given:
            given[name] = as_integers(name, given[name], least)
            if not given[name]:
                raise ValueError(f"{name} is an empty list; leave it out.")
    reuse = given.get("reuse")
    if isinstance(reuse, bool):
        given["reuse"] = "on" if reuse else "off"
    elif isinstance(reuse, Reuse):
        del given["reuse"]
    words_of = {"reuse": Start, "allocation": Allocation, "sampler": Sampler, "parallel": ParallelSolver}
    for name, words in words_of.items():
        if name in given and given[name] not in get_args(words):
            raise ValueError(f"{name}={given[name]!r} is unknown; choose one of {', '.join(get_args(words))}.")
    try:
        return SamplingOptions(**given)
    except OptionError as error:
        raise ValueError(error.spelled(keyword)) from None


def pipeline_options(values: dict[str, Any]) -> SamplingOptions:
    """The sampling options of a pipeline, from its index: iterations as a number, reuse as a flag or a word."""
    values = {name: value for name, value in values.items() if value is not None}
    if "iterations" in values:
        each = values["iterations"]
        values["iterations"] = tuple(each) if isinstance(each, list | tuple) else (each,)
    if isinstance(values.get("reuse"), bool):
        values["reuse"] = "on" if values["reuse"] else "off"
    return SamplingOptions(**values)


def keyword(name: str) -> str:
    """The keyword of a call for a sampling option."""
    return _KEYWORDS.get(name, name)


def seed_of(generator: torch.Generator | int | None) -> int:
    """The seed of a call: all its noise is a function of it."""
    if generator is None:
        return secrets.randbits(62)
    if isinstance(generator, torch.Generator):
        return int(torch.randint(2**62, (), generator=generator, device=generator.device))
    if isinstance(generator, np.integer):
        generator = int(generator)
    if isinstance(generator, bool) or not isinstance(generator, int) or generator < 0:
        raise ValueError(
            f"generator={generator!r} must be one torch.Generator or a seed, at least 0; every image has its own noise "
            "already."
        )
    return generator
