"""PNG files: single images and image grids. Images are (C, H, W) in [-1, 1]."""

from collections.abc import Sequence
from pathlib import Path

import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

GAP = 1  # pixels between the images of a grid, before it is enlarged
ROWS = 8  # largest number of rows of a sample grid
MAX_COLUMNS = 20  # largest number of classes for which a sample grid has a column for each class


def to_bytes(x: Tensor) -> Tensor:
    """Images with values in [-1, 1] as uint8 on the CPU; values outside [-1, 1] are clipped.

    Raises:
        ValueError: a value is NaN, which has no color.
    """
    if x.isnan().any():
        raise ValueError(
            "An image holds NaN: the network or the VAE overflows, or its weights are damaged; compute in float32, or "
            "sample from other weights."
        )
    return ((x.float().clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8).cpu()


def to_pil(x: Tensor) -> Image.Image:
    """The image (C, H, W), C = 1 or 3, as a PIL image with 8 bits per channel; values outside [-1, 1] are clipped."""
    pixels = to_bytes(x).permute(1, 2, 0).numpy()
    if pixels.shape[2] not in (1, 3):
        raise ValueError(f"An image has 1 or 3 channels, but this tensor has {pixels.shape[2]}; decode latents first.")
    return Image.fromarray(pixels[:, :, 0] if pixels.shape[2] == 1 else pixels)


def read(path: Path) -> Image.Image:
    """The image in a PNG file.

    Raises:
        SyntaxError: the pixels do not fit their checksum, which Pillow compares in `verify` only.
    """
    with Image.open(path) as file:
        file.verify()
    with Image.open(path) as file:
        return file.copy()


def class_labels(count: int, num_classes: int) -> list[int] | None:
    """Labels of `count` samples: the classes in turn, or `count` evenly spaced classes if there are more classes than
    samples; None without classes.
    """
    if not num_classes:
        return None
    return [i % num_classes if num_classes <= count else i * num_classes // count for i in range(count)]


def columns_by_class(labels: Sequence[int], rows: int) -> list[int]:
    """Indices of the images of a grid with a column for each class, row by row. The grid has `rows` rows, or as many as
    the smallest class has images.
    """
    members = {y: [i for i, other in enumerate(labels) if other == y] for y in sorted(set(labels))}
    rows = min(rows, *(len(found) for found in members.values()))
    return [found[row] for row in range(rows) for found in members.values()]


def sample_grid(images: Tensor, labels: Sequence[int] | None, classes: Sequence[str] = ()) -> Image.Image:
    """A grid of images. With at most `MAX_COLUMNS` classes, the grid has a column for each class, under its name; else
    the images are in rows of `ROWS`.

    Args:
        images: (n, C, H, W), in [-1, 1].
        labels: class of each image; None without classes.
        classes: names of the classes; a class without a name is shown by its number.
    """
    used = sorted(set(labels or ()))
    if labels and len(used) <= MAX_COLUMNS:
        chosen = columns_by_class(labels, ROWS)
        head = [classes[y] if y < len(classes) else str(y) for y in used]
        return grid([to_pil(images[i]) for i in chosen], len(used), head=head)
    count = min(len(images), ROWS * ROWS)
    return grid([to_pil(x) for x in images[:count]], min(ROWS, count))


def grid(
    images: Sequence[Image.Image], columns: int, enlarge: int | None = None, head: Sequence[str] = ()
) -> Image.Image:
    """A grid of images.

    Args:
        images: images of one size and mode.
        columns: number of images in a row.
        enlarge: factor by which the grid is enlarged; None: the factor that makes an image about 64 pixels wide, or 1.
        head: texts above the columns; empty: no texts.
    """
    width, height = images[0].size
    enlarge = enlarge or max(1, round(64 / width))
    rows = -(-len(images) // columns)
    size = (columns * (width + GAP) + GAP, rows * (height + GAP) + GAP)
    page = Image.new(images[0].mode, size, _gray(images[0], 96))
    for i, image in enumerate(images):
        row, column = divmod(i, columns)
        page.paste(image, (GAP + column * (width + GAP), GAP + row * (height + GAP)))
    page = page.resize((page.width * enlarge, page.height * enlarge), Image.Resampling.NEAREST)
    return _with_head(page, head, (width + GAP) * enlarge, enlarge) if head else page


def _with_head(page: Image.Image, head: Sequence[str], pitch: int, enlarge: int) -> Image.Image:
    """The grid `page` under a band with a text above each column; the distance of columns is `pitch` pixels."""
    band = max(20, 3 * enlarge)
    whole = Image.new(page.mode, (page.width, page.height + band), _gray(page, 255))
    whole.paste(page, (0, band))
    draw = ImageDraw.Draw(whole)
    for column, text in enumerate(head):
        size = 0.7 * band
        length = ImageFont.load_default(size).getlength(text)
        font = ImageFont.load_default(max(1.0, size * min(1.0, 0.95 * pitch / max(length, 1))))
        center = GAP * enlarge + column * pitch + (pitch - GAP * enlarge) / 2
        draw.text((center, band / 2), text, fill=_gray(whole, 0), font=font, anchor="mm")
    return whole


def _gray(image: Image.Image, level: int) -> int | tuple[int, int, int]:
    return level if image.mode == "L" else (level, level, level)
