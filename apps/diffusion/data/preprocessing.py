"""Reads an image file as pixels, as image viewers show it, and crops the image as ADM crops ImageNet (Dhariwal & Nichol
2021, arXiv 2105.05233).

    1. turn or mirror it by its EXIF orientation
    2. 8 bits a channel; 16-bit gray is scaled, 32-bit gray is refused, since its range is unknown
    3. colors to sRGB, by the ICC profile in the file (Pillow does not read the profile of JPEG 2000)
    4. transparent pixels are composed on a white background
    5. gray (1 channel) or RGB (3 channels)
    6. while both sides are at least twice the size: halve them (box filter)
    7. resize so that the image covers the size (bicubic), and cut out the middle

Training, encoding and scoring all read image files by `read`, which reads the first frame of an animation.
"""

import io
from collections.abc import Iterator
from contextlib import contextmanager
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageCms, ImageOps, UnidentifiedImageError

from apps.diffusion.files.names import printable

Size = int | tuple[int, int]
"""Side of a square, or (height, width), in pixels."""
BACKGROUND = 255  # white
# transpositions for the EXIF orientations 2 to 8
_TURNS = "FLIP_LEFT_RIGHT ROTATE_180 FLIP_TOP_BOTTOM TRANSPOSE ROTATE_270 TRANSVERSE ROTATE_90".split()
_LEVELS = {"L;2": 3, "L;4": 15}  # largest gray level of PNG in 2 and 4 bits, which Pillow scales to 255
_DEEP_LEVELS = {"I;12": 2**12 - 1}  # largest gray level of TIFF in 12 bits, which Pillow does not scale


class Unusable(ValueError):
    """An image file cannot be used; the message is the reason, in a few words."""


def height_width(size: Size) -> tuple[int, int]:
    """(height, width) of a size.

    Raises:
        ValueError: a side is below 1.
    """
    height, width = (size, size) if isinstance(size, int) else size
    if height < 1 or width < 1:
        raise ValueError(f"size={size} leaves no pixels; give at least 1.")
    return height, width


