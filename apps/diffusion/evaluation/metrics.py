"""Metrics of generated images on the features of a network.

Fréchet distance (Dowson and Landau 1982; Heusel et al. 2017, arXiv 1706.08500; with Inception features the FID): the
squared distance of two sets of features, approximated by Gaussians N(m1, C1) and N(m2, C2), is

    d^2 = |m1 - m2|^2 + tr(C1 + C2 - 2 (C1 C2)^(1/2)),   tr (C1 C2)^(1/2) = sum_i sqrt(lambda_i(C1^(1/2) C2 C1^(1/2)))

d^2 is 0 for equal Gaussians. Few images bias d^2 upwards, so only distances of equally many images can be compared.

Inception score (Salimans et al. 2016, arXiv 1606.03498), p(y|x) the class probabilities of the image x:

    IS = exp( E_x KL(p(y|x) || p(y)) ),     1 (all probabilities equal) to the number of classes

Kernel distance, KID on Inception features (Binkowski et al. 2018, arXiv 1801.01401): the squared maximum mean
discrepancy, unbiased, so that it may be negative, of the kernel k(x, y) = (x . y / D + 1)^3,

    KID = mean_{i != j} k(x_i, x_j) + mean_{i != j} k(y_i, y_j) - 2 mean_{i, j} k(x_i, y_j)

Precision and recall (Kynkäänniemi et al. 2019, arXiv 1904.06991): the manifold of a set of points is the union of balls
about the points; the radius of a ball is the distance to the point's k-th nearest neighbor. Precision is the share of
generated points within the manifold of the real points, recall the share of real points within the manifold of the
generated points.
"""

import math
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

ROWS = 1024  # rows of a distance matrix that are computed at a time


class Spread(NamedTuple):
    """Mean and standard deviation of a score over parts of the images."""

    mean: float
    std: float


@dataclass(frozen=True)
class Gaussian:
    """Mean (D,) and covariance (D, D) of a set of features, in float64."""

    mean: Tensor
    cov: Tensor

    @classmethod
    def of(cls, features: Tensor) -> "Gaussian":
        """The Gaussian with the mean and the unbiased covariance of features (n, D), n >= 2."""
        if features.ndim != 2 or len(features) < 2:
            raise ValueError(
                f"A covariance needs features (n, D) of at least 2 images, but their shape is {tuple(features.shape)}; "
                "generate more."
            )
        features = features.double()
        return cls(features.mean(0), torch.cov(features.T))


def frechet_distance(a: Gaussian, b: Gaussian) -> float:
    """Squared Fréchet distance d^2 of two Gaussians; symmetric, and 0 if and only if the Gaussians are equal."""
    values, vectors = torch.linalg.eigh(a.cov)
    root = (vectors * values.clamp(min=0).sqrt()) @ vectors.T
    cross = torch.linalg.eigvalsh(root @ b.cov @ root).clamp(min=0).sqrt().sum()
    return (((a.mean - b.mean) ** 2).sum() + a.cov.trace() + b.cov.trace() - 2 * cross).clamp(min=0).item()


def label_accuracy(logits: Tensor, labels: Tensor) -> float:
    """Share of images whose largest logit in `logits` (n, K) is that of their label in `labels` (n,)."""
    return float((logits.argmax(1) == labels).double().mean())


def inception_score(logits: Tensor, splits: int = 10) -> Spread:
    """IS from logits (n, classes): mean over `splits` successive parts, or one part if there are fewer images."""
    scores = []
    for part in logits.double().chunk(splits if len(logits) >= splits else 1):
        log_p = part.log_softmax(1)
        divergence = (log_p.exp() * (log_p - (log_p.logsumexp(0) - math.log(len(part))))).sum(1)
        scores.append(divergence.mean().exp())
    return _spread(torch.stack(scores))


def kernel_distance(x: Tensor, y: Tensor, subset: int = 1000, subsets: int = 100, seed: int = 0) -> Spread:
    """KID of features x (n, D) and y (m, D): the mean over `subsets` random subsets of `subset` images each. If neither
    set has more than `subset` images, KID is computed once on the complete sets.

    Raises:
        ValueError: a set has fewer than two images.
    """
    if min(len(x), len(y)) < 2:
        raise ValueError("A kernel distance needs at least 2 images on either side; generate more.")
    x, y = x.double(), y.double()
    if max(len(x), len(y)) <= subset:
        return Spread(float(_mmd(x, y)), 0.0)
    draws = torch.Generator().manual_seed(seed)
    size = min(subset, len(x), len(y))
    found = []
    for _ in range(subsets):
        chosen = (a[torch.randperm(len(a), generator=draws)[:size]] for a in (x, y))
        found.append(_mmd(*chosen))
    return _spread(torch.stack(found))


def precision_recall(generated: Tensor, real: Tensor, k: int = 3) -> tuple[float, float]:
    """Precision and recall of features `generated` (n, D) against features `real` (m, D).

    Raises:
        ValueError: a set has k images or fewer.
    """
    if min(len(generated), len(real)) <= k:
        raise ValueError(f"Precision and recall need more than {k} images on either side; generate more.")
    generated, real = generated.double(), real.double()
    return _covered(generated, real, k), _covered(real, generated, k)


def _covered(points: Tensor, centers: Tensor, k: int) -> float:
    """The share of points within the manifold of the centers."""
    radii = torch.cat([squared_distances(rows, centers).kthvalue(k + 1, dim=1).values for rows in centers.split(ROWS)])
    inside = [(squared_distances(rows, centers) <= radii).any(1) for rows in points.split(ROWS)]
    return float(torch.cat(inside).double().mean())


def squared_distances(x: Tensor, y: Tensor) -> Tensor:
    """Squared distances (n, m) of x (n, D) and y (m, D): |a - b|^2 = |a|^2 + |b|^2 - 2 a.b."""
    return ((x**2).sum(1)[:, None] + (y**2).sum(1) - 2 * x @ y.T).clamp_min(0)


def _mmd(x: Tensor, y: Tensor) -> Tensor:
    def kernel(a: Tensor, b: Tensor) -> Tensor:
        return (a @ b.T / a.shape[1] + 1) ** 3

    def within(a: Tensor) -> Tensor:
        own = kernel(a, a)
        return (own.sum() - own.diagonal().sum()) / (len(a) * (len(a) - 1))

    return within(x) + within(y) - 2 * kernel(x, y).mean()


def _spread(values: Tensor) -> Spread:
    return Spread(float(values.mean()), float(values.std(correction=0)))
