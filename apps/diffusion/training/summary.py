"""Summary of a training run: metrics.json, loss.png and samples.png. For labeled images in memory, metrics.json has the
scores of the samples and of held-out images.

With --max-time, sampling ends after a quarter of that time; the samples complete by then are scored and drawn.
"""

import math
import platform
import sys
import time
from contextlib import suppress
from functools import partial
from importlib.metadata import version
from pathlib import Path
from shlex import quote
from typing import Any

from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL
from PIL import Image
from tqdm import tqdm

from apps.diffusion.config.checks import flag
from apps.diffusion.config.sampling import OptionError, SamplingOptions
from apps.diffusion.config.serialization import to_plain
from apps.diffusion.config.training import Config
from apps.diffusion.data import ImageDataset, TensorDataset
from apps.diffusion.evaluation.feature_extractors import SMALLEST_SET, features_of
from apps.diffusion.evaluation.feature_statistics import measure
from apps.diffusion.evaluation.image_sources import of_dataset, of_tensors
from apps.diffusion.evaluation.scores import Scores, evaluate, table
from apps.diffusion.files.atomic import atomic_path
from apps.diffusion.files.images import ROWS, class_labels, sample_grid
from apps.diffusion.files.json_file import write_object
from apps.diffusion.files.plots import loss_curve
from apps.diffusion.models.autoencoder import decode
from apps.diffusion.models.dit import DiT
from apps.diffusion.models.fpdm import FPDM
from apps.diffusion.sampling.plan import plan
from apps.diffusion.sampling.sampler import CHUNK, SampleResult, sample
from apps.diffusion.schedulers.noise_schedule import scheduler_of
from apps.diffusion.training.trainer import Trainer


def summarize(
    config: Config,
    trainer: Trainer,
    network: DiT | FPDM,
    images: ImageDataset,
    held_out: TensorDataset | None,
    decoder: AutoencoderKL | None,
    began: float,
) -> None:
    """Samples from the averaged weights, scores the samples, and writes and prints the summary. The time of the summary
    does not count as training time.

    Args:
        config: the run's configuration.
        trainer: the trainer, after training.
        network: the network with the averaged weights.
        images: the training images.
        held_out: images that were not trained on; None: the source has no such images. Nothing is scored with fewer
            than `SMALLEST_SET` of them.
        decoder: the VAE that decodes latents; None: the data are pixels, or samples of latents are not drawn.
        began: monotonic clock in seconds at the run's start.
    """
    real = None
    if isinstance(images, TensorDataset) and held_out is not None and images.num_classes:
        if len(held_out) >= SMALLEST_SET:
            real = (images, held_out)
        else:
            print(f"There are no scores: they need {SMALLEST_SET} held-out images, and the data have {len(held_out)}.")
    count = config.num_samples if real else min(config.num_samples, ROWS**2)
    result = draw_samples(config, network, images.num_classes, count, _time_limit(config))
    if result is not None and result.samples.isnan().any():
        print("The samples hold NaN, because the network overflows, and are neither scored nor drawn.")
        result, count = None, 0
    complete = 0 if result is None else len(result.samples)
    if complete < count:
        print(
            f"{complete} of {count} images were sampled in {_time_limit(config):.0f} s, the share of --max-time for "
            "the summary; the command below samples more.",
            flush=True,
        )
    scores = _scores(config, result, *real) if real and result is not None and complete > 1 else {}
    _draw(config, trainer, result, images, decoder)
    metrics = {
        **scores,
        "training": {
            "network": trainer.network["class"],
            "parameters": sum(p.numel() for p in trainer.model.parameters()),
            "images": trainer.progress.images,
            "steps": trainer.progress.steps,
            "skipped": trainer.progress.skipped,
            "loss": trainer.progress.history[-1][1] if trainer.progress.history else None,
            "seconds": trainer.progress.seconds,
            "last": trainer.progress.last,
        },
        "sampling": {
            **to_plain(config.sampling_options()),
            "images": complete,
            "effort_per_image": result.effort.summary() if result is not None else None,
        },
        "seconds_in_all": time.monotonic() - began,
        "versions": _versions(trainer),
    }
    write_object(config.out / "metrics.json", metrics)
    _print(config, metrics, scores)


def check_sampling(config: Config, network: DiT | FPDM) -> None:
    """Raises ValueError if the sampling options of a run do not fit its network. A measured allocation is not checked,
    since planning it takes a measurement on the trained network.
    """
    options = config.sampling_options()
    if options.allocation == "measured":
        return
    try:
        plan(network, scheduler_of(config), SamplingOptions(), defaults=options)
    except OptionError as error:
        raise ValueError(error.spelled(partial(flag, options))) from None


def _time_limit(config: Config) -> float:
    """Seconds of sampling in the summary, and for an image grid during training."""
    return math.inf if config.max_time is None else config.max_time / 4


class _TimeLimitExceeded(Exception):
    """The time limit of sampling is exceeded."""


