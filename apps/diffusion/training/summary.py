"""What a run shows when its training is over: metrics.json, loss.png, samples.png, and for digits its score beside
that of real ones.
"""

from __future__ import annotations

import json
import platform
import sys
import time
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL
from PIL import Image
from tqdm import tqdm

from apps.diffusion.checkpoint.training_state import write_atomically
from apps.diffusion.config.training import Config
from apps.diffusion.data import DataSet, Images
from apps.diffusion.evaluation.digit_classifier import Judge, Score
from apps.diffusion.files.images import loss_curve
from apps.diffusion.models.dit import DiT
from apps.diffusion.models.fpdm import FPDM
from apps.diffusion.sampling.sampler import SampleResult
from apps.diffusion.training import gallery
from apps.diffusion.training.trainer import Trainer


def finish(
    config: Config,
    trainer: Trainer,
    network: DiT | FPDM,
    images: DataSet,
    held_out: Images | None,
    decoder: AutoencoderKL | None,
    began: float,
) -> None:
    """Sample from the averaged weights, score, draw, write and print.

    Args:
        config: of the run.
        trainer: when it is done.
        network: with the averaged weights.
        images: what it learnt from.
        held_out: what it has not seen; with classes, samples are scored beside these.
        decoder: of latents; without it their samples are not drawn.
        began: monotonic clock at the run's start.
    """
    real = (images, held_out) if isinstance(images, Images) and held_out is not None and images.num_classes else None
    count = config.sampling.images if real else min(config.sampling.images, gallery.ROWS**2)
    result = _samples(config, network, images.num_classes, count)
    scores = _scores(config, result, *real) if real else {}
    _pictures(config, trainer, result, decoder)
    metrics = {
        **{name: asdict(score) for name, score in scores.items()},
        "training": {
            "network": trainer.network["class"],
            "parameters": sum(p.numel() for p in trainer.model.parameters()),
            "images": trainer.progress.images,
            "steps": trainer.progress.steps,
            "skipped": trainer.progress.skipped,
            "loss": trainer.progress.history[-1][1],
            "seconds": trainer.progress.seconds,
            "last": trainer.entry,
        },
        "sampling": {**asdict(config.sampling), "images": count, "effort_per_image": result.effort.summary()},
        "seconds_in_all": time.monotonic() - began,
        "versions": _versions(trainer),
    }
    write_atomically(config.out / "metrics.json", json.dumps(metrics, indent=2) + "\n")
    _print(config, metrics, scores)


def _samples(config: Config, network: DiT | FPDM, num_classes: int, count: int) -> SampleResult:
    with tqdm(desc="sampling", unit="step", leave=False, mininterval=0.5 if sys.stderr.isatty() else 20) as bar:

        def progress(done: int, total: int) -> None:
            bar.total = total
            bar.update(done - bar.n)

        return gallery.draw(config, network, num_classes, count, network.device, progress)


def sheet(config: Config, network: DiT | FPDM, num_classes: int, decoder: AutoencoderKL | None) -> Image.Image | None:
    """Samples of a network in training; None for latents without a decoder."""
    if decoder is None and config.data.source == "latents":
        return None
    count = min(config.sampling.images, gallery.ROWS**2)
    result = _samples(config, network, num_classes, count)
    labels = None if result.labels is None else result.labels.tolist()
    return gallery.sheet(gallery.pixels(result.samples, decoder), labels)


def _scores(config: Config, result: SampleResult, images: Images, held_out: Images) -> dict[str, Score]:
    """Of the generated images, and of as many real ones as there are, up to that number, that the classifier has not
    seen.

    The classifier of the 8 x 8 digits is trained on the training images, of which there are enough for nothing else.
    Other data have more held-out images: theirs is trained on these, and has seen nothing that the network learnt from.
    """
    assert result.labels is not None
    known, unseen = (images, held_out) if config.data.source == "digits" else (held_out, images)
    judge = Judge.of(known)
    count = min(len(unseen), len(result.samples))
    chosen = torch.arange(count) * len(unseen) // count  # from all over: files are often sorted by class
    scores = {"generated": judge.score(result.samples.clamp(-1, 1), result.labels)}
    name = "real_held_out" if unseen is held_out else "real_training"
    return {**scores, name: judge.score(unseen.x[chosen], unseen.y[chosen])}


def _pictures(config: Config, trainer: Trainer, result: SampleResult, decoder: AutoencoderKL | None) -> None:
    loss_curve(trainer.progress.history, config.out / "loss.png", f"{trainer.network['class']}: training loss")
    if decoder is None and config.data.source == "latents":
        return
    labels = None if result.labels is None else result.labels.tolist()
    gallery.sheet(gallery.pixels(result.samples, decoder), labels).save(config.out / "samples.png")


def _versions(trainer: Trainer) -> dict[str, Any]:
    names = ("torch", "diffusers", "accelerate", "scikit-learn")
    return {
        "python": platform.python_version(),
        **{name: version(name) for name in names},
        "device": str(trainer.accelerator.device),
        "processes": trainer.accelerator.num_processes,
    }


def _print(config: Config, metrics: dict[str, Any], scores: dict[str, Score]) -> None:
    training, out = metrics["training"], Path(config.out)
    print(
        f"\nTrained for {training['seconds']:.0f} s on {training['images']:,} images, {training['skipped']} "
        f"steps skipped."
    )
    if scores:
        print(f"{'':24}{'images':>8}{'right label':>14}{'Fréchet distance':>19}")
    for name, score in scores.items():
        told = name.replace("real_", "real, ").replace("_", " ")
        print(f"{told:24}{score.images:8}{100 * score.accuracy:12.1f} %{score.frechet:19.2f}")
    pictures = [str(p) for p in (out / "samples.png", out / "loss.png") if p.exists()]
    print(f"\nPictures:      {'  '.join(pictures)}")
    print(f"Numbers:       {out / 'metrics.json'}")
    print(f"Weights:       {out / 'checkpoints'}")
    print(f"More samples:  python -m apps.diffusion.sample {out} --num 100")
    print(f"In all {metrics['seconds_in_all']:.0f} s.")
