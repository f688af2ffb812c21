"""From sampling options to the arguments of the sampling loop: scheduler, timesteps, guidance, iterations, warm start.

The training summary, the sampling command and the pipeline call `plan`. This file checks class labels too.
"""

import copy
import operator
import unicodedata
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any, cast

from diffusers.schedulers.scheduling_ddim import DDIMScheduler

from apps.diffusion.config.network import check_zero_snr
from apps.diffusion.config.sampling import OptionError, SamplingOptions, Spacing
from apps.diffusion.files.names import first_names
from apps.diffusion.models.dit import DiT
from apps.diffusion.models.fpdm import FPDM
from apps.diffusion.sampling import iteration_budget
from apps.diffusion.sampling.guidance import Guidance
from apps.diffusion.sampling.parallel import Parallel
from apps.diffusion.sampling.residual_curves import ResidualCurves, measure
from apps.diffusion.sampling.sampler import CHUNK, SamplingPlan, Solve
from apps.diffusion.sampling.warm_start import Reuse, reuse_rule
from apps.diffusion.schedulers.noise_levels import is_flow, starts_at_noise
from apps.diffusion.schedulers.noise_schedule import same_noise
from apps.diffusion.schedulers.reverse_step import Reverse
from apps.diffusion.schedulers.timesteps import check_start, timesteps
from implicit import Stop


@dataclass(frozen=True, kw_only=True)
class MeasuredPlan(SamplingPlan):
    """A plan whose iterations are allocated by the residual curves `curves`."""

    curves: ResidualCurves


def plan(
    model: DiT | FPDM,
    scheduler: Any,
    options: SamplingOptions,
    *,
    defaults: SamplingOptions = SamplingOptions(),
    stop: Stop | Sequence[Stop] | None = None,
    warm_start: Reuse | None = None,
    curves: ResidualCurves | None = None,
    chunk: int = CHUNK,
) -> SamplingPlan:
    """The arguments of the sampling loop for a network and these options.

    Args:
        model: the network.
        scheduler: a diffusers scheduler with the network's noise schedule; it is the sampler if no sampler is given.
        options: the options that the caller gives.
        defaults: options of the run or of the pipeline, for the options that the caller leaves open.
        stop: stopping criterion of all timesteps, or one per timestep, instead of iterations. None: as the options say.
        warm_start: rule for the start of each solve, instead of `options.reuse`. None: as the options say.
        curves: residual curves of an earlier plan, for `allocation` measured. None: the curves are measured.
        chunk: number of images in one call of the network while curves are measured.

    Raises:
        OptionError: an option does not fit the network or another option.
        ValueError: the scheduler cannot follow the timesteps, or the budget cannot be spent.
    """
    given = [*options.fixed_point_options(), *(["stop"] if stop is not None else [])]
    given += ["reuse"] if warm_start is not None and "reuse" not in given else []
    if given and not model.has_fixed_point:
        names = ", ".join(f"{{{i}}}" for i in range(len(given)))
        raise OptionError(f"A DiT has no fixed-point layer; leave out {names}, or use an FPDM.", *given)
    steps, options = options.steps, options.over(defaults)
    guidance = _guidance(model, options)
    # read before the sampler is made, whose class may have no spacing (dpm++-single, flow)
    spacing = options.spacing or scheduler.config.get("timestep_spacing", options.value("spacing"))
    scheduler = _scheduler(scheduler, options)
    visited = options.timesteps or _timesteps(model, scheduler, options, guidance, steps, spacing)
    noise, zero_snr = scheduler.config, starts_at_noise(scheduler)
    if not options.timesteps and not is_flow(scheduler):
        check_zero_snr(zero_snr, noise["prediction_type"], spacing)
    check_start(visited, zero_snr, noise["num_train_timesteps"])
    reverse = Reverse(scheduler, visited, eta=options.value("eta"))  # raises if timesteps or eta do not fit
    solve = _solve(model, options, len(visited), guidance, stop, warm_start) if model.has_fixed_point else None
    found = SamplingPlan(
        scheduler=scheduler,
        timesteps=visited,
        eta=options.value("eta"),
        guidance=guidance,
        solve=solve,
        parallel=_parallel(options, reverse, solve),
    )
    if solve is None or stop is not None or options.value("allocation") != "measured":
        return found
    return _measured(cast("FPDM", model), options, found, curves, chunk)


def _guidance(model: DiT | FPDM, options: SamplingOptions) -> Guidance:
    """The classifier-free guidance of the options.

    Raises:
        OptionError: guidance is given for a network without classes, an interval is given without guidance, or more
            channels are guided than the image has.
    """
    guidance = Guidance(
        scale=options.value("guidance"), channels=options.guidance_channels, interval=options.guidance_interval
    )
    if guidance.doubles and not model.num_classes:
        raise OptionError(f"{{0}} = {guidance.scale:g} needs a network with classes; leave {{0}} at 1.", "guidance")
    if guidance.interval is not None and not guidance.doubles:
        raise OptionError("{0} needs {1} other than 1; give both, or leave {0} out.", "guidance_interval", "guidance")
    if guidance.channels is not None and guidance.channels > (most := model.latent[0]):
        raise OptionError(f"{{0}} = {guidance.channels} exceeds the {most} channels of the image.", "guidance_channels")
    return guidance


