"""Sample from a trained run: `python -m apps.diffusion.sample RUN --num 100 --out DIR`.

Writes one PNG per image at its own size, 00042-class-7.png, grid.png, enlarged, and effort.json: the block
passes, multiply-accumulates, evaluations, residuals and seconds that were spent. Sample number i depends on
(seed, i), its class and the settings alone, so files that exist are kept, and an interrupted command goes on
where it stopped. Several processes share the images by RANK and WORLD_SIZE as `accelerate launch` and torchrun
set them, or by --rank and --world; the files are the same, and whichever finishes last writes the rest.
"""

from __future__ import annotations

import dataclasses
import os
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import tyro

from apps.diffusion.config.sampling import Recipe

if TYPE_CHECKING:
    from apps.diffusion.checkpoint.trained_run import Trained
    from apps.diffusion.sampling.generate import Plan
    from apps.diffusion.sampling.output_folder import Album


@dataclass(frozen=True, kw_only=True)
class Request:
    """Sample images from a trained run. What is left out is done as in the run's own samples."""

    run: Annotated[Path, tyro.conf.Positional]
    """Folder of the run, or the name of a network that comes with the repository, such as mnist-fpdm."""
    num: int = 100
    """Images in all."""
    classes: tuple[int, ...] = ()
    """Classes to go through in turn; all by default."""
    recipe: Annotated[Recipe, tyro.conf.arg(name="")] = field(default_factory=Recipe)
    """How samples are made."""
    seed: int = 0
    """Seed of the samples."""
    batch: int = 64
    """Images that are made before their files are written, in whole chunks; the files do not depend on it."""
    chunk: int = 16
    """Images in one call of the network. Another number changes the last bits, so a folder has one."""
    vae: str | None = None
    """Decodes latents, instead of the run's own: a folder, or a name on the hub."""
    npz: bool = False
    """Write samples.npz too, for the ADM evaluation suite."""
    out: Path | None = None
    """Folder for the images; by default samples, inside the run, or samples/NAME for a network by name."""
    device: str = "cpu"
    """Where to compute, such as cpu or cuda."""
    rank: int | None = None
    """Number of this process; RANK by default, or 0."""
    world: int | None = None
    """How many processes share the work; WORLD_SIZE by default, or 1."""

    def __post_init__(self) -> None:
        if self.num < 1 or self.seed < 0:
            raise ValueError(f"--num must be at least 1 and --seed at least 0, got {self.num} and {self.seed}.")
        if self.batch < 1 or self.chunk < 1:
            raise ValueError(f"--batch and --chunk must be at least 1, got {self.batch} and {self.chunk}.")

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
        run(tyro.cli(Request, args=argv, prog="python -m apps.diffusion.sample"))
    except ValueError as error:
        print(f"sample: {error}", file=sys.stderr)
        return 2
    except OSError as error:
        print(f"sample: {error}; images that are there are kept, run the command again to go on.", file=sys.stderr)
        return 1
    return 0


