"""Iterations per timestep from measured residual curves, under a budget.

A few trajectories are sampled with J iterations at every timestep, and r_k(j) is the mean relative residual
||f(z) - z|| / ||f(z)|| of the j-th iteration at timestep k. At most `total` iterations are allocated as

    argmin sum_k r_k(j_k)   subject to   sum_k j_k <= total,   1 <= j_k <= J,

found exactly by dynamic programming over the timesteps: with V_0 = 0,

    V_k(b) = min_j r_k(j) + V_{k-1}(b - j).

For convex decreasing curves the result is that of the greedy rule, which gives each further iteration to the timestep
whose residual it reduces most.
"""

from dataclasses import dataclass, fields, replace
from typing import Any

import numpy as np

from apps.diffusion.config.serialization import from_plain
from apps.diffusion.models.fpdm import FPDM
from apps.diffusion.sampling.sampler import CHUNK, SamplingPlan, Solve, sample


@dataclass(frozen=True, kw_only=True)
class ResidualCurves:
    """Measured residual curves.

    Attributes:
        timesteps: the K timesteps, from the noisiest on.
        residuals: K curves r_k; each has J mean relative residuals, one for each iteration.
        seconds: seconds per image without the iterations, and seconds per image of one iteration at every timestep.
        images: number of images whose trajectories were measured.
    """

    timesteps: tuple[int, ...]
    residuals: tuple[tuple[float, ...], ...]
    seconds: tuple[float, float]
    images: int

    @classmethod
    def from_json(cls, plain: dict[str, Any]) -> "ResidualCurves":
        """The curves in a JSON object.

        Raises:
            KeyError, ValueError: the object does not hold curves.
        """
        values = {field.name: plain[field.name] for field in fields(cls)}
        return from_plain(cls, {"type": cls.__name__, **values}, "curves")

    def allocate(self, total: int) -> tuple[int, ...]:
        """The allocation j_1 ... j_K above of at most `total` iterations.

        Raises:
            ValueError: `total` is smaller than the number of timesteps.
        """
        curves = np.array(self.residuals)
        steps, most = curves.shape
        if total < steps:
            raise ValueError(
                f"{total} iterations are fewer than one for each of {steps} timesteps; raise the budget or take fewer "
                "steps."
            )
        total = min(total, steps * most)
        value, choices = np.zeros(total + 1), np.zeros((steps, total + 1), dtype=int)
        for k in range(steps):
            options = np.full((most, total + 1), np.inf)
            for j in range(1, min(most, total) + 1):
                options[j - 1, j:] = curves[k, j - 1] + value[: total + 1 - j]
            choices[k], value = options.argmin(axis=0) + 1, options.min(axis=0)
        chosen, left = [], total
        for k in reversed(range(steps)):
            chosen.append(int(choices[k, left]))
            left -= chosen[-1]
        return tuple(reversed(chosen))

    def within_seconds(self, seconds: float) -> int:
        """The number of iterations per image, summed over the timesteps, that take at most `seconds`.

        Raises:
            ValueError: one iteration at every timestep takes longer than `seconds`.
        """
        steps, (rest, each) = len(self.timesteps), self.seconds
        total = int((seconds - rest) / each * steps)
        if total < steps:
            raise ValueError(
                f"A budget of {seconds:.3g} seconds is too small for {steps} timesteps: with one iteration each an "
                f"image takes {rest + each:.3g} seconds. Raise the budget to at least that, or take fewer steps."
            )
        return total


def measure(
    model: FPDM,
    plan: SamplingPlan,
    *,
    iterations: int,
    images: int = 8,
    chunk: int = CHUNK,
) -> ResidualCurves:
    """The residual curves of J = `iterations` iterations, measured by sampling images 0 ... `images` - 1 of seed 0.

    The images cycle through the classes. Sampling uses `plan` with another number of iterations.
    """
    labels = [i % model.num_classes for i in range(images)] if model.num_classes else None
    own = plan.solve or Solve()

    def sampled(count: int) -> Any:
        solve = replace(own, iterations=count, stop=None, trace=True)
        return sample(
            model,
            range(images),
            labels,
            plan=replace(plan, solve=solve),
            seed=0,
            chunk=chunk,
            reproducible=False,
            device=model.device,
        ).effort

    one, many = sampled(1), sampled(iterations)
    each = max(many.seconds - one.seconds, 1e-9) / max(iterations - 1, 1) / images
    rest = max(one.seconds / images - each, 0.0)
    curves = many.traces.double().mean(0).tolist()
    return ResidualCurves(
        timesteps=tuple(plan.timesteps),
        residuals=tuple(tuple(curve) for curve in curves),
        seconds=(rest, each),
        images=images,
    )
