"""VAE latents on the disk as a data set; `python -m apps.diffusion.encode` writes them.

    DIR/index.json                  what they are and where they come from
    DIR/shards/00000.safetensors    mean (n, 2, C, h, w), std likewise, label (n,)

The second axis is the image and its mirror image. A VAE encodes an image x to a normal distribution of
latents; what training sees of it is

    z = scaling (mean_k + std_k eps - shift),    k ~ U{0, 1},  eps ~ N(0, 1)

drawn afresh in every epoch by (seed, epoch, index) alone. Nothing is held in memory: shards are mapped.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from apps.diffusion.rng import Stream, generator

FORMAT = 1


class Latents:
    """The latents in a folder.

    Args:
        root: the folder.
        mirror: show every other image mirrored.
        sample: draw from each distribution; False shows its mean.
        labels: tell the classes; False hides them.

    Raises:
        ValueError: no such folder, encoding is not finished, or a shard is missing or truncated.
    """

    def __init__(self, root: Path, *, mirror: bool = True, sample: bool = True, labels: bool = True) -> None:
        self.root, self.mirror, self.sample = root, mirror, sample
        self.index = read_index(root)
        self.classes: tuple[str, ...] = tuple(self.index["classes"] if labels else ())
        self.shape: tuple[int, int, int] = tuple(self.index["shape"])
        self._shards = [self._open(shard) for shard in self.index["shards"]]
        self._starts = np.cumsum([0, *(shard["images"] for shard in self.index["shards"])])
        self.y = torch.cat([shard.get_tensor("label") for shard in self._shards])

    def __len__(self) -> int:
        return int(self._starts[-1])

    @property
    def num_classes(self) -> int:
        """0 where the images have no classes."""
        return len(self.classes)

    def __getitem__(self, index: Sequence[int]) -> tuple[Tensor, Tensor]:
        """The means (b, C, h, w) of the images at these indices, scaled, not mirrored; and classes (b,)."""
        moments = [self.moments(i) for i in index]
        return self._scaled(torch.stack([mean[0] for mean, _ in moments])), self.y[torch.as_tensor(index)]

    def draw(self, index: Sequence[int], epoch: Sequence[int], seed: int) -> tuple[Tensor, Tensor]:
        """Latents (b, C, h, w), float32, scaled, and classes (b,): image k as epoch[k] shows it."""
        z = []
        for i, e in zip(index, epoch, strict=True):
            own = generator(seed, Stream.VIEW, e * len(self) + i)
            side = int(torch.randint(2, (), generator=own)) if self.mirror else 0
            mean, std = (moment[side] for moment in self.moments(i))
            noise = torch.randn(self.shape, generator=own) if self.sample else 0.0
            z.append(mean + std * noise)
        return self._scaled(torch.stack(z)), self.y[torch.as_tensor(index)]

    def moments(self, i: int) -> tuple[Tensor, Tensor]:
        """Mean and standard deviation (2, C, h, w) of image i and its mirror image, as the VAE gives them."""
        if not 0 <= i < len(self):
            raise IndexError(f"There are {len(self)} images, and no number {i}.")
        k = int(np.searchsorted(self._starts, i, side="right")) - 1
        row = i - int(self._starts[k])
        mean, std = (self._shards[k].get_slice(name)[row] for name in ("mean", "std"))
        return mean.float(), std.float()

    def verify(self) -> None:
        """Compares every shard with its checksum.

        Raises:
            ValueError: naming the shard that is damaged.
        """
        for shard in self.index["shards"]:
            if sha256(self.root / shard["file"]) != shard["sha256"]:
                raise ValueError(
                    f"{self.root / shard['file']} is damaged: its checksum is not the one in index.json. Delete it and "
                    "its .json, and encode again: only that shard is made."
                )

    def _scaled(self, z: Tensor) -> Tensor:
        return self.index["scaling_factor"] * (z - self.index["shift_factor"])

    def _open(self, shard: dict[str, Any]) -> Any:
        path = self.root / shard["file"]
        try:
            if path.stat().st_size != shard["bytes"]:
                raise OSError(f"it has {path.stat().st_size} bytes instead of {shard['bytes']}")
            return safe_open(path, framework="pt")
        except (OSError, SafetensorError) as error:
            raise ValueError(
                f"The shard {path} cannot be read ({error}); delete it and its .json, and encode again: only that "
                "shard is made."
            ) from None


def read_index(root: Path) -> dict[str, Any]:
    """index.json of a folder of latents.

    Raises:
        ValueError: there is none, or it is not this version's.
    """
    try:
        index = json.loads((root / "index.json").read_text())
        version = index["format"]
    except FileNotFoundError:
        started = (root / "settings.json").exists()
        raise ValueError(
            f"{root} holds latents whose encoding is not finished; run the same encode command again to continue it."
            if started
            else f"{root} holds no latents (no index.json); make them with python -m apps.diffusion.encode."
        ) from None
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{root / 'index.json'} is not the index of latents ({error}); encode them again.") from None
    if version != FORMAT:
        raise ValueError(f"{root} has format {version}, and this version reads {FORMAT}; encode the images again.")
    return index


def sha256(path: Path) -> str:
    """Of a file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
