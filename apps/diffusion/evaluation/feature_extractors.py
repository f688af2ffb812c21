"""Feature extractors for the metrics: pooled features, spatial features, class logits.

An extractor is a callable on uint8 images with a name and a digest of its weights. The extractors are classifiers of
the 8 x 8 digits, of MNIST and of the reference images, which this module trains, and the Inception network of published
scores, which torch-fidelity provides (installed by the extra `inception`).
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from apps.diffusion.config.training import Backend
from apps.diffusion.data import TensorDataset, digits
from apps.diffusion.data.mnist import mnist
from apps.diffusion.evaluation.digit_classifier import Classifier, FeatureClassifier, train_classifier
from apps.diffusion.evaluation.lenet import SMALLEST, train_lenet
from apps.diffusion.files.hashing import of_tensors

SMALLEST_SET = 64  # the fewest images that a classifier is trained on: one batch
INCEPTION = "weights-inception-2015-12-05-6726825d.pth"


class Extracted(NamedTuple):
    """Features of b images, float32 on the CPU.

    Attributes:
        pooled: (b, D) features, for the Fréchet distance, KID, precision and recall.
        spatial: (b, S) features at all positions of a feature map, for sFID; None if the extractor has no such map.
        logits: (b, K) logits of a classifier, for the inception score and accuracy; None if the extractor has none.
    """

    pooled: Tensor
    spatial: Tensor | None
    logits: Tensor | None


class Extractor(Protocol):
    """A feature extractor; `name` and `digest` identify its features in cached statistics."""

    @property
    def name(self) -> str: ...

    @property
    def digest(self) -> str: ...

    def __call__(self, images: Tensor) -> Extracted:
        """Features of images (b, C, H, W), uint8.

        Raises:
            ValueError: the images have a size that the extractor does not take.
        """
        ...


@dataclass(frozen=True)
class ClassifierFeatures:
    """The features of a classifier before its last layer.

    Args:
        classifier: a trained classifier of images of `shape`.
        shape: (C, H, W) of the classifier's images; other channels are averaged to gray.
        name: name of the features.
        classifies: whether its classes are those of the images; false: there are no logits and no label accuracy.
        resizes: whether images of another size are resized to `shape`; false: such images raise.
    """

    classifier: FeatureClassifier
    shape: tuple[int, int, int]
    name: str = "trained"
    classifies: bool = True
    resizes: bool = False

    @property
    def digest(self) -> str:
        return of_tensors(self.classifier.state_dict())

    @torch.no_grad()
    def __call__(self, images: Tensor) -> Extracted:
        if not self.resizes and tuple(images.shape[2:]) != self.shape[1:]:
            raise ValueError(
                f"--features {self.name} takes images of {' x '.join(map(str, self.shape[1:]))} pixels, and these have "
                f"{' x '.join(map(str, images.shape[2:]))}; give --features trained or inception."
            )
        x = _resized(images, self.shape)
        logits = self.classifier(x) if self.classifies else None
        spatial = None
        if isinstance(self.classifier, Classifier):
            spatial = self.classifier.body[:5](x)[:, :7].flatten(1)  # seven channels after the first pooling
        return Extracted(self.classifier.features(x), spatial, logits)


def features_of(
    images: TensorDataset, seed: int = 0, epochs: int | None = None, name: str = "trained"
) -> ClassifierFeatures:
    """Features of a classifier trained on labeled images: LeNet from 12 x 12 pixels on, else `Classifier`."""
    train = train_lenet if min(images.shape[1:]) >= SMALLEST else train_classifier
    return ClassifierFeatures(train(images, seed, epochs), images.shape, name)


def digit_features(epochs: int | None = None) -> ClassifierFeatures:
    """Features of a classifier trained on the 8 x 8 training digits."""
    return features_of(digits("train"), epochs=epochs, name="digits")


def mnist_features(epochs: int | None = None) -> ClassifierFeatures:
    """Features of LeNet trained on MNIST's held-out digits, which no diffusion model is trained on."""
    return features_of(mnist("held-out"), epochs=epochs, name="mnist")


