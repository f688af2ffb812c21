"""Samples of a trained network, by the choices of a recipe and, where it leaves them open, of a run."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

import implicit
from apps.diffusion.config.sampling import Recipe
from apps.diffusion.config.training import Config, Sampling
from apps.diffusion.models import build
from apps.diffusion.models.dit import DiT
from apps.diffusion.models.fpdm import FPDM
from apps.diffusion.sampling import iteration_budget as allocation
from apps.diffusion.sampling.guidance import Guidance
from apps.diffusion.sampling.sampler import CHUNK, SampleResult, Solve, sample
from apps.diffusion.sampling.warm_start import Reuse
from apps.diffusion.schedulers import noise_schedule as schedule
from apps.diffusion.schedulers.reverse_step import Reverse
from implicit import Stop

_SOLVERS = {
    "picard": implicit.Picard,
    "anderson": implicit.Anderson,
    "anderson-gs": implicit.AndersonGS,
    "broyden": implicit.Broyden,
}


@dataclass(frozen=True, kw_only=True)
class Plan:
    """The objects that a recipe means for one network; `sampler.sample` takes them by these names."""

    scheduler: Any
    timesteps: tuple[int, ...]
    eta: float
    guidance: Guidance
    solve: Solve | None

    def sample(
        self,
        model: nn.Module,
        indices: Sequence[int],
        labels: Sequence[int] | None,
        *,
        seed: int,
        chunk: int = CHUNK,
        device: torch.device | str = "cpu",
        progress: Callable[[int, int], None] | None = None,
    ) -> SampleResult:
        """Samples number `indices` of the stream `seed`; see `sampler.sample`."""
        return sample(
            model,
            indices,
            labels,
            seed=seed,
            scheduler=self.scheduler,
            timesteps=self.timesteps,
            eta=self.eta,
            guidance=self.guidance,
            solve=self.solve,
            chunk=chunk,
            device=device,
            progress=progress,
        )


def plan(model: DiT | FPDM, config: Config, recipe: Recipe) -> Plan:
    """What `recipe` means for a network that was trained by `config`.

    Raises:
        ValueError: choices that do not fit the network, its noise or each other, with what to do.
    """
    asked, recipe = recipe, recipe.filled(config.sampling)
    assert recipe.sampler is not None and recipe.guidance is not None
    guidance = Guidance(scale=recipe.guidance, channels=recipe.guidance_channels)
    if guidance.doubles and not model.num_classes:
        raise ValueError(
            f"--guidance {recipe.guidance:g} needs a network with classes, and this one knows none; leave it at 1."
        )
    if not isinstance(model, FPDM) and asked.of_fixed_point():
        raise ValueError(
            f"A DiT has no fixed point to solve; leave out {', '.join(asked.of_fixed_point())}, or take an FPDM."
        )
    walk = recipe.timesteps
    if not walk:
        steps = _steps(model, asked, guidance) or recipe.steps
        assert steps is not None and recipe.spacing is not None
        walk = schedule.timesteps(steps, recipe.spacing, config.schedule.timesteps)
    _check_walk(config, walk, recipe.spacing)
    scheduler = scheduler_of(config, recipe.sampler, recipe.spacing)
    Reverse(scheduler, walk, eta=recipe.eta)  # raises where they do not fit
    solve = solve_of(model, recipe, len(walk), guided=guidance.doubles) if isinstance(model, FPDM) else None
    return Plan(scheduler=scheduler, timesteps=walk, eta=recipe.eta, guidance=guidance, solve=solve)


def _check_walk(config: Config, walk: tuple[int, ...], spacing: str | None) -> None:
    """Raises ValueError where the walk does not begin where the noise is pure."""
    noise = config.schedule
    schedule.check_pair(noise.prediction, noise.zero_snr, spacing or "trailing")
    schedule.check_start(walk, noise.zero_snr, noise.timesteps)


def scheduler_of(config: Config, sampler: str, spacing: str | None = None) -> Any:
    """The scheduler by this name (`schedule.SAMPLERS`) for a network that was trained by `config`."""
    scheduler = build.scheduler(config, "ddpm")
    scheduler.register_to_config(timestep_spacing=spacing or config.sampling.spacing)
    return schedule.same_noise(scheduler, sampler)


def _steps(model: DiT | FPDM, recipe: Recipe, guidance: Guidance) -> int | None:
    """The number of steps by which a DiT spends a budget of block passes; None where nobody gave one."""
    if isinstance(model, FPDM) or recipe.block_passes is None:
        return None
    one = model.block_passes() * (2 if guidance.doubles else 1)
    steps, rest = divmod(recipe.block_passes, one)
    if rest or not steps or recipe.steps not in (None, steps):
        raise ValueError(
            f"A step of this DiT costs {one} block passes, so a budget of {recipe.block_passes} is not spent exactly"
            + (f" by {recipe.steps} steps" if recipe.steps else "")
            + f"; give a multiple of {one}, and leave out --steps."
        )
    return steps


def solve_of(model: FPDM, recipe: Recipe, steps: int, *, guided: bool) -> Solve:
    """How an FPDM solves at each of `steps` timesteps; `recipe` must be filled.

    Raises:
        ValueError: a list of another length, or a budget that is too small or cannot be spent exactly.
    """
    iterations: tuple[int, ...] | None = recipe.iterations
    stop: tuple[Stop, ...] | None = None
    if recipe.block_passes is not None:
        iterations = allocation.within_block_passes(model, recipe.block_passes, steps, recipe.allocation, guided=guided)
    elif recipe.macs is not None:
        iterations = allocation.within_macs(model, recipe.macs, steps, recipe.allocation, guided=guided)
    elif recipe.rtol:
        stop = tuple(Stop(rtol=r, atol=0.0, max_evals=recipe.max_evals) for r in recipe.rtol)
        stop, iterations = stop * steps if len(stop) == 1 else stop, None
    elif len(iterations or ()) == 1:
        iterations = allocation.spread(recipe.iterations[0] * steps, steps, recipe.allocation)
    options = {} if recipe.memory is None else {"memory": recipe.memory}
    solver = _SOLVERS[recipe.solver](**options)
    reuse = {
        "off": None,
        "on": Reuse(),
        "blended": Reuse(share=recipe.share),
        "extrapolated": Reuse(extrapolation=recipe.extrapolation),
    }[recipe.reuse or "off"]
    solve = Solve(iterations=iterations, stop=stop, solver=solver, reuse=reuse)
    solve.check(steps)
    return solve


def generate(
    model: Any,
    config: Config,
    sampling: Sampling,
    indices: Sequence[int],
    labels: Sequence[int] | None,
    seed: int,
    device: torch.device | str = "cpu",
    progress: Callable[[int, int], None] | None = None,
) -> SampleResult:
    """Samples number `indices` of the stream `seed`; `config` says how the network was trained.

    Raises:
        ValueError: guidance without labels, a class that the network does not know, impossible timesteps.
    """
    chosen = plan(model, dataclasses.replace(config, sampling=sampling), Recipe())
    return chosen.sample(model, indices, labels, seed=seed, device=device, progress=progress)
