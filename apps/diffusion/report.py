"""What a run shows when its training is over: its score beside that of real images, metrics.json, loss.png,
samples.png.
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

from tqdm import tqdm

from .checkpoint import write_atomically
from .config import Config
from .data import Images
from .generate import generate, labels_in_turn
from .metrics import Judge, Score
from .pictures import columns_by_class, grid, loss_curve, to_pil
from .sampler import SampleResult
from .trainer import Trainer

ROWS = 8  # of samples.png


def finish(config: Config, trainer: Trainer, images: Images, held_out: Images, began: float) -> None:
    """Sample from the averaged weights, score, draw, write and print. `began`: monotonic clock at the run's
    start.
    """
    out = config.out
    result = _samples(config, trainer, images.num_classes)
    generated, real = _scores(config, result, images, held_out)
    _pictures(config, trainer, result)
    metrics = {
        "generated": asdict(generated),
        "real_held_out": asdict(real),
        "training": {
            "network": trainer.network["class"],
            "parameters": sum(p.numel() for p in trainer.model.parameters()),
            "images": trainer.progress.images,
            "steps": trainer.progress.steps,
            "skipped": trainer.progress.skipped,
            "loss": trainer.progress.history[-1][1],
            "seconds": trainer.progress.seconds,
        },
        "sampling": {**asdict(config.sampling), "effort_per_image": result.effort.summary()},
        "seconds_in_all": time.monotonic() - began,
        "versions": _versions(trainer),
    }
    write_atomically(out / "metrics.json", json.dumps(metrics, indent=2) + "\n")
    _print(config, metrics, generated, real)


def _samples(config: Config, trainer: Trainer, num_classes: int) -> SampleResult:
    model = trainer.ema.module.eval()
    indices = range(config.sampling.images)
    labels = labels_in_turn(indices, range(num_classes)) if num_classes else None
    with tqdm(desc="sampling", unit="step", leave=False, mininterval=0.5 if sys.stderr.isatty() else 20) as bar:

        def progress(done: int, total: int) -> None:
            bar.total = total
            bar.update(done - bar.n)

        device = trainer.accelerator.device
        return generate(model, config, config.sampling, indices, labels, config.seed, device, progress)


def _scores(config: Config, result: SampleResult, images: Images, held_out: Images) -> tuple[Score, Score]:
    """Of the generated images, and of as many real ones as there are, up to that number."""
    assert result.labels is not None
    judge = Judge.of(images)
    count = min(len(held_out), len(result.samples))
    real = judge.score(held_out.x[:count], held_out.y[:count])
    return judge.score(result.samples.clamp(-1, 1), result.labels), real


def _pictures(config: Config, trainer: Trainer, result: SampleResult) -> None:
    loss_curve(trainer.progress.history, config.out / "loss.png", f"{trainer.network['class']}: training loss")
    assert result.labels is not None
    labels = result.labels.tolist()
    chosen = columns_by_class(labels, ROWS)
    classes = sorted(set(labels))
    sheet = grid([to_pil(result.samples[i]) for i in chosen], len(classes), head=[str(y) for y in classes])
    sheet.save(config.out / "samples.png")


def _versions(trainer: Trainer) -> dict[str, Any]:
    names = ("torch", "diffusers", "accelerate", "scikit-learn")
    return {
        "python": platform.python_version(),
        **{name: version(name) for name in names},
        "device": str(trainer.accelerator.device),
        "processes": trainer.accelerator.num_processes,
    }


def _print(config: Config, metrics: dict[str, Any], generated: Score, real: Score) -> None:
    training, out = metrics["training"], Path(config.out)
    print(
        f"\nTrained for {training['seconds']:.0f} s on {training['images']:,} images, {training['skipped']} "
        f"steps skipped."
    )
    print(f"{'':24}{'images':>8}{'right label':>14}{'Fréchet distance':>19}")
    for name, score in (("generated", generated), ("real, held out", real)):
        print(f"{name:24}{score.images:8}{100 * score.accuracy:12.1f} %{score.frechet:19.2f}")
    print(f"\nPictures:      {out / 'samples.png'}  {out / 'loss.png'}")
    print(f"Numbers:       {out / 'metrics.json'}")
    print(f"Weights:       {out / 'checkpoints'}")
    print(f"More samples:  python -m apps.diffusion.sample {out} --num 100")
    print(f"In all {metrics['seconds_in_all']:.0f} s.")
