"""Noise and coupling: is f a function of z, and is each sample's f(z) a function of that sample?

Both are measured at a generic point p = f(z0) + s n, with n standard normal and s the root mean square of f(z0):

    noise       ||f(p) - f(p)|| / ||f(p)|| of two evaluations at one p
    coupling    ||f(p)_b - f(p')_b|| / ||f(p)_b|| where p' differs from p in other samples than b
"""

from dataclasses import dataclass

import torch

from implicit.diagnostics.diagnose.condition import Condition, Finding
from implicit.evaluation import FlatMap
from implicit.loop.repeated_points import REPEATABLE
from implicit.pytree import Flat, PerSample, norm

_CERTAIN = 100.0  # a finding is certain if the difference exceeds this multiple of the threshold
_MANY = 64  # in a batch of at least so many numbers one more evaluation shows noise; smaller batches take eight


@dataclass(frozen=True, eq=False)
class GenericPoint:
    """A point p away from the start, f(p), and the length scale of the state."""

    z: Flat
    fz: Flat
    scale: PerSample


def normal(like: Flat, seed: int) -> Flat:
    """Standard normal numbers, the same for every sample, device and dtype."""
    rng = torch.Generator().manual_seed(seed)
    return torch.randn(like.shape[1], generator=rng, dtype=torch.float64, device=rng.device).to(like).expand_as(like)


def root_mean_square(flat: Flat) -> PerSample:
    """(B,) root mean square of every row."""
    return norm(flat) / flat.shape[1] ** 0.5


def generic_point(f: FlatMap, z0: Flat, first: Flat) -> GenericPoint:
    """A point near `first`, f(z0), at which f is finite: as far as the scale, a tenth or a hundredth of it."""
    scale = root_mean_square(first)
    scale = torch.where(scale > 0, scale, torch.where(norm(z0) > 0, root_mean_square(z0), 1.0))
    z, fz = first, first
    for share in (1.0, 0.1, 0.01):
        z = first + share * scale.unsqueeze(1) * normal(first, seed=1)
        fz = f(z)
        if bool(torch.isfinite(fz).all()):
            break
    return GenericPoint(z, fz, scale)


def noise(f: FlatMap, point: GenericPoint) -> Finding | None:
    """Whether evaluations at one point differ; more evaluations for small batches, whose draws may agree by chance."""
    off = torch.zeros_like(point.scale)
    for _ in range(1 if point.z.numel() >= _MANY else 8):
        off = torch.maximum(off, _difference(f(point.z), point.fz))
    return _finding(Condition.NOISY, "evaluations of f at one state differ by {} of ||f(z)||", off, f.layout.eps)


def coupling(f: FlatMap, point: GenericPoint) -> Finding | None:
    """Whether f(z) of a sample changes when other samples change: each half of the batch is moved in turn."""
    batch = len(point.z)
    if batch < 2:
        return None
    moved = point.z + point.scale.unsqueeze(1) * normal(point.z, seed=2)
    first = (torch.arange(batch, device=point.z.device) % 2 == 0).unsqueeze(1)
    off = torch.zeros(batch, dtype=point.z.dtype, device=point.z.device)
    for half in (first, ~first):
        apart = f(torch.where(half, moved, point.z))
        off = torch.where(half[:, 0], off, _difference(apart, point.fz))
    return _finding(
        Condition.COUPLED, "f(z) of a sample changes by {} of its norm when other samples change", off, f.layout.eps
    )


def _difference(a: Flat, b: Flat) -> PerSample:
    """||a - b|| / ||b||; 0 if a = b, NaN if one of the two is not finite."""
    off = norm(a - b)
    return torch.where(off == 0, 0.0, off / norm(b).clamp_min(torch.finfo(b.dtype).tiny))


def _finding(condition: Condition, evidence: str, off: PerSample, eps: float) -> Finding | None:
    """The finding for samples whose difference exceeds rounding; the largest difference is put into `evidence`."""
    threshold = REPEATABLE * eps
    if not bool((off > threshold).any()):
        return None
    worst = float(off.nan_to_num(nan=-1).max())
    return Finding.of(condition, evidence.format(f"{worst:.1e}"), off > threshold, worst > _CERTAIN * threshold)
