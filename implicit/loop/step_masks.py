"""Which step each evaluated sample takes next, as masks on the device."""

from collections.abc import Callable

import numpy as np
import torch
from jaxtyping import Bool
from torch import Tensor

from implicit.loop.best_iterates import BestIterates
from implicit.pytree import Flat
from implicit.solvers.base import Point
from implicit.staged_safeguard import Stage, StagedSafeguard

Mask = Bool[Tensor, "rows 1"]


class StepMasks:
    """(rows, 1) tensors; None if all samples take the solver's step.

    Attributes:
        running: samples that have not finished; the others are frozen at their best iterates.
        plain: samples that the safeguard has set to plain steps z' = f(z).
        newton: samples in the safeguard's Newton-Krylov stage.
        scale: the share of the next step that a sample takes, at most 1.
        at_start: samples that are evaluated at z0 next.
    """

    def __init__(self) -> None:
        self.running: Mask | None = None
        self.plain: Mask | None = None
        self.newton: Mask | None = None
        self.scale: Tensor | None = None
        self.at_start: Mask | None = None

    def set_stages(self, safeguard: StagedSafeguard, to_mask: Callable[[np.ndarray], Mask]) -> None:
        """Copy the stages of the safeguard to the device."""
        plain, newton = safeguard.on(Stage.PLAIN), safeguard.on(Stage.NEWTON)
        self.plain = to_mask(plain) if self.plain is not None or plain.any() else None
        self.newton = to_mask(newton) if newton.any() else None

    def apply(self, z: Flat, point: Point, best: BestIterates, rows: np.ndarray) -> Flat:
        """The next iterate of the samples `rows`, where z is the solver's; `at_start` and `scale` hold for one step."""
        if self.plain is not None:
            z = torch.where(self.plain, point.fz, z)
        if self.at_start is not None:
            z, self.at_start = torch.where(self.at_start, best.start_of(rows), z), None
        if self.scale is not None:
            z = torch.where(self.scale < 1, torch.lerp(point.z, z, self.scale), z)
            # a Newton-Krylov sample stays at its z while GMRES runs, so its share is kept until it takes the step
            self.scale = None if self.newton is None else torch.where(self.newton, self.scale, 1)
        if self.running is not None:
            z = torch.where(self.running, z, best.of(rows).z)
        return z
