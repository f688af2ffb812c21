"""Checkpoints: one folder each, written whole or not at all, and read without executing anything.

    RUN/checkpoints/000000096000/        the images the run had seen
        model.safetensors  ema.safetensors  optimizer.safetensors
        state.json                       how the network is built, progress, the loss so far

A checkpoint is written under another name, flushed to the disk, and renamed: a reader finds the old one or
the new one. No state of a random generator is in it, because every random number of a run follows from the
seed and the images seen.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor

from apps.diffusion.files.atomic import abandoned, folder_at_once

FORMAT = 1
_TENSORS = ("model", "ema", "optimizer")


@dataclass(kw_only=True)
class Progress:
    """How far a run has come. It counts up while the run goes on."""

    images: int = 0
    """Images seen, over all processes."""
    steps: int = 0
    """Steps of the optimizer."""
    skipped: int = 0
    """Steps left out because the gradient was not finite."""
    seconds: float = 0.0
    """Time spent in training."""
    history: list[tuple[int, float]] = field(default_factory=list)
    """(images, mean loss since the entry before)."""


@dataclass(frozen=True, kw_only=True)
class Checkpoint:
    """Everything from which a run goes on, or samples.

    `network` is {"class": name, "config": arguments}, from which the model is built; `optimizer` is torch's
    state by parameter number: {0: {"step": ..., "exp_avg": ..., ...}, ...}.
    """

    network: dict[str, Any]
    model: Mapping[str, Tensor]
    ema: Mapping[str, Tensor]
    optimizer: Mapping[int, Mapping[str, Tensor]]
    progress: Progress


class Unreadable(ValueError):
    """A checkpoint that is damaged, or that is none; the message says what to do."""


def save(run: Path, checkpoint: Checkpoint, keep: int = 1) -> Path:
    """Write a checkpoint into the run's folder, then delete all but the newest `keep`; returns where it is.

    A moment that has a checkpoint already keeps it.

    Raises:
        OSError: it cannot be written, the disk being full or the like; the checkpoints before it are intact.
    """
    from safetensors.torch import save_file

    folder = run / "checkpoints"
    folder.mkdir(parents=True, exist_ok=True)
    final = folder / f"{checkpoint.progress.images:012d}"
    if final.exists():
        return final
    for left_over in folder.glob(".*.partial"):
        if abandoned(left_over):
            shutil.rmtree(left_over)
    flat = {f"{i}.{name}": value for i, entry in checkpoint.optimizer.items() for name, value in entry.items()}
    state = {"format": FORMAT, "network": checkpoint.network, "progress": asdict(checkpoint.progress)}
    with folder_at_once(final) as partial:
        for name, tensors in zip(_TENSORS, (checkpoint.model, checkpoint.ema, flat), strict=True):
            tensors = {key: value.detach().cpu().contiguous() for key, value in tensors.items()}
            save_file(tensors, partial / f"{name}.safetensors", metadata={"format": "pt"})
        (partial / "state.json").write_text(json.dumps(state))
        for file in partial.iterdir():
            _flush(file)
        _flush(partial)
    _flush(folder)
    for old in all_of(run)[:-keep]:
        shutil.rmtree(old)
    return final


def all_of(run: Path) -> list[Path]:
    """The folders of a run's checkpoints, oldest first."""
    return sorted(p for p in (run / "checkpoints").glob(12 * "[0-9]") if p.is_dir())


def load(path: Path, device: str = "cpu") -> Checkpoint:
    """Read the checkpoint in the folder `path`.

    Raises:
        Unreadable: a file is missing, truncated, or not what it should be.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        state = json.loads((path / "state.json").read_text())
        if state["format"] != FORMAT:
            raise Unreadable(
                f"The checkpoint {path} has format {state['format']}, and this version reads format "
                f"{FORMAT}; "
                "read it with the version that wrote it."
            )
        model, ema, flat = (load_file(path / f"{name}.safetensors", device=device) for name in _TENSORS)
        progress = Progress(**state["progress"])
        progress.history = [(int(images), float(loss)) for images, loss in progress.history]
        network = state["network"]
        optimizer: dict[int, dict[str, Tensor]] = {}
        for key, value in flat.items():
            number, name = key.split(".", 1)
            optimizer.setdefault(int(number), {})[name] = value
    except Unreadable:
        raise
    except (OSError, SafetensorError, ValueError, KeyError, TypeError) as error:
        others = [p for p in all_of(path.parent.parent) if p != path]
        remedy = (
            f"the one before, {others[-1]}, may be whole: delete the damaged folder to use it"
            if others
            else ("there is no other in this run; train again into a new folder")
        )
        raise Unreadable(f"The checkpoint {path} cannot be read ({type(error).__name__}: {error}); {remedy}.") from None
    return Checkpoint(network=network, model=model, ema=ema, optimizer=optimizer, progress=progress)


def newest(run: Path, device: str = "cpu") -> Checkpoint:
    """The newest checkpoint of a run.

    Raises:
        Unreadable: there is none, or it is damaged.
    """
    found = all_of(run)
    if not found:
        raise Unreadable(
            f"{run} holds no checkpoint; give the folder of a run, as printed by `python -m apps.diffusion.train`."
        )
    return load(found[-1], device)


def write_atomically(path: Path, text: str) -> None:
    """Write a text file whole or not at all."""
    partial = path.with_name(f".{path.name}.partial")
    partial.write_text(text)
    _flush(partial)
    os.replace(partial, path)


def _flush(path: Path) -> None:
    """Have the operating system bring a file or folder to the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
