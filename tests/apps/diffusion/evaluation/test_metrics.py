"""Inception score, KID, precision and recall, compared with closed forms, plain loops and torchmetrics."""

import itertools
import math

import numpy as np
import pytest
import torch
from torch import nn

from apps.diffusion.evaluation.metrics import inception_score, kernel_distance, precision_recall


def normal(n, dim=6, seed=0, mean=0.0, std=1.0):
    return mean + std * torch.randn(n, dim, generator=torch.Generator().manual_seed(seed))


class Flat(nn.Module):
    num_features = 6

    def forward(self, x):
        return x.flatten(1)


def test_the_inception_score_of_known_verdicts():
    certain = 1e3 * torch.eye(7).repeat(20, 1)
    assert inception_score(certain, 1).mean == pytest.approx(7)
    assert inception_score(certain, 10) == (pytest.approx(7), pytest.approx(0, abs=1e-9))
    assert inception_score(torch.zeros(50, 7)).mean == pytest.approx(1)
    p = np.array([[0.7, 0.2, 0.1], [0.1, 0.1, 0.8], [0.2, 0.5, 0.3], [0.3, 0.3, 0.4]])
    marginal = p.mean(0)
    expected = math.exp(sum(q * math.log(q / m) for row in p for q, m in zip(row, marginal, strict=True)) / 4)
    assert inception_score(torch.from_numpy(p).log(), 1).mean == pytest.approx(expected)
    halves = [inception_score(torch.from_numpy(half).log(), 1).mean for half in (p[:2], p[2:])]
    found = inception_score(torch.from_numpy(p).log(), 2)
    assert found == (pytest.approx(np.mean(halves)), pytest.approx(np.std(halves)))


@pytest.mark.filterwarnings("ignore:Metric `InceptionScore` will save", "ignore:std")
def test_the_inception_score_agrees_with_torchmetrics():
    from torchmetrics.image.inception import InceptionScore

    x = normal(60, std=2.0)
    meter = InceptionScore(feature=Flat(), normalize=False, splits=1)
    meter.update(x.view(-1, 1, 2, 3))
    assert inception_score(x, 1).mean == pytest.approx(float(meter.compute()[0]), rel=1e-5)


@pytest.mark.filterwarnings("ignore:Metric `Kernel Inception Distance` will save")
def test_the_kernel_distance_agrees_with_torchmetrics_and_with_loops():
    from torchmetrics.image.kid import KernelInceptionDistance

    x, y = normal(40, mean=0.3, seed=1), normal(40, std=1.5, seed=2)
    meter = KernelInceptionDistance(feature=Flat(), subsets=1, subset_size=40, normalize=True)
    meter.update(x.view(-1, 1, 2, 3), real=False)
    meter.update(y.view(-1, 1, 2, 3), real=True)
    found = kernel_distance(x, y)
    assert found.mean == pytest.approx(float(meter.compute()[0]), rel=1e-4) and found.std == 0

    def kernel(a, b):
        return (float(a.double() @ b.double()) / 6 + 1) ** 3

    few, many = x[:5], y[:7]
    pairs = [list(itertools.permutations(a, 2)) for a in (few, many)]
    within = [sum(kernel(a, b) for a, b in p) / len(p) for p in pairs]
    between = sum(kernel(a, b) for a, b in itertools.product(few, many)) / 35
    assert kernel_distance(few, many).mean == pytest.approx(sum(within) - 2 * between, rel=1e-6)


def test_the_kernel_distance_has_no_bias():
    """Over halves of one distribution it is 0 on average; for a shifted mean it is what the moments say."""
    x, y = normal(2000, dim=2, seed=3), normal(2000, dim=2, seed=4)
    same = kernel_distance(x, y, subset=200, subsets=60)
    assert abs(same.mean) < 4 * same.std / 60**0.5 + 0.02 and same.std > 0
    assert kernel_distance(x, y, subset=200) == kernel_distance(x, y, subset=200)
    # a = m . n / 2 + 1 with x ~ N(m, 1), y ~ N(n, 1) in two dimensions: E k for means 0 and d by sampling theory
    shifted = kernel_distance(x + 2.0, y, subset=500, subsets=20).mean
    g = torch.Generator().manual_seed(9)
    a, b, c, d = (torch.randn(200_000, 2, generator=g, dtype=torch.float64) for _ in range(4))

    def mean(p, q):
        return float((((p * q).sum(1) / 2 + 1) ** 3).mean())

    expected = mean(a + 2, b + 2) + mean(c, d) - 2 * mean(a + 2, c)
    assert shifted == pytest.approx(expected, rel=0.05)


def test_precision_and_recall_by_loops():
    generated, real, k = normal(30, 3, seed=5, mean=0.8), normal(40, 3, seed=6), 3

    def share(points, centers):
        inside = 0
        for p in points:
            for c in centers:
                radius = sorted(float((c - other).norm()) for other in centers)[k]
                if float((p - c).norm()) <= radius:
                    inside += 1
                    break
        return inside / len(points)

    found = precision_recall(generated, real, k)
    assert found == (pytest.approx(share(generated, real)), pytest.approx(share(real, generated)))
    assert 0.3 < found[0] < 1 and 0.3 < found[1] < 1


def test_precision_and_recall_of_known_sets():
    real = torch.cat([normal(60, 2, seed=7), 100 + normal(60, 2, seed=8)])
    assert precision_recall(real, real) == (1, 1)
    assert precision_recall(real + 1000, real) == (0, 0)
    precision, recall = precision_recall(real[:60], real)  # one of two modes, and nothing else
    assert precision == 1 and recall == pytest.approx(0.5)
    precision, recall = precision_recall(torch.cat([real, real + 1000]), real)  # half of it is nonsense
    assert precision == pytest.approx(0.5) and recall == 1


def test_too_few_images_are_refused():
    with pytest.raises(ValueError, match="2"):
        kernel_distance(normal(1), normal(5))
    with pytest.raises(ValueError, match="3"):
        precision_recall(normal(3), normal(9))
