"""Metrics of a run while it trains: numbers for a tracker, image grids, and a profiler trace.

    loss                 mean over the steps since the entry before
    learning_rate        of the last step
    residual/mean, max   ||f(z) - z|| / ||f(z)|| at the end of the solves of these steps, over all samples: solves that
                         stop converging show here first
    iterations           mean number of evaluations of f
    images_per_second    of these steps
    skipped              steps left out so far, because the gradient was not finite

The horizontal axis is the number of images seen.
"""

from __future__ import annotations

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

WAIT, WARMUP, ACTIVE = 5, 2, 5  # steps of a profile


@dataclass
class StepMetrics:
    """Sums over the steps since the last entry, on the device: nothing here waits for it before `entry`."""

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
        """Adds a fixed-point solve; None: an explicit network has none."""
        if solution is not None:
            self.residuals.append(relative_residual(solution))
            self.evals.append(solution.evals.float())

    def add_step(self, loss: Tensor, images: int) -> None:
        """Adds a step of so many images over all processes, with this process's loss, a scalar."""
        self.losses.append(loss.detach().float())
        self.images += images

    def entry(self) -> dict[str, float]:
        """The means over all processes, which must all call this; losses that are not finite do not count. Empty
        without a finite loss.
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
    """accelerate's tracker of this name; None for "none", and for "auto" without TensorBoard.

    Raises:
        ValueError: it is not installed.
    """
    if name == "none" or (name == "auto" and find_spec("tensorboard") is None):
        return None
    name = "tensorboard" if name == "auto" else name
    if name not in [str(known) for known in get_available_trackers()]:
        raise ValueError(f"--track {name} is not installed here; install it, or choose another, or none.")
    return name


class MetricLogger:
    """Log entries and image grids of one run; every process makes one, the first writes.

    Args:
        accelerator: with a tracker, or without.
        folder: of the run; grids go to its subfolder grids.
        seen: images seen before. TensorBoard's entries behind them are dropped: a run that was killed after its last
            checkpoint makes them again.
        config: for trackers that store one.
    """

    def __init__(self, accelerator: Accelerator, folder: Path, seen: int = 0, config: str = "") -> None:
        self.accelerator, self.folder = accelerator, folder / "grids"
        kept = {} if accelerator.log_with and "tensorboard" in map(str, accelerator.log_with) else {"config": config}
        options = {"tensorboard": {"purge_step": seen + 1}} if seen else {}
        self.accelerator.init_trackers(folder.name or "run", config=kept or None, init_kwargs=options)

    def log(self, values: dict[str, float], images: int) -> None:
        """An entry, after so many images."""
        self.accelerator.log(values, step=images)

    def close(self) -> None:
        """Writes everything."""
        for known in self.accelerator.trackers:
            known.finish()
        self.accelerator.trackers = []

    def show(self, grid: Image.Image | None, images: int) -> None:
        """An image grid, as a file and for the tracker."""
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
    """A function to be called after every step; steps 8 to 12 are recorded into `folder`/trace.json, in the format of
    chrome://tracing and Perfetto. None: nothing is recorded.
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