def minimal_side(size: Size) -> int:
    """The default of `least`, a quarter of the size; a smaller image would be enlarged more than fourfold."""
    return max(1, min(height_width(size)) // 4)


def center_crop(image: Image.Image, size: Size) -> Image.Image:
    """The resized and cropped image (steps 6 and 7)."""
    height, width = height_width(size)
    while image.width >= 2 * width and image.height >= 2 * height:
        image = image.resize((image.width // 2, image.height // 2), Image.Resampling.BOX)
    scale = max(width / image.width, height / image.height)
    scaled = (max(width, round(image.width * scale)), max(height, round(image.height * scale)))
    image = image.resize(scaled, Image.Resampling.BICUBIC)
    left, top = (image.width - width) // 2, (image.height - height) // 2
    return image.crop((left, top, left + width, top + height))


def read(path: Path, size: Size | None, least: int = 1, channels: int = 3) -> np.ndarray:
    """The image in a file as (channels, height, width) uint8; the checksums of a PNG file are compared.

    Args:
        path: a file in any format that Pillow reads.
        size: size of the crop; None: the image is not resized and not cropped.
        least: smallest side in pixels; a smaller image raises.
        channels: 1 (gray) or 3 (RGB).

    Raises:
        Unusable: the image cannot be decoded (rightly), is too small, or has an unknown range of values.
    """
    with _opened(path, least) as file:
        image = as_shown(file, channels)
        if file.format == "PNG":  # Pillow decodes pixels of a wrong checksum, and compares checksums in `verify` only
            with Image.open(path) as stored:
                stored.verify()
    rows = np.array(image if size is None else center_crop(image, size))
    return rows[None] if channels == 1 else rows.transpose(2, 0, 1)


def header(path: Path, least: int) -> int:
    """Number of channels of the image in a file, 1 or 3, from the header; the pixels are not decoded.

    Raises:
        Unusable: no decoder reads the file, or the image is too small.
    """
    with _opened(path, least) as file:
        return 1 if _is_gray(file) else 3


def as_shown(image: Image.Image, channels: int = 3) -> Image.Image:
    """The image as viewers show it (steps 1 to 5), with mode L (1 channel) or RGB (3 channels)."""
    profile, kind = image.info.get("icc_profile"), image.format
    raw = _raw_mode(image)
    # here, not at the first use of a pixel: a second attempt to load a damaged file gives black pixels without an error
    image.load()
    # TIFF may store white as 0, XBM and PSD in 1 bit always do; of these Pillow inverts TIFF of 1 and 8 bits only
    white_is_zero = kind == "TIFF" and image.mode.startswith("I;16") and getattr(image, "tag_v2", {}).get(262) == 0
    white_is_zero |= kind in ("XBM", "PSD") and image.mode == "1"
    image = _eight_bits(_upright(image), kind, _DEEP_LEVELS.get(raw, 2**16 - 1))
    if white_is_zero:
        image = ImageOps.invert(image)
    if isinstance(transparent := image.info.get("transparency"), tuple) and "16" in raw:
        # PNG: one color in 16 bits is transparent, and Pillow keeps the upper 8 bits of each pixel
        image.info["transparency"] = tuple(level >> 8 for level in transparent)
    if isinstance(transparent, int) and raw in _LEVELS:
        image.info["transparency"] = transparent * 255 // _LEVELS[raw]
    if raw == "LA;16B":  # Pillow reads it as RGBA, and its profile is one of gray
        image = image.convert("LA")
    image = _without_palette(image)
    image = _to_srgb(image, profile)
    if image.mode == "LAB":  # Pillow converts Lab to RGB only
        image = image.convert("RGB")
    if image.mode in ("LA", "RGBA"):
        image = image.convert("RGBA")
        ground = Image.new("RGBA", image.size, (BACKGROUND, BACKGROUND, BACKGROUND, 255))
        image = Image.alpha_composite(ground, image)
    return image.convert("L" if channels == 1 else "RGB")


@contextmanager
def _opened(path: Path, least: int) -> Iterator[Image.Image]:
    """The opened image of a file; an error while the image is read, in the block too, becomes `Unusable`.

    Only regular files are opened, because opening a named pipe would wait for a writer.
    """
    if not path.is_file():
        raise Unusable("unreadable: a broken link, or not a regular file")
    try:
        # not Image.open(path), which maps uncompressed TIFF into memory and garbles images rotated by 90 degrees
        with path.open("rb") as stream, Image.open(stream) as file:
            if min(file.size) < least:
                raise Unusable(f"too small: {file.width} x {file.height}, less than {least} on a side")
            if misread := _misread(file):
                raise Unusable(misread)
            yield file
    except (Unusable, MemoryError):
        raise
    except UnidentifiedImageError:
        raise Unusable(f"unreadable: {printable(path.name)} is damaged, or in no format that Pillow reads") from None
    except Exception as error:  # decoders of damaged files raise errors of many classes
        raise Unusable(f"unreadable: {printable(error) or type(error).__name__}") from None


def _misread(image: Image.Image) -> str:
    """The reason why Pillow would silently read other values than those in the file; empty if it reads them rightly."""
    tags = getattr(image, "tag_v2", {}) if image.format == "TIFF" else {}
    deep, tiles = max(tags.get(258, (1,))) > 8, getattr(image, "tile", ())
    if 2 in tags.get(339, ()) and not deep:
        return "TIFF of signed numbers, which Pillow reads as unsigned"
    uncompressed = bool(tiles) and tiles[0][0] == "raw"
    if tags.get(284) == 2 and (image.mode == "LAB" or (deep and uncompressed)):
        return f"TIFF with the channels of {image.mode} in separate planes, which Pillow garbles"
    if tags.get(332) == 2:
        return "TIFF of inks that are not cyan, magenta, yellow and black"
    if 0 < max(tags.get(320, (0,))) < 256:
        return "TIFF with a palette of 8 bits, which Pillow reads as black"
    if image.format == "FITS" and image.mode.startswith("I;16"):
        return "FITS in 16 bits, whose bytes Pillow exchanges"
    if (image.mode in ("P", "PA") and image.palette is None) or _lost_palette(image):
        return "without its palette"
    if _lost_tile(image):
        return "cut off; Pillow would read the rest as black"
    return ""


def _lost_palette(image: Image.Image) -> bool:
    """Whether the palette, the last 768 bytes of a PCX file of one plane after a byte 12, is cut off; Pillow then takes
    the indices for gray levels.
    """
    stream = getattr(image, "fp", None)
    if image.format != "PCX" or image.mode != "L" or stream is None:
        return False
    stream.seek(0)
    return stream.read()[-769:-768] != b"\x0c"


def _lost_tile(image: Image.Image) -> bool:
    """Whether a JPEG 2000 file ends within the marker segment that begins a tile (FF90), before the marker of the end
    (FFD9); compressed data contain neither. Pillow then gives black for the tile, without an error.
    """
    stream = getattr(image, "fp", None)
    if image.format != "JPEG2000" or stream is None:
        return False
    stream.seek(0)
    content = stream.read()
    return content.rfind(b"\xff\xd9") < content.rfind(b"\xff\x90")


def _raw_mode(image: Image.Image) -> str:
    """Pillow's name for the pixel format in the file; empty if Pillow does not name it."""
    tiles = getattr(image, "tile", ())
    args = tiles[0][3] if tiles else ""
    return str(args[0]) if isinstance(args, tuple) and args else str(args)


def _is_gray(image: Image.Image) -> bool:
    if image.mode in ("P", "PA"):
        colors = np.array(image.getpalette("RGB") or [], dtype=np.uint8).reshape(-1, 3)
        return bool((colors == colors[:, :1]).all())
    gray = image.mode in ("1", "L", "LA", "La", "I", "F") or image.mode.startswith("I;16")
    return gray or _raw_mode(image) == "LA;16B"


def _upright(image: Image.Image) -> Image.Image:
    """Step 1. Damaged EXIF data are ignored."""
    try:
        orientation = image.getexif().get(0x0112, 1)
    except Exception:  # Pillow raises errors of many types for damaged EXIF data
        orientation = 1
    if orientation not in range(2, 9):
        return image
    try:
        return ImageOps.exif_transpose(image)
    except Exception:  # exif_transpose rewrites all EXIF entries, and fails if another entry is damaged
        return image.transpose(Image.Transpose[_TURNS[orientation - 2]])


def _eight_bits(image: Image.Image, kind: str | None, white: int) -> Image.Image:
    """Step 2 for an image of the format `kind`; `white` is the largest gray level, if gray has more than 8 bits.

    Pillow's conversion is not used, because it clips 16-bit gray at level 255.
    """
    if image.mode.startswith("I;16") or (image.mode == "I" and kind in ("PNG", "PPM")):
        levels = np.asarray(image).astype(np.int64)
        gray = Image.fromarray((levels * (255 / white)).round().astype(np.uint8))
        if isinstance(transparent := image.info.get("transparency"), int):  # PNG: one gray level is transparent
            gray.putalpha(Image.fromarray(np.where(levels == transparent, 0, 255).astype(np.uint8)))
        return gray
    if image.mode in ("I", "F"):
        raise Unusable(f"gray in 32 bits ({image.mode}), of unknown range")
    return image


def _without_palette(image: Image.Image) -> Image.Image:
    """The image with colors instead of palette indices, and with an alpha channel instead of a transparent color."""
    transparent = "transparency" in image.info
    if image.mode in ("P", "PA", "RGBa") or (transparent and image.mode == "RGB"):
        return image.convert("RGBA")  # a palette itself may hold an alpha channel
    if image.mode == "La" or (transparent and image.mode in ("1", "L")):
        return image.convert("LA")
    return image.convert("L") if image.mode == "1" else image


def _to_srgb(image: Image.Image, profile: bytes | None) -> Image.Image:
    """Step 3. A profile that is damaged, or made for another color space than the image's, is ignored."""
    if not profile or image.mode not in ("L", "LA", "RGB", "RGBA", "CMYK"):
        return image
    alpha = image.getchannel("A") if image.mode in ("LA", "RGBA") else None
    colors = image.convert(image.mode.removesuffix("A")) if alpha else image
    try:
        transform = _transform(profile, colors.mode)
        if transform is None:
            return image
        colors = _gray_to_srgb(colors, transform) if colors.mode == "L" else ImageCms.applyTransform(colors, transform)
    except (ImageCms.PyCMSError, ValueError, OSError):
        return image
    assert colors is not None
    if alpha is not None:
        colors.putalpha(alpha)
    return colors


def _gray_to_srgb(gray: Image.Image, transform: Any) -> Image.Image:
    """Gray in sRGB, by a table of its 256 levels."""
    levels = ImageCms.applyTransform(Image.frombytes("L", (256, 1), bytes(range(256))), transform)
    assert levels is not None
    return Image.merge("RGB", [gray.point(list(channel.tobytes())) for channel in levels.split()])


@lru_cache(maxsize=64)
def _transform(profile: bytes, mode: str) -> Any:
    """The transform of images of this mode from the profile to sRGB; None if the profile has another color space."""
    source: Any = ImageCms.ImageCmsProfile(io.BytesIO(profile))
    if source.profile.xcolor_space.strip() != {"L": "GRAY"}.get(mode, mode):
        return None
    # the optimized transform of gray interpolates between some levels, up to 10 levels off near black
    flags = ImageCms.Flags.NOOPTIMIZE if mode == "L" else ImageCms.Flags.NONE
    intent = ImageCms.Intent.PERCEPTUAL
    target = ImageCms.createProfile("sRGB")
    return ImageCms.buildTransform(source, target, mode, "RGB", renderingIntent=intent, flags=flags)
