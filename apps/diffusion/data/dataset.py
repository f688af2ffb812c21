"""The protocol of datasets, and the dataset of tensors in memory.

Datasets are map-style, for use with `torch.utils.data.DataLoader`: `dataset[i] -> (x, label)` with x (C, H, W) float32
in [-1, 1] (latents: scaled). A random augmentation (mirroring, or drawing a latent from its distribution) is a function
of (seed, epoch, i): `dataset[i, epoch]` is image i as augmented in that epoch, and `dataset[i]` is `dataset[i, 0]`.
`batch_sampler.BatchSampler` yields keys (i, epoch).
"""

from collections.abc import Sequence
from typing import Any, Literal, Protocol

import torch
from torch import Tensor

from apps.diffusion.files import hashing
from apps.diffusion.rng import Stream, generator

Split = Literal["train", "held-out"]
Key = int | tuple[int, int]
"""Number of an image, or (number, epoch)."""


class ImageDataset(Protocol):
    """A map-style dataset of images of one shape."""

    def __len__(self) -> int: ...

    def __getitem__(self, key: Key) -> tuple[Tensor, int]:
        """The image (C, H, W), float32, as augmented in the epoch, and its label; 0 without classes."""
        ...

    @property
    def shape(self) -> tuple[int, int, int]:
        """(C, H, W) of one image."""
        ...

    @property
    def classes(self) -> Sequence[str]:
        """Names of the classes; empty without classes."""
        ...

    @property
    def num_classes(self) -> int:
        """Number of classes; 0 without classes."""
        ...

    def fingerprint(self) -> str:
        """SHA-256 that identifies the images and labels."""
        ...


class TensorDataset:
    """Images in memory.

    Args:
        x: (n, C, H, W) images, float, in [-1, 1].
        y: (n,) labels, integers from 0; None without classes.
        num_classes: number of classes; 0: without classes, and `y` is ignored. None: the number of names in `classes`,
            or the largest label plus one.
        classes: names of the classes; empty: their numbers.

    Raises:
        ValueError: there are no images, the numbers of images and labels differ, or a label is out of range.
    """

    def __init__(
        self, x: Tensor, y: Tensor | None = None, num_classes: int | None = None, classes: Sequence[str] = ()
    ) -> None:
        if x.ndim != 4 or len(x) == 0:
            raise ValueError(f"x has the shape {tuple(x.shape)}; images have the shape (n, C, H, W) with n > 0.")
        if y is not None and len(y) != len(x):
            raise ValueError(f"y has {len(y)} labels for {len(x)} images; give one label for each image.")
        if y is None and num_classes:
            raise ValueError(f"num_classes={num_classes}, but the images have no labels; give y.")
        labels = torch.zeros(len(x), dtype=torch.long) if y is None else y
        if num_classes is None:
            num_classes = 0 if y is None else len(classes) or int(labels.max()) + 1
        if num_classes and not (0 <= int(labels.min()) and int(labels.max()) < num_classes):
            raise ValueError(
                f"y reaches from {int(labels.min())} to {int(labels.max())}, and num_classes={num_classes} allows "
                f"0..{num_classes - 1}; give num_classes as the largest label plus one."
            )
        if classes and num_classes and len(classes) != num_classes:
            raise ValueError(f"classes has {len(classes)} names for {num_classes} classes; give one for each.")
        self.x, self.y = x, labels
        self.classes = tuple(classes or map(str, range(num_classes))) if num_classes else ()

    def __len__(self) -> int:
        return len(self.x)

    def __getitem__(self, key: Key) -> tuple[Tensor, int]:
        """The image and its label, which are the same in every epoch."""
        i, _ = index_and_epoch(key)
        return self.x[i], int(self.y[i])

    @property
    def shape(self) -> tuple[int, int, int]:
        """(C, H, W) of one image."""
        channels, height, width = self.x.shape[1:]
        return channels, height, width

    @property
    def num_classes(self) -> int:
        """Number of classes; 0 without classes."""
        return len(self.classes)

    def unconditional(self) -> "TensorDataset":
        """The same images without classes."""
        return TensorDataset(self.x)

    def fingerprint(self) -> str:
        """SHA-256 of images and labels."""
        return hashing.of_tensors({"x": self.x, "y": self.y})


def index_and_epoch(key: Key) -> tuple[int, int]:
    """(number of the image, epoch) of a key; the epoch of a key without an epoch is 0."""
    return key if isinstance(key, tuple) else (key, 0)


def augmentation_generator(seed: int, n: int, key: Key) -> torch.Generator:
    """The generator of an image's augmentation, a function of (seed, epoch, number), in a dataset of `n` images."""
    i, epoch = index_and_epoch(key)
    return generator(seed, Stream.AUGMENTATION, epoch * n + i)


def all_images(dataset: ImageDataset, numbers: Sequence[int] | None = None) -> tuple[Tensor, Tensor]:
    """The images (b, C, H, W) and labels (b,) with these numbers (None: all), as augmented in epoch 0."""
    pairs: list[Any] = [dataset[i] for i in (range(len(dataset)) if numbers is None else numbers)]
    return torch.stack([x for x, _ in pairs]), torch.tensor([y for _, y in pairs])
