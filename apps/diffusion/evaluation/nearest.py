"""Nearest real images of generated ones, so that memorized training images are seen.

    d(x, y) = sqrt( mean over pixels and channels of (x - y)^2 ),     x, y in [0, 1]

A network that copies has samples at distances near 0 from its training images; one that does not has them about as far
away as held-out real images are.
"""

from __future__ import annotations

import torch
from PIL import Image
from torch import Tensor

from apps.diffusion.files.images import grid, to_pil

ROWS = 256  # of the distance matrix at a time


def nearest(x: Tensor, real: Tensor) -> tuple[Tensor, Tensor]:
    """Of each image in x (n, C, H, W), uint8, the index (n,) of the nearest among `real` (m, C, H, W), and d (n,).

    Raises:
        ValueError: images of different shapes.
    """
    if x.shape[1:] != real.shape[1:]:
        raise ValueError(
            f"The images are {' x '.join(map(str, x.shape[1:]))} and the real ones "
            f"{' x '.join(map(str, real.shape[1:]))}; nearest images need one size."
        )
    # |a - b|^2 = |a|^2 + |b|^2 - 2 a.b, in float32: exact enough for 8-bit values of less than 2^24 in sum
    rows, others = x.flatten(1).float() / 255, real.flatten(1).float() / 255
    norms = (others**2).sum(1)
    found = [((part**2).sum(1)[:, None] + norms - 2 * part @ others.T).min(1) for part in rows.split(ROWS)]
    squared, index = torch.cat([f.values for f in found]), torch.cat([f.indices for f in found])
    return index, (squared.clamp_min(0) / rows.shape[1]).sqrt()


def neighbor_grid(x: Tensor, real: Tensor, columns: int = 10) -> Image.Image:
    """The images x (n, C, H, W), uint8, row by row, each above the nearest of `real` (m, C, H, W)."""
    index, _ = nearest(x, real)
    blank = torch.zeros_like(x[:1])
    rows: list[Tensor] = []
    for first in range(0, len(x), columns):
        part, near = x[first : first + columns], real[index[first : first + columns]]
        missing = columns - len(part)  # a short last row is filled up with black
        rows += [*part, *blank.expand(missing, -1, -1, -1), *near, *blank.expand(missing, -1, -1, -1)]
    return grid([to_pil(image.float() / 127.5 - 1) for image in rows], columns)
