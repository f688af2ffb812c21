"""Classifiers of real images, trained on the spot, whose features score generated images.

The features are the 32 in which a convolutional classifier of the *real* images ends, each standardized over the real
training images; LeNet (lenet.py) takes its place from 12 x 12 pixels on.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from apps.diffusion.data import TensorDataset
from apps.diffusion.evaluation.lenet import SMALLEST, LeNet, train_lenet
from apps.diffusion.evaluation.metrics import Gaussian, frechet_distance
from apps.diffusion.rng import Stream, drawing_from, generator

FEATURES = 32


class Classifier(nn.Module):
    """A convolutional network (B, C, H, W) -> class logits (B, num_classes), through 32 features."""

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
        self.head = nn.Linear(FEATURES, num_classes)
        self.register_buffer("mean", torch.zeros(FEATURES))
        self.register_buffer("std", torch.ones(FEATURES))

    def forward(self, x: Tensor) -> Tensor:
        return self.head(nn.functional.gelu(self.body(x)))

    @torch.no_grad()
    def features(self, x: Tensor) -> Tensor:
        """The 32 features (B, 32), each with mean 0 and variance 1 over the training images of the
        classifier.
        """
        return (self.body(x) - self.mean) / self.std

    @torch.no_grad()
    def accuracy(self, x: Tensor, y: Tensor) -> float:
        """The fraction of images (B, C, H, W) that are given the label (B,) they should have."""
        return (self(x).argmax(1) == y).double().mean().item()


def train_classifier(images: TensorDataset, seed: int = 0, epochs: int = 12, batch_size: int = 64) -> Classifier:
    """A classifier of these real images (AdamW, one-cycle learning rate, shifts by one pixel); seconds for
    the digits.

    It is trained on real images only.
    """
    draws = generator(seed, Stream.CLASSIFIER)
    with drawing_from(draws):
        model = Classifier(images.shape[0], images.num_classes)
    draws = generator(seed, Stream.CLASSIFIER, 1)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3, weight_decay=1e-2)
    batches = len(images) // batch_size
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 3e-3, total_steps=epochs * batches)
    for _ in range(epochs):
        shuffled = torch.randperm(len(images), generator=draws)
        for chosen in shuffled[: batches * batch_size].split(batch_size):
            x, y = images.x[chosen], images.y[chosen]
            x = _shift(x, torch.randint(-1, 2, (2,), generator=draws).tolist())
            loss = nn.functional.cross_entropy(model(x), y, label_smoothing=0.05)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
    model.eval().requires_grad_(False)
    features = model.body(images.x)
    model.mean = features.mean(0)
    model.std = features.std(0)
    return model


def _shift(x: Tensor, by: list[int]) -> Tensor:
    """Images shifted by (rows, columns) of at most one pixel; the margin is background, -1."""
    padded = nn.functional.pad(x, (1, 1, 1, 1), value=-1.0)
    height, width = x.shape[-2:]
    return padded[..., 1 + by[0] : 1 + by[0] + height, 1 + by[1] : 1 + by[1] + width]


@dataclass(frozen=True)
class Score:
    """Scores of a set of images by a classifier: label accuracy in [0, 1], and distance from the real
    training images.
    """

    images: int
    accuracy: float
    frechet: float


@dataclass(frozen=True)
class ImageScorer:
    """A classifier, and the statistics of its training images."""

    classifier: Classifier | LeNet
    real: Gaussian

    @classmethod
    def of(cls, images: TensorDataset, seed: int = 0, epochs: int | None = None) -> ImageScorer:
        """Train the classifier on real images and keep their statistics: LeNet from 12 x 12 pixels on (see lenet.py),
        below that `Classifier`.
        """
        if min(images.shape[1:]) >= SMALLEST:
            classifier: Classifier | LeNet = train_lenet(images, seed, epochs)
        else:
            classifier = train_classifier(images, seed, epochs or 12)
        features = torch.cat([classifier.features(part) for part in images.x.split(1024)])
        return cls(classifier, Gaussian.of(features))

    def score(self, x: Tensor, y: Tensor) -> Score:
        """The score of images (n, C, H, W) in [-1, 1] that should show the classes y (n,)."""
        distance = frechet_distance(Gaussian.of(self.classifier.features(x)), self.real)
        return Score(len(x), self.classifier.accuracy(x, y), distance)
