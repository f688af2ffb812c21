"""Score a folder of samples: `python -m apps.diffusion.evaluate DIR`, where DIR is what `python -m
apps.diffusion.sample` wrote.

A classifier trained on real digits says how many samples show the class in their name, and how far (Fréchet
distance on its features) they lie from the real training digits; beside it stand the same figures for real
held-out digits.
"""

from __future__ import annotations

import json
import re
import sys
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import tyro

if TYPE_CHECKING:
    from torch import Tensor

_NAME = re.compile(r"\d+-class-(\d+)\.png")


@dataclass(frozen=True, kw_only=True)
class Request:
    """Score a folder of generated digits."""

    samples: Annotated[Path, tyro.conf.Positional]
    """Folder of images named 00042-class-7.png."""
    json: bool = False
    """Print JSON instead of a table."""


def main(argv: list[str] | None = None) -> int:
    """The command; returns its exit code: 0, or 2 for bad input."""
    request = tyro.cli(Request, args=argv, prog="python -m apps.diffusion.evaluate")
    try:
        x, y = read(request.samples)
        from .data import digits
        from .metrics import Judge

        train, held_out = digits("train"), digits("held-out")
        if tuple(x.shape[1:]) != train.shape:
            raise ValueError(
                f"These images are {tuple(x.shape[1:])}, and digits are {train.shape}; score samples of digits."
            )
        if int(y.max()) >= train.num_classes:
            raise ValueError(
                f"There are images of class {int(y.max())}, and digits have the classes 0 to {train.num_classes - 1}."
            )
        judge = Judge.of(train)
        count = min(len(x), len(held_out))  # the distance is biased upwards with few images: compare equal numbers
        scores = {"generated": judge.score(x, y), "real, held out": judge.score(held_out.x[:count], held_out.y[:count])}
    except ValueError as error:
        print(f"evaluate: {error}", file=sys.stderr)
        return 2
    if request.json:
        print(
            json.dumps({name.replace(", ", "_").replace(" ", "_"): asdict(s) for name, s in scores.items()}, indent=2)
        )
        return 0
    print(f"{'':24}{'images':>8}{'right label':>14}{'Fréchet distance':>19}")
    for name, score in scores.items():
        print(f"{name:24}{score.images:8}{100 * score.accuracy:12.1f} %{score.frechet:19.2f}")
    return 0


def read(folder: Path) -> tuple[Tensor, Tensor]:
    """The images (n, C, H, W) in [-1, 1] and classes (n,) of a folder of samples.

    Raises:
        ValueError: fewer than two images with a class in their name, or images of several sizes.
    """
    import numpy as np
    import torch

    from . import pictures

    found = sorted((file, int(match[1])) for file in folder.glob("*.png") if (match := _NAME.fullmatch(file.name)))
    if len(found) < 2:
        raise ValueError(f"{folder} holds {len(found)} images named like 00042-class-7.png; at least 2 are needed.")
    arrays = [np.asarray(pictures.read(file)) for file, _ in found]
    if len({array.shape for array in arrays}) > 1:
        raise ValueError(f"The images in {folder} have several sizes; give a folder of one sampling command.")
    x = torch.from_numpy(np.stack(arrays)).float() / 127.5 - 1
    x = x[:, None] if x.ndim == 3 else x.permute(0, 3, 1, 2)
    return x, torch.tensor([y for _, y in found])


if __name__ == "__main__":
    sys.exit(main())
