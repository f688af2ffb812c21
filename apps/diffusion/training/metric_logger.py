"""What a run tells of itself while it goes on: numbers to a tracker, and sheets of samples.

    loss                 mean over the steps since the entry before
    learning_rate        of the last step
    residual/mean, max   ||f(z) - z|| / ||f(z)|| that the solves of these steps ended with, over all samples: a solve
                         that stopped converging shows here first
    iterations           mean number of evaluations of f
    images_per_second    of these steps
    skipped              steps left out so far, because the gradient was not finite

The horizontal axis is the number of images seen.
"""

from __future__ import annotations

import math
import time
from dataclasses import dataclass, field
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from accelerate.tracking import get_available_trackers
from accelerate.utils import gather
from PIL import Image
from torch import Tensor

from apps.diffusion.config.training import Config
from apps.diffusion.files.atomic import file_at_once
from implicit import Solution

if TYPE_CHECKING:
    from apps.diffusion.training.trainer import Trainer


@dataclass
class Tally:
    """Sums over the steps since the last entry."""

    losses: float = 0.0
    steps: int = 0
    residuals: list[Tensor] = field(default_factory=list)
    evals: list[Tensor] = field(default_factory=list)
    began: float = field(default_factory=time.monotonic)
    images: int = 0

    def solved(self, solution: Solution | None) -> None:
        """Book a fixed-point solve; None: an explicit network has none."""
        if solution is not None:
            size = torch.linalg.vector_norm(solution.value.detach().float().flatten(1), dim=1)
            tiny = torch.finfo(torch.float32).tiny
            self.residuals.append(solution.residual.detach().float() / size.clamp_min(tiny))
            self.evals.append(solution.evals.float())

    def stepped(self, loss: float, images: int) -> None:
        """Book a step of so many images; a loss that is not finite does not count."""
        self.images += images
        if math.isfinite(loss):
            self.losses += loss
            self.steps += 1

    def entry(self) -> dict[str, float]:
        """The means, over all processes, which must all call this; empty where there was no step."""
        if not self.steps:
            return {}
        found = {
            "loss": self.losses / self.steps,
            "images_per_second": self.images / max(time.monotonic() - self.began, 1e-9),
        }
        if self.residuals:
            residuals, evals = torch.cat(self.residuals), torch.cat(self.evals)
            every: Any = gather(torch.stack([residuals.mean(), residuals.amax(), evals.mean()])[None])
            found |= {
                "residual/mean": float(every[:, 0].mean()),
                "residual/max": float(every[:, 1].amax()),
                "iterations": float(every[:, 2].mean()),
            }
        return found


def tracker(name: str) -> str | None:
    """The tracker of accelerate that is meant; None is none.

    Raises:
        ValueError: it is not installed.
    """
    if name == "none" or (name == "auto" and find_spec("tensorboard") is None):
        return None
    name = "tensorboard" if name == "auto" else name
    if name not in [str(known) for known in get_available_trackers()]:
        raise ValueError(f"Config.track = {name} is not installed here; install it, or choose another, or none.")
    return name


class Logbook:
    """Entries and sheets of one run; all processes make one, the first writes."""

    def __init__(self, trainer: Trainer, config: Config) -> None:
        self.accelerator = trainer.accelerator
        self.folder = config.out / "sheets"
        seen = trainer.progress.images
        plain = {"config": config.to_json()} if tracker(config.track) not in (None, "tensorboard") else None
        # entries of a run that was killed after its last checkpoint are made again
        options = {"tensorboard": {"purge_step": seen + 1}} if seen else {}
        self.accelerator.init_trackers(config.out.name or "run", config=plain, init_kwargs=options)

    def log(self, values: dict[str, float], images: int) -> None:
        """An entry, after so many images."""
        self.accelerator.log(values, step=images)

    def close(self) -> None:
        """Everything is written."""
        for known in self.accelerator.trackers:
            known.finish()
        self.accelerator.trackers = []

    def show(self, sheet: Image.Image | None, images: int) -> None:
        """A sheet of samples, as a file and for the tracker."""
        if sheet is None:
            return
        self.folder.mkdir(parents=True, exist_ok=True)
        file = self.folder / f"{images:012d}.png"
        with file_at_once(file) as partial:
            sheet.save(partial, format="PNG")
        for known in self.accelerator.trackers:
            if known.name == "tensorboard":
                pixels = np.asarray(sheet.convert("RGB"))[None]
                known.log_images({"samples": pixels}, step=images, dataformats="NHWC")  # pyright: ignore
            elif known.name == "wandb":
                known.log_images({"samples": [sheet]}, step=images)  # pyright: ignore
