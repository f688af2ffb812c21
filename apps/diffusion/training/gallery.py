"""Sheets of samples: what a run shows of itself."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL
from PIL import Image
from torch import Tensor, nn

from apps.diffusion.config.training import Config
from apps.diffusion.files.images import columns_by_class, grid, to_pil
from apps.diffusion.models.autoencoder import decode
from apps.diffusion.sampling.generate import generate
from apps.diffusion.sampling.sampler import SampleResult

ROWS = 8
HEADS = 20  # most classes that have a column each


def spread(count: int, num_classes: int) -> list[int] | None:
    """The classes of `count` samples: each in turn, or where there are more than `count`, some from all over; None
    where there are none.
    """
    if not num_classes:
        return None
    return [i % num_classes if num_classes <= count else i * num_classes // count for i in range(count)]


def draw(
    config: Config,
    model: nn.Module,
    num_classes: int,
    count: int,
    device: torch.device | str,
    progress: Callable[[int, int], None] | None = None,
) -> SampleResult:
    """The first `count` samples of the run's seed, made as its configuration says."""
    return generate(
        model, config, config.sampling, range(count), spread(count, num_classes), config.seed, device, progress
    )


def pixels(samples: Tensor, decoder: AutoencoderKL | None) -> Tensor:
    """Samples (n, C, H, W) as images; latents go through the decoder."""
    return samples if decoder is None else decode(decoder, samples)


def sheet(images: Tensor, labels: Sequence[int] | None) -> Image.Image:
    """Images (n, C, H, W) in [-1, 1]: one class to a column where the classes are few, else row by row."""
    classes = sorted(set(labels or ()))
    if labels and len(classes) <= HEADS:
        chosen, head = columns_by_class(labels, ROWS), [str(y) for y in classes]
        return grid([to_pil(images[i]) for i in chosen], len(classes), head=head)
    count = min(len(images), ROWS * ROWS)
    return grid([to_pil(x) for x in images[:count]], min(ROWS, count))
