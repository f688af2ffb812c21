"""Metrics of a run while it trains: numbers for a tracker, image grids, and a profiler trace.

    loss                 mean over the steps since the previous entry
    learning_rate        learning rate of the last step
    residual/mean, max   ||f(z) - z|| / ||f(z)|| at the end of the solves since the previous entry, over all samples; a
                         fixed point that no longer converges raises these numbers first
    iterations           mean number of evaluations of f per solve
    images_per_second    training images per second since the previous entry
    skipped              number of steps since the start of the run that were skipped, because the gradient was not
                         finite

The horizontal axis is the number of images seen.
"""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.tracking import get_available_trackers
from accelerate.utils import gather
from PIL import Image
from torch import Tensor

from apps.diffusion.files.atomic import atomic_path
from apps.diffusion.sampling.effort import relative_residual
from implicit import Solution

WAIT, WARMUP, ACTIVE = 5, 2, 5  # steps before profiling, steps of warm-up, steps recorded


@dataclass
class StepMetrics:
    """Losses and solves of the steps since the last entry, on the device; only `entry` waits for the device."""

    losses: list[Tensor] = field(default_factory=list)
    residuals: list[Tensor] = field(default_factory=list)
    evals: list[Tensor] = field(default_factory=list)
    began: float = field(default_factory=time.monotonic)
    images: int = 0

    @property
    def steps(self) -> int:
        """Steps since the last entry."""
        return len(self.losses)

    def add_solve(self, solution: Solution | None) -> None:
        """Adds a fixed-point solve; None: the network has no fixed-point layer."""
        if solution is not None:
            self.residuals.append(relative_residual(solution))
            self.evals.append(solution.evals.float())

    def add_step(self, loss: Tensor, images: int) -> None:
        """Adds a step.

        Args:
            loss: this process's loss, a scalar.
            images: number of images of the step, over all processes.
        """
        self.losses.append(loss.detach().float())
        self.images += images

    def entry(self) -> dict[str, float]:
        """The means over all processes; all of them must call this. Losses that are not finite are left out; without a
        finite loss the entry is empty.
        """
        if not self.losses:
            return {}
        # the loss of a step is the mean over the processes
        every: Any = gather(torch.stack(self.losses)[None])
        means = every.mean(0)
        finite = means[means.isfinite()].tolist()
        if not finite:
            return {}
        found = {
            "loss": sum(finite) / len(finite),
            "images_per_second": self.images / max(time.monotonic() - self.began, 1e-9),
        }
        if self.residuals:
            residuals, evals = torch.cat(self.residuals), torch.cat(self.evals)
            every = gather(torch.stack([residuals.mean(), residuals.amax(), evals.mean()])[None])
            found |= {
                "residual/mean": float(every[:, 0].mean()),
                "residual/max": float(every[:, 1].amax()),
                "iterations": float(every[:, 2].mean()),
            }
        return found


def tracker(name: str) -> str | None:
    """The name of accelerate's tracker; None (no tracker) for "none", and for "auto" if TensorBoard is not installed.

    Raises:
        ValueError: the tracker is not installed.
    """
    if name == "none" or (name == "auto" and find_spec("tensorboard") is None):
        return None
    name = "tensorboard" if name == "auto" else name
    if name not in [str(known) for known in get_available_trackers()]:
        raise ValueError(
            f"The tracker of --track {name} is not installed; install it, or give another tracker or none."
        )
    return name


class MetricLogger:
    """Log entries and image grids of one run. Every process makes a logger, and the first process writes.

    Args:
        accelerator: the run's accelerator, with or without a tracker.
        folder: the run's folder; grids are written to its subfolder grids.
        seen: number of images seen before the run was resumed, 0 for a new run. TensorBoard's entries after this number
            are dropped, since the resumed run makes them again.
        config: the run's configuration as JSON, for trackers that store a configuration.
    """

    def __init__(self, accelerator: Accelerator, folder: Path, seen: int = 0, config: str = "") -> None:
        self.accelerator, self.folder = accelerator, folder / "grids"
        kept = {} if accelerator.log_with and "tensorboard" in map(str, accelerator.log_with) else {"config": config}
        options = {"tensorboard": {"purge_step": seen + 1}} if seen else {}
        self.accelerator.init_trackers(folder.name or "run", config=kept or None, init_kwargs=options)

    def log(self, values: dict[str, float], images: int) -> None:
        """Sends an entry to the tracker; `images` is the number of images seen."""
        self.accelerator.log(values, step=images)

    def close(self) -> None:
        """Makes the trackers write their remaining entries, and ends them."""
        for known in self.accelerator.trackers:
            known.finish()
        self.accelerator.trackers = []

    def show(self, grid: Image.Image | None, images: int) -> None:
        """Writes an image grid to a file and sends it to the tracker; None: no grid."""
        if grid is None:
            return
        file = self.folder / f"{images:012d}.png"
        with atomic_path(file) as partial:
            grid.save(partial, format="PNG")
        for known in self.accelerator.trackers:
            if known.name == "tensorboard":
                pixels = np.asarray(grid.convert("RGB"))[None]
                known.log_images({"samples": pixels}, step=images, dataformats="NHWC")  # pyright: ignore
            elif known.name == "wandb":
                known.log_images({"samples": [grid]}, step=images)  # pyright: ignore


@contextmanager
def profiler(folder: Path | None) -> Iterator[Callable[[], Any]]:
    """Yields a function that has to be called after every step. Steps 8 to 12 are recorded in `folder`/trace.json, in
    the format of chrome://tracing and Perfetto; if `folder` is None, no step is recorded.
    """
    if folder is None:
        yield lambda: None
        return

    def write(profile: torch.profiler.profile) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        profile.export_chrome_trace(str(folder / "trace.json"))

    schedule = torch.profiler.schedule(wait=WAIT, warmup=WARMUP, active=ACTIVE, repeat=1)
    kinds = torch.profiler.supported_activities()
    with torch.profiler.profile(activities=kinds, schedule=schedule, on_trace_ready=write) as profile:
        yield profile.step
