"""Samples of a trained network, by the choices of a configuration."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import nn

from . import build, schedule
from .config import Config, Sampling
from .guidance import Guidance
from .reuse import Reuse
from .sampler import SampleResult, Solve, sample


def labels_in_turn(indices: Sequence[int], classes: Sequence[int]) -> list[int]:
    """The class of each sample: number i has class `classes[i mod len(classes)]`."""
    return [classes[i % len(classes)] for i in indices]


def generate(
    model: nn.Module,
    config: Config,
    sampling: Sampling,
    indices: Sequence[int],
    labels: Sequence[int] | None,
    seed: int,
    device: torch.device | str = "cpu",
    progress: Callable[[int, int], None] | None = None,
) -> SampleResult:
    """Samples number `indices` of the stream `seed`; `config` says how the network was trained.

    Raises:
        ValueError: guidance without labels, a class that the network does not know, impossible timesteps.
    """
    return sample(
        model,
        indices,
        labels,
        seed=seed,
        scheduler=build.scheduler(config, sampling.sampler),
        timesteps=schedule.timesteps(sampling.steps, sampling.spacing, config.schedule.timesteps),
        guidance=Guidance(scale=sampling.guidance),
        solve=Solve(iterations=sampling.iterations, reuse=Reuse() if sampling.reuse else None),
        device=device,
        progress=progress,
    )
