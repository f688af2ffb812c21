"""From a configuration to the objects it describes."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from typing import Any, Literal

from torch.nn.attention import SDPBackend, sdpa_kernel

import implicit
from apps.diffusion.config import training as c
from apps.diffusion.data import DataSet, Images, digits
from apps.diffusion.data.idx import has_split, idx
from apps.diffusion.data.image_folder import Pixels, folder
from apps.diffusion.data.latents import Latents
from apps.diffusion.data.mnist import mnist
from apps.diffusion.models.dit import DiT
from apps.diffusion.models.fpdm import FPDM
from apps.diffusion.models.layers import SIZES, Size
from apps.diffusion.rng import Stream, drawing_from, generator
from apps.diffusion.schedulers.noise_schedule import make_scheduler

_SIZES = {"tiny": Size(hidden_size=128, depth=6, num_heads=4), **SIZES}
_NETWORKS = {"DiT": DiT, "FPDM": FPDM}


def images(config: c.DataConfig, progress: Callable[[int, int], None] | None = None) -> tuple[DataSet, Images | None]:
    """The images to train on, and those held out, where there are some.

    Args:
        config: what to learn from.
        progress: called as progress(done, total) while pictures are read.

    Raises:
        ValueError: no such folder, or nothing in it that can be used.
    """
    mirror = config.mirror is not False
    try:
        match config.source:
            case "digits" | "mnist":
                read = digits if config.source == "digits" else mnist
                return _unlabelled(config, read("train")), _unlabelled(config, read("held-out"))
            case "idx":
                assert config.path is not None
                train = idx(config.path, sha256=config.sha256)
                held_out = idx(config.path, "held-out") if has_split(config.path, "held-out") else None
                return _unlabelled(config, train), None if held_out is None else _unlabelled(config, held_out)
            case "folder":
                assert config.path is not None and config.size is not None
                classes = "none" if config.unconditional else "folders"
                return folder(config.path, config.size, classes=classes, mirror=mirror, progress=progress), None
            case "latents":
                assert config.path is not None
                return Latents(config.path, mirror=mirror, labels=not config.unconditional), None
    except ValueError as error:
        raise ValueError(f"Data.path: {error}") from None


def _unlabelled(config: c.Data, images: Images) -> Images:
    """The images, without their classes where the configuration leaves these out."""
    return replace(images, num_classes=0) if config.unconditional else images


def fingerprint(images: DataSet) -> dict[str, Any]:
    """What a run that goes on must find again: how many images of which shape and classes, and which ones.

    A folder is told by the names and classes of its files, latents by the checksums of their shards.
    """
    known: list[Any] = []
    if isinstance(images, Pixels):
        known = [images.files, images.y.tolist()]
    if isinstance(images, Latents):
        known = [shard["sha256"] for shard in images.index["shards"]]
    return {
        "images": len(images),
        "shape": list(images.shape),
        "classes": images.num_classes,
        "sha256": hashlib.sha256(json.dumps(known).encode()).hexdigest() if known else None,
    }


def network(
    config: c.ModelConfig, shape: tuple[int, int, int], num_classes: int, iterations: int, seed: int
) -> DiT | FPDM:
    """A new network for images of `shape` (C, H, W); its first weights depend on the seed alone.

    `iterations` is what an FPDM does where nobody says otherwise.
    """
    size = _SIZES[config.size]
    common: dict[str, Any] = {
        "input_size": shape[1:],
        "in_channels": shape[0],
        "patch_size": config.patch,
        "hidden_size": config.hidden or size.hidden_size,
        "num_heads": config.heads or size.num_heads,
        "mlp_ratio": config.mlp_ratio,
        "num_classes": num_classes,
        "learn_sigma": config.learn_sigma,
    }
    with drawing_from(generator(seed, Stream.WEIGHTS)):
        if config.kind == "dit":
            return DiT(**common, depth=config.depth or size.depth)
        model = FPDM(
            **common,
            pre=config.pre,
            post=config.post,
            iterations=iterations,
            condition_on_time=config.condition_on_time,
        )
        model.scale_recurrent_weights(config.recurrent_init)
        return model


def describe(model: DiT | FPDM) -> dict[str, Any]:
    """What `rebuild` needs to build the same network, as JSON."""
    arguments = {name: value for name, value in dict(model.config).items() if not name.startswith("_")}
    return json.loads(json.dumps({"class": type(model).__name__, "config": arguments}))


def rebuild(description: dict[str, Any]) -> DiT | FPDM:
    """The network that `describe` described, with fresh weights."""
    return _NETWORKS[description["class"]](**description["config"])


def scheduler(config: c.Config, kind: Literal["ddim", "ddpm"]) -> Any:
    """The noise schedule of a run, as a diffusers scheduler. What is predicted of pixels is kept within [-1, 1];
    latents know no bound.
    """
    schedule = config.schedule
    return make_scheduler(
        kind,
        prediction=schedule.prediction,
        zero_snr=schedule.zero_snr,
        spacing=config.sampling.spacing,
        learn_sigma=config.model.learn_sigma,
        betas=schedule.betas,
        beta_start=schedule.beta_start,
        beta_end=schedule.beta_end,
        train_steps=schedule.timesteps,
        clip=None if config.data.source == "latents" else 1.0,
    )


def attention(config: c.Config) -> AbstractContextManager[Any]:
    """How attention is computed in training: plainly for NewtonKrylov, which differentiates f twice, as PyTorch's fused
    kernels cannot be.
    """
    twice = config.model.kind == "fpdm" and isinstance(config.solver, implicit.NewtonKrylov)
    return sdpa_kernel(SDPBackend.MATH) if twice else nullcontext()
