"""Checkpoints of training: each is one folder with checksums, written completely or not at all.

    RUN/checkpoints/000000096000/        named by the number of images seen
        model.safetensors  ema.safetensors  optimizer.safetensors
        state.json                       description of the network, progress, losses, class names, SHA-256 of each file

A checkpoint is written into a temporary folder, flushed to the disk, and renamed, so that a reader never finds an
incomplete checkpoint. Reading executes no code. A checkpoint holds no state of a random generator, because every random
number of a run is a function of the seed and the number of images seen. Format 1, without checksums and class names, is
read too.
"""

import json
import math
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from apps.diffusion.files import hashing
from apps.diffusion.files.atomic import atomic_path, flush, remove_partial
from apps.diffusion.files.json_file import read_object

FORMAT = 2
TENSORS = ("model", "ema", "optimizer")


@dataclass(kw_only=True)
class Progress:
    """Counts of a run, which training updates."""

    images: int = 0
    """Number of images seen, over all processes."""
    steps: int = 0
    """Number of optimizer steps."""
    skipped: int = 0
    """Number of steps skipped because the gradient was not finite."""
    seconds: float = 0.0
    """Training time in seconds."""
    history: list[tuple[int, float]] = field(default_factory=list)
    """Entries (images seen, mean loss since the previous entry)."""
    last: dict[str, float] = field(default_factory=dict)
    """The last entry of the log."""


@dataclass(frozen=True, kw_only=True)
class Checkpoint:
    """The state of a run, from which training continues and sampling takes the network.

    Attributes:
        network: {"class": name, "config": arguments}, from which the network is built.
        model: weights by name.
        ema: averaged weights by name.
        optimizer: torch's optimizer state by parameter number: {0: {"step": ..., "exp_avg": ..., ...}, ...}.
        progress: counts of the run.
        classes: names of the classes; empty if there are no classes, and in format 1.
        teacher: SHA-256 of the teacher's weights; empty without a teacher, and in earlier versions.
    """

    network: dict[str, Any]
    model: Mapping[str, Tensor]
    ema: Mapping[str, Tensor]
    optimizer: Mapping[int, Mapping[str, Tensor]]
    progress: Progress
    classes: tuple[str, ...] = ()
    teacher: str = ""


class Unreadable(ValueError):
    """A checkpoint is damaged or missing; the message says what to do."""


def save(run: Path, checkpoint: Checkpoint, keep: int = 1) -> Path:
    """Writes a checkpoint into the run's folder, then deletes all but the newest `keep` checkpoints; returns the folder
    of the checkpoint.

    If a checkpoint of the same number of images exists, nothing is written. Only one process at a time may save.

    Raises:
        OSError: the checkpoint cannot be written, for example because the disk is full; earlier checkpoints are intact.
    """
    folder = run / "checkpoints"
    folder.mkdir(parents=True, exist_ok=True)
    final = folder / f"{checkpoint.progress.images:012d}"
    if final.exists():
        return final
    remove_partial(folder)
    flat = {f"{i}.{name}": value for i, entry in checkpoint.optimizer.items() for name, value in entry.items()}
    with atomic_path(final) as partial:
        partial.mkdir()
        for name, tensors in zip(TENSORS, (checkpoint.model, checkpoint.ema, flat), strict=True):
            tensors = {key: value.detach().cpu().contiguous() for key, value in tensors.items()}
            save_file(tensors, partial / f"{name}.safetensors", metadata={"format": "pt"})
        state: dict[str, Any] = {
            "format": FORMAT,
            "network": checkpoint.network,
            "progress": asdict(checkpoint.progress),
            "classes": list(checkpoint.classes),
            "teacher": checkpoint.teacher,
            "files": {f"{name}.safetensors": hashing.of_file(partial / f"{name}.safetensors") for name in TENSORS},
        }
        state = json.loads(json.dumps(state))
        state["sha256"] = hashing.of_json(state)
        (partial / "state.json").write_text(json.dumps(state))
    flush(folder)
    for old in all_of(run)[:-keep]:
        shutil.rmtree(old)
    return final


def all_of(run: Path) -> list[Path]:
    """The folders of a run's checkpoints, oldest first."""
    return sorted(p for p in (run / "checkpoints").glob(12 * "[0-9]") if p.is_dir())


