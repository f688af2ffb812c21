"""Sampling options: one class for the training configuration, the sampling command and the pipeline's keywords.

An option that is None is left open: `over` fills it from the options of the run or of the pipeline, and `DEFAULTS` has
the value if those leave it open too. `sampling/plan.py` turns the options into the arguments of the sampling loop.
"""

import dataclasses
from collections.abc import Callable, Collection
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, ClassVar, Literal

import implicit
from apps.diffusion.config.fixed_point import Solver

Sampler = Literal["ddim", "ddpm", "dpm++", "dpm++-single", "unipc", "lms", "euler", "euler-ancestral", "flow"]
Spacing = Literal["trailing", "linspace", "leading"]
Allocation = Literal["constant", "increasing", "decreasing", "measured"]
Start = Literal["off", "on", "blended", "extrapolated", "history"]
ParallelSolver = Literal["picard", "anderson"]

DEFAULTS: dict[str, Any] = {
    "sampler": "ddim",
    "eta": 0.0,
    "steps": 20,
    "spacing": "trailing",
    "guidance": 1.0,
    "allocation": "constant",
    "max_evals": 50,
    "solver": implicit.Picard(),
    "reuse": "off",
    "share": 0.5,
    "extrapolation": 1.0,
}
_COUNTS = ("iterations", "block_passes", "macs", "seconds", "rtol")
_FIXED_POINT = {"iterations", "macs", "seconds", "allocation", "rtol", "max_evals", "solver"}
_FIXED_POINT |= {"reuse", "share", "extrapolation"}
# (leading options, group): if a leading option is given, the run's or pipeline's options of the group are dropped
_GROUPS = (
    (("sampler",), ("sampler", "eta")),
    (("timesteps",), ("timesteps", "steps", "spacing")),
    (("steps", "spacing"), ("timesteps",)),
    (_COUNTS, (*_COUNTS, "max_evals", "allocation")),
    (("reuse",), ("reuse", "share", "extrapolation")),
    (("guidance",), ("guidance_interval",)),
    (("parallel",), ("parallel", "parallel_rtol", "window")),
)


class OptionError(ValueError):
    """An option out of range, or options that exclude each other.

    Attributes:
        message: format string with a field {0}, {1}, ... for the name of each option.
        names: names of these options.
    """

    def __init__(self, message: str, *names: str) -> None:
        self.message, self.names = message, names
        super().__init__(self.spelled(str))

    def spelled(self, name: Callable[[str], str]) -> str:
        """The message, in which `name` turns the names of options into flags or keywords."""
        return self.message.format(*map(name, self.names))


