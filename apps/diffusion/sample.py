"""Sample from a trained network: `python -m apps.diffusion.sample RUN --num 100 --out DIR`.

Writes one PNG per image at its own size, 00042-class-7.png, an enlarged grid.png, and effort.json: block passes,
multiply-accumulates, evaluations, residuals and seconds. Sample i depends on (seed, i), its class and the options
alone, so existing files are kept, and an interrupted command continues. Several processes share the images by RANK and
WORLD_SIZE as `accelerate launch` and torchrun set them, or by --rank and --world; the files are the same, and the
process that finishes last writes the grid.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

import tyro
from tqdm import tqdm

from apps.diffusion.checkpoint.open_network import OpenedNetwork, open_network
from apps.diffusion.checkpoint.pretrained import output_folder
from apps.diffusion.checkpoint.readers import Weights
from apps.diffusion.cli import device_of, rank_and_world, run_request
from apps.diffusion.config.checks import at_least
from apps.diffusion.config.network import Prediction
from apps.diffusion.config.sampling import SamplingOptions
from apps.diffusion.config.serialization import to_plain
from apps.diffusion.config.training import Backend
from apps.diffusion.models.autoencoder import decode, digests
from apps.diffusion.sampling.output_folder import OutputFolder
from apps.diffusion.sampling.plan import MeasuredPlan, plan
from apps.diffusion.sampling.sampler import Precision, SamplingPlan, sample


@dataclass(frozen=True, kw_only=True)
class Request:
    """Sample images from a trained network; options left out are those of its training run."""

    run: Annotated[Path, tyro.conf.Positional]
    """Folder of a training run, a pipeline or a model, or the name of a network of the repository (mnist-fpdm)."""
    num: int = 100
    """Number of images."""
    classes: tuple[str, ...] = ()
    """Classes to cycle through, by number or name; default: all."""
    sampling: Annotated[SamplingOptions, tyro.conf.arg(name="")] = field(default_factory=SamplingOptions)
    """Sampling options."""
    seed: int = 0
    """Random seed of the samples."""
    reproducible: bool = True
    """Files with equal bits for every --batch and any number of processes: the network is called on chunks of --chunk
    images, which takes four times as long for one image and 1.0 to 1.3 times for 16 and more. With --no-reproducible
    it is called on --batch images, and files agree to rounding.
    """
    batch: int = 64
    """Images sampled before their files are written; with --no-reproducible also the batch size of the network."""
    chunk: int = 16
    """Batch size of the network with --reproducible. Another number changes the last bits, so an output folder has
    one.
    """
    precision: Precision = "no"
    """bf16: call the network under autocast to bfloat16; weights and samples stay float32."""
    compile: Backend = "no"
    """Backend of torch.compile for the blocks and the iteration; inductor is the fast one."""
    weights: Weights = "ema"
    """Averaged weights of a run, or its last ones."""
    vae: str | None = None
    """VAE that decodes latents, a folder or a hub name; default: the run's own."""
    prediction: Prediction | None = None
    """Prediction target of a model folder, which has no noise schedule; default: epsilon for DiT, else v_prediction."""
    zero_snr: bool | None = None
    """Zero terminal SNR of a model folder; default: not for DiT, for FPDM."""
    npz: bool = False
    """Write samples.npz too, for the ADM evaluation suite."""
    out: Path | None = None
    """Output folder; default: samples, inside the run, or samples/NAME for a network by name."""
    device: str = "auto"
    """Device: auto (the first available one of cuda, mps, xpu and cpu), or its name."""
    rank: int | None = None
    """Number of this process; default: RANK, or 0."""
    world: int | None = None
    """Number of processes; default: WORLD_SIZE, or 1."""

    def __post_init__(self) -> None:
        at_least(self, 1, "num", "batch", "chunk")
        at_least(self, 0, "seed")

    @property
    def network_batch(self) -> int:
        """Images in one call of the network."""
        return self.chunk if self.reproducible else self.batch


def main(argv: list[str] | None = None) -> int:
    """The command; returns its exit code (see cli.py)."""
    return run_request(
        Request, "sample", run, argv, after="Finished images are kept; run the command again to continue."
    )


