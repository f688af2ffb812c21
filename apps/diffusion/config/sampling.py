"""How samples are made, as one frozen dataclass: the flags of the sampling command, and what Python may give.

This file does not import torch, so that `--help` is quick; generate.py makes the objects that are meant.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Literal

from apps.diffusion.config.training import Sampling

Sampler = Literal["ddim", "ddpm", "dpm++", "dpm++-single", "unipc", "lms", "euler", "euler-ancestral"]
Solver = Literal["picard", "anderson", "anderson-gs", "broyden"]
Allocation = Literal["constant", "increasing", "decreasing"]
Start = Literal["off", "on", "blended", "extrapolated"]

COUNTS = ("iterations", "block_passes", "macs", "rtol")


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """How samples are made. What is left out is done as the run's own configuration says.

    Raises:
        ValueError: a value out of range, or two that exclude each other.
    """

    sampler: Sampler | None = None
    """ddim: deterministic; ddpm: ancestral; dpm++: second order; the others are diffusers' schedulers."""
    eta: float = 0.0
    """Share of fresh noise in a step of ddim, 0 to 1."""
    steps: int | None = None
    """Timesteps."""
    spacing: Literal["trailing", "linspace", "leading"] | None = None
    """Which timesteps: from the last one down in equal steps, both ends, or beginning below the last."""
    timesteps: tuple[int, ...] = ()
    """The timesteps themselves, falling, instead of --steps and --spacing."""
    guidance: float | None = None
    """Weight of classifier-free guidance; 1 is none."""
    guidance_channels: int | None = None
    """Guide the first so many channels only (3 in the published DiT); all by default."""
    iterations: tuple[int, ...] = ()
    """Iterations of the fixed-point layer at every timestep, or one number for each; FPDM only."""
    block_passes: int | None = None
    """Budget of an image in transformer blocks applied, spent exactly, instead of --iterations."""
    macs: float | None = None
    """Budget of an image in multiply-accumulates, such as 5.9e11, instead of --iterations."""
    allocation: Allocation = "constant"
    """How a budget, or --iterations times the timesteps, is shared out from the noisiest timestep on."""
    rtol: tuple[float, ...] = ()
    """Relative tolerance of every timestep, or one for each, instead of --iterations; every image stops by itself."""
    max_evals: int = 50
    """Most iterations with --rtol."""
    solver: Solver = "picard"
    """How the next iterate is made; picard is the naive iteration. FPDM only."""
    memory: int | None = None
    """Iterates that the solver remembers; the solver's own number by default."""
    reuse: Start | None = None
    """Start a solve fresh (off), from the solution of the timestep before (on), from a mixture of the two (blended), or
    from the line through the last two solutions (extrapolated). FPDM only."""
    share: float = 0.5
    """Weight of the earlier solution in --reuse blended."""
    extrapolation: float = 1.0
    """How far along that line --reuse extrapolated goes: 0 is its last point, 1 one timestep further."""

    def __post_init__(self) -> None:
        given = [name for name in COUNTS if getattr(self, name) not in ((), None)]
        if len(given) > 1:
            raise ValueError(f"{_flags(given)} say the same thing in different ways; give one of them.")
        if self.timesteps and (self.steps is not None or self.spacing is not None):
            raise ValueError("--timesteps stands instead of --steps and --spacing; leave those out.")
        for name, values in (("iterations", self.iterations), ("steps", (self.steps,)), ("memory", (self.memory,))):
            if any(v is not None and v < 1 for v in values):
                raise ValueError(f"--{name} must be at least 1, got {' '.join(map(str, values))}.")
        if self.guidance is not None and not 0 <= self.guidance < float("inf"):
            raise ValueError(f"--guidance must be 0 or more, got {self.guidance}; 1 is none, 4 is strong.")
        if any(not 0 <= r < 1 for r in self.rtol) or self.max_evals < 1:
            raise ValueError(
                f"--rtol must lie in [0, 1) and --max-evals be at least 1, got {self.rtol} and {self.max_evals}."
            )
        if self.memory is not None and self.solver == "picard":
            raise ValueError("--memory is for a solver that remembers; choose --solver anderson or broyden, or none.")
        for name, other, needed in (
            ("share", self.reuse == "blended", "--reuse blended"),
            ("extrapolation", self.reuse == "extrapolated", "--reuse extrapolated"),
            ("max_evals", bool(self.rtol), "--rtol"),
        ):
            if not other and getattr(self, name) != getattr(type(self), name):
                raise ValueError(f"{_flags([name])} means nothing without {needed}; give that too, or leave it out.")
        if self.allocation != "constant" and (len(self.iterations) > 1 or self.rtol):
            raise ValueError("--allocation shares out a budget; a list of --iterations and --rtol leave none to share.")
        if not (0 <= self.share <= 1 and 0 <= self.extrapolation <= 1 and 0 <= self.eta <= 1):
            raise ValueError("--share, --extrapolation and --eta must lie in [0, 1].")

    def of_fixed_point(self) -> list[str]:
        """The options given that only an FPDM knows."""
        default = Recipe()
        names = ("iterations", "macs", "allocation", "rtol", "max_evals", "solver", "memory", "reuse", "share")
        return [name for name in (*names, "extrapolation") if getattr(self, name) != getattr(default, name)]

    def filled(self, sampling: Sampling) -> Recipe:
        """With the run's own choices where this one has none."""
        own: dict[str, object] = {"sampler": sampling.sampler, "guidance": sampling.guidance}
        if not self.timesteps:
            own |= {"steps": sampling.steps, "spacing": sampling.spacing}
        own["reuse"] = "on" if sampling.reuse else "off"
        if all(getattr(self, name) in ((), None) for name in COUNTS):
            own["iterations"] = (sampling.iterations,)
        left_out = {name: value for name, value in own.items() if getattr(self, name) in ((), None)}
        return dataclasses.replace(self, **left_out)  # pyright: ignore[reportArgumentType]


def _flags(names: list[str]) -> str:
    return ", ".join("--" + name.replace("_", "-") for name in names)