@dataclass(frozen=True, kw_only=True)
class SamplingOptions:
    """Options of sampling; an option that is None takes the value of the training run or pipeline, or the default.

    Raises:
        OptionError: a value out of range, or two options that exclude each other.
    """

    SECTION: ClassVar[str] = "sampling"

    sampler: Sampler | None = None
    """ddim: deterministic; ddpm: ancestral; dpm++: second order; flow: Euler's steps, the only sampler of a rectified
    flow; the other names are diffusers' schedulers. Default: ddim, or flow for a rectified flow.
    """
    eta: float | None = None
    """Stochasticity of ddim, 0 (deterministic) to 1 (ddpm). Default: 0."""
    steps: int | None = None
    """Number of timesteps. Default: 20."""
    spacing: Spacing | None = None
    """Spacing of the timesteps: trailing includes the noisiest timestep, linspace both ends, leading the cleanest one.
    Default: trailing.
    """
    timesteps: tuple[int, ...] = ()
    """Explicit timesteps, decreasing, instead of `steps` and `spacing`."""
    guidance: float | None = None
    """Scale of classifier-free guidance. Default: 1, no guidance."""
    guidance_channels: int | None = None
    """Number of image channels that are guided, counted from the first (3 in the published DiT). Default: all."""
    guidance_interval: tuple[int, int] | None = None
    """Lowest and highest timestep with guidance, such as 200 800, both included; a timestep outside has no guidance and
    costs half (arXiv 2404.07724). Default: all timesteps have guidance.
    """
    iterations: tuple[int, ...] = ()
    """Iterations of the fixed-point layer: one number for all timesteps, or one number per timestep; FPDM only.
    Default: the number in the network's configuration.
    """
    block_passes: int | None = None
    """Budget per image in evaluations of a transformer block, instead of iterations. The budget is spent exactly."""
    macs: float | None = None
    """Budget per image in multiply-accumulates, such as 5.9e11, instead of iterations; FPDM only."""
    seconds: float | None = None
    """Budget per image in seconds on this machine, instead of iterations; needs allocation measured. FPDM only."""
    allocation: Allocation | None = None
    """Distribution of a budget, or of iterations times timesteps, over the timesteps: constant; increasing or
    decreasing from the noisiest timestep on; or measured, by the residuals of a few trajectories, which may leave some
    of the budget. FPDM only. Default: constant.
    """
    rtol: tuple[float, ...] = ()
    """Relative tolerance of the solves, instead of iterations: one for all timesteps, or one per timestep. Each image
    stops on its own. FPDM only.
    """
    max_evals: int | None = None
    """Maximum evaluations of the fixed-point layer per timestep if `rtol` is given; FPDM only. Default: 50."""
    solver: Solver | None = None
    """Solver of the fixed-point layer; FPDM only. Default: Picard, the plain iteration."""
    reuse: Start | None = None
    """Start of each solve: off (the output of the explicit blocks before the layer), on (the previous timestep's
    solution), blended (a mixture of both), extrapolated (from the last two solutions), history (the previous timestep's
    solution and solver state). FPDM only. Default: off.
    """
    share: float | None = None
    """Weight of the previous timestep's solution in a blended start, 0 to 1. Default: 0.5."""
    extrapolation: float | None = None
    """Step of an extrapolated start: 0 gives the last solution, 1 continues the line through the last two solutions by
    one timestep. Default: 1.
    """
    parallel: ParallelSolver | None = None
    """Solve for all timesteps at once, by Picard iteration or triangular Anderson acceleration; ddim, ddpm and flow
    only. Default: one timestep after another.
    """
    parallel_rtol: float | None = None
    """Relative tolerance of the trajectory in parallel sampling. Default: 0.001."""
    window: int | None = None
    """Number of timesteps that parallel sampling solves for at once. Default: all."""

    def __post_init__(self) -> None:
        counts = [name for name in _COUNTS if getattr(self, name) not in ((), None)]
        if len(counts) > 1:
            names = ", ".join(f"{{{i}}}" for i in range(len(counts)))
            raise OptionError(f"{names} exclude each other; give one of them.", *counts)
        if self.timesteps and (self.steps is not None or self.spacing is not None):
            raise OptionError("{0} excludes {1} and {2}; leave those out.", "timesteps", "steps", "spacing")
        self._check_ranges()
        for name, met, needed, value in (
            ("share", self.reuse == "blended", "reuse", "blended"),
            ("extrapolation", self.reuse == "extrapolated", "reuse", "extrapolated"),
            ("max_evals", bool(self.rtol), "rtol", ""),
            ("seconds", self.allocation == "measured", "allocation", "measured"),
            ("parallel_rtol", self.parallel is not None, "parallel", ""),
            ("window", self.parallel is not None, "parallel", ""),
        ):
            if not met and getattr(self, name) is not None:
                raise OptionError("{0} needs {1}" + f" {value}".rstrip() + "; give it, or leave {0} out.", name, needed)
        if self.allocation not in (None, "constant") and (len(self.iterations) > 1 or self.rtol):
            other = "rtol" if self.rtol else "iterations"
            raise OptionError("{0} needs a budget or one number of iterations, and excludes {1}.", "allocation", other)
        if self.guidance_interval is not None:
            self._check_interval(*self.guidance_interval)
        if self.parallel and (self.allocation not in (None, "constant") or self.reuse not in (None, "off")):
            other = "reuse" if self.reuse not in (None, "off") else "allocation"
            raise OptionError("{0} treats all timesteps alike, and excludes {1}; leave it out.", "parallel", other)

    def _check_interval(self, low: int, high: int) -> None:
        if not 0 <= low <= high:
            raise OptionError(
                f"{{0}} must be two timesteps, 0 <= low <= high, got {low} and {high}.", "guidance_interval"
            )
        for name in ("block_passes", "macs", "seconds", "parallel"):
            if getattr(self, name) is not None:
                message = "{0} makes the cost differ between timesteps, and excludes {1}; leave one of them out."
                raise OptionError(message, "guidance_interval", name)

    def _check_ranges(self) -> None:
        bounds = {"steps": 1, "iterations": 1, "guidance_channels": 1, "max_evals": 1, "timesteps": 0, "guidance": 0}
        bounds |= {"window": 1, "seconds": 0}
        for name, least in bounds.items():
            value = getattr(self, name)
            values = value if isinstance(value, tuple) else () if value is None else (value,)
            if not all(least <= v < float("inf") for v in values):
                raise OptionError(f"{{0}} must be at least {least} and finite, got {value}.", name)
        for name in ("eta", "share", "extrapolation"):
            value = getattr(self, name)
            if value is not None and not 0 <= value <= 1:
                raise OptionError(f"{{0}} must lie in [0, 1], got {value}.", name)
        if any(a <= b for a, b in pairwise(self.timesteps)):
            raise OptionError(f"{{0}} must fall from each entry to the next, got {self.timesteps}.", "timesteps")
        if self.parallel_rtol is not None and not 0 < self.parallel_rtol < 1:
            raise OptionError(f"{{0}} must lie in (0, 1), got {self.parallel_rtol}.", "parallel_rtol")
        if any(not 0 <= r < 1 for r in self.rtol):
            raise OptionError(f"{{0}} must lie in [0, 1), got {self.rtol}.", "rtol")

    def given(self) -> dict[str, Any]:
        """The options that are not left open, by name."""
        values = {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}
        return {name: value for name, value in values.items() if value not in ((), None)}

    def fixed_point_options(self) -> list[str]:
        """Names of the given options that apply to an FPDM only."""
        return [name for name in self.given() if name in _FIXED_POINT]

    def replaced_by(self, names: Collection[str]) -> "SamplingOptions":
        """These options without the ones that the options `names` replace (`_GROUPS`)."""
        own = self.given()
        for leading, group in _GROUPS:
            if any(name in names for name in leading):
                own = {name: value for name, value in own.items() if name not in group}
        return SamplingOptions(**own)

    def over(self, other: "SamplingOptions") -> "SamplingOptions":
        """These options; an option left open is that of `other`, unless a given option replaces it (`_GROUPS`)."""
        mine = self.given()
        return SamplingOptions(**other.replaced_by(mine).given() | mine)

    def value(self, name: str) -> Any:
        """The option `name`, or its default if the option is left open."""
        found = getattr(self, name)
        return DEFAULTS.get(name, found) if found in ((), None) else found