def reference_features(images: Tensor, labels: Tensor | None = None, epochs: int = 12) -> ClassifierFeatures:
    """Features of a classifier trained on the reference images, of any kind; no pretrained weights are needed.

    Images are resized to at most 32 x 32 pixels. Without classes the classifier is trained to predict by which multiple
    of 90 degrees an image is rotated (Gidaris et al. 2018, arXiv 1803.07728).

    Args:
        images: (n, C, H, W) reference images, uint8.
        labels: (n,) classes of the images; None: the images have no classes.
        epochs: passes over the images.

    Raises:
        ValueError: there are fewer than 64 images.
    """
    if len(images) < SMALLEST_SET:
        raise ValueError(f"--features trained needs at least {SMALLEST_SET} reference images, got {len(images)}.")
    side = min(32, *images.shape[2:])
    shape = (images.shape[1], side, side)
    x = _resized(images, shape)
    if labels is None:
        x = torch.cat([x.rot90(k, (2, 3)) for k in range(4)])
    y = torch.arange(4).repeat_interleave(len(images)) if labels is None else labels
    known = TensorDataset(x, y, num_classes=int(y.max()) + 1)
    return ClassifierFeatures(train_classifier(known, 0, epochs), shape, classifies=labels is not None, resizes=True)


def _resized(images: Tensor, shape: tuple[int, int, int]) -> Tensor:
    """Images (b, C, H, W), uint8, as float32 in [-1, 1] with the channels and the size of `shape`."""
    x = images.float()
    if x.shape[1] != shape[0]:
        x = x.mean(1, keepdim=True).expand(-1, shape[0], -1, -1)
    if tuple(x.shape[2:]) != shape[1:]:
        x = torch.nn.functional.interpolate(x, shape[1:], mode="area")
    return x / 127.5 - 1


class Inception:
    """Inception-v3 of 2015 as converted by torch-fidelity, with the features of the ADM evaluation suite: 2048 pooled
    features, the first 7 channels of mixed_6/conv as 2023 spatial features, and logits without the bias.

    Args:
        weights: file of the weights; None: the file in torch.hub's folder.
        device: device of the network.
        backend: backend of torch.compile; "no": the network is not compiled.

    Raises:
        ValueError: torch-fidelity is not installed, or the weights are missing or cannot be read.
    """

    name = "inception-2015-12-05"

    def __init__(self, weights: Path | None = None, device: str = "cpu", backend: Backend = "no") -> None:
        try:
            from torch_fidelity.feature_extractor_inceptionv3 import (  # pyright: ignore[reportMissingImports]
                FeatureExtractorInceptionV3,
            )
        except ImportError as error:
            raise ValueError(
                f"Inception features need torch-fidelity and its torchvision ({error}); install them with pip install "
                "'implicit-fixed-points[inception]', or choose --features digits for digits."
            ) from None
        file = weights or Path(torch.hub.get_dir()) / "checkpoints" / INCEPTION
        try:
            # raises for a file with code, which torch-fidelity's own loading would execute
            torch.load(file, weights_only=True, map_location="meta")
            network: Any = FeatureExtractorInceptionV3(self.name, ["2048", "logits_unbiased"], str(file))
        except FileNotFoundError:
            raise ValueError(
                f"Inception's weights are not installed: there is no {file}. Fetch {INCEPTION} from torch-fidelity's "
                "release v0.2.0 and put it there, or give its path with --weights."
            ) from None
        except Exception as error:  # torch.load raises errors of many types for damaged files
            reason = " ".join(str(error).split())[:200]
            raise ValueError(f"{file} holds no weights of Inception ({reason}); fetch {INCEPTION} again.") from None
        self.digest = of_tensors(network.state_dict())
        self.device = device
        self._network = network.to(device).eval()
        self._spatial: list[Tensor] = []
        self._network.Mixed_6d.branch1x1.register_forward_hook(lambda _, __, out: self._spatial.append(out[:, :7]))
        if backend != "no":
            self._network.compile(backend=backend)

    @torch.no_grad()
    def __call__(self, images: Tensor) -> Extracted:
        if images.shape[1] == 1:
            images = images.expand(-1, 3, -1, -1)
        self._spatial.clear()
        pooled, logits = self._network(images.to(self.device))
        return Extracted(pooled.float().cpu(), self._spatial.pop().flatten(1).float().cpu(), logits.float().cpu())


@dataclass(frozen=True)
class HalfPrecision:
    """An extractor under autocast to bfloat16; the name of its features differs from that of the float32 features."""

    extractor: Extractor
    device: str = "cpu"

    @property
    def name(self) -> str:
        return f"{self.extractor.name}-bf16"

    @property
    def digest(self) -> str:
        return self.extractor.digest

    @property
    def classifies(self) -> bool:
        """Whether the classes of the logits are those of the images."""
        return getattr(self.extractor, "classifies", False)

    def __call__(self, images: Tensor) -> Extracted:
        with torch.autocast(torch.device(self.device).type, torch.bfloat16):
            found = self.extractor(images)
        return Extracted(*(None if value is None else value.float() for value in found))  # pyright: ignore[reportArgumentType]
