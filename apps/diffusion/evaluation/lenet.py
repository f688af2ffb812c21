"""A classifier of the size of LeNet-5 for images of 12 pixels a side and more: it scores generated MNIST digits.

    x -> pool(relu(conv 5 x 5, 8)) -> pool(relu(conv 5 x 5, 24)) -> 120 -> 84 features -> logits

after LeCun et al., "Gradient-based learning applied to document recognition" (1998), section II.B, with ReLU, max
pooling and dropout. The classifier is trained on real images that no diffusion model is trained on. These are few, so a
random affine map (rotation, scale, shear, shift) augments each image: trained on the 1000 held-out digits of
data/mnist.py, the classifier is right on about 98 % of the other 4000 digits.
"""

import math
from functools import partial

import torch
from torch import Tensor, nn

from apps.diffusion.data import TensorDataset
from apps.diffusion.evaluation.digit_classifier import FeatureClassifier, trained

FEATURES = 84
SMALLEST = 12  # smallest side of an image in pixels
SHOWN = 60_000  # length of training: number of images, repetitions included
BATCH = 50
ROTATION = math.radians(15)  # largest angle
SCALE, SHEAR, SHIFT = 0.15, 0.2, 0.14  # largest relative scale, shear, and shift in half image widths


class LeNet(FeatureClassifier):
    """Images (B, C, H, W) -> class logits (B, num_classes), through 84 features.

    Args:
        shape: (C, H, W) of an image.
        num_classes: number of classes.

    Raises:
        ValueError: an image is smaller than 12 x 12.
    """

    def __init__(self, shape: tuple[int, int, int], num_classes: int) -> None:
        super().__init__()
        channels, height, width = shape
        if min(height, width) < SMALLEST:
            raise ValueError(f"shape = {shape}: LeNet takes images of at least {SMALLEST} x {SMALLEST} pixels.")
        cells = (height // 2 - 4) // 2 * ((width // 2 - 4) // 2)
        self.maps = nn.Sequential(
            nn.Conv2d(channels, 8, 5, padding=2),
            nn.ReLU(),
            nn.MaxPool2d(2),
            nn.Conv2d(8, 24, 5),
            nn.ReLU(),
            nn.MaxPool2d(2),
            nn.Flatten(),
        )
        self.body = nn.Sequential(nn.Linear(24 * cells, 120), nn.ReLU(), nn.Dropout(0.3), nn.Linear(120, FEATURES))
        self.add_head(FEATURES, num_classes)

    def embed(self, x: Tensor) -> Tensor:
        return self.body(self.maps(x))

    def activation(self, features: Tensor) -> Tensor:
        return features.relu()


def train_lenet(images: TensorDataset, seed: int = 0, epochs: int | None = None) -> LeNet:
    """LeNet trained on these real images, each under a random affine map.

    Args:
        images: real images with classes.
        seed: random seed of the initial weights, the order, the affine maps and dropout.
        epochs: passes over the images; None: 60,000 images in all, 25 s of one core at 28 x 28 pixels.
    """
    epochs = epochs or max(1, SHOWN // len(images))
    make = partial(LeNet, images.shape, images.num_classes)
    return trained(make, images, seed, epochs=epochs, batch=BATCH, lr=4e-3, augment=affine)


def affine(x: Tensor, draws: torch.Generator) -> Tensor:
    """Images (B, C, H, W), each under its own random affine map; pixels outside the image are background, -1."""
    n = len(x)

    def uniform(*shape: int) -> Tensor:
        return 2 * torch.rand(*shape, generator=draws) - 1

    angle, scale, shear = ROTATION * uniform(n), 1 + SCALE * uniform(n), SHEAR * uniform(n)
    maps = torch.zeros(n, 2, 3)
    maps[:, 0, 0] = maps[:, 1, 1] = angle.cos() / scale
    maps[:, 0, 1] = shear - angle.sin()
    maps[:, 1, 0] = angle.sin()
    maps[:, :, 2] = SHIFT * uniform(n, 2)
    where = nn.functional.affine_grid(maps, list(x.shape), align_corners=False)
    return nn.functional.grid_sample(x + 1, where, align_corners=False) - 1