def run(request: Request) -> None:
    """Write the images that are not there yet and, where all are there, what is made of them.

    Raises:
        ValueError: no run in the folder, choices that do not fit it, a folder with samples made otherwise.
    """
    rank, world = request.place()
    import torch

    from apps.diffusion.checkpoint.pretrained import locate
    from apps.diffusion.checkpoint.trained_run import decoder_of, open_run
    from apps.diffusion.cli import device_of
    from apps.diffusion.sampling.generate import plan
    from apps.diffusion.sampling.output_folder import Album

    device = device_of(request.device)
    trained = open_run(request.run)
    if trained.config.threads is not None:
        torch.set_num_threads(trained.config.threads)
    made = plan(trained.model, trained.config, request.recipe)
    inside = locate(request.run) == request.run
    out = request.out or (request.run / "samples" if inside else Path("samples") / request.run)
    album = Album(out, _labels(request, range(request.num), trained))
    decoder = decoder_of(trained, request.vae, device)
    album.settle(_settings(request, trained, decoder))
    missing = album.missing()
    mine = [i for i in missing if (i // request.chunk) % world == rank]
    _write(album, mine, request, trained, made, decoder, rank, device)
    left = len(album.missing())
    kept = request.num - len(missing)
    print(f"{len(mine)} new images" + (f", {kept} kept," if kept else "") + f" are in {album.folder}")
    if left:
        print(f"{left} of {request.num} are not there yet; other processes make them, and the grid.")
        return
    album.write_grid()
    if request.npz:
        album.write_npz()
    _tell(album.write_effort(made.timesteps))


def _labels(request: Request, indices: Any, trained: Trained) -> list[int | None]:
    """The class of each of these samples; None for all of an unconditional network."""
    num_classes = trained.model.num_classes
    if num_classes == 0:
        if request.classes:
            raise ValueError("This run knows no classes; leave out --classes.")
        return [None] * len(indices)
    wrong = [y for y in request.classes if not 0 <= y < num_classes]
    if wrong:
        raise ValueError(f"--classes {wrong[0]} does not exist: this run knows the classes 0 to {num_classes - 1}.")
    classes = request.classes or range(num_classes)
    return [classes[i % len(classes)] for i in indices]


def _settings(request: Request, trained: Trained, decoder: Any) -> dict[str, Any]:
    """All that the images depend on."""
    from apps.diffusion.models.autoencoder import digests

    return {
        "seed": request.seed,
        "classes": list(request.classes),
        "chunk": request.chunk,
        **dataclasses.asdict(request.recipe.filled(trained.config.sampling)),
        "network": type(trained.model).__name__,
        "trained_images": trained.images,
        "weights": trained.digest,
        "vae": None if decoder is None else digests(decoder),
    }


def _write(
    album: Album, mine: list[int], request: Request, trained: Trained, made: Plan, decoder: Any, rank: int, device: str
) -> None:
    """Make this process's images, part by part, and write each as soon as it is there."""
    import torch
    from tqdm import tqdm

    from apps.diffusion.models.autoencoder import decode

    torch.nn.Module.to(trained.model, torch.device(device))
    chunk, chunks = request.chunk, sorted({i // request.chunk for i in mine})
    step = max(1, request.batch // chunk)
    wanted, width = set(mine), sys.stderr.isatty()
    with tqdm(total=len(mine), unit="img", desc="sampling", mininterval=0.5 if width else 20, disable=not mine) as bar:
        for first in range(0, len(chunks), step):
            # whole chunks with their own labels: what shares a call with a sample is always the same
            indices = [c * chunk + place for c in chunks[first : first + step] for place in range(chunk)]
            labels = [y for y in _labels(request, indices, trained) if y is not None] or None
            result = made.sample(trained.model, indices, labels, seed=request.seed, chunk=chunk, device=device)
            part = [i for i in indices if i in wanted]
            x = result.samples[[indices.index(i) for i in part]]
            images = x if decoder is None else decode(decoder, x)
            album.note_effort(rank, result, part)
            for i, image in zip(part, images, strict=True):
                album.write(i, image)
            bar.update(len(part))


def _tell(effort: dict[str, Any]) -> None:
    """What was spent, in words."""
    if not effort["images"]:
        return
    one, by = effort["per_image"], effort["by_timestep"]
    print(
        f"An image took {one['block_passes']:.1f} block passes and {one['macs']:.3e} multiply-accumulates; "
        f"{effort['images']} took {effort['seconds']:.1f} s."
    )
    if one["evaluations"]:
        mean = sum(by["residual_mean"]) / len(by["residual_mean"])
        print(
            f"The fixed-point layer was evaluated {one['evaluations']:.1f} times an image; residual {mean:.2e} "
            f"relative, on average, at most {max(by['residual_max']):.2e}. effort.json has it by timestep."
        )


if __name__ == "__main__":
    sys.exit(main())
