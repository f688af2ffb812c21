"""Own images on a laptop: the preset `folder-small` on generated colored shapes, scored by two classifiers.

    python -m benchmarks.diffusion.own_images           # trains, samples, scores, writes results/own_images.json
    python -m benchmarks.diffusion.own_images --run RUN # scores a run of the preset on the same shapes

The data are 600 images of 16 x 16 pixels: circles, squares and triangles of random color, position and size. Two
classifiers decide whether a sample shows the shape of its class, a convolutional network and a support vector machine
on the brightest channel, both trained on 3600 other shapes.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageDraw
from sklearn.svm import SVC
from torch import Tensor

from apps.diffusion import train
from apps.diffusion.checkpoint import training_state
from apps.diffusion.checkpoint.open_network import open_network
from apps.diffusion.config.presets import PRESETS
from apps.diffusion.data import ImageFolderDataset, TensorDataset
from apps.diffusion.data.dataset import all_images
from apps.diffusion.evaluation.digit_classifier import train_classifier
from apps.diffusion.evaluation.metrics import label_accuracy
from apps.diffusion.sampling.plan import plan
from apps.diffusion.sampling.sampler import sample
from benchmarks.harness import RESULTS, provenance, write_result

SHAPES = ("circle", "square", "triangle")
SIZE = 16
GUIDANCE = 4.0


def shape(kind: str, seed: int, size: int = SIZE) -> Image.Image:
    """An image of one shape of random bright color, position and size, drawn at four times the size and reduced."""
    draw = np.random.default_rng(seed)
    big = 4 * size
    radius = draw.uniform(0.22, 0.38) * big
    x, y = draw.uniform(radius + 2, big - radius - 2, 2)
    red, green, blue = (int(v) for v in draw.permutation(np.array([255, draw.integers(60, 256), draw.integers(0, 60)])))
    image = Image.new("RGB", (big, big), (16, 16, 16))
    pen = ImageDraw.Draw(image)
    if kind == "circle":
        pen.ellipse((x - radius, y - radius, x + radius, y + radius), fill=(red, green, blue))
    elif kind == "square":
        pen.rectangle((x - radius, y - radius, x + radius, y + radius), fill=(red, green, blue))
    else:
        pen.polygon([(x, y - radius), (x - radius, y + radius), (x + radius, y + radius)], fill=(red, green, blue))
    return image.resize((size, size), Image.Resampling.BOX)


def save_shapes(root: Path, each: int, first: int = 0) -> Path:
    """`each` images of every shape below `root`, from number `first` on; returns `root`."""
    for k, kind in enumerate(SHAPES):
        (root / kind).mkdir(parents=True, exist_ok=True)
        for i in range(first, first + each):
            shape(kind, 10_000 * k + i).save(root / kind / f"{i:04d}.png")
    return root


class Classifiers:
    """Two classifiers of shapes, trained on images that no diffusion model is trained on."""

    def __init__(self, root: Path, each: int = 1200) -> None:
        x, y = all_images(ImageFolderDataset(save_shapes(root, each, first=5000), SIZE))
        self.network = train_classifier(TensorDataset(x, y, len(SHAPES)))
        self.machine = SVC(C=10).fit(_brightest(x), y.numpy())

    def accuracy(self, x: Tensor, y: Tensor) -> dict[str, float]:
        """By classifier, the share of images (n, 3, 16, 16) that show their class."""
        x = x.clamp(-1, 1)
        return {
            "network": label_accuracy(self.network(x), y),
            "support vectors": float(self.machine.score(_brightest(x), y.numpy())),
        }


def _brightest(x: Tensor) -> np.ndarray:
    return x.amax(1).flatten(1).numpy()


def scored(run: Path, images: Path, classifiers: Classifiers, count: int) -> dict[str, Any]:
    """Numbers of a training run on the shapes, and scores of samples with the options of the preset and guidance."""
    opened = open_network(run)
    options = replace(PRESETS["folder-small"]().sampling, guidance=GUIDANCE)
    chosen = plan(opened.model, opened.scheduler, options, defaults=opened.options)
    labels = [i % len(SHAPES) for i in range(count)]
    result = sample(opened.model, range(count), labels, plan=chosen, seed=0, reproducible=False, chunk=60)
    progress = training_state.newest(run).progress
    return {
        "images": progress.images,
        "steps": progress.steps,
        "loss": progress.history[-1][1],
        "parameters": sum(p.numel() for p in opened.model.parameters()),
        "samples": count,
        "guidance": GUIDANCE,
        "right class": classifiers.accuracy(result.samples, torch.tensor(labels)),
        "right class, training images": classifiers.accuracy(*all_images(ImageFolderDataset(images, SIZE))),
    }


def main(argv: list[str] | None = None) -> None:
    """The command."""
    parser = argparse.ArgumentParser(description="Own images on a laptop: the preset folder-small on generated shapes.")
    parser.add_argument(
        "--run", type=Path, help="training run of the preset on the shapes in --images; nothing is trained"
    )
    parser.add_argument("--images", type=Path, help="folder of the 600 shapes; written if it does not exist")
    parser.add_argument("--cpu-seconds", type=float, help="of the training of --run")
    parser.add_argument("--note", default="", help="how --run was trained, for the result file")
    parser.add_argument("--samples", type=int, default=300)
    given = parser.parse_args(argv)
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        images = given.images or folder / "shapes"
        if not images.exists():
            save_shapes(images, 200)
        run, spent = given.run, given.cpu_seconds
        if run is None:
            run, began = folder / "run", time.process_time()
            flags = ["--data.path", str(images), "--out", str(run), "--max-time", "None", "--track", "none"]
            assert train.main(["folder-small", *flags]) == 0
            spent = time.process_time() - began
        found = scored(run, images, Classifiers(folder / "others"), given.samples)
    result = {**provenance("cpu"), "cpu seconds of training": spent, "note": given.note, **found}
    write_result(RESULTS / "own_images.json", result)
    print(result)


if __name__ == "__main__":
    main()
