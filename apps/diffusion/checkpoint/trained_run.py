"""The configuration of a trained run, and whether a run can continue from a checkpoint."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from shlex import quote
from typing import Any

import torch

from apps.diffusion.checkpoint import pretrained
from apps.diffusion.checkpoint.training_state import Checkpoint
from apps.diffusion.config.training import Config


def read_config(run: Path) -> Config:
    """The configuration in a run's folder. Relative paths in it are found from the current folder, or else from a
    folder above the run.

    Raises:
        ValueError: there is none, or it cannot be read.
    """
    file = run / "config.json"
    if not file.is_file():
        shipped = ", ".join(pretrained.names()) or "none are here: a wheel leaves them out, the repository has them"
        raise ValueError(
            f"{run} holds no run (it has no config.json); train one: "
            f"python -m apps.diffusion.train --out {quote(str(run))}, or take a trained network by its name "
            f"({shipped})."
        )
    config = Config.from_json(file.read_text(), str(file))
    path, vae = config.data.path, config.data.vae
    data = dataclasses.replace(
        config.data,
        path=None if path is None else located(path, run),
        vae=None if vae is None else str(located(Path(vae), run)),
    )
    return dataclasses.replace(config, data=data)


def located(path: Path, run: Path) -> Path:
    """A relative path that a run has stored: as it is where it exists, else below the first folder above the run where
    it exists, else as it is (a VAE may have the form of a relative path and be a name on the hub).
    """
    if path.is_absolute() or path.exists():
        return path
    return next((above / path for above in run.absolute().parents if (above / path).exists()), path)


def check_start(start: Checkpoint, model: torch.nn.Module, network: dict[str, Any], where: Path) -> None:
    """Checks that a run can continue from a checkpoint, its weights apart (see `models.build.load_weights`).

    Args:
        start: the checkpoint.
        model: the network to train.
        network: its description (`models.build.describe`).
        where: folder of the run, for messages.

    Raises:
        ValueError: the checkpoint holds another network, or the optimizer's state of another one.
    """
    if _architecture(start.network) != _architecture(network):
        raise ValueError(
            f"The checkpoint holds another network ({start.network}) than the configuration describes ({network}); "
            "resume it with the settings it was started with."
        )
    sizes = dict(enumerate(p.shape for p in model.parameters()))
    for i, entry in start.optimizer.items():
        if any(i not in sizes or (value.ndim and value.shape != sizes[i]) for value in entry.values()):
            raise ValueError(
                f"The optimizer's state in {where} is that of another network (parameter {i} has another shape); "
                "delete this checkpoint to continue from the one before, or train again into a new folder."
            )


def _architecture(network: dict[str, Any]) -> dict[str, Any]:
    """What determines the weights and their meaning; the number of iterations of an FPDM does not."""
    return {**network, "config": {k: v for k, v in network["config"].items() if k != "iterations"}}