def _scheduler(scheduler: Any, options: SamplingOptions) -> Any:
    """The scheduler with the sampler and the spacing of the options.

    Raises:
        OptionError: the spacing or eta does not fit the sampler.
    """
    if is_flow(scheduler) and options.spacing not in (None, "trailing"):
        raise OptionError(f"{{0}} {options.spacing} does not fit a rectified flow; use trailing.", "spacing")
    if options.spacing is not None and not is_flow(scheduler):
        scheduler = copy.deepcopy(scheduler)
        scheduler.register_to_config(timestep_spacing=options.spacing)
    scheduler = scheduler if options.sampler is None else same_noise(scheduler, options.sampler)
    if options.value("eta") and not isinstance(scheduler, DDIMScheduler):
        raise OptionError(
            f"{{0}} = {options.eta:g} is for ddim; leave {{0}} out, or give {{1}} ddim.", "eta", "sampler"
        )
    return scheduler


def _parallel(options: SamplingOptions, reverse: Reverse, solve: Solve | None) -> Parallel | None:
    """The options of parallel-in-time sampling; None: one timestep after another.

    Raises:
        OptionError: the scheduler carries a state from timestep to timestep.
        ValueError: the solves of the timesteps differ, or start from the solution of another timestep.
    """
    if options.parallel is None:
        return None
    if not reverse.closed_form:
        raise OptionError(
            f"{{0}} is for ddim, ddpm and flow; {type(reverse.scheduler).__name__} carries a state from timestep to "
            "timestep. Leave {0} out, or give {1} ddim.",
            "parallel",
            "sampler",
        )
    if solve is not None:
        solve.alike()
    rtol = Parallel.rtol if options.parallel_rtol is None else options.parallel_rtol
    return Parallel(solver=options.parallel, rtol=rtol, window=options.window)


