"""A training run from its configuration to its summary.

    OUT/config.json  data.json       configuration; number, shape, classes and checksum of the images
    OUT/checkpoints/  logs/  grids/  checkpoints, tracker, image grids of `sample_every`
    OUT/metrics.json  loss.png  samples.png      when training is complete

The first process writes; a second process that trains into the same folder is refused.
"""

import os
import signal
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from shlex import quote
from typing import Any

import torch
from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL
from tqdm import tqdm

from apps.diffusion.checkpoint import training_state as checkpoint
from apps.diffusion.checkpoint.training_state import Checkpoint
from apps.diffusion.config.training import Config
from apps.diffusion.data import ImageDataset, ImageFolderDataset, TensorDataset
from apps.diffusion.data import build as data
from apps.diffusion.data.latents import read_index
from apps.diffusion.files.atomic import LOCK, PARTIAL, write_text
from apps.diffusion.files.json_file import write_or_compare
from apps.diffusion.models.autoencoder import open_decoder
from apps.diffusion.training.metric_logger import MetricLogger
from apps.diffusion.training.summary import check_sampling, image_grid, summarize
from apps.diffusion.training.trainer import Diverged, Trainer


def start_of(config: Config, resume: bool) -> Checkpoint | None:
    """The checkpoint to continue from; None: training begins at its first step.

    Raises:
        ValueError: the folder is not empty and `resume` is not set, or the checkpoint cannot be read.
    """
    out = config.out
    if resume:
        return checkpoint.newest(out) if checkpoint.all_of(out) else None
    found = [p.name for p in out.iterdir() if p.suffix != PARTIAL] if out.exists() else []
    if int(os.environ.get("RANK", 0)) == 0 and set(found) - {LOCK}:
        what, remedy = ("a run", "continue it with --resume, ") if "config.json" in found else ("files", "")
        raise ValueError(
            f"{out} holds {what} already, and nothing is overwritten: {remedy}give another folder with --out, or "
            f"delete {out.absolute()}."
        )
    return None


def run(config: Config, start: Checkpoint | None) -> int:
    """Trains, then writes the summary. Returns the exit code: 0, 1 if training diverged, 128 + the number of the signal
    that stopped training.

    Raises:
        ValueError: images or a VAE that cannot be used, or images that differ from those of the run's start.
        OSError: the run's folder cannot be written.
    """
    began = time.monotonic()
    config = with_channels_of(config, start)
    if config.threads is not None:
        torch.set_num_threads(config.threads)
    images, held_out = load_images(config)
    if int(os.environ.get("RANK", 0)) == 0 and (config.out / "config.json").exists():
        write_data(config.out, data.fingerprint(images), config.data.path)  # other images are refused before a network
    trainer = Trainer(config, images, start)
    check_sampling(config, trainer.accelerator.unwrap_model(trainer.model))
    main_process = trainer.accelerator.is_main_process
    decoder = decoder_of_grids(config) if main_process else None
    if main_process:
        _open_folder(config, trainer, resumed=start is not None)
    logger = MetricLogger(trainer.accelerator, config.out, trainer.progress.images, config.to_json())
    try:
        with stop_on_signals(trainer) as caught:
            trainer.run(
                lambda state: checkpoint.save(config.out, state, config.keep),
                logger.log,
                lambda network: logger.show(image_grid(config, network, images, decoder), trainer.progress.images),
            )
    except Diverged as error:
        print(f"train: {error}", file=sys.stderr)
        return 1
    finally:
        logger.close()
    if trainer.stopping:
        if main_process:
            print(
                f"Stopped at {trainer.progress.images} images; the checkpoint is in {config.out}.\n"
                f"Continue:      python -m apps.diffusion.train --resume --out {quote(str(config.out))}"
            )
        return 128 + (caught[0] if caught else signal.SIGTERM)  # another process may have received the signal
    network = trainer.averaged()
    if network is not None:
        summarize(config, trainer, network, images, held_out, decoder, began)
    trainer.accelerator.wait_for_everyone()
    trainer.accelerator.end_training()
    return 0


