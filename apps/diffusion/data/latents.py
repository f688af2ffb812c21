"""Dataset of VAE latents in a folder that `python -m apps.diffusion.encode` writes.

    DIR/index.json                  settings, checksums and the folder of the images
    DIR/shards/00000.safetensors    mean and std, both (n, 2, C, h, w), and label (n,)

Index 0 of the second axis is the image, index 1 its mirror image. A VAE encodes an image to a normal distribution of
latents. The latent of an image in an epoch is the sample

    l = mean_k + std_k eps,    k ~ U{0, 1},  eps ~ N(0, 1)
    z = scaling (l - shift),   or, if the VAE's configuration has latents_mean and latents_std (one number per channel),
    z = scaling (l - latents_mean) / latents_std

with k and eps a function of (seed, epoch, number of the image). The shards are memory-mapped, after each was compared
with its checksum.
"""

import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from apps.diffusion.config.serialization import from_plain
from apps.diffusion.data.dataset import Key, augmentation_generator, index_and_epoch
from apps.diffusion.files import hashing
from apps.diffusion.files.json_file import read_object

FORMAT = 1
_ENTRIES = {
    "shape": tuple[int, int, int],
    "classes": tuple[str, ...],
    "scaling_factor": float,
    "shift_factor": float,
    "shards": tuple[dict, ...],
}
_OF_SHARD = {"file": str, "images": int, "bytes": int, "sha256": str}
_OF_VAE = {"name": str, "weights_sha256": str}


class LatentDataset:
    """A folder of latents as a dataset: `dataset[i] -> (z, label)`, z (C, h, w) float32, scaled.

    Args:
        path: the folder.
        mirror: whether k is random; false: k = 0, without mirror images.
        sample: whether eps is random; false: eps = 0, the mean of the distribution.
        labels: whether the dataset has the classes of the images; false: it has no classes.
        seed: random seed of k and eps.
        verify: whether the constructor compares every shard with its checksum. It reads each file on all cores, at the
            speed of SHA-256 (0.1 to 0.3 GB per second and core, measured on a busy CPU with SHA instructions) or of the
            disk. Every process of a distributed run does so; the workers of a DataLoader do not.

    Attributes:
        y: (n,) labels.
        classes: names of the classes.
        shape: (C, h, w) of a latent.
        index: content of index.json.

    Raises:
        ValueError: the folder holds no latents, encoding is not finished, or a shard is missing, truncated or damaged.
    """

    def __init__(
        self,
        path: Path | str,
        *,
        mirror: bool = False,
        sample: bool = True,
        labels: bool = True,
        seed: int = 0,
        verify: bool = True,
    ) -> None:
        self.root, self.mirror, self.sample, self.seed = Path(path), mirror, sample, seed
        self.index = read_index(self.root, latents=True)
        self.classes: tuple[str, ...] = tuple(self.index["classes"] if labels else ())
        self.shape: tuple[int, int, int] = tuple(self.index["shape"])
        self._starts = np.cumsum([0, *(shard["images"] for shard in self.index["shards"])])
        self._shards: list[Any] | None = None
        mean, std = self.index.get("latents_mean"), self.index.get("latents_std")
        self._normalization: list[Tensor] | None = None
        if mean is not None and std is not None:
            self._normalization = [torch.tensor(v, dtype=torch.float32)[:, None, None] for v in (mean, std)]
        self.y = torch.cat([shard.get_tensor("label") for shard in self._opened()])
        if verify:
            self.verify()

    def __len__(self) -> int:
        return int(self._starts[-1])

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_shards": None}  # open files cannot be pickled: a worker opens them again

    @property
    def num_classes(self) -> int:
        """Number of classes; 0 without classes."""
        return len(self.classes)

    def __getitem__(self, key: Key) -> tuple[Tensor, int]:
        """The latent and its label."""
        i, epoch = index_and_epoch(key)
        i = range(len(self))[i]
        if not (self.mirror or self.sample):
            return self._scaled(self.moments(i)[0][0]), int(self.y[i])
        own = augmentation_generator(self.seed, len(self), (i, epoch))
        side = int(torch.randint(2, (), generator=own)) if self.mirror else 0
        mean, std = (moment[side] for moment in self.moments(i))
        noise = torch.randn(self.shape, generator=own) if self.sample else 0.0
        return self._scaled(mean + std * noise), int(self.y[i])

    def fingerprint(self) -> str:
        """SHA-256 of the checksums of the shards."""
        return hashing.of_json([shard["sha256"] for shard in self.index["shards"]])

    def moments(self, i: int) -> tuple[Tensor, Tensor]:
        """Mean and standard deviation (2, C, h, w) of the latents of image i and its mirror image, not scaled.

        Raises:
            IndexError: there is no image i.
        """
        if not 0 <= i < len(self):
            raise IndexError(f"There are {len(self)} images, and no number {i}.")
        k = int(np.searchsorted(self._starts, i, side="right")) - 1
        row = i - int(self._starts[k])
        shard = self._opened()[k]
        mean, std = (shard.get_slice(name)[row] for name in ("mean", "std"))
        return mean.float(), std.float()

    def verify(self) -> None:
        """Compares every shard with its checksum.

        Raises:
            ValueError: a shard is damaged.
        """
        shards = self.index["shards"]
        with ThreadPoolExecutor(os.cpu_count()) as pool:
            found = list(pool.map(hashing.of_file, (self.root / shard["file"] for shard in shards)))
        for shard, checksum in zip(shards, found, strict=True):
            if checksum != shard["sha256"]:
                raise ValueError(
                    f"{self.root / shard['file']} is damaged: its checksum is not the one in index.json. Delete it and "
                    "its .json, and encode again; only this shard is then encoded."
                )

    def _scaled(self, z: Tensor) -> Tensor:
        """z of the equation at the top of this file."""
        if self._normalization is not None:
            mean, std = self._normalization
            return self.index["scaling_factor"] * (z - mean) / std
        return self.index["scaling_factor"] * (z - self.index["shift_factor"])

    def _opened(self) -> list[Any]:
        if self._shards is None:
            self._shards = [self._open(shard) for shard in self.index["shards"]]
        return self._shards

    def _open(self, shard: dict[str, Any]) -> Any:
        path = self.root / shard["file"]
        try:
            if path.stat().st_size != shard["bytes"]:
                raise OSError(f"it has {path.stat().st_size} bytes instead of {shard['bytes']}")
            return safe_open(path, framework="pt")
        except PermissionError:
            raise
        except (OSError, SafetensorError) as error:
            raise ValueError(
                f"The shard {path} cannot be read ({error}); delete it and its .json, and encode again; only this "
                "shard is then encoded."
            ) from None


