"""Optional terms of an FPDM's training loss, for a fixed point that few iterations solve.

With f the fixed-point layer, x its start without noise, z the solution, D the blocks after the layer (prediction =
D(z)) and sg the stop of the gradient:

    residual   mean ||f(z) - z||^2 / ||z||^2        a terminal fixed-point loss: the residual of the last iterate z
    jacobian   mean ||df/dz||_F^2 / N at z          Bai et al. 2021, arXiv 2106.14342 (implicit.diagnostics)
    early      mean (D(f(x)) - sg D(z))^2           any-time training: the prediction after one iteration learns the
                                                    prediction from the solution (self-distillation, arXiv 2604.09168)
    reuse      mean (D(f(z_s)) - sg D(z))^2         consistency across timesteps: like `early`, but the iteration starts
                                                    from the solution z_s at a noisier timestep s of the same image and
                                                    noise, as in sampling that reuses solutions (arXiv 2401.08741)

s is t + 1 + floor(u T / 10), u uniform in [0, 1), at most T - 1; this range covers the distance of successive timesteps
in sampling with ten timesteps or more. With noise of scale c at the start (Huang et al. 2026, arXiv 2605.21488, random
initialization), a training solve starts from

    z_0 = x + c rms(x) n,      n ~ N(0, 1)

so that training visits iterates beside the path from x to the solution.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor

from apps.diffusion.rng import Stream, normal, uniform
from implicit.diagnostics import jacobian_penalty

Map = Callable[[Tensor], Tensor]


@dataclass(frozen=True, kw_only=True)
class Penalties:
    """The weighted sum of the terms above, for `FPDM.forward(penalty=...)`.

    Args:
        residual: weight of the term `residual`.
        jacobian: weight of the term `jacobian`.
        early: weight of the term `early`.
        reuse: weight of the term `reuse`.
        earlier: (B, T, D) z_s; None is allowed if `reuse` is 0.
        generator: random numbers of the probes in the term `jacobian`.
    """

    residual: float = 0.0
    jacobian: float = 0.0
    early: float = 0.0
    reuse: float = 0.0
    earlier: Float[Tensor, "B T D"] | None = None
    generator: torch.Generator

    def __call__(self, f: Map, decode: Map, fresh: Tensor, z: Tensor, prediction: Tensor) -> Tensor:
        """The sum, a scalar with its graph.

        Args:
            f: the fixed-point layer.
            decode: D.
            fresh: (B, T, D) x.
            z: (B, T, D) the solution.
            prediction: (B, C, H, W) D(z).
        """
        total = prediction.new_zeros(())
        if self.residual:
            gap = (f(z) - z).square().flatten(1).sum(1)
            total = total + self.residual * (gap / z.square().flatten(1).sum(1)).mean()
        if self.jacobian:
            total = total + self.jacobian * jacobian_penalty(f, z.detach(), generator=self.generator).mean()
        if self.early:
            total = total + self.early * (decode(f(fresh)) - prediction.detach()).square().mean()
        if self.reuse:
            assert self.earlier is not None
            total = total + self.reuse * (decode(f(self.earlier)) - prediction.detach()).square().mean()
        return total


def earlier_timesteps(
    seed: int, positions: Int[Tensor, " B"], t: Int[Tensor, " B"], timesteps: int
) -> Int[Tensor, " B"]:
    """The timesteps s above.

    Args:
        seed: the run's seed.
        positions: (B,) number of each image in the run.
        t: (B,) timestep of each image.
        timesteps: T, the number of timesteps of the schedule.
    """
    gap = 1 + (uniform(seed, Stream.EARLIER, positions, 1)[:, 0] * timesteps / 10).long()
    return (t + gap).clamp(max=timesteps - 1)


@dataclass(frozen=True, kw_only=True)
class NoisyStart:
    """The start with noise above, for `FPDM.forward(start=...)`.

    Args:
        scale: c.
        seed: the run's seed.
        positions: (B,) number of each image in the run, on the device of x; the noise of an image depends on it.
    """

    scale: float
    seed: int
    positions: Int[Tensor, " B"]

    def __call__(self, fresh: Tensor) -> Tensor:
        """z_0 for the start without noise x (B, T, D)."""
        noise = normal(self.seed, Stream.START, self.positions, fresh.shape[1:]).to(fresh.dtype)
        return fresh + self.scale * fresh.square().mean(dim=(1, 2), keepdim=True).sqrt() * noise
