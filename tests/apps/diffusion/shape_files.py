"""Generated image files: colored circles, squares and triangles, one folder per shape."""

import numpy as np
from PIL import Image, ImageDraw

SHAPES = ("circle", "square", "triangle")


def shape(kind, seed, size=16):
    """One shape of a random bright color, place and size on a dark background, drawn four times as large."""
    draw = np.random.default_rng(seed)
    big = 4 * size
    radius = draw.uniform(0.22, 0.38) * big
    x, y = draw.uniform(radius + 2, big - radius - 2, 2)
    color = tuple(int(v) for v in draw.permutation([255, draw.integers(60, 256), draw.integers(0, 60)]))
    image = Image.new("RGB", (big, big), (16, 16, 16))
    pen = ImageDraw.Draw(image)
    if kind == "circle":
        pen.ellipse((x - radius, y - radius, x + radius, y + radius), fill=color)
    elif kind == "square":
        pen.rectangle((x - radius, y - radius, x + radius, y + radius), fill=color)
    else:
        pen.polygon([(x, y - radius), (x - radius, y + radius), (x + radius, y + radius)], fill=color)
    return image.resize((size, size), Image.Resampling.BOX)


def save_shapes(root, each, size=16):
    """`each` images of every shape below `root`."""
    for k, kind in enumerate(SHAPES):
        (root / kind).mkdir(parents=True, exist_ok=True)
        for i in range(each):
            shape(kind, 10_000 * k + i, size).save(root / kind / f"{i:04d}.png")
