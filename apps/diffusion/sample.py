"""Sample from a trained network: `python -m apps.diffusion.sample RUN --num 100 --out DIR`.

The command writes one PNG per image, such as 00042-class-7.png, an enlarged grid.png, and effort.json with the cost:
block passes, multiply-accumulates, evaluations, residuals and seconds. Sample i depends only on (seed, i), its class
and the options. The same command therefore continues after an interruption, and existing files are kept. Several
processes share the images by RANK and WORLD_SIZE, as `accelerate launch` and torchrun set them, or by --rank and
--world; the files do not depend on the number of processes, and the process that finishes last writes the grid.
"""

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
    """Sample images from a trained network. Sampling options default to those of the training run."""

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
    """Make files that are equal to the last bit for every --batch and number of processes: the network is called on
    chunks of --chunk images. Sampling then takes four times as long for one image, and 1.0 to 1.3 times as long for 16
    images and more. With --no-reproducible the network is called on --batch images, and files agree to rounding.
    """
    batch: int = 64
    """Number of images sampled before their files are written; with --no-reproducible also the network's batch size."""
    chunk: int = 16
    """Batch size of the network with --reproducible. Another size changes the last bits of the images, so an output
    folder accepts one size only.
    """
    precision: Precision = "no"
    """bf16: call the network under autocast to bfloat16; weights and samples stay float32."""
    compile: Backend = "no"
    """Backend of torch.compile for the explicit blocks and the fixed-point layer; inductor is the fastest."""
    weights: Weights = "ema"
    """Weights of a training run: ema, the averaged weights, or model, the weights after the last step."""
    vae: str | None = None
    """VAE that decodes latents, a folder or a hub name; default: the run's own."""
    prediction: Prediction | None = None
    """Prediction target of a network from a model folder, which stores no noise schedule; default: epsilon for a DiT,
    v_prediction for an FPDM.
    """
    zero_snr: bool | None = None
    """Whether a network from a model folder was trained with zero terminal SNR; default: no for a DiT, yes for an FPDM.
    """
    npz: bool = False
    """Write all samples to samples.npz too, for the ADM evaluation suite."""
    out: Path | None = None
    """Output folder; default: RUN/samples, or samples/NAME for a network by name."""
    device: str = "auto"
    """Device by name, such as cpu or cuda; auto: the first available of cuda, mps, xpu and cpu."""
    rank: int | None = None
    """Number of this process, from 0; default: RANK, or 0."""
    world: int | None = None
    """Number of processes; default: WORLD_SIZE, or 1."""

    def __post_init__(self) -> None:
        at_least(self, 1, "num", "batch", "chunk")
        at_least(self, 0, "seed")

    @property
    def network_batch(self) -> int:
        """Number of images in one call of the network."""
        return self.chunk if self.reproducible else self.batch


def main(argv: list[str] | None = None) -> int:
    """The command; returns its exit code (see cli.py)."""
    return run_request(
        Request, "sample", run, argv, after="Finished images are kept; run the command again to continue."
    )


def run(request: Request) -> None:
    """Write the missing images and, if all images exist then, the grid, the archive and the effort.

    Raises:
        ValueError: the folder holds no network, an option does not fit the network, or the output folder has other
            samples.
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
        raise ValueError(f"This network generates latents of {channels} channels; give their VAE with --vae.")
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
        print(f"{left} of {request.num} images are missing; other processes write these images and the grid.")
        return
    folder.write_grid()
    if request.npz:
        folder.write_npz()
    if more := folder.others():
        print(
            f"{folder.folder} holds {more} further images; grid, archive and effort cover the first {request.num} only."
        )
    _print_effort(folder.write_effort(chosen.timesteps))


def _settings(request: Request, opened: OpenedNetwork, classes: Sequence[int | None], decoder: Any) -> dict[str, Any]:
    """All settings that the images depend on."""
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
    """The iterations allocated by measured residuals; a second measurement may allocate other iterations."""
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
    """Sample the images `mine` of this process in parts; each part is written before the next part is sampled."""
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
    """The parts: numbers of the samples that are computed before their files are written. With --reproducible a part
    consists of whole chunks, so that the batch-mates of a sample are always the same.
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
        print(f"{len(by['timestep'])} timesteps took {one['rounds']:.1f} rounds (successive calls of the network).")
    if one["evaluations"]:
        residual = "the residual overflows"
        if "residual_mean" in by:
            mean = sum(by["residual_mean"]) / len(by["residual_mean"])
            residual = f"relative residual {mean:.2e} on average, at most {max(by['residual_max']):.2e}"
        print(
            f"The fixed-point layer was evaluated {one['evaluations']:.1f} times per image; {residual}. effort.json "
            "lists it by timestep."
        )


if __name__ == "__main__":
    sys.exit(main())