def _measured(
    model: FPDM, options: SamplingOptions, found: SamplingPlan, curves: ResidualCurves | None, chunk: int
) -> SamplingPlan:
    """The plan `found` with its total number of iterations, or a budget in seconds, allocated by residual curves."""
    assert found.solve is not None
    steps, counts = len(found.timesteps), found.solve.iterations
    total = sum(counts) if isinstance(counts, Sequence) else None  # None: the budget is in seconds
    if curves is None or curves.timesteps != found.timesteps:
        each = 10 if total is None else -(-total // steps)
        curves = measure(model, replace(found, parallel=None), iterations=max(8, 3 * each), chunk=chunk)
    if total is None:
        total = curves.within_seconds(options.value("seconds"))
    solve = replace(found.solve, iterations=curves.allocate(total))
    return MeasuredPlan(**{**vars(found), "solve": solve, "curves": curves})


def _timesteps(
    model: DiT | FPDM, scheduler: Any, options: SamplingOptions, guidance: Guidance, given: int | None, spacing: Spacing
) -> tuple[int, ...]:
    """The timesteps by number and spacing. For a DiT, a budget of block passes determines the number; `given` is the
    number that the caller gives.
    """
    steps, budget = options.value("steps"), options.block_passes
    if budget is not None and not model.has_fixed_point:
        each = model.block_passes() * (2 if guidance.doubles else 1)
        if budget % each or not budget:
            raise OptionError(
                f"{{0}} = {budget} cannot be spent exactly, because a timestep of this DiT costs {each} block passes; "
                f"give a multiple of {each}.",
                "block_passes",
            )
        if given not in (None, budget // each):
            message = f"{{0}} = {budget} means {budget // each} timesteps; leave out {{1}}."
            raise OptionError(message, "block_passes", "steps")
        steps = budget // each
    most = scheduler.config["num_train_timesteps"]
    if steps > most:
        raise OptionError(f"{{0}} = {steps} exceeds the {most} timesteps of the noise schedule; take fewer.", "steps")
    return timesteps(steps, spacing, most)


def _solve(
    model: Any,
    options: SamplingOptions,
    steps: int,
    guidance: Guidance,
    stop: Stop | Sequence[Stop] | None,
    warm_start: Reuse | None,
) -> Solve:
    """The solves of an FPDM at `steps` timesteps."""
    iterations: tuple[int, ...] | None = options.iterations or None
    allocation, guided = options.value("allocation"), guidance.doubles
    allocation = "constant" if allocation == "measured" else allocation  # `_measured` replaces the iterations later
    if stop is not None or options.seconds is not None:
        iterations = None
    elif options.block_passes is not None:
        budget = options.block_passes
        iterations = iteration_budget.within_block_passes(model, budget, steps, allocation, guided=guided)
    elif options.macs is not None:
        iterations = iteration_budget.within_macs(model, options.macs, steps, allocation, guided=guided)
    elif options.rtol:
        _check_entries("rtol", options.rtol, steps)
        stop = tuple(Stop(rtol=r, atol=0.0, max_evals=options.value("max_evals")) for r in options.rtol)
        stop = stop * steps if len(stop) == 1 else stop
    elif len(options.iterations) <= 1:
        each = options.iterations[0] if options.iterations else int(model.config["iterations"])
        iterations = iteration_budget.spread(each * steps, steps, allocation)
    else:
        _check_entries("iterations", options.iterations, steps)
    named = reuse_rule(options.value("reuse"), options.value("share"), options.value("extrapolation"))
    reuse = named if warm_start is None else warm_start
    solve = Solve(iterations=iterations, stop=stop, solver=options.value("solver"), reuse=reuse)
    solve.check(steps)
    return solve


def _check_entries(name: str, values: Sequence[float], steps: int) -> None:
    if len(values) not in (1, steps):
        raise OptionError(
            f"{{0}} has {len(values)} entries for {steps} timesteps; give one entry, or one for each timestep.", name
        )


def as_number(name: str, value: Any) -> float:
    """A number of Python, numpy or torch as a float.

    Raises:
        ValueError: the value is no number.
    """
    try:
        if not isinstance(value, str | bool):
            return float(value)
    except (TypeError, ValueError, RuntimeError):
        pass
    raise ValueError(f"{name}={value!r} is no number; give a number.")


def as_integer(name: str, value: Any, least: int | None = None) -> int:
    """A whole number of Python, numpy or torch as an int.

    Raises:
        ValueError: the value is no whole number, or is below `least`.
    """
    try:
        number = operator.index(value)
    except (TypeError, ValueError):
        raise ValueError(f"{name}={value!r} is no whole number; give a whole number.") from None
    if isinstance(value, bool) or (least is not None and number < least):
        raise ValueError(f"{name}={value!r} must be a whole number, at least {least or 0}.")
    return number


def as_integers(name: str, value: Any, least: int | None = None) -> tuple[int, ...]:
    """A whole number, or a list, array or tensor of whole numbers, as a tuple."""
    if getattr(value, "ndim", 1) and isinstance(value, Iterable):
        return tuple(as_integer(name, each, least) for each in value)
    return (as_integer(name, value, least),)


def class_numbers(
    name: str, given: Iterable[Any], num_classes: int, names: Sequence[str] = (), *, null: bool = True
) -> list[int]:
    """Numbers of the classes that are given by number or by name.

    Args:
        name: the flag or keyword, for messages.
        given: numbers or names of classes.
        num_classes: number of classes of the network.
        names: names of the classes; empty if the classes have no names.
        null: whether the number `num_classes`, the null class, is allowed.

    Raises:
        ValueError: a class does not exist.
    """
    numbers = []
    # NFC: file systems may store an accent as a character of its own
    composed = [unicodedata.normalize("NFC", known) for known in names]
    for each in given:
        text = each if isinstance(each, str) else ""
        if text not in names and (same := unicodedata.normalize("NFC", text)) in composed:
            text = names[composed.index(same)]
        number = names.index(text) if text in names else int(text) if text.isdecimal() else each
        if isinstance(number, str) or not 0 <= as_integer(name, number) < num_classes + null:
            known = f"0 to {num_classes - 1}" + (f", or {first_names(names, len(names))}" if names else "")
            raise ValueError(f"{name} {each!r} does not exist; the classes are {known}.")
        numbers.append(as_integer(name, number))
    return numbers


def labels_for(given: Any, count: int | None, num_classes: int, names: Sequence[str] = ()) -> list[int] | None:
    """The class of each image; None for an unconditional network.

    Args:
        given: one class for all images, or one class for each image.
        count: number of images; None: one image for each class that is given.
        num_classes: number of classes of the network.
        names: names of the classes; empty if the classes have no names.

    Raises:
        ValueError: the classes do not fit the network, or their number differs from `count`.
    """
    count = None if count is None else as_integer("num_images", count, 1)
    if num_classes == 0:
        if given is not None:
            raise ValueError("This network is unconditional; leave class_labels out, and give num_images.")
        return None
    if given is None:
        raise ValueError(f"class_labels are missing: give the class of each image, 0 to {num_classes - 1}.")
    one = isinstance(given, str) or not (getattr(given, "ndim", 1) and isinstance(given, Iterable))
    labels = class_numbers("class_labels", [given] if one else given, num_classes, names)
    if one:
        return labels * (count or 1)
    if not labels or (count is not None and len(labels) != count):
        raise ValueError(f"There are {len(labels)} class_labels for num_images={count or 0}; give one for each image.")
    return labels
