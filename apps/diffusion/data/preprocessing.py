"""A picture file as square pixels, as ADM prepares ImageNet (Dhariwal & Nichol 2021, arXiv 2105.05233).

while the shorter side is at least twice `size`: halve both sides (box filter)
resize so that the shorter side is `size` (bicubic)
cut the square in the middle
"""

from __future__ import annotations

import struct
import zlib
from pathlib import Path

import numpy as np
from PIL import Image


class Unusable(ValueError):
    """A picture that cannot be used; the message is the reason, in a few words."""


def centre_crop(image: Image.Image, size: int) -> Image.Image:
    """The middle of the picture, `size` x `size` pixels, by the rule above."""
    while min(image.size) >= 2 * size:
        image = image.resize((image.width // 2, image.height // 2), Image.Resampling.BOX)
    scale = size / min(image.size)
    width, height = (max(size, round(side * scale)) for side in image.size)
    image = image.resize((width, height), Image.Resampling.BICUBIC)
    left, top = (width - size) // 2, (height - size) // 2
    return image.crop((left, top, left + size, top + size))


def eight_bits(image: Image.Image) -> Image.Image:
    """The picture with 8 bits a channel. Pillow's own conversion clips grey ones of 16 bits to white.

    Raises:
        Unusable: 32 bits, whose range nobody knows.
    """
    if image.mode.startswith("I;16") or (image.mode == "I" and image.format == "PNG"):
        return Image.fromarray((np.asarray(image).astype(np.uint32) / 257).round().astype(np.uint8))
    if image.mode in ("I", "F"):
        raise Unusable(f"grey in 32 bits ({image.mode}), of unknown range")
    return image


def read(path: Path, size: int, least: int) -> np.ndarray:
    """The picture as (3, size, size) uint8, grey ones with three equal channels, transparency dropped.

    Args:
        path: any format that Pillow reads.
        size: side in pixels.
        least: pictures whose shorter side is below this are too small to be enlarged.

    Raises:
        Unusable: it cannot be decoded, or it is too small.
    """
    try:
        with Image.open(path) as file:
            if min(file.size) < least:
                raise Unusable(f"too small: {file.width} x {file.height}, less than {least} on a side")
            image = eight_bits(file)
            image = image.convert("RGBA").convert("RGB") if "transparency" in image.info else image.convert("RGB")
        return np.asarray(centre_crop(image, size)).transpose(2, 0, 1)
    except Unusable:
        raise
    except (
        OSError,
        ValueError,
        SyntaxError,  # what Pillow raises for some damaged PNGs
        EOFError,
        struct.error,
        zlib.error,
        Image.DecompressionBombError,
    ) as error:
        raise Unusable(f"unreadable: {error or type(error).__name__}".replace(str(path), path.name)) from None
