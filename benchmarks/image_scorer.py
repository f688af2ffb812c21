"""Scores of samples by a classifier of real images: label accuracy, and Fréchet distance from the training images."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from apps.diffusion.data import TensorDataset
from apps.diffusion.evaluation.digit_classifier import FeatureClassifier
from apps.diffusion.evaluation.feature_extractors import features_of
from apps.diffusion.evaluation.metrics import Gaussian, frechet_distance, label_accuracy


@dataclass(frozen=True)
class Score:
    """Label accuracy in [0, 1], Fréchet distance from the training images of the classifier, and number of images."""

    images: int
    accuracy: float
    frechet: float


@dataclass(frozen=True)
class ImageScorer:
    """A classifier, and the statistics of its training images."""

    classifier: FeatureClassifier
    real: Gaussian

    @classmethod
    def of(cls, images: TensorDataset, seed: int = 0, epochs: int | None = None) -> ImageScorer:
        """Train the classifier on real images and keep their statistics."""
        classifier = features_of(images, seed, epochs).classifier
        return cls(classifier, Gaussian.of(torch.cat([classifier.features(part) for part in images.x.split(1024)])))

    def score(self, x: Tensor, y: Tensor) -> Score:
        """The score of images (n, C, H, W) in [-1, 1] that should show the classes y (n,)."""
        distance = frechet_distance(Gaussian.of(self.classifier.features(x)), self.real)
        return Score(len(x), label_accuracy(self.classifier(x), y), distance)
