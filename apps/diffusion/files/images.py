"""PNG files: single images, grids of them, and the loss curve. Images are (C, H, W) in [-1, 1]."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

GAP = 1  # pixels between the images of a grid, before it is enlarged


def to_pil(x: Tensor) -> Image.Image:
    """The image (C, H, W) with C = 1 or 3 in 8 bits; what lies outside [-1, 1] is clipped."""
    pixels = ((x.float().clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8).permute(1, 2, 0).cpu().numpy()
    if pixels.shape[2] not in (1, 3):
        raise ValueError(f"A picture has 1 or 3 channels, but this image has {pixels.shape[2]}; decode latents first.")
    return Image.fromarray(pixels[:, :, 0] if pixels.shape[2] == 1 else pixels)


def read(path: Path) -> Image.Image:
    """The picture in a file, which is closed again."""
    with Image.open(path) as file:
        return file.copy()


def columns_by_class(labels: Sequence[int], rows: int) -> list[int]:
    """Indices of up to `rows` images of each class, row by row, one class per column; classes with fewer
    limit the rows.
    """
    members = {y: [i for i, other in enumerate(labels) if other == y] for y in sorted(set(labels))}
    rows = min(rows, *(len(found) for found in members.values()))
    return [found[row] for row in range(rows) for found in members.values()]


def grid(
    images: Sequence[Image.Image], columns: int, enlarge: int | None = None, head: Sequence[str] = ()
) -> Image.Image:
    """The images (all of one size) in rows of `columns`, each pixel drawn as a square of `enlarge` pixels.

    By default so large that an image is at least 64 pixels wide. `head` is written above the columns.
    """
    from PIL import ImageDraw, ImageFont

    width, height = images[0].size
    enlarge = enlarge or max(1, round(64 / width))
    rows = -(-len(images) // columns)
    sheet = Image.new(
        images[0].mode, (columns * (width + GAP) + GAP, rows * (height + GAP) + GAP), _grey(images[0], 96)
    )
    for i, image in enumerate(images):
        row, column = divmod(i, columns)
        sheet.paste(image, (GAP + column * (width + GAP), GAP + row * (height + GAP)))
    sheet = sheet.resize((sheet.width * enlarge, sheet.height * enlarge), Image.Resampling.NEAREST)
    if not head:
        return sheet
    band = max(20, 3 * enlarge)
    page = Image.new(sheet.mode, (sheet.width, sheet.height + band), _grey(sheet, 255))
    page.paste(sheet, (0, band))
    draw = ImageDraw.Draw(page)
    for column, text in enumerate(head):
        centre = (GAP + column * (width + GAP) + width / 2) * enlarge
        draw.text(
            (centre, band / 2),
            text,
            fill=_grey(page, 0),
            font=ImageFont.load_default(0.7 * band),
            anchor="mm",
        )
    return page


def _grey(image: Image.Image, level: int) -> int | tuple[int, int, int]:
    return level if image.mode == "L" else (level, level, level)


def loss_curve(history: Sequence[tuple[int, float]], path: Path, title: str) -> None:
    """The loss over the images seen, as single means and smoothed, on a logarithmic axis."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    images, losses = (np.array(column, dtype=float) for column in zip(*history, strict=True))
    axes.plot(images, losses, color="tab:blue", alpha=0.35, linewidth=1, marker=".", label="mean of 25 steps")
    width = max(1, len(losses) // 20)
    if width > 1:
        smooth = np.convolve(losses, np.ones(width) / width, mode="valid")
        axes.plot(
            images[(width - 1) // 2 :][: len(smooth)],
            smooth,
            color="tab:blue",
            linewidth=2,
            label=f"mean of {25 * width}",
        )
    axes.set(xlabel="images seen", ylabel="mean squared error", yscale="log", title=title)
    for side in (axes.yaxis.set_major_formatter, axes.yaxis.set_minor_formatter):
        side("{x:g}")
    axes.grid(which="both", alpha=0.3)
    axes.legend(frameon=False)
    figure.savefig(path, dpi=120)
