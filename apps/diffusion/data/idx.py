"""Images and labels in IDX files, the format of MNIST, Fashion-MNIST, KMNIST and QMNIST's images.

An IDX file of unsigned bytes is a header and the values in row-major order (LeCun, Cortes and Burges, "The MNIST
database of handwritten digits"):

    0 0 8 d             four bytes: 8 is the code of unsigned bytes, d the number of dimensions
    n_1 ... n_d         d sizes, each a big-endian 32-bit integer
    values              n_1 * ... * n_d bytes

A dataset is a folder of four files, gzip-compressed (with the suffix .gz) or plain:

    train-images-idx3-ubyte  train-labels-idx1-ubyte  t10k-images-idx3-ubyte  t10k-labels-idx1-ubyte

Debian's package dataset-fashion-mnist installs such a folder, /usr/share/datasets/fashion-mnist.
"""

import gzip
import math
import zlib
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch

from apps.diffusion.config.checks import check_word
from apps.diffusion.data.dataset import Split, TensorDataset
from apps.diffusion.files import hashing

UNSIGNED_BYTE = 8
PREFIX = {"train": "train", "held-out": "t10k"}


def idx(root: Path, split: Split = "train", *, sha256: Sequence[str] = (), least: int = 1) -> TensorDataset:
    """The images of one split of a folder of IDX files, as float32 images (n, 1, H, W) in [-1, 1].

    Args:
        root: the folder.
        split: "train", the files train-*; "held-out", the files t10k-*.
        sha256: the expected SHA-256 of the stored file of images and of that of labels; empty: not checked.
        least: smallest number of classes, so that a split without images of the last classes has these classes too.

    Raises:
        ValueError: the split is unknown, a file is missing or damaged or has another SHA-256, or the numbers of images
            and labels differ.
    """
    check_word("split", split, Split)
    if len(sha256) not in (0, 2):
        raise ValueError(f"sha256 has {len(sha256)} entries; give two, for images and for labels, or leave it out.")
    expected = tuple(sha256) or (None, None)
    pixels = read_idx(_file(root, split, "images-idx3"), dimensions=3, sha256=expected[0])
    labels = read_idx(_file(root, split, "labels-idx1"), dimensions=1, sha256=expected[1])
    if len(pixels) != len(labels) or not pixels.size:
        raise ValueError(
            f"path = {root} holds {len(pixels)} {split} images of {pixels.shape[1]} x {pixels.shape[2]} pixels and "
            f"{len(labels)} labels; give files of the same images, at least one."
        )
    # intensities 0..255 to -1..1, in place to save memory
    x = torch.from_numpy(pixels[:, None].astype(np.float32)).div_(127.5).sub_(1)
    y = torch.from_numpy(labels.astype(np.int64))
    return TensorDataset(x, y, num_classes=max(least, int(y.max()) + 1))


def has_split(root: Path, split: Split) -> bool:
    """Whether the folder holds the images and labels of this split."""
    return all(any(_candidates(root, split, kind)) for kind in ("images-idx3", "labels-idx1"))


def _candidates(root: Path, split: Split, kind: str) -> list[Path]:
    """The files of this name that exist, plain or compressed."""
    names = (f"{PREFIX[split]}-{kind}-ubyte", f"{PREFIX[split]}-{kind}-ubyte.gz")
    return [root / name for name in names if (root / name).is_file()]


def _file(root: Path, split: Split, kind: str) -> Path:
    found = _candidates(root, split, kind)
    if not found:
        raise ValueError(
            f"path = {root} has no file {PREFIX[split]}-{kind}-ubyte, plain or with .gz; give the folder of the IDX "
            "files."
        )
    return found[0]


def read_idx(path: Path, *, dimensions: int, sha256: str | None = None) -> npt.NDArray[np.uint8]:
    """The array in one IDX file.

    Args:
        path: the file; gzip-compressed if its name ends with .gz.
        dimensions: the number of dimensions that the array must have: 3 for images, 1 for labels.
        sha256: the expected SHA-256 of the stored file, in hexadecimal; None: not checked.

    Raises:
        ValueError: the file cannot be read, its SHA-256 differs, or its header or size does not fit.
    """
    try:
        stored = path.read_bytes()
    except OSError as error:
        raise ValueError(f"path = {path} cannot be read ({error}); give the folder of the IDX files.") from None
    # checksum of the stored bytes, before decoding
    found = hashing.of_parts([stored])
    if sha256 is not None and found != sha256.lower():
        raise ValueError(f"sha256 of {path} is {found}, expected {sha256.lower()}; download the file again.")
    try:
        content = gzip.decompress(stored) if path.suffix == ".gz" else stored
    except (OSError, EOFError, zlib.error) as error:
        raise ValueError(f"path = {path} is not a whole gzip file ({error}); download it again.") from None
    # header: magic number, then the sizes
    magic = bytes([0, 0, UNSIGNED_BYTE, dimensions])
    start = 4 + 4 * dimensions
    if content[:4] != magic or len(content) < start:
        raise ValueError(
            f"path = {path} starts with {content[:4].hex(' ')}; an IDX file of {dimensions}-dimensional unsigned bytes "
            f"starts with {magic.hex(' ')}. Give the images as idx3-ubyte and the labels as idx1-ubyte."
        )
    shape = tuple(int(n) for n in np.frombuffer(content, ">u4", dimensions, offset=4))
    # size: the number of values must be that of the header
    if len(content) - start != math.prod(shape):
        raise ValueError(
            f"path = {path} holds {len(content) - start} values, and its header states {math.prod(shape)} "
            f"({' x '.join(map(str, shape))}); download it again."
        )
    return np.frombuffer(content, np.uint8, offset=start).reshape(shape)
