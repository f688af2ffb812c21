"""The nearest real image of each generated image, to detect memorized training images.

    d(x, y) = sqrt( mean over pixels and channels of (x - y)^2 ),     x, y in [0, 1]

Samples of a network that copies training images have distances near 0 from these. Samples of a network that does not
copy are about as far from the training images as held-out real images are.
"""

import torch
from PIL import Image
from torch import Tensor

from apps.diffusion.evaluation.metrics import squared_distances
from apps.diffusion.files.images import grid, to_pil

ROWS = 256  # rows of the distance matrix that are computed at a time


def nearest(x: Tensor, real: Tensor) -> tuple[Tensor, Tensor]:
    """For each image in x (n, C, H, W), uint8: index (n,) of the nearest image of `real` (m, C, H, W), and d (n,).

    Raises:
        ValueError: the shapes of x and `real` differ.
    """
    if x.shape[1:] != real.shape[1:]:
        raise ValueError(
            f"The images have the shape {' x '.join(map(str, x.shape[1:]))} and the real images "
            f"{' x '.join(map(str, real.shape[1:]))}; give images of one shape."
        )
    # float32 is accurate enough for 8-bit values
    rows, others = x.flatten(1).float() / 255, real.flatten(1).float() / 255
    found = [squared_distances(part, others).min(1) for part in rows.split(ROWS)]
    squared, index = torch.cat([f.values for f in found]), torch.cat([f.indices for f in found])
    return index, (squared / rows.shape[1]).sqrt()


def neighbor_grid(x: Tensor, real: Tensor, columns: int = 10) -> Image.Image:
    """The images x (n, C, H, W), uint8, row by row, each above the nearest of `real` (m, C, H, W)."""
    index, _ = nearest(x, real)
    blank = torch.zeros_like(x[:1])
    rows: list[Tensor] = []
    for first in range(0, len(x), columns):
        part, near = x[first : first + columns], real[index[first : first + columns]]
        missing = columns - len(part)  # black images complete the last row
        rows += [*part, *blank.expand(missing, -1, -1, -1), *near, *blank.expand(missing, -1, -1, -1)]
    return grid([to_pil(image.float() / 127.5 - 1) for image in rows], columns)