def draw_samples(
    config: Config, network: DiT | FPDM, num_classes: int, count: int, limit: float = math.inf
) -> SampleResult | None:
    """The first `count` samples of the run's seed with the run's sampling options, computed in chunks. Sampling ends
    after `limit` seconds; the result has the complete chunks, and is None if no chunk is complete.
    """
    labels = class_labels(count, num_classes)
    chosen = plan(network, scheduler_of(config), SamplingOptions(), defaults=config.sampling_options())
    end, parts = time.monotonic() + limit, []
    chunk = CHUNK if network.device.type == "cpu" else 4 * CHUNK
    total = -(-count // chunk) * len(chosen.timesteps)
    with tqdm(
        total=total, desc="sampling", unit="step", leave=False, mininterval=0.5 if sys.stderr.isatty() else 20
    ) as bar:

        def progress(done: int, _: int) -> None:
            bar.update(1)
            if time.monotonic() > end:
                raise _TimeLimitExceeded

        with suppress(_TimeLimitExceeded):
            for first in range(0, count, chunk):
                numbers = range(first, min(first + chunk, count))
                y = None if labels is None else labels[first : first + chunk]
                parts.append(
                    sample(
                        network,
                        numbers,
                        y,
                        plan=chosen,
                        seed=config.seed,
                        chunk=chunk,
                        device=network.device,
                        progress=progress,
                    )
                )
    return SampleResult.joined(parts) if parts else None


def image_grid(
    config: Config, network: DiT | FPDM, images: ImageDataset, decoder: AutoencoderKL | None
) -> Image.Image | None:
    """A grid of samples of a network in training; None for latents without a decoder, and if no chunk of samples is
    complete within the time limit.
    """
    if decoder is None and config.data.source == "latents":
        return None
    count = min(config.num_samples, ROWS**2)
    result = draw_samples(config, network, images.num_classes, count, _time_limit(config))
    return None if result is None else _grid(result, images, decoder)


def _grid(result: SampleResult, images: ImageDataset, decoder: AutoencoderKL | None) -> Image.Image:
    labels = None if result.labels is None else result.labels.tolist()
    pixels = result.samples if decoder is None else decode(decoder, result.samples)
    return sample_grid(pixels, labels, images.classes)


def _scores(config: Config, result: SampleResult, images: TensorDataset, held_out: TensorDataset) -> dict[str, Scores]:
    """Scores of the generated images and of real images, at most as many, that the classifier was not trained on.

    For the 8 x 8 digits, the classifier is trained on the training images, because the held-out images are too few to
    train it. For other data, it is trained on the held-out images, so that it has seen no image of the network's
    training set; the real images to score are then training images.
    """
    assert result.labels is not None
    known, unseen = (images, held_out) if config.data.source == "digits" else (held_out, images)
    extractor = features_of(known)
    reference = measure(of_dataset("reference", known), extractor)
    sets = {
        "generated": of_tensors("generated", result.samples, result.labels),
        "real_held_out" if unseen is held_out else "real_training": of_dataset("real", unseen, len(result.samples)),
    }
    return {name: evaluate(source, reference, extractor) for name, source in sets.items()}


def _draw(
    config: Config,
    trainer: Trainer,
    result: SampleResult | None,
    images: ImageDataset,
    decoder: AutoencoderKL | None,
) -> None:
    """Writes loss.png, and samples.png if a sample is complete and is an image or can be decoded."""
    if trainer.progress.history:
        with atomic_path(config.out / "loss.png") as partial:
            loss_curve(trainer.progress.history, partial, f"{trainer.network['class']}: training loss")
    if result is not None and (decoder is not None or config.data.source != "latents"):
        with atomic_path(config.out / "samples.png") as partial:
            _grid(result, images, decoder).save(partial, format="PNG")


def _versions(trainer: Trainer) -> dict[str, Any]:
    names = ("torch", "diffusers", "accelerate", "scikit-learn")
    return {
        "python": platform.python_version(),
        **{name: version(name) for name in names},
        "device": str(trainer.accelerator.device),
        "processes": trainer.accelerator.num_processes,
    }


def _print(config: Config, metrics: dict[str, Any], scores: dict[str, Scores]) -> None:
    training, out = metrics["training"], Path(config.out)
    print(
        f"\nTrained for {training['seconds']:.0f} s on {training['images']:,} images, {training['skipped']} "
        f"steps skipped."
    )
    if scores:
        print(table({name.replace("real_", "real, ").replace("_", " "): score for name, score in scores.items()}))
    drawn = [str(p) for p in (out / "samples.png", out / "loss.png") if p.exists()]
    print(f"\nImages:        {'  '.join(drawn)}")
    print(f"Numbers:       {out / 'metrics.json'}")
    print(f"Weights:       {out / 'checkpoints'}")
    print(f"More samples:  python -m apps.diffusion.sample {quote(str(out))} --num 100")
    print(f"In all {metrics['seconds_in_all']:.0f} s.")
