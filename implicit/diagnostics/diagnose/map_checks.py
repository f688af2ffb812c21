"""Noise and coupling: is f a function of z, and is each sample's f(z) a function of that sample?

Both are measured at a generic point p = f(z0) + s n, with n standard normal and s the root mean square of f(z0), for
every tensor of the state by itself:

    noise       ||f(p) - f(p)|| / ||f(p)|| of two evaluations at one p
    coupling    ||f(p)_b - f(p')_b|| / ||f(p)_b|| where p' differs from p in other samples than b: for every binary
                digit of the sample numbers, those with the digit 0 move and then those with the digit 1, so that each
                sample moves once without each other one
"""

from dataclasses import dataclass

import torch

from implicit.diagnostics.diagnose.condition import Condition, Finding
from implicit.evaluation import FlatMap
from implicit.loop.repeated_points import REPEATABLE
from implicit.pytree import Flat, Layout, PerSample, norm

_COARSE = 2.0  # the threshold is at least this multiple of eps, which matters for dtypes with few digits
_CERTAIN = 3.0  # a finding is certain if the difference exceeds this multiple of the threshold
_MANY = 64  # in a batch of at least so many numbers one more evaluation shows noise; smaller batches take eight


@dataclass(frozen=True, eq=False)
class GenericPoint:
    """A point p away from the start, f(p), and the length scale of every number of the state."""

    z: Flat
    fz: Flat
    scale: Flat


def normal(like: Flat, seed: int) -> Flat:
    """Standard normal numbers, the same for every sample, device and dtype."""
    rng = torch.Generator().manual_seed(seed)
    return torch.randn(like.shape[1], generator=rng, dtype=torch.float64, device=rng.device).to(like).expand_as(like)


def root_mean_square(flat: Flat, layout: Layout) -> Flat:
    """(B, N): for every number of a row the root mean square of the tensor that it belongs to."""
    parts = flat.split(list(layout.widths), dim=1)
    return torch.cat([(norm(part) / part.shape[1] ** 0.5).unsqueeze(1).expand_as(part) for part in parts], dim=1)


def size_or(flat: Flat, typical: Flat, layout: Layout) -> Flat:
    """`root_mean_square`, or `typical` where that is 0 beside it."""
    size = root_mean_square(flat, layout)
    return torch.where(size > layout.eps**0.5 * typical, size, typical)


def typical_size(first: Flat, z0: Flat, layout: Layout) -> Flat:
    """(B, N) root mean square of f(z0), or where that is 0, of z0, of other samples, or of other tensors; else 1."""
    size = root_mean_square(first, layout)
    size = torch.where(size > 0, size, root_mean_square(z0, layout))
    for axis in (0, 1):
        size = torch.where(size > 0, size, size.amax(dim=axis, keepdim=True))
    return torch.where(size > 0, size, 1.0)


def generic_point(f: FlatMap, z0: Flat, first: Flat) -> GenericPoint:
    """A point near `first`, f(z0), at which f is finite: as far as the scale, a tenth or a hundredth of it."""
    scale = typical_size(first, z0, f.layout)
    z, fz = first, first
    for share in (1.0, 0.1, 0.01):
        z = first + share * scale * normal(first, seed=1)
        fz = f(z)
        if bool(torch.isfinite(fz).all()):
            break
    return GenericPoint(z, fz, scale)


def noise(f: FlatMap, point: GenericPoint) -> Finding | None:
    """Whether evaluations at one point differ; more evaluations for small batches, whose draws may agree by chance."""
    off = torch.zeros_like(point.scale[:, 0])
    for _ in range(1 if point.z.numel() >= _MANY else 8):
        off = torch.maximum(off, _difference(f(point.z), point.fz))
    return _finding(Condition.NOISY, "evaluations of f at one state differ by {} of ||f(z)||", off, f.layout.eps)


def coupling(f: FlatMap, point: GenericPoint) -> Finding | None:
    """Whether f(z) of a sample changes when other samples change; 2 log2 B evaluations."""
    batch = len(point.z)
    if batch < 2:
        return None
    moved = point.z + point.scale * normal(point.z, seed=2)
    numbers = torch.arange(batch, device=point.z.device)
    off = torch.zeros(batch, dtype=point.z.dtype, device=point.z.device)
    for digit in range((batch - 1).bit_length()):
        ones = (numbers >> digit) % 2 == 1
        for moves in (~ones, ones):
            apart = _difference(f(torch.where(moves.unsqueeze(1), moved, point.z)), point.fz)
            off = torch.where(moves, off, torch.maximum(off, apart))
    return _finding(
        Condition.COUPLED, "f(z) of a sample changes by {} of its norm when other samples change", off, f.layout.eps
    )


def _difference(a: Flat, b: Flat) -> PerSample:
    """||a - b|| / ||b||; 0 if a = b, NaN if one of the two is not finite."""
    off = norm(a - b)
    return torch.where(off == 0, 0.0, off / norm(b).clamp_min(torch.finfo(b.dtype).tiny))


def _finding(condition: Condition, evidence: str, off: PerSample, eps: float) -> Finding | None:
    """The finding for samples whose difference exceeds rounding; the largest difference is put into `evidence`."""
    threshold = max(min(REPEATABLE * eps, 1e-4), _COARSE * eps)
    if not bool((off > threshold).any()):
        return None
    worst = float(off.nan_to_num(nan=-1).max())
    return Finding.of(condition, evidence.format(f"{worst:.1e}"), off > threshold, worst > _CERTAIN * threshold)
