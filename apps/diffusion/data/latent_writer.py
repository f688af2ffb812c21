"""Writes a folder of latents shard by shard, so that encoding can be interrupted and continued, and shared by
processes.

    settings.json              the settings that all latents depend on
    shards/00000.safetensors   mean, std, label of the images of a shard
    shards/00000.json          record of the shard, written last: counts, checksum, digest of the sizes and dates of the
                               image files
    index.json                 written by the process that finds all shards complete

A shard is complete if its record exists and fits the image files; an incomplete shard is encoded again.
"""

import json
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from safetensors.torch import save_file
from torch import Tensor

from apps.diffusion.data.image_folder import Listing, Skipped, attempt, skipped_text
from apps.diffusion.data.latents import FORMAT
from apps.diffusion.files import hashing
from apps.diffusion.files.atomic import atomic_path, make_folder
from apps.diffusion.files.json_file import read_object, write_object, write_or_compare
from apps.diffusion.models import autoencoder

PREPROCESSING = 2
"""Version of preprocessing.py; version 1 ignored EXIF orientation, ICC profiles and transparency."""


@dataclass(frozen=True, kw_only=True)
class LatentWriter:
    """Encodes a folder of images and writes the latents.

    Attributes:
        out: output folder of the latents.
        listed: the image files.
        vae: the autoencoder, on its device.
        name: name of the autoencoder, for the index.
        size: side of the cropped images in pixels.
        least: smallest side in pixels; smaller images are skipped.
        batch: number of images in one call of the autoencoder.
        shard_size: number of images of a shard.
        dtype: data type of the stored latents.
    """

    out: Path
    listed: Listing
    vae: Any
    name: str
    size: int
    least: int
    batch: int = 16
    shard_size: int = 4096
    dtype: Literal["float32", "float16"] = "float32"

    @property
    def shards(self) -> int:
        """Number of shards."""
        return -(-len(self.listed.files) // self.shard_size)

    def images_of(self, k: int) -> range:
        """Numbers of the images in shard k."""
        start = k * self.shard_size
        return range(start, min(start + self.shard_size, len(self.listed.files)))

    def settings(self) -> dict[str, Any]:
        """Content of settings.json."""
        return {
            "format": FORMAT,
            "images": {
                "count": len(self.listed.files),
                "sha256": self.listed.digest(),
                "classes": list(self.listed.classes),
            },
            "preprocessing": {
                "version": PREPROCESSING,
                "size": self.size,
                "crop": "center",
                "least_side": self.least,
                "range": [-1, 1],
            },
            "vae": autoencoder.digests(self.vae),
            "stored": {"dtype": self.dtype, "shard_size": self.shard_size, "mirrored": True},
        }

    def begin(self) -> None:
        """Makes the folder and writes settings.json first, by which an interrupted command knows the folder as its own.

        Raises:
            ValueError: the folder holds latents with other settings, or cannot be made.
        """
        make_folder(self.out)
        write_or_compare(self.out / "settings.json", self.settings(), "give another folder with --out.")
        make_folder(self.out / "shards")

    def record(self, k: int, *, checksum: bool = False) -> dict[str, Any] | None:
        """The record of shard k; None if the shard is incomplete, or its image files have changed.

        Args:
            k: number of the shard.
            checksum: whether the shard is read and compared with its SHA-256; false: only its size is compared.
        """
        tensors, file = self._paths(k)
        try:
            found = read_object(file)
            if not hashing.fits_digest(found):
                return None
            same = found["sources"] == self._sources(k) and tensors.stat().st_size == found["bytes"]
            return found if same and (not checksum or hashing.of_file(tensors) == found["sha256"]) else None
        except (FileNotFoundError, ValueError, LookupError, TypeError, AttributeError):
            return None

    def write(self, k: int, pool: ThreadPoolExecutor, progress: Callable[[int, list[Skipped]], None]) -> None:
        """Encodes and writes shard k.

        Args:
            k: number of the shard.
            pool: threads that read images.
            progress: called after each batch with its number of images and its skipped images.
        """
        before = self._sources(k)
        rows: list[tuple[Tensor, Tensor]] = []
        good: list[int] = []
        skipped: list[Skipped] = []
        for numbers, pixels, unusable in self._batches(k, pool):
            total = len(numbers) + len(unusable)
            if numbers:
                x = torch.from_numpy(np.stack(pixels)).to(self.vae.device).float() / 127.5 - 1
                kept, row, infinite = self._finite(numbers, autoencoder.moments(self.vae, x))
                good += kept
                rows.append(row)
                unusable = unusable + infinite
            skipped += unusable
            progress(total, unusable)
        self._write_shard(k, good, rows, skipped, before)

    def finish(self, source: Path) -> str:
        """Writes index.json if every shard is complete; returns a summary.

        Args:
            source: the folder of the images, for the index.

        Raises:
            ValueError: no image can be used.
        """
        records = [found for k in range(self.shards) if (found := self.record(k))]
        if len(records) < self.shards:
            done = f"{len(records)} of {self.shards} shards are in {self.out}"
            return f"{done}; other processes write the other shards and the index."
        total = len(self.listed.files)
        skipped = [Skipped(**image) for found in records for image in found["skipped"]]
        if len(skipped) == total:
            raise ValueError(f"None of the {total} images below {source} can be used; {skipped_text(skipped, total)}")
        scaling, shift = autoencoder.constants(self.vae)
        config: Any = self.vae.config
        settings = self.settings()
        index = {
            "format": FORMAT,
            "images": sum(found["images"] for found in records),
            "shape": next(found["shape"] for found in records if found["shape"]),
            "classes": list(self.listed.classes),
            "class_counts": [sum(n) for n in zip(*(found["class_counts"] for found in records), strict=True)],
            "scaling_factor": scaling,
            "shift_factor": shift,
            "latents_mean": _numbers(getattr(config, "latents_mean", None)),
            "latents_std": _numbers(getattr(config, "latents_std", None)),
            "vae": {"name": self.name, **settings["vae"]},
            "preprocessing": settings["preprocessing"],
            "stored": settings["stored"],
            "source": {"folder": str(source.absolute()), "listed": total, "sha256": settings["images"]["sha256"]},
            "skipped": [image._asdict() for image in skipped],
            "shards": [{key: found[key] for key in ("file", "images", "bytes", "sha256")} for found in records],
        }
        write_object(self.out / "index.json", hashing.with_digest(index))
        summary = f"{index['images']} images in {len(self.listed.classes)} classes are in {self.out}."
        return f"{summary} {skipped_text(skipped, total)}".rstrip()

    def _paths(self, k: int) -> tuple[Path, Path]:
        """The paths of the tensors and of the record of shard k."""
        return self.out / "shards" / f"{k:05d}.safetensors", self.out / "shards" / f"{k:05d}.json"

    def _sources(self, k: int) -> str:
        """SHA-256 of the sizes and dates of the image files of shard k."""
        parts = []
        for i in self.images_of(k):
            try:
                found = (self.listed.root / self.listed.files[i]).stat()
                parts.append(f"{found.st_size} {found.st_mtime_ns}\n")
            except OSError:
                parts.append("unreadable\n")
        return hashing.of_parts(parts)

    def _batches(self, k: int, pool: ThreadPoolExecutor) -> Iterator[tuple[list[int], list[np.ndarray], list[Skipped]]]:
        """Yields for each batch of shard k the numbers and the pixels of the usable images, and the skipped images.
        Threads read the next batch while the caller encodes this one.
        """
        numbers = self.images_of(k)
        read = partial(attempt, self.listed, self.size, self.least)
        parts = [numbers[i : i + self.batch] for i in range(0, len(numbers), self.batch)]
        ahead = pool.map(read, parts[0])
        for i, part in enumerate(parts):
            found = list(ahead)
            if i + 1 < len(parts):
                ahead = pool.map(read, parts[i + 1])
            pairs = list(zip(part, found, strict=True))
            good = [(n, pixels) for n, pixels in pairs if not isinstance(pixels, Skipped)]
            yield [n for n, _ in good], [p for _, p in good], [p for _, p in pairs if isinstance(p, Skipped)]

    def _finite(
        self, numbers: list[int], latents: tuple[Tensor, Tensor]
    ) -> tuple[list[int], tuple[Tensor, Tensor], list[Skipped]]:
        """Numbers and latents of the images whose latents are finite in the stored type, and the other images."""
        mean, std = (part.to(getattr(torch, self.dtype)) for part in latents)
        sound = mean.flatten(1).isfinite().all(1) & std.flatten(1).isfinite().all(1)
        pairs = list(zip(numbers, sound.tolist(), strict=True))
        reason = f"its latent is not finite in {self.dtype}"
        bad = [Skipped(self.listed.files[n], reason) for n, finite in pairs if not finite]
        return [n for n, finite in pairs if finite], (mean[sound], std[sound]), bad

    def _write_shard(
        self, k: int, good: list[int], rows: list[tuple[Tensor, Tensor]], skipped: list[Skipped], before: str
    ) -> None:
        """Writes the tensors of shard k, then its record; `before` is `_sources(k)` before the images were read."""
        file, record = self._paths(k)
        labels = torch.tensor([self.listed.labels[i] for i in good], dtype=torch.int64)
        tensors = {"label": labels}
        if good:
            mean, std = (torch.cat(parts) for parts in zip(*rows, strict=True))
            tensors |= {"mean": mean, "std": std}
        with atomic_path(file) as temporary:
            save_file(tensors, temporary, metadata={"files": json.dumps([self.listed.files[i] for i in good])})
        found = {
            "file": f"shards/{file.name}",
            "images": len(good),
            "shape": list(tensors["mean"].shape[2:]) if good else None,
            "class_counts": torch.bincount(labels, minlength=max(1, len(self.listed.classes))).tolist(),
            "skipped": [image._asdict() for image in skipped],
            "sources": before,
            "bytes": file.stat().st_size,
            "sha256": hashing.of_file(file),
        }
        write_object(record, hashing.with_digest(found))


def check_out(out: Path) -> None:
    """Raises ValueError if `out` is a file, or a folder that holds other files than latents."""
    if out.exists() and not out.is_dir():
        raise ValueError(f"--out {out} is a file; give a folder.")
    if (out / "settings.json").exists() or not out.exists():
        return
    if any(not entry.name.startswith(".") for entry in out.iterdir()):
        raise ValueError(f"--out {out} holds files that are no latents; give another folder.")


def _numbers(values: Any) -> list[float] | None:
    return None if values is None else [float(value) for value in values]
