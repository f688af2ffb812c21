"""Encode a folder of images to VAE latents: `python -m apps.diffusion.encode IMAGES --vae VAE --out DIR`.

IMAGES holds pictures in one subfolder per class, or just pictures. VAE is any diffusers AutoencoderKL, a
folder or a name on the hub. DIR gets index.json and shards of `--shard-size` images (see data/latents.py):
mean and standard deviation of each image and its mirror image.

The same command again goes on where it stopped. Several processes share the shards by --rank and --world, or
by RANK and WORLD_SIZE as torchrun sets them; whichever finishes last writes the index.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import tyro

from apps.diffusion.data.latent_writer import check_out, complete, paths, settle, sources

if TYPE_CHECKING:
    import numpy as np
    from torch import Tensor

    from apps.diffusion.data.image_folder import Listing, Skipped


@dataclass(frozen=True, kw_only=True)
class Request:
    """Encode a folder of images to VAE latents, for training."""

    images: Annotated[Path, tyro.conf.Positional]
    """Folder of images; its subfolders are the classes."""
    vae: str
    """Folder of a diffusers AutoencoderKL, or its name on the hub, such as stabilityai/sd-vae-ft-mse."""
    out: Path
    """Folder for the latents."""
    subfolder: str | None = None
    """Where the VAE lies in a folder or repository of several models, such as vae."""
    size: int = 256
    """Side of the cropped images, in pixels."""
    classes: Literal["folders", "none"] = "folders"
    """Whether subfolders are classes."""
    least: int | None = None
    """Skip images with a shorter side; a quarter of `size` by default."""
    batch: int = 16
    """Images encoded at a time."""
    shard_size: int = 4096
    """Images to a file."""
    dtype: Literal["float32", "float16"] = "float32"
    """How latents are stored; an image of 256 pixels takes 64 KiB or 32 KiB."""
    rank: int | None = None
    """Number of this process; RANK by default, or 0."""
    world: int | None = None
    """How many processes share the work; WORLD_SIZE by default, or 1."""
    workers: int = 4
    """Threads that read images."""
    device: str | None = None
    """Where to compute; a GPU where there is one."""

    def __post_init__(self) -> None:
        for name in ("size", "batch", "shard_size", "workers"):
            if getattr(self, name) < 1:
                raise ValueError(f"--{name.replace('_', '-')} must be at least 1, got {getattr(self, name)}.")

    def place(self) -> tuple[int, int]:
        """(rank, world)."""
        rank = int(os.environ.get("RANK", 0)) if self.rank is None else self.rank
        world = int(os.environ.get("WORLD_SIZE", 1)) if self.world is None else self.world
        if not 0 <= rank < world:
            raise ValueError(f"Process {rank} of {world} does not exist; --rank counts from 0 to --world minus 1.")
        return rank, world


def main(argv: list[str] | None = None) -> int:
    """The command; returns its exit code: 0, 1 if the disk fails, 2 for bad input."""
    try:
        run(tyro.cli(Request, args=argv, prog="python -m apps.diffusion.encode"))
    except ValueError as error:
        print(f"encode: {error}", file=sys.stderr)
        return 2
    except OSError as error:
        print(
            f"encode: {error}; shards that are complete are kept, run the command again to go on.",
            file=sys.stderr,
        )
        return 1
    return 0


def run(request: Request) -> None:
    """Encode this process's shards that are not there yet, and write the index if all are.

    Raises:
        ValueError: a folder without images, an unreadable VAE, an output folder with something else in it.
    """
    rank, world = request.place()
    from apps.diffusion.data.image_folder import least_side, listing

    listed = listing(request.images, request.classes)
    check_out(request.out)
    import torch

    from apps.diffusion.cli import device_of
    from apps.diffusion.models.autoencoder import check_images, digests, open_vae

    device = device_of(request.device or ("cuda" if torch.cuda.is_available() else "cpu"))
    vae, name = open_vae(request.vae, request.subfolder, device)
    check_images(vae, request.size)
    least = least_side(request.size) if request.least is None else request.least
    settings = {
        "format": 1,
        "images": {"count": len(listed.files), "sha256": listed.digest(), "classes": list(listed.classes)},
        "preprocessing": {"size": request.size, "crop": "centre", "least_side": least, "range": [-1, 1]},
        "vae": digests(vae),
        "stored": {"dtype": request.dtype, "shard_size": request.shard_size, "mirrored": True},
    }
    settle(request.out, settings)
    work = Work(request=request, listed=listed, vae=vae, least=least)
    mine = [k for k in range(work.shards) if k % world == rank]
    todo = [k for k in mine if work.complete(k, checksum=True) is None]
    encode_shards(work, todo, len(mine))
    finish(work, settings, name)


@dataclass(frozen=True, kw_only=True)
class Work:
    """Everything that encoding a shard needs."""

    request: Request
    listed: Listing
    vae: Any
    least: int

    @property
    def shards(self) -> int:
        """How many there are in all."""
        return -(-len(self.listed.files) // self.request.shard_size)

    def of(self, k: int) -> range:
        """Numbers of the images in shard k."""
        start = k * self.request.shard_size
        return range(start, min(start + self.request.shard_size, len(self.listed.files)))

    def complete(self, k: int, *, checksum: bool = False) -> dict[str, Any] | None:
        """The note of shard k, if it is there; see shards.complete."""
        return complete(self.request.out, k, sources(self.listed, self.of(k)), checksum=checksum)


def encode_shards(work: Work, todo: list[int], mine: int) -> None:
    """Encode and write these shards."""
    from concurrent.futures import ThreadPoolExecutor

    import numpy as np
    import torch
    from tqdm import tqdm

    from apps.diffusion.models.autoencoder import moments

    total = sum(len(work.of(k)) for k in todo)
    kept = f" ({mine - len(todo)} of {mine} shards are there already)" if mine > len(todo) else ""
    tick = 0.5 if sys.stderr.isatty() else 20
    with (
        ThreadPoolExecutor(work.request.workers) as pool,
        tqdm(total=total, unit="img", desc=f"encoding{kept}", mininterval=tick) as bar,
    ):
        for k in todo:
            before = sources(work.listed, work.of(k))
            rows: list[tuple[Tensor, Tensor]] = []
            good: list[int] = []
            skipped: list[Skipped] = []
            for numbers, pictures, unusable in batches(work, k, pool):
                for image in unusable:
                    bar.write(f"skipped {image.file}: {image.reason}", file=sys.stderr)
                skipped += unusable
                if numbers:
                    x = torch.from_numpy(np.stack(pictures)).to(work.vae.device).float() / 127.5 - 1
                    kept, row, infinite = finite(work, numbers, moments(work.vae, x))
                    for image in infinite:
                        bar.write(f"skipped {image.file}: {image.reason}", file=sys.stderr)
                    skipped += infinite
                    good += kept
                    rows.append(row)
                bar.update(len(numbers) + len(unusable))
            write_shard(work, k, good, rows, skipped, before)


def finite(
    work: Work, numbers: list[int], moments: tuple[Tensor, Tensor]
) -> tuple[list[int], tuple[Tensor, Tensor], list[Skipped]]:
    """Of these images those whose latents are finite as they are stored, their latents, and the others."""
    import torch

    from apps.diffusion.data.image_folder import Skipped

    mean, std = (part.to(getattr(torch, work.request.dtype)) for part in moments)
    sound = mean.flatten(1).isfinite().all(1) & std.flatten(1).isfinite().all(1)
    reason = f"its latent is not finite in {work.request.dtype}"
    bad = [Skipped(work.listed.files[n], reason) for n, fine in zip(numbers, sound.tolist(), strict=True) if not fine]
    kept = [n for n, fine in zip(numbers, sound.tolist(), strict=True) if fine]
    return kept, (mean[sound], std[sound]), bad


def batches(work: Work, k: int, pool: Any) -> Iterator[tuple[list[int], list[np.ndarray], list[Skipped]]]:
    """The images of shard k, batch by batch: numbers, pixels, and those that cannot be used.

    The next batch is read while one is encoded.
    """
    from functools import partial

    from apps.diffusion.data.image_folder import Skipped, attempt

    numbers, size = work.of(k), work.request.batch
    read = partial(attempt, work.listed, work.request.size, work.least)
    parts = [numbers[i : i + size] for i in range(0, len(numbers), size)]
    ahead = pool.map(read, parts[0])
    for i, part in enumerate(parts):
        found = list(ahead)
        if i + 1 < len(parts):
            ahead = pool.map(read, parts[i + 1])
        pairs = list(zip(part, found, strict=True))
        good = [(n, picture) for n, picture in pairs if not isinstance(picture, Skipped)]
        yield [n for n, _ in good], [p for _, p in good], [p for _, p in pairs if isinstance(p, Skipped)]


def write_shard(
    work: Work, k: int, good: list[int], rows: list[tuple[Tensor, Tensor]], skipped: list[Skipped], before: str
) -> None:
    """Write the tensors of shard k, and then its note; `before` is what `sources` said when they were read."""
    import torch
    from safetensors.torch import save_file

    from apps.diffusion.data.latents import sha256
    from apps.diffusion.files.atomic import file_at_once

    tensors_file, note_file = paths(work.request.out, k)
    labels = torch.tensor([work.listed.labels[i] for i in good], dtype=torch.int64)
    tensors = {"label": labels}
    if good:
        mean, std = (torch.cat(parts) for parts in zip(*rows, strict=True))
        tensors |= {"mean": mean, "std": std}
    files = [work.listed.files[i] for i in good]
    with file_at_once(tensors_file) as partial:
        save_file(tensors, partial, metadata={"files": json.dumps(files)})
    note = {
        "file": f"shards/{tensors_file.name}",
        "images": len(good),
        "shape": list(tensors["mean"].shape[2:]) if good else None,
        "class_counts": torch.bincount(labels, minlength=max(1, len(work.listed.classes))).tolist(),
        "skipped": [image._asdict() for image in skipped],
        "sources": before,
        "bytes": tensors_file.stat().st_size,
        "sha256": sha256(tensors_file),
    }
    with file_at_once(note_file) as partial:
        partial.write_text(json.dumps(note, indent=2) + "\n")


def finish(work: Work, settings: dict[str, Any], name: str) -> None:
    """Write the index if every shard is there, and say how things stand.

    Raises:
        ValueError: not one image can be used.
    """
    from apps.diffusion.data.image_folder import Skipped, told
    from apps.diffusion.files.atomic import file_at_once
    from apps.diffusion.models.autoencoder import constants

    out, total = work.request.out, len(work.listed.files)
    notes = [note for k in range(work.shards) if (note := work.complete(k))]
    if len(notes) < work.shards:
        print(f"{len(notes)} of {work.shards} shards are in {out}; other processes make the rest, and the index.")
        return
    skipped = [Skipped(**image) for note in notes for image in note["skipped"]]
    if len(skipped) == total:
        raise ValueError(f"None of the {total} images below {work.request.images} can be used; {told(skipped, total)}")
    scaling, shift = constants(work.vae)
    index = {
        "format": settings["format"],
        "images": sum(note["images"] for note in notes),
        "shape": next(note["shape"] for note in notes if note["shape"]),
        "classes": list(work.listed.classes),
        "class_counts": [sum(counts) for counts in zip(*(note["class_counts"] for note in notes), strict=True)],
        "scaling_factor": scaling,
        "shift_factor": shift,
        "vae": {"name": name, **settings["vae"]},
        "preprocessing": settings["preprocessing"],
        "stored": settings["stored"],
        "source": {
            "folder": str(work.request.images),
            "listed": total,
            "sha256": settings["images"]["sha256"],
        },
        "skipped": [image._asdict() for image in skipped],
        "shards": [{key: note[key] for key in ("file", "images", "bytes", "sha256")} for note in notes],
    }
    with file_at_once(out / "index.json") as partial:
        partial.write_text(json.dumps(index, indent=2) + "\n")
    print(
        f"{index['images']} images in {len(work.listed.classes)} classes are in {out}. {told(skipped, total)}".rstrip()
    )


if __name__ == "__main__":
    sys.exit(main())
