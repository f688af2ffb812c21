"""The norms of an evaluated point: copied from the device to the host, and compared with the tolerance there."""

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from implicit.pytree import to_host
from implicit.solvers.base import Point
from implicit.stopping import Criterion


class Norms:
    """The norms of f(z) - z and f(z), on their way to the host."""

    def __init__(self, sizes: tuple[Tensor, Tensor], ready: "torch.cuda.Event | None" = None) -> None:
        self._sizes = sizes
        self._ready = ready  # marks the arrival of `sizes`; None: they have arrived

    def arrived(self) -> tuple[Tensor, Tensor]:
        """The norms on the host. Waits for them: before their arrival the host's memory holds other numbers."""
        if self._ready is not None:
            self._ready.synchronize()
            self._ready = None
        return self._sizes


@dataclass
class Observation:
    """A point whose norms are being copied to the host."""

    point: Point
    rows: np.ndarray  # numbers of the samples in `point`
    held: np.ndarray  # (rows,) whether the sample was evaluated at its best iterate, as finished samples are
    calls: int  # number of the evaluation
    norms: Norms
    stopped: Tensor | None = None  # (rows,) where `Stop.when` is True; None without `when`
    read_early: np.ndarray | None = None  # (rows,) samples of which this point was read before the others

    @property
    def sizes(self) -> tuple[Tensor, Tensor]:
        """The norms of f(z) - z and f(z) on the host."""
        return self.norms.arrived()


def fetch(criterion: Criterion, point: Point) -> Norms:
    """The norms of f(z) - z and f(z), being copied to the host."""
    if criterion.whole_rows:  # norms that solvers use too
        sizes = point.r_size, point.fz_size
    else:
        sizes = criterion.measure(point.r.detach()), criterion.measure(point.fz.detach())
    if on_host(point.fz):
        return Norms(sizes)
    host, ready = copy_to_host(torch.stack(sizes))
    r_size, fz_size = host.unbind()
    return Norms((r_size, fz_size), ready)


def on_host(t: Tensor) -> bool:
    """Whether the host reads the tensor without a copy."""
    return t.device.type == "cpu"


def copy_to_host(t: Tensor) -> tuple[Tensor, "torch.cuda.Event | None"]:
    """A copy of `t` on the host, and the event that marks its arrival; None: it has arrived."""
    if not t.is_cuda:
        return t.to("cpu"), None
    host, ready = t.to("cpu", non_blocking=True), torch.cuda.Event()
    ready.record(torch.cuda.current_stream(t.device))
    return host, ready


def as_array(host: Tensor) -> np.ndarray:
    """A host tensor as a float64 array."""
    return host.numpy().astype(np.float64)


def compare(
    criterion: Criterion,
    point: Point,
    sizes: tuple[Tensor, Tensor],
    rows: np.ndarray,
    solved: np.ndarray | None = None,
) -> tuple[np.ndarray, ...]:
    """(residual, size, tolerance) of the samples `rows`; norms whose squares may be out of range are measured again.

    `solved` marks samples whose residual was 0 before: a norm of 0 is not measured again there.
    """
    r, s = as_array(sizes[0]), as_array(sizes[1])
    unsafe = [criterion.unsafe(size) for size in (r, s)]  # each by itself: r keeps its bits where f(z) is 0
    if solved is not None:
        for which in unsafe:
            which[solved & (r == 0 if r.ndim == 1 else (r == 0).all(axis=1))] = False
    if any(which.any() for which in unsafe):
        with torch.no_grad():
            again = [to_host(criterion.measure(x, scaled=True)) for x in (point.r.detach(), point.fz.detach())]
        r, s = np.where(unsafe[0], again[0], r), np.where(unsafe[1], again[1], s)
    first = criterion.first
    return criterion.compare(r, s, first[rows] if isinstance(first, np.ndarray) else first)


def absolute(
    criterion: Criterion, sizes: tuple[Tensor, Tensor], r: np.ndarray, s: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """||f(z) - z|| and ||f(z)|| of whole rows: r and s, or computed from `sizes` if r and s are relative to groups."""
    if criterion.grouped:
        with np.errstate(all="ignore"):
            r, s = (np.linalg.norm(as_array(x), axis=1) for x in sizes)
    return r, s


def set_first(criterion: Criterion, seen: Observation) -> None:
    """Set `criterion.first`, the norm of the first f(z), if it is not set yet."""
    if isinstance(criterion.first, np.ndarray):
        return
    s = as_array(seen.sizes[1])
    unsafe = criterion.unsafe(s)
    if unsafe.any():
        s = np.where(unsafe, to_host(criterion.measure(seen.point.fz.detach(), scaled=True)), s)
    criterion.first = np.where(np.isfinite(s), s, 0.0)


def of_every_sample(criterion: Criterion, seen: Observation, r: np.ndarray, size: int) -> np.ndarray:
    """(size,) residuals of all samples: r for the rows of `seen`, NaN for others; a joint row gives one per sample."""
    if criterion.joint > 1:
        apart, raw = criterion.apart(), [criterion.samples(as_array(t)) for t in seen.sizes]
        return apart.compare(raw[0], raw[1], apart.first)[0]
    full = np.full(size, np.nan)
    full[seen.rows] = r
    return full
