"""The norms of an evaluated point on their way from the device to the host."""

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from implicit.solvers.base import Point
from implicit.stopping import Criterion


@dataclass
class Observation:
    """A point whose norms are on their way to the host."""

    point: Point
    rows: np.ndarray  # the samples it holds
    held: np.ndarray  # (rows,) those of them that were evaluated at their best iterate, finished ones among them
    calls: int
    sizes: tuple[Tensor, Tensor]  # norms of f(z) - z and f(z), on the host
    ready: "torch.cuda.Event | None"  # when they are there
    stopped: Tensor | None = None  # (rows,) where `Stop.when` holds


def fetch(criterion: Criterion, point: Point) -> tuple[tuple[Tensor, Tensor], "torch.cuda.Event | None"]:
    """The norms of f(z) - z and f(z) on their way to the host, and the event that marks their arrival."""
    r, fz = point.r, point.fz
    if r.requires_grad or fz.requires_grad:
        r, fz = r.detach(), fz.detach()
    sizes = criterion.measure(r), criterion.measure(fz)
    if fz.device.type == "cpu":
        return sizes, None
    r_size, fz_size = torch.stack(sizes).to("cpu", non_blocking=fz.is_cuda).unbind()
    if not fz.is_cuda:
        return (r_size, fz_size), None
    ready = torch.cuda.Event()
    ready.record()
    return (r_size, fz_size), ready


def as_array(host: Tensor) -> np.ndarray:
    """A host tensor as a float64 array."""
    return host.numpy().astype(np.float64)
