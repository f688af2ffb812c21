"""Encode a folder of images to VAE latents: `python -m apps.diffusion.encode IMAGES --vae VAE --out DIR`.

IMAGES holds one subfolder of images per class, or images only. VAE is any diffusers AutoencoderKL, a folder or a name
on the hub. The command writes DIR/index.json and shards of `--shard-size` images (see data/latents.py), with the mean
and standard deviation of the latent of each image and of its mirror image.

After an interruption, the same command continues. Several processes share the shards by --rank and --world, or by RANK
and WORLD_SIZE as torchrun sets them; the process that finishes last writes the index.
"""

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import tyro

from apps.diffusion.cli import rank_and_world, run_request
from apps.diffusion.config.checks import at_least


@dataclass(frozen=True, kw_only=True)
class Request:
    """Encode a folder of images to VAE latents, for training."""

    images: Annotated[Path, tyro.conf.Positional]
    """Folder of images; its subfolders are the classes."""
    vae: str
    """Folder of a diffusers AutoencoderKL, or its name on the hub, such as stabilityai/sd-vae-ft-mse."""
    out: Path
    """Output folder of the latents."""
    subfolder: str | None = None
    """Subfolder of the VAE in a folder or repository of several models, such as vae."""
    size: int = 256
    """Side in pixels of the square to which images are cropped and resized."""
    classes: Literal["folders", "none"] = "folders"
    """folders: each subfolder is a class; none: the images have no classes."""
    least: int | None = None
    """Smallest side in pixels; smaller images are skipped. Default: a quarter of `size`."""
    batch: int = 16
    """Number of images in one call of the VAE."""
    shard_size: int = 4096
    """Number of images in one output file."""
    dtype: Literal["float32", "float16"] = "float32"
    """Data type of the stored latents; an image of 256 pixels takes 64 KiB in float32 and 32 KiB in float16."""
    rank: int | None = None
    """Number of this process, from 0; default: RANK, or 0."""
    world: int | None = None
    """Number of processes; default: WORLD_SIZE, or 1."""
    workers: int = 4
    """Number of threads that read images."""
    device: str = "auto"
    """Device by name, such as cpu or cuda; auto: the first available of cuda, mps, xpu and cpu."""

    def __post_init__(self) -> None:
        at_least(self, 1, "size", "least", "batch", "shard_size", "workers")


def main(argv: list[str] | None = None) -> int:
    """The command; returns its exit code: 0, 1 if the disk fails, 2 for bad input."""
    return run_request(Request, "encode", run, argv, after="Complete shards are kept; the same command continues.")


def run(request: Request) -> None:
    """Encodes the incomplete shards of this process, and writes the index if all shards are complete.

    Raises:
        ValueError: the folder holds no images, the VAE cannot be read, or the output folder has other content.
    """
    rank, world = rank_and_world(request.rank, request.world)
    from concurrent.futures import ThreadPoolExecutor

    from tqdm import tqdm

    from apps.diffusion.cli import device_of
    from apps.diffusion.data.image_folder import Skipped, listing
    from apps.diffusion.data.latent_writer import LatentWriter, check_out
    from apps.diffusion.data.preprocessing import minimal_side
    from apps.diffusion.files.names import printable
    from apps.diffusion.models.autoencoder import check_images, open_vae

    listed = listing(request.images, request.classes)
    check_out(request.out)
    for remark in listed.remarks() if rank == 0 else ():
        print(f"encode: {remark}", file=sys.stderr)
    device = device_of(request.device)
    vae, name = open_vae(request.vae, request.subfolder, device)
    check_images(vae, request.size)
    writer = LatentWriter(
        out=request.out,
        listed=listed,
        vae=vae,
        name=str(Path(name).absolute()) if Path(name).exists() else name,
        size=request.size,
        least=minimal_side(request.size) if request.least is None else request.least,
        batch=request.batch,
        shard_size=request.shard_size,
        dtype=request.dtype,
    )
    writer.begin()
    mine = [k for k in range(writer.shards) if k % world == rank]
    todo = [k for k in mine if writer.record(k, checksum=True) is None]
    total = sum(len(writer.images_of(k)) for k in todo)
    kept = f" ({len(mine) - len(todo)} of {len(mine)} shards are there already)" if len(mine) > len(todo) else ""
    interval = 0.5 if sys.stderr.isatty() else 20
    with (
        ThreadPoolExecutor(request.workers) as pool,
        tqdm(total=total, unit="img", desc=f"encoding{kept}", mininterval=interval) as bar,
    ):

        def progress(count: int, skipped: list[Skipped]) -> None:
            for image in skipped:
                bar.write(f"skipped {printable(image.file)}: {image.reason}", file=sys.stderr)
            bar.update(count)

        for k in todo:
            writer.write(k, pool, progress)
    if changed := [k for k in todo if writer.record(k) is None]:
        raise ValueError(
            f"Image files of {len(changed)} of {len(todo)} shards changed while they were encoded; give the same "
            "command again, which encodes these shards again."
        )
    print(writer.finish(request.images))


if __name__ == "__main__":
    sys.exit(main())
