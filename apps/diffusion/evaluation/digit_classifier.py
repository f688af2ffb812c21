"""How good are generated images? A Fréchet distance and the accuracy of their labels, on the features of a
small classifier.

Fréchet: two sets of features, taken as Gaussians N(m1, C1) and N(m2, C2), lie apart by

    d^2 = |m1 - m2|^2 + tr(C1 + C2 - 2 (C1 C2)^(1/2))
    tr (C1 C2)^(1/2) = sum_i sqrt(lambda_i(C1^(1/2) C2 C1^(1/2)))

(Dowson and Landau 1982; Heusel et al. 2017, arXiv 1706.08500). With Inception features and 50,000 images this
is the FID. Here the features are the 32 that a classifier of the *real* images ends in, each standardised
over the real training images. The distance is 0 for equal Gaussians; with few images it is biased upwards, so
always compare equal numbers of images.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from apps.diffusion.data import TensorDataset
from apps.diffusion.evaluation.lenet import SMALLEST, LeNet, train_lenet
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
        """The 32 features (B, 32), each with mean 0 and variance 1 over the images that the classifier learnt
        from.
        """
        return (self.body(x) - self.mean) / self.std

    @torch.no_grad()
    def accuracy(self, x: Tensor, y: Tensor) -> float:
        """The fraction of images (B, C, H, W) that are given the label (B,) they should have."""
        return (self(x).argmax(1) == y).double().mean().item()


def train_classifier(images: TensorDataset, seed: int = 0, epochs: int = 12, batch_size: int = 64) -> Classifier:
    """A classifier of these real images (AdamW, one-cycle learning rate, shifts by one pixel); seconds for
    the digits.

    It never sees a generated image, and no diffusion model ever sees it: it is a judge.
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
    """Images moved by (rows, columns) of at most one pixel; what comes in is background, -1."""
    padded = nn.functional.pad(x, (1, 1, 1, 1), value=-1.0)
    height, width = x.shape[-2:]
    return padded[..., 1 + by[0] : 1 + by[0] + height, 1 + by[1] : 1 + by[1] + width]


@dataclass(frozen=True)
class Gaussian:
    """Mean (D,) and covariance (D, D) of a set of features, in float64."""

    mean: Tensor
    cov: Tensor

    @classmethod
    def of(cls, features: Tensor) -> Gaussian:
        """The Gaussian with the mean and the unbiased covariance of features (n, D), n >= 2."""
        if features.ndim != 2 or len(features) < 2:
            raise ValueError(
                f"A covariance needs features (n, D) of at least 2 images, but their shape is "
                f"{tuple(features.shape)}; "
                "generate more images."
            )
        features = features.double()
        return cls(features.mean(0), torch.cov(features.T))


def frechet_distance(a: Gaussian, b: Gaussian) -> float:
    """Squared Fréchet distance of two Gaussians (see above); symmetric, 0 if and only if they are equal."""
    values, vectors = torch.linalg.eigh(a.cov)
    root = (vectors * values.clamp(min=0).sqrt()) @ vectors.T
    cross = torch.linalg.eigvalsh(root @ b.cov @ root).clamp(min=0).sqrt().sum()
    return (((a.mean - b.mean) ** 2).sum() + a.cov.trace() + b.cov.trace() - 2 * cross).clamp(min=0).item()


@dataclass(frozen=True)
class Score:
    """What a classifier says of a set of images: label accuracy in [0, 1], and distance from the real
    training images.
    """

    images: int
    accuracy: float
    frechet: float


@dataclass(frozen=True)
class Judge:
    """A classifier, and the statistics of the real images that it learnt from."""

    classifier: Classifier | LeNet
    real: Gaussian

    @classmethod
    def of(cls, images: TensorDataset, seed: int = 0, epochs: int | None = None) -> Judge:
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