def read_index(root: Path, *, latents: bool = False) -> dict[str, Any]:
    """index.json of a folder of latents.

    Args:
        root: the folder.
        latents: whether the entries from which latents are read must be there; false: that of the VAE only.

    Raises:
        ValueError: the file is missing or damaged, or has another format.
    """
    try:
        index = read_object(root / "index.json")
        version = index["format"]
        if not hashing.fits_digest(index):
            raise ValueError("its content does not fit its digest")
        if version == FORMAT:
            _check_types(index, latents)
    except FileNotFoundError:
        started = (root / "settings.json").exists()
        raise ValueError(
            f"{root} holds latents whose encoding is not finished; run the same encode command again to continue it."
            if started
            else f"{root} holds no latents (no index.json); make them with python -m apps.diffusion.encode."
        ) from None
    except PermissionError:
        raise
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ValueError(
            f"{root / 'index.json'} is not the index of latents ({error}); give the same encode command again, which "
            "writes a new one."
        ) from None
    if version != FORMAT:
        raise ValueError(f"{root} has format {version}, and this version reads {FORMAT}; encode the images again.")
    return index


def _check_types(index: dict[str, Any], latents: bool) -> None:
    """Raises KeyError, TypeError or ValueError if an entry of an index is missing or of another type. An index of an
    earlier version has no digest that would show the damage.
    """
    parts: list[tuple[dict[str, Any], dict[str, Any], str]] = []
    if latents:
        parts = [(_ENTRIES, index, ""), *((_OF_SHARD, shard, "shards.") for shard in list(index["shards"]))]
    if "vae" in index:
        parts.append((_OF_VAE, from_plain(dict, index["vae"], "vae"), "vae."))
    for kinds, part, where in parts:
        for name, kind in kinds.items():
            from_plain(kind, part[name], where + name)
