"""The datasets of a configuration, and the identity of a dataset, which resumed runs compare."""

from collections.abc import Callable
from typing import Any

from apps.diffusion.config import training as c
from apps.diffusion.data.dataset import ImageDataset, TensorDataset
from apps.diffusion.data.digits import digits
from apps.diffusion.data.idx import has_split, idx
from apps.diffusion.data.image_folder import ImageFolderDataset
from apps.diffusion.data.latents import LatentDataset
from apps.diffusion.data.mnist import mnist


def datasets(
    config: c.DataConfig, seed: int = 0, progress: Callable[[int, int], None] | None = None
) -> tuple[ImageDataset, TensorDataset | None]:
    """The training images and the held-out images (None: the source has no held-out images).

    Args:
        config: configuration of the data.
        seed: random seed of mirroring, and of drawing latents from their distributions.
        progress: called as progress(done, total) while image files are read; None: no progress is reported.

    Raises:
        ValueError: the folder does not exist, or holds no usable images.
    """
    mirror = config.mirror is not False
    try:
        match config.source:
            case "digits" | "mnist":
                read = digits if config.source == "digits" else mnist
                return _conditional(config, read("train")), _conditional(config, read("held-out"))
            case "idx":
                assert config.path is not None
                train = _conditional(config, idx(config.path, sha256=config.sha256))
                if not has_split(config.path, "held-out"):
                    return train, None
                held_out = idx(config.path, "held-out", least=train.num_classes)
                if held_out.shape != train.shape:
                    sizes = [" x ".join(map(str, images.shape[1:])) for images in (train, held_out)]
                    raise ValueError(
                        f"{config.path} holds training images (train-*) of {sizes[0]} pixels and held-out images "
                        f"(t10k-*) of {sizes[1]}; give files of one data set, or leave the held-out files out."
                    )
                return train, _conditional(config, held_out)
            case "folder":
                assert config.path is not None and config.size is not None
                classes = "none" if config.unconditional else "folders"
                folder = ImageFolderDataset(
                    config.path,
                    config.size,
                    mirror=mirror,
                    classes=classes,
                    channels=config.channels,
                    seed=seed,
                    progress=progress,
                )
                return folder, None
            case "latents":
                assert config.path is not None
                return LatentDataset(config.path, mirror=mirror, labels=not config.unconditional, seed=seed), None
    except ValueError as error:
        raise ValueError(f"--data.path: {error}") from None


def _conditional(config: c.DataConfig, images: TensorDataset) -> TensorDataset:
    """The images, without classes if the configuration is unconditional."""
    return images.unconditional() if config.unconditional else images


def fingerprint(images: ImageDataset) -> dict[str, Any]:
    """The identity of a dataset: number, shape, classes and checksum of the images.

    The checksum of a folder is that of the names, classes and sizes of its files; the checksum of latents that of the
    checksums of their shards; the checksum of images in memory that of their values.
    """
    sizes = {"file_sizes_sha256": images.sizes_digest()} if isinstance(images, ImageFolderDataset) else {}
    return {
        "images": len(images),
        "shape": list(images.shape),
        "classes": images.num_classes,
        "sha256": images.fingerprint(),
        "class_names": list(images.classes),
        **sizes,
    }
