"""Picard iteration: z' = damping z + (1 - damping) f(z), the naive iteration."""

from dataclasses import dataclass

import torch

from implicit.argument_types import check_fields
from implicit.pytree import Flat
from implicit.solvers.base import AbstractSolver, Point, check_share


@dataclass(frozen=True)
class Picard(AbstractSolver[None]):
    """z' = damping z + (1 - damping) f(z).

    With ``damping=0`` and no tolerance, n evaluations give exactly f applied n times. Converges where the spectral
    radius of (1 - damping) df/dz + damping I is below 1, by that factor per evaluation. Memory: no state.

    Args:
        damping: share of the old iterate kept, in [0, 1).
    """

    damping: float = 0.0

    def __post_init__(self) -> None:
        check_fields(self)
        check_share(self, "damping")

    def init(self, point: Point) -> None:
        return None

    def step(self, point: Point, state: None) -> tuple[Flat, None, None]:
        z = torch.lerp(point.fz, point.z, self.damping) if self.damping else point.fz
        return z, None, None
