"""What a call of the pipeline asks for, checked: whole numbers, classes, timesteps, and how an FPDM solves.

Whole numbers may be those of Python, numpy or torch; a fraction is refused.
"""

from __future__ import annotations

import operator
from collections.abc import Iterable, Sequence
from typing import Any, get_args

from apps.diffusion.models.dit import DiT
from apps.diffusion.models.fpdm import FPDM
from apps.diffusion.sampling.iteration_budget import Shape, spread, within_block_passes, within_macs
from apps.diffusion.sampling.sampler import Solve
from apps.diffusion.sampling.warm_start import Reuse
from apps.diffusion.schedulers import noise_schedule as schedule
from implicit import AbstractSolver, Stop


def whole(name: str, value: Any, least: int | None = None) -> int:
    """The whole number that is meant.

    Raises:
        ValueError: it is none, or below `least`.
    """
    try:
        number = operator.index(value)
    except (TypeError, ValueError):
        raise ValueError(f"{name}={value!r} is no whole number; give one.") from None
    if isinstance(value, bool) or (least is not None and number < least):
        raise ValueError(f"{name}={value!r} must be a whole number, at least {least or 0}.")
    return number


def one_or_several(name: str, value: Any, least: int | None = None) -> int | tuple[int, ...]:
    """One whole number, or a tuple of those in a list, an array or a tensor."""
    if getattr(value, "ndim", 1) and isinstance(value, Iterable):
        return tuple(whole(name, each, least) for each in value)
    return whole(name, value, least)


def labels_for(given: int | Sequence[int] | None, count: int | None, num_classes: int) -> list[int] | None:
    """The class of each of `count` images, from one for all or one for each; None for an unconditional network.

    Raises:
        ValueError: they do not fit the network or each other.
    """
    count = None if count is None else whole("num_images", count)
    if count is not None and count < 1:
        raise ValueError(f"num_images={count} asks for nothing; give at least 1.")
    if num_classes == 0:
        if given is not None:
            raise ValueError("This network knows no classes; leave out class_labels, and say num_images.")
        return None
    if given is None:
        raise ValueError(f"This network wants a class for each image: give class_labels from 0 to {num_classes - 1}.")
    found = one_or_several("class_labels", given)
    labels = [found] * (count or 1) if isinstance(found, int) else list(found)
    if count is not None and len(labels) != count:
        raise ValueError(f"There are {len(labels)} class_labels for num_images={count}; give one for each.")
    wrong = [y for y in labels if not 0 <= y <= num_classes]
    if wrong or not labels:
        raise ValueError(
            f"class_labels={labels} must name classes from 0 to {num_classes - 1}, or {num_classes} for no class."
        )
    return labels


def walk_of(scheduler: Any, own: int, steps: int | None, timesteps: Sequence[int] | None) -> tuple[int, ...]:
    """The timesteps of a call: as many as it says, or else as the pipeline does (`own`), or these themselves.

    Raises:
        ValueError: both, none at all, or a start where the noise is not pure, though the network knows that.
    """
    config = scheduler.config
    total = config["num_train_timesteps"]
    if timesteps is None:
        n = whole("num_inference_steps", own if steps is None else steps, 1)
        return schedule.timesteps(n, config["timestep_spacing"], total)
    if steps is not None:
        raise ValueError("timesteps stands instead of num_inference_steps; give one of them.")
    walk = one_or_several("timesteps", timesteps, 0)
    if isinstance(walk, int) or not walk:
        raise ValueError(f"timesteps={timesteps!r} must be a list of the timesteps to visit, falling, or left out.")
    schedule.check_start(walk, bool(config.get("rescale_betas_zero_snr")), total)
    return walk


def solve_of(
    model: DiT | FPDM,
    own: int | None,
    steps: int,
    *,
    guided: bool,
    iterations: Any,
    block_passes: int | None,
    macs: float | None,
    allocation: Shape,
    stop: Stop | Sequence[Stop] | None,
    solver: AbstractSolver[Any] | None,
    reuse: bool | Reuse,
) -> Solve:
    """How an FPDM solves at each of `steps` timesteps; `own` iterations where the call says nothing.

    Raises:
        ValueError: choices that exclude each other, do not fit, or mean nothing to a DiT.
    """
    counts = {"iterations": iterations, "block_passes": block_passes, "macs": macs, "stop": stop}
    several = [name for name, value in counts.items() if value is not None]
    if len(several) > 1:
        raise ValueError(f"{', '.join(several)} say the same thing in different ways; give one of them.")
    if allocation not in get_args(Shape):
        raise ValueError(f"allocation={allocation!r} is unknown; choose one of {', '.join(get_args(Shape))}.")
    if not isinstance(model, FPDM):
        others = {"allocation": allocation != "constant", "solver": solver is not None, "reuse": reuse}
        named = several + [name for name, given in others.items() if given]
        if named:
            raise ValueError(f"{', '.join(named)}: a DiT has no fixed point to solve; leave it out, or load an FPDM.")
        return Solve()
    if block_passes is not None:
        budget = whole("block_passes", block_passes, 1)
        iterations = within_block_passes(model, budget, steps, allocation, guided=guided)
    elif macs is not None:
        iterations = within_macs(model, macs, steps, allocation, guided=guided)
    elif stop is None:
        iterations = own if iterations is None else one_or_several("iterations", iterations, 1)
    if allocation != "constant" and block_passes is None and macs is None:
        if stop is not None or isinstance(iterations, tuple):
            raise ValueError("allocation shares out a budget; a list of iterations and a stop leave none to share.")
        each = model.config["iterations"] if iterations is None else iterations
        iterations = spread(each * steps, steps, allocation)
    start = (Reuse() if reuse else None) if isinstance(reuse, bool) else reuse
    return Solve(iterations=iterations, stop=stop, solver=solver, reuse=start)
