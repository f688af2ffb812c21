"""The randomness of a training step: a function of (seed, image number), computed on the device.

The k-th image of a batch of B images, image s + k of the run, has noise, two uniform numbers u, v and the timestep

    t = floor(T q((k + u) / B)),        q the quantile function of weighting.py

so that the timesteps of a batch are stratified. Its label is dropped where v is below the share of dropped labels. Each
process computes the random numbers of its own images only; they do not depend on the number of processes.
"""

from collections.abc import Sequence

import torch

from apps.diffusion.config.training import Config
from apps.diffusion.rng import Stream, normal, uniform
from apps.diffusion.training.loss import TrainingNoise
from apps.diffusion.training.weighting import quantile


def training_noise(
    config: Config, shape: Sequence[int], start: int, part: slice, device: torch.device
) -> TrainingNoise:
    """The randomness of the images `part` of the batch that begins at image `start`.

    Args:
        config: the run's configuration, with the seed, batch size, timesteps and share of dropped labels.
        shape: (C, H, W) of an image.
        start: number of images seen before the batch.
        part: rows of the batch.
        device: device of the result.
    """
    row = torch.arange(part.start, part.stop, device=device)
    noise = normal(config.seed, Stream.STEP, start + row, shape)
    level, dropout = uniform(config.seed, Stream.STEP, start + row, 2).unbind(1)
    share = quantile(
        (row + level) / config.optimizer.batch, config.loss.timesteps, config.loss.location, config.loss.scale
    )
    last = config.schedule.timesteps - 1
    t = (share * config.schedule.timesteps).long().clamp(max=last)  # float32 may round the largest share to 1
    dropped = dropout < config.optimizer.label_dropout
    return TrainingNoise(noise=noise, t=t, dropped=dropped, positions=start + row)