def with_channels_of(config: Config, start: Checkpoint | None) -> Config:
    """The configuration with `data.channels` of the checkpoint's network, for a folder of images without
    --data.channels. Earlier versions read gray images with three channels, and their runs have to continue so.
    """
    if start is None or config.data.source != "folder" or config.data.channels is not None:
        return config
    channels = start.network["config"].get("in_channels")
    return replace(config, data=replace(config.data, channels=channels if channels in (1, 3) else None))


def _open_folder(config: Config, trainer: Trainer, resumed: bool) -> None:
    """Writes config.json and data.json, and prints the network's class, its size and the data.

    Raises:
        ValueError: the run was started with other images.
    """
    images = trainer.images
    write_text(config.out / "config.json", config.to_json())  # first: --resume needs it, and writes the rest
    write_data(config.out, data.fingerprint(images), config.data.path)
    count = sum(p.numel() for p in trainer.model.parameters())
    classes = f"in {images.num_classes} classes" if images.num_classes else "without classes"
    print(
        f"{'Resuming' if resumed else 'Training'} {trainer.network['class']} with {count:,} parameters on "
        f"{len(images)} images of {' x '.join(map(str, images.shape))} {classes}; the run's folder is {config.out}.",
        flush=True,
    )


def write_data(out: Path, found: dict[str, Any], folder: Path | None = None) -> None:
    """Writes data.json if the file is missing, else compares the file with the images at hand.

    In earlier versions, data.json lacks the class names, the checksum of images in memory and that of file sizes.

    Args:
        out: the run's folder.
        found: number, shape, classes and checksum of the images at hand.
        folder: folder of the image files, for messages; None: the images are no files.

    Raises:
        ValueError: the run was started with other images.
    """
    file = out / "data.json"
    where = f"the images in {folder} are not those of the run" if folder else "these images are not those of the run"
    remedy = f"{where}: restore them, give their folder with --data.path, or another --out for another run."
    write_or_compare(file, found, remedy, optional=("class_names", "sha256", "file_sizes_sha256"))


def load_images(config: Config) -> tuple[ImageDataset, TensorDataset | None]:
    """The training images, and the held-out images (None: the source has none); prints which files are left out.

    Raises:
        ValueError: no image can be used, or sampling has guidance and the images have no classes.
    """
    quiet = config.data.source != "folder" or int(os.environ.get("RANK", 0)) > 0
    with tqdm(desc="reading", unit="img", disable=quiet, mininterval=0.5 if sys.stderr.isatty() else 20) as bar:

        def progress(done: int, total: int) -> None:
            bar.total = total
            bar.update(done - bar.n)

        images, held_out = data.datasets(config.data, config.seed, progress)
    if isinstance(images, ImageFolderDataset) and not quiet:
        for remark in images.remarks():
            print(f"train: {remark}", file=sys.stderr)
    if not images.num_classes and config.sampling.value("guidance") != 1:
        raise ValueError(
            f"--sampling.guidance {config.sampling.guidance:g} needs classes, and these images have no classes; leave "
            "guidance at 1."
        )
    return images, held_out


def decoder_of_grids(config: Config) -> AutoencoderKL | None:
    """The VAE that decodes latents for image grids. None if the data are pixels, and if --data.vae is not given and the
    VAE of the latents cannot be found.

    Raises:
        ValueError: the VAE of --data.vae cannot be read, or is not the VAE that encoded the latents.
    """
    if config.data.source != "latents" or config.data.path is None:
        return None
    try:
        return open_decoder(read_index(config.data.path), config.data.vae)
    except ValueError as error:
        if config.data.vae is not None:
            raise
        print(f"train: no image grid will be drawn: {error} --data.vae names a copy of the VAE.", file=sys.stderr)
        return None


@contextmanager
def stop_on_signals(trainer: Trainer) -> Iterator[list[int]]:
    """Within the block, SIGTERM and Ctrl-C stop the trainer after its step; a second signal ends the process.

    Yields the list of the signals received so far.
    """
    caught: list[int] = []

    def handle(number: int, frame: Any) -> None:
        caught.append(number)
        trainer.stop_requested = True
        signal.signal(number, signal.SIG_DFL)

    before = {number: signal.signal(number, handle) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield caught
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
