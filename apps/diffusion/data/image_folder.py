"""A folder of images: which files there are and of which class, and their pixels as a data set.

The classes are the subfolders in alphabetical order, whatever lies deeper belongs to them; images that lie in
the folder itself have no class. Everything goes by the index in one sorted list.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Literal, NamedTuple

import numpy as np
import torch
from torch import Tensor

from apps.diffusion.data import preprocessing as crop
from apps.diffusion.rng import Stream, generator

SUFFIXES = frozenset({".png", ".jpg", ".jpeg", ".jpe", ".webp", ".bmp", ".ppm", ".pgm", ".tif", ".tiff", ".gif"})
Classes = Literal["folders", "none"]


class Skipped(NamedTuple):
    """An image that was left out, by its path below the folder, and why."""

    file: str
    reason: str


@dataclass(frozen=True)
class Listing:
    """The image files below `root`.

    Attributes:
        root: the folder.
        files: paths below it with "/" between folders, sorted.
        labels: the class of each.
        classes: names of the classes; empty where there are none.
    """

    root: Path
    files: tuple[str, ...]
    labels: tuple[int, ...]
    classes: tuple[str, ...]

    def digest(self) -> str:
        """SHA-256 of names and labels."""
        text = "\n".join(f"{label} {file}" for file, label in zip(self.files, self.labels, strict=True))
        return hashlib.sha256(text.encode(errors="surrogateescape")).hexdigest()


def listing(root: Path, classes: Classes = "folders") -> Listing:
    """The images below `root`; hidden files and files of other kinds are passed over.

    Args:
        root: a folder.
        classes: "folders": each subfolder is a class, and images in `root` itself have none; "none": subfolders
            mean nothing.

    Raises:
        ValueError: no such folder, no images in it, or images both inside and outside of subfolders.
    """
    if not root.is_dir():
        raise ValueError(f"{root} is no folder; give a folder of images.")
    files = []
    for folder, subfolders, names in os.walk(root, followlinks=True):
        subfolders[:] = [name for name in subfolders if not name.startswith(".")]
        below = Path(folder).relative_to(root)
        files += [(below / n).as_posix() for n in names if n[0] != "." and Path(n).suffix.lower() in SUFFIXES]
    files.sort()
    if not files:
        raise ValueError(f"{root} holds no images ({', '.join(sorted(SUFFIXES))}); give a folder of images.")
    inside = [file for file in files if "/" in file]
    if classes == "none" or not inside:
        return Listing(root, tuple(files), (0,) * len(files), ())
    if len(inside) < len(files):
        loose = next(file for file in files if "/" not in file)
        raise ValueError(
            f"{root} holds images in subfolders, which are classes, and images of no class, such as {loose}; move "
            "them into subfolders, or choose classes = none."
        )
    names = sorted({file.split("/", 1)[0] for file in files})
    number = {name: i for i, name in enumerate(names)}
    return Listing(root, tuple(files), tuple(number[file.split("/", 1)[0]] for file in files), tuple(names))


def least_side(size: int) -> int:
    """Pictures with a side shorter than this would be enlarged more than fourfold, and are left out."""
    return max(1, size // 4)


def attempt(listed: Listing, size: int, least: int, i: int) -> np.ndarray | Skipped:
    """The i-th image as (3, size, size) uint8, or why it cannot be used."""
    try:
        return crop.read(listed.root / listed.files[i], size, least)
    except crop.Unusable as reason:
        return Skipped(listed.files[i], str(reason))


@dataclass(frozen=True)
class Pixels:
    """A folder of images as a data set, held in memory: 3 size^2 bytes an image.

    For a set that does not fit, encode latents (`python -m apps.diffusion.encode`), which stay on the disk.

    Attributes:
        x: (n, 3, size, size) uint8.
        y: (n,) classes; zeros where there are none.
        classes: their names.
        files: (n) the path of each image below its folder.
        skipped: the images that could not be used.
        mirror: in training, show every other image mirrored.
    """

    x: Tensor
    y: Tensor
    classes: tuple[str, ...]
    files: tuple[str, ...]
    skipped: tuple[Skipped, ...]
    mirror: bool = True

    def __len__(self) -> int:
        return len(self.x)

    def __getitem__(self, index: Sequence[int]) -> tuple[Tensor, Tensor]:
        """The images (b, 3, size, size), float32 in [-1, 1], and classes (b,) at these indices."""
        chosen = torch.as_tensor(index)
        return self.x[chosen].float() / 127.5 - 1, self.y[chosen]

    def draw(self, index: Sequence[int], epoch: Sequence[int], seed: int) -> tuple[Tensor, Tensor]:
        """The same, image k as epoch[k] shows it: mirrored or not, by (seed, epoch, index)."""
        x, y = self[index]
        if self.mirror:
            n = len(self)
            own = [generator(seed, Stream.VIEW, e * n + i) for e, i in zip(epoch, index, strict=True)]
            flipped = torch.tensor([bool(torch.rand((), generator=g) < 0.5) for g in own])
            x = torch.where(flipped[:, None, None, None], x.flip(3), x)
        return x, y

    @property
    def num_classes(self) -> int:
        """0 where the images have no classes."""
        return len(self.classes)

    @property
    def shape(self) -> tuple[int, int, int]:
        """(3, size, size)."""
        channels, height, width = self.x.shape[1:]
        return channels, height, width


def folder(
    root: Path,
    size: int,
    *,
    classes: Classes = "folders",
    mirror: bool = True,
    least: int | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> Pixels:
    """Reads the images below `root`, cropped and resized to `size` (see crop.py).

    Args:
        root: a folder of images.
        size: side in pixels.
        classes: whether subfolders are classes.
        mirror: show every other image mirrored in training.
        least: leave out images with a shorter side; None: a quarter of `size`.
        progress: called as progress(done, total).

    Raises:
        ValueError: no folder, no usable image, or a size below 1.
    """
    if size < 1:
        raise ValueError(f"size={size} leaves no pixels; give at least 1.")
    listed = listing(root, classes)
    total = len(listed.files)
    pixels = np.empty((total, 3, size, size), dtype=np.uint8)
    kept, skipped = [], []
    with ThreadPoolExecutor(os.cpu_count()) as pool:  # Pillow decodes without the interpreter's lock
        read = partial(attempt, listed, size, least_side(size) if least is None else least)
        for i, found in enumerate(pool.map(read, range(total))):
            if isinstance(found, Skipped):
                skipped.append(found)
            else:
                pixels[len(kept)] = found
                kept.append(i)
            if progress:
                progress(i + 1, total)
    if not kept:
        raise ValueError(f"None of the {total} images below {root} can be used; the first one: {skipped[0].reason}.")
    return Pixels(
        x=torch.from_numpy(pixels[: len(kept)]),
        y=torch.tensor([listed.labels[i] for i in kept]),
        classes=listed.classes,
        files=tuple(listed.files[i] for i in kept),
        skipped=tuple(skipped),
        mirror=mirror,
    )


def told(skipped: Sequence[Skipped], total: int) -> str:
    """A sentence that counts and names what was left out; empty for nothing."""
    if not skipped:
        return ""
    named = "; ".join(f"{file} ({reason})" for file, reason in skipped[:20])
    more = f"; and {len(skipped) - 20} more" if len(skipped) > 20 else ""
    return f"{len(skipped)} of {total} images were skipped: {named}{more}."