def run(request: Request) -> None:
    """Write the missing images and, once all are there, the grid, the archive and the effort.

    Raises:
        ValueError: no network in the folder, options that do not fit it, an output folder of other samples.
    """
    rank, world = rank_and_world(request.rank, request.world)
    device = device_of(request.device)
    opened = open_network(request.run, request.weights, prediction=request.prediction, zero_snr=request.zero_snr)
    opened.to(device)
    out = request.out or output_folder(request.run, "samples")
    classes = opened.class_cycle(request.classes) or (None,)
    folder = OutputFolder(out, [classes[i % len(classes)] for i in range(request.num)])
    decoder, channels = opened.decoder(request.vae, device), opened.model.latent[0]
    if decoder is None and channels not in (1, 3):
        raise ValueError(f"This network generates latents of {channels} channels; name their VAE with --vae.")
    chosen = plan(
        opened.model,
        opened.scheduler,
        request.sampling,
        defaults=opened.options,
        curves=folder.read_curves(),
        chunk=request.network_batch,
    )
    folder.write_or_check_settings(_settings(request, opened, classes, decoder) | _allocated(chosen))
    if isinstance(chosen, MeasuredPlan):
        folder.write_curves(chosen.curves, _allocated(chosen)["allocated"])
    missing = folder.missing()
    mine = [i for i in missing if (i // request.network_batch) % world == rank]
    _write(folder, mine, request, opened, chosen, classes, decoder, rank, device)
    left, kept = len(folder.missing()), request.num - len(missing)
    print(f"{len(mine)} new images" + (f", {kept} existing ones," if kept else "") + f" are in {folder.folder}")
    if left:
        print(f"{left} of {request.num} are missing; other processes write them and the grid.")
        return
    folder.write_grid()
    if request.npz:
        folder.write_npz()
    if more := folder.others():
        print(f"{folder.folder} holds {more} further images; grid, archive and effort are of the first {request.num}.")
    _print_effort(folder.write_effort(chosen.timesteps))


def _settings(request: Request, opened: OpenedNetwork, classes: Sequence[int | None], decoder: Any) -> dict[str, Any]:
    """Everything that the images depend on."""
    options = request.sampling.over(opened.options)
    return {
        "seed": request.seed,
        "classes": list(classes) if request.classes else [],
        "chunk": request.chunk if request.reproducible else None,
        "precision": None if request.precision == "no" else request.precision,
        "compile": None if request.compile == "no" else request.compile,
        **{name: to_plain(options.value(name)) for name in vars(options)},
        "network": type(opened.model).__name__,
        "trained_images": opened.images,
        "weights": opened.digest,
        "vae": None if decoder is None else digests(decoder),
    }


def _allocated(chosen: SamplingPlan) -> dict[str, Any]:
    """The iterations that follow from measured residuals, which another measurement may not repeat."""
    counts = chosen.solve.iterations if isinstance(chosen, MeasuredPlan) and chosen.solve is not None else None
    return {"allocated": list(counts)} if isinstance(counts, Sequence) else {}


def _write(
    folder: OutputFolder,
    mine: list[int],
    request: Request,
    opened: OpenedNetwork,
    chosen: SamplingPlan,
    classes: Sequence[int | None],
    decoder: Any,
    rank: int,
    device: str,
) -> None:
    """Sample this process's images in parts, and write each part at once."""
    if request.compile != "no":
        opened.model.compile_blocks(backend=request.compile)
    wanted, interval = set(mine), 0.5 if sys.stderr.isatty() else 20
    with tqdm(total=len(mine), unit="img", desc="sampling", mininterval=interval, disable=not mine) as bar:
        for indices in _parts(mine, request):
            labels = [y for i in indices if (y := classes[i % len(classes)]) is not None] or None
            result = sample(
                opened.model,
                indices,
                labels,
                plan=chosen,
                seed=request.seed,
                chunk=request.network_batch,
                reproducible=request.reproducible,
                device=device,
                precision=request.precision,
            )
            part = [i for i in indices if i in wanted]
            x = result.samples[[indices.index(i) for i in part]]
            images = x if decoder is None else decode(decoder, x)
            folder.add_effort(rank, result, part)
            for i, image in zip(part, images, strict=True):
                folder.write(i, image)
            bar.update(len(part))


def _parts(mine: list[int], request: Request) -> Iterator[list[int]]:
    """The samples to compute before files are written, in turn. With --reproducible whole chunks, with the labels of
    all their places, so that the batch of a sample is always the same.
    """
    if not request.reproducible:
        yield from (mine[first : first + request.batch] for first in range(0, len(mine), request.batch))
        return
    chunk, chunks = request.chunk, sorted({i // request.chunk for i in mine})
    step = max(1, request.batch // chunk)
    for first in range(0, len(chunks), step):
        yield [c * chunk + place for c in chunks[first : first + step] for place in range(chunk)]


def _print_effort(effort: dict[str, Any]) -> None:
    """The effort in two sentences."""
    if not effort["images"]:
        return
    one, by = effort["per_image"], effort["by_timestep"]
    print(
        f"An image took {one['block_passes']:.1f} block passes and {one['macs']:.3e} multiply-accumulates; "
        f"{effort['sampled']} took {effort['seconds']:.1f} s."
    )
    if one["rounds"] not in (0, len(by["timestep"])):
        print(f"{len(by['timestep'])} timesteps took {one['rounds']:.1f} rounds, calls of the network in succession.")
    if one["evaluations"]:
        mean = sum(by["residual_mean"]) / len(by["residual_mean"])
        print(
            f"The fixed-point layer was evaluated {one['evaluations']:.1f} times per image; relative residual "
            f"{mean:.2e} on average, at most {max(by['residual_max']):.2e}. effort.json lists it by timestep."
        )


if __name__ == "__main__":
    sys.exit(main())
