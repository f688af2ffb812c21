"""A folder of latents that is being made: what it was begun with, and which of its shards are there.

    settings.json              how all latents are made
    shards/00000.safetensors   the tensors of a shard
    shards/00000.json          its note, written last: counts, checksum, and sizes and dates of its pictures

This file does not import torch, so that `--help` is quick.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from apps.diffusion.cli import make_folder
from apps.diffusion.files.atomic import file_at_once

if TYPE_CHECKING:
    from apps.diffusion.data.image_folder import Listing


def check_out(out: Path) -> None:
    """Raises ValueError where something else than latents is in the way."""
    if out.exists() and not out.is_dir():
        raise ValueError(f"--out {out} is a file; give a folder.")
    if (out / "settings.json").exists() or not out.exists():
        return
    if any(not entry.name.startswith(".") for entry in out.iterdir()):
        raise ValueError(f"--out {out} holds something else than latents; give another folder.")


def settle(out: Path, settings: dict[str, Any]) -> None:
    """Make the folder and note in it how its latents are made; refuse one whose latents are made otherwise."""
    note = out / "settings.json"
    make_folder(out / "shards")
    if note.exists():
        try:
            before = dict(json.loads(note.read_text()))
        except (ValueError, TypeError):
            raise ValueError(f"{note} is damaged; give another folder with --out.") from None
        changed = [f"{k} was {before.get(k)}, now {v}" for k, v in settings.items() if before.get(k) != v]
        if changed:
            raise ValueError(
                f"{out} holds latents made otherwise ({'; '.join(changed)}); give another folder with --out."
            )
        return
    with file_at_once(note) as partial:
        partial.write_text(json.dumps(settings, indent=2) + "\n")


def paths(out: Path, k: int) -> tuple[Path, Path]:
    """Of shard k: its tensors, and the note that is written last."""
    return out / "shards" / f"{k:05d}.safetensors", out / "shards" / f"{k:05d}.json"


def complete(out: Path, k: int, now: str, *, checksum: bool = False) -> dict[str, Any] | None:
    """The note of shard k, if the shard is there as it was written, of pictures as they are `now` (see `sources`).

    `checksum` reads the shard; without, its size must do.
    """
    from apps.diffusion.data.latents import sha256  # imports torch

    tensors, note = paths(out, k)
    try:
        found = json.loads(note.read_text())
        same = found["sources"] == now and tensors.stat().st_size == found["bytes"]
        return found if same and (not checksum or sha256(tensors) == found["sha256"]) else None
    except (FileNotFoundError, ValueError, LookupError, TypeError):
        return None  # not there, or damaged: the shard is made again


def sources(listed: Listing, numbers: Sequence[int]) -> str:
    """SHA-256 of the sizes and dates of these pictures."""
    found = hashlib.sha256()
    for i in numbers:
        try:
            told = (listed.root / listed.files[i]).stat()
            found.update(f"{told.st_size} {told.st_mtime_ns}\n".encode())
        except OSError:
            found.update(b"unreadable\n")
    return found.hexdigest()
