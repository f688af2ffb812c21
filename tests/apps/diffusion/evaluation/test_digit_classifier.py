"""The Fréchet distance computed in three ways, and the classifier on real and on degraded digits."""

import numpy as np
import pytest
import torch
from torch import nn

from apps.diffusion.data import digits
from apps.diffusion.evaluation.digit_classifier import train_classifier
from apps.diffusion.evaluation.metrics import Gaussian, frechet_distance, label_accuracy


def _gaussian(seed, dim=5, rank=None):
    g = torch.Generator().manual_seed(seed)
    a = torch.randn(dim, rank or dim, generator=g, dtype=torch.float64)
    return Gaussian(torch.randn(dim, generator=g, dtype=torch.float64), a @ a.T)


def test_the_distance_of_diagonal_gaussians_is_known_in_closed_form():
    m, s = (
        torch.tensor([[0.0, 1.0, 2.0], [1.0, 1.0, -1.0]]).double(),
        torch.tensor([[1.0, 4.0, 0.0], [9.0, 4.0, 25.0]]).double(),
    )
    a, b = Gaussian(m[0], s[0].diag()), Gaussian(m[1], s[1].diag())
    expected = ((m[0] - m[1]) ** 2).sum() + ((s[0].sqrt() - s[1].sqrt()) ** 2).sum()
    assert frechet_distance(a, b) == pytest.approx(float(expected), rel=1e-12)


@pytest.mark.parametrize(("first", "second"), [(None, None), (2, None), (None, 3)])
def test_the_distance_agrees_with_the_matrix_square_root(first, second):
    from scipy.linalg import sqrtm

    a, b = _gaussian(0, rank=first), _gaussian(1, rank=second)
    cross = sqrtm((a.cov @ b.cov).numpy() + 1e-13 * np.eye(5)).real
    expected = float(((a.mean - b.mean) ** 2).sum() + a.cov.trace() + b.cov.trace()) - 2 * np.trace(cross)
    assert frechet_distance(a, b) == pytest.approx(expected, rel=1e-5)
    assert frechet_distance(b, a) == pytest.approx(frechet_distance(a, b), rel=1e-7)
    assert frechet_distance(a, a) == pytest.approx(0, abs=1e-6)


def test_the_distance_agrees_with_torchmetrics():
    from torchmetrics.image.fid import FrechetInceptionDistance

    class Flat(nn.Module):
        num_features = 6

        def forward(self, x):
            return x.flatten(1)

    g = torch.Generator().manual_seed(0)
    real, fake = torch.randn(200, 1, 2, 3, generator=g), 0.3 + 1.7 * torch.rand(150, 1, 2, 3, generator=g)
    meter = FrechetInceptionDistance(feature=Flat(), normalize=True)
    meter.update(real, real=True)
    meter.update(fake, real=False)
    ours = frechet_distance(Gaussian.of(real.flatten(1)), Gaussian.of(fake.flatten(1)))
    assert ours == pytest.approx(float(meter.compute()), rel=1e-4)


def test_statistics_of_features():
    x = torch.randn(50, 4, generator=torch.Generator().manual_seed(0))
    found = Gaussian.of(x)
    assert torch.allclose(found.mean, x.double().mean(0))
    np.testing.assert_allclose(found.cov.numpy(), np.cov(x.numpy(), rowvar=False), rtol=1e-5)
    with pytest.raises(ValueError, match=r"\(1, 4\)"):
        Gaussian.of(x[:1])


def distance(classifier, x, real):
    return frechet_distance(*(Gaussian.of(classifier.features(images)) for images in (x, real)))


def test_a_classifier_tells_real_digits_from_spoilt_ones():
    held_out, train = digits("held-out"), digits("train")
    classifier = train_classifier(train, epochs=5)
    assert label_accuracy(classifier(held_out.x), held_out.y) > 0.95
    assert label_accuracy(classifier(held_out.x), (held_out.y + 1) % 10) < 0.05
    real = distance(classifier, held_out.x, train.x)
    assert 0 < real < 0.5 and distance(classifier, train.x, train.x) == pytest.approx(0, abs=1e-6)
    noisy = held_out.x + 0.7 * torch.randn(held_out.x.shape, generator=torch.Generator().manual_seed(0))
    assert label_accuracy(classifier(noisy), held_out.y) < label_accuracy(classifier(held_out.x), held_out.y)
    assert distance(classifier, noisy, train.x) > 3 * real
    features = classifier.features(train.x)
    assert torch.allclose(features.mean(0), torch.zeros(32), atol=1e-4)
    assert torch.allclose(features.std(0), torch.ones(32), atol=1e-4)


def test_a_classifier_is_a_function_of_its_seed():
    before = torch.get_rng_state()
    again, same, other = (train_classifier(digits("train"), seed, epochs=1) for seed in (0, 0, 1))
    assert torch.equal(torch.get_rng_state(), before)
    weights = [next(classifier.parameters()) for classifier in (again, same, other)]
    assert torch.equal(weights[0], weights[1]) and not torch.equal(weights[0], weights[2])
