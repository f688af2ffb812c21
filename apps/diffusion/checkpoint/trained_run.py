"""The configuration of a trained run, and whether a run can continue from a checkpoint."""

import dataclasses
from pathlib import Path
from shlex import quote
from typing import Any

import torch

from apps.diffusion.checkpoint import pretrained
from apps.diffusion.checkpoint.training_state import Checkpoint
from apps.diffusion.config.training import Config


def read_config(run: Path) -> Config:
    """The configuration in a run's folder; relative paths in it are resolved by `located`.

    Raises:
        ValueError: the configuration is missing or cannot be read.
    """
    file = run / "config.json"
    if run.is_file():
        raise ValueError(
            f"{run} is a file; write a model folder of a checkpoint first: python -m apps.diffusion.convert "
            f"{quote(str(run))} --out DIR"
        )
    if not file.is_file():
        shipped = ", ".join(pretrained.names()) or "only in the repository; a wheel does not contain these networks"
        raise ValueError(
            f"{run} holds no run (it has no config.json); {_remedy(run)}, or take a trained network by its name "
            f"({shipped})."
        )
    try:
        text = file.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(
            f"{file} is damaged ({error.reason} at byte {error.start}); restore it from a copy, or train again into a "
            "new folder."
        ) from None
    config = Config.from_json(text, str(file))
    path, vae = config.data.path, config.data.vae
    data = dataclasses.replace(
        config.data,
        path=None if path is None else located(path, run),
        vae=None if vae is None else str(located(Path(vae), run)),
    )
    return dataclasses.replace(config, data=data)


def _remedy(folder: Path) -> str:
    """What to do if a folder holds no run: give the run above it, or train into it if it is new or empty."""
    for above in folder.absolute().parents:
        if (above / "config.json").is_file() and (above / "checkpoints").is_dir():
            return f"give the folder of the run, {above}"
    if folder.is_dir() and any(folder.iterdir()):
        return "give the folder of a run"
    return f"train one: python -m apps.diffusion.train --out {quote(str(folder))}"


def located(path: Path, run: Path) -> Path:
    """Resolves a path stored in a run's configuration. An absolute path, and a path that exists relative to the working
    directory, stays as it is. Another path is resolved against the nearest folder above the run in which it exists; if
    there is no such folder, it stays as it is (a VAE's name on the hub has the form of a relative path).
    """
    if path.is_absolute() or path.exists():
        return path
    return next((above / path for above in run.absolute().parents if (above / path).exists()), path)


def check_start(start: Checkpoint, model: torch.nn.Module, network: dict[str, Any], where: Path) -> None:
    """Checks that architecture and optimizer state of a checkpoint fit a run; `models.build.load_weights` checks the
    weights.

    Args:
        start: the checkpoint.
        model: the network to train.
        network: the description of `model` (`models.build.describe`).
        where: folder of the run, for messages.

    Raises:
        ValueError: the checkpoint holds another network, or the optimizer state of another network.
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
                f"The optimizer state in {where} belongs to another network (parameter {i} has another shape); "
                "delete this checkpoint to continue from the previous one, or train again into a new folder."
            )


def _architecture(network: dict[str, Any]) -> dict[str, Any]:
    """The description without the number of iterations of an FPDM, which does not affect the weights."""
    return {**network, "config": {k: v for k, v in network["config"].items() if k != "iterations"}}