def load(path: Path, tensors: Sequence[str] = TENSORS) -> Checkpoint:
    """Reads the checkpoint in the folder `path` to the CPU, and compares the files with their checksums.

    Args:
        path: the folder.
        tensors: the files to read, of "model", "ema", "optimizer"; the tensors of the other files stay empty.

    Raises:
        Unreadable: a file is missing, damaged, or of another format.
        PermissionError: this user may not read a file.
    """
    file = path / "state.json"
    found: dict[str, dict[str, Tensor]] = {name: {} for name in TENSORS}
    try:
        state = _state(file)
        for name in tensors:
            file = path / f"{name}.safetensors"
            expected = state["files"].get(file.name) if "files" in state else None
            if "files" in state and hashing.of_file(file) != expected:
                raise ValueError("its SHA-256 is not the one in state.json")
            found[name] = load_file(file)
        optimizer: dict[int, dict[str, Tensor]] = {}
        for key, value in found["optimizer"].items():
            number, name = key.split(".", 1)
            optimizer.setdefault(int(number), {})[name] = value
    except PermissionError:  # the checkpoint may be whole
        raise
    except (OSError, SafetensorError, ValueError, KeyError, TypeError, AttributeError) as error:
        others = [p for p in all_of(path.parent.parent) if p != path]
        remedy = (
            f"to use the previous checkpoint, {others[-1]}, delete the folder {path}"
            if others
            else "this run has no other checkpoint; train again into a new folder"
        )
        reason = str(error) or type(error).__name__
        raise Unreadable(f"The checkpoint {path} cannot be read because of {file.name} ({reason}); {remedy}.") from None
    return Checkpoint(
        network=state["network"],
        model=found["model"],
        ema=found["ema"],
        optimizer=optimizer,
        progress=state["progress"],
        classes=tuple(state.get("classes", ())),
        teacher=state.get("teacher", ""),
    )


def _state(file: Path) -> dict[str, Any]:
    """The content of a state.json, checked, with "progress" as `Progress`.

    Raises:
        ValueError, KeyError, TypeError: the file is damaged, or its format is unknown.
    """
    state = read_object(file)
    version = state["format"]
    if version not in (1, FORMAT):
        raise ValueError(f"it has format {version}, and this version reads formats 1 and {FORMAT}")
    if version == FORMAT and state.pop("sha256") != hashing.of_json(state):
        raise ValueError("its content does not fit its SHA-256")
    if version == 1 and {"files", "sha256"} & set(state):
        raise ValueError("format 1 has no checksums")
    if not isinstance(state["network"]["config"], dict) or not isinstance(state["network"]["class"], str):
        raise ValueError(f"network is {state['network']!r}")
    state["progress"] = _progress(dict(state["progress"]))
    return state


def _progress(plain: dict[str, Any]) -> Progress:
    """The `Progress` of a dict from JSON. Raises ValueError or TypeError if a value is no count, no time or no loss."""
    for name in ("images", "steps", "skipped"):
        if type(plain[name]) is not int or plain[name] < 0:
            raise ValueError(f"progress.{name} is {plain[name]!r}, which is no count")
    seconds = plain["seconds"]
    if type(seconds) not in (int, float) or not 0 <= seconds < math.inf:
        raise ValueError(f"progress.seconds is {seconds!r}, which is no time")
    plain["seconds"] = float(seconds)
    plain["history"] = [(int(images), float(loss)) for images, loss in plain["history"]]
    return Progress(**plain)


def newest(run: Path, tensors: Sequence[str] = TENSORS) -> Checkpoint:
    """The newest checkpoint of a run; `tensors` as in `load`.

    Raises:
        Unreadable: the run has no checkpoint, or the newest one is damaged.
    """
    found = all_of(run)
    if not found:
        raise Unreadable(
            f"{run} holds no checkpoint; give the folder of a run, as printed by `python -m apps.diffusion.train`."
        )
    try:
        return load(found[-1], tensors)
    except Unreadable:
        if found[-1].exists() or not all_of(run):
            raise
    return newest(run, tensors)  # training has written newer checkpoints meanwhile, and deleted this one
