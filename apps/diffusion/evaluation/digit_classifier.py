"""Small classifiers that are trained on real images when scores are computed; their features score generated images.

The features are the activations before the last layer, each standardized over the real training images. The classifier
is `Classifier` for images below 12 x 12 pixels, else LeNet (lenet.py).
"""

from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import TypeVar

import torch
from torch import Tensor, nn

from apps.diffusion.data import TensorDataset
from apps.diffusion.rng import Stream, drawing_from, generator

FEATURES = 32


class FeatureClassifier(nn.Module, ABC):
    """Images (B, C, H, W) -> class logits (B, num_classes), through F features.

    A subclass defines `embed`, which computes the features before standardization, and `activation`, the nonlinearity
    between features and logits.
    """

    mean: Tensor
    std: Tensor
    head: nn.Linear

    def add_head(self, features: int, num_classes: int) -> None:
        """Add the last layer, and buffers for the mean and standard deviation of the features; these are 0 and 1 until
        training has ended.
        """
        self.head = nn.Linear(features, num_classes)
        self.register_buffer("mean", torch.zeros(features))
        self.register_buffer("std", torch.ones(features))

    @abstractmethod
    def embed(self, x: Tensor) -> Tensor:
        """The features (B, F), not standardized."""

    @abstractmethod
    def activation(self, features: Tensor) -> Tensor:
        """The nonlinearity between features and logits."""

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.activation(self.embed(x)))

    @torch.no_grad()
    def features(self, x: Tensor) -> Tensor:
        """The features (B, F), each with mean 0 and variance 1 over the training images of the classifier."""
        return (self.embed(x) - self.mean) / self.std


class Classifier(FeatureClassifier):
    """A convolutional network with 32 features, for images of any size."""

    def __init__(self, channels: int, num_classes: int) -> None:
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv2d(channels, 32, 3, padding=1),
            nn.GELU(),
            nn.Conv2d(32, 64, 3, padding=1),
            nn.GELU(),
            nn.MaxPool2d(2),
            nn.Conv2d(64, 64, 3, padding=1),
            nn.GELU(),
            nn.AdaptiveMaxPool2d(2),
            nn.Flatten(),
            nn.Linear(256, FEATURES),
        )
        self.add_head(FEATURES, num_classes)

    def embed(self, x: Tensor) -> Tensor:
        return self.body(x)

    def activation(self, features: Tensor) -> Tensor:
        return nn.functional.gelu(features)


C = TypeVar("C", bound=FeatureClassifier)


def trained(
    make: Callable[[], C],
    images: TensorDataset,
    seed: int,
    *,
    epochs: int,
    batch: int,
    lr: float,
    augment: Callable[[Tensor, torch.Generator], Tensor],
    smoothing: float = 0.0,
) -> C:
    """A classifier trained on images with classes by AdamW with a one-cycle learning rate; incomplete batches are left
    out. Initial weights, order, augmentation and dropout are functions of the seed.

    Args:
        make: makes the untrained classifier.
        images: images with classes.
        seed: the random seed.
        epochs: passes over the images.
        batch: images of a batch.
        lr: largest learning rate.
        augment: function (images (b, C, H, W), generator) -> augmented images.
        smoothing: label smoothing of the cross entropy.
    """
    with drawing_from(generator(seed, Stream.CLASSIFIER)):
        model = make()
    draws, batches = generator(seed, Stream.CLASSIFIER, 1), max(1, len(images) // batch)
    optimizer = torch.optim.AdamW(model.parameters(), lr=lr, weight_decay=1e-2)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, lr, total_steps=epochs * batches)
    with drawing_from(generator(seed, Stream.CLASSIFIER, 2)):  # dropout draws from torch's global generator
        for _ in range(epochs):
            for chosen in torch.randperm(len(images), generator=draws)[: batches * batch].split(batch):
                x, y = augment(images.x[chosen], draws), images.y[chosen]
                loss = nn.functional.cross_entropy(model(x), y, label_smoothing=smoothing)
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
                schedule.step()
    model.eval().requires_grad_(False)
    features = torch.cat([model.features(part) for part in images.x.split(256)])
    model.mean, model.std = features.mean(0), features.std(0).clamp_min(1e-6)
    return model


def train_classifier(images: TensorDataset, seed: int = 0, epochs: int | None = None) -> Classifier:
    """A `Classifier` trained on these real images, each batch shifted by at most one pixel; default: 12 epochs."""
    return trained(
        lambda: Classifier(images.shape[0], images.num_classes),
        images,
        seed,
        epochs=epochs or 12,
        batch=64,
        lr=3e-3,
        augment=_shift,
        smoothing=0.05,
    )


def _shift(x: Tensor, draws: torch.Generator) -> Tensor:
    """The images, all shifted by the same random offset of at most one pixel; the margin is background, -1."""
    rows, columns = torch.randint(0, 3, (2,), generator=draws).tolist()
    height, width = x.shape[-2:]
    return nn.functional.pad(x, (1, 1, 1, 1), value=-1.0)[..., rows : rows + height, columns : columns + width]
