"""A trained run, loaded for sampling: configuration, network, class names, and the VAE of its latents."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL

from apps.diffusion.checkpoint import pretrained
from apps.diffusion.checkpoint import training_state as checkpoint
from apps.diffusion.checkpoint.readers import Weights, read_model_folder
from apps.diffusion.checkpoint.training_state import Checkpoint
from apps.diffusion.config.training import Config
from apps.diffusion.data.latents import read_index
from apps.diffusion.files import hashing
from apps.diffusion.models import build
from apps.diffusion.models.autoencoder import open_decoder, open_vae
from apps.diffusion.models.dit import DiT
from apps.diffusion.models.fpdm import FPDM


@dataclass(frozen=True, kw_only=True)
class Trained:
    """A trained run.

    Attributes:
        config: its configuration.
        model: the network, in evaluation mode, on the CPU.
        images: the images that it has seen.
        digest: SHA-256 of the weights.
        classes: names of the classes by label; empty without classes.
    """

    config: Config
    model: DiT | FPDM
    images: int
    digest: str
    classes: tuple[str, ...] = ()


def read_config(run: Path) -> Config:
    """The configuration in a run's folder. Relative paths in it are found from the current folder, or else from a
    folder above the run.

    Raises:
        ValueError: there is none, or it cannot be read.
    """
    file = run / "config.json"
    if not file.is_file():
        shipped = ", ".join(pretrained.names()) or "none are here: a wheel leaves them out, the repository has them"
        raise ValueError(
            f"{run} holds no run (it has no config.json); train one: python -m apps.diffusion.train --out {run}, or "
            f"take a trained network by its name ({shipped})."
        )
    config = Config.from_json(file.read_text(), str(file))
    path, vae = config.data.path, config.data.vae
    data = dataclasses.replace(
        config.data,
        path=None if path is None else located(path, run),
        vae=None if vae is None else str(located(Path(vae), run)),
    )
    return dataclasses.replace(config, data=data)


def located(path: Path, run: Path) -> Path:
    """A relative path that a run has stored: as it is where it exists, else below the first folder above the run where
    it exists, else as it is (a VAE may have the form of a relative path and be a name on the hub).
    """
    if path.is_absolute() or path.exists():
        return path
    return next((above / path for above in run.absolute().parents if (above / path).exists()), path)


def open_run(run: Path, weights: Weights = "ema") -> Trained:
    """The newest checkpoint of a run: its averaged weights, or its last ones. A network that comes with the repository
    stands for its own run, by name or by folder (see pretrained.py); it has averaged weights alone.

    Raises:
        ValueError: no run in the folder, one that cannot be read, or weights of another network.
    """
    run = pretrained.locate(run)
    if (run / pretrained.RECORD).is_file():
        return _open_pipeline(run, weights)
    config = read_config(run)
    state = checkpoint.newest(run, tensors=(weights,))
    try:
        model = build.rebuild(state.network)
    except (LookupError, TypeError, ValueError) as error:
        raise ValueError(f"The checkpoint in {run} describes no network of this version ({error!r}).") from None
    chosen = state.ema if weights == "ema" else state.model
    build.load_weights(model, chosen, run)
    return Trained(
        config=config,
        model=model.eval(),
        images=state.progress.images,
        digest=hashing.of_tensors(chosen),
        classes=state.classes,
    )


def _open_pipeline(folder: Path, weights: str) -> Trained:
    """The network in a pipeline folder with a record of its training."""
    if weights != "ema":
        raise ValueError(
            f"weights={weights!r} are not in {folder}, which holds the averaged ones; leave weights at ema."
        )
    config, images = pretrained.read_record(folder)
    model = read_model_folder(folder / "model").float()
    return Trained(config=config, model=model.eval(), images=images, digest=hashing.of_tensors(model.state_dict()))


def decoder_of(trained: Trained, name: str | None = None, device: str = "cpu") -> AutoencoderKL | None:
    """The VAE between the latents of a run and images; None for a run of pixels.

    By default the one that encoded the run's latents. Where those lie within reach, a copy must have the same
    weights; elsewhere its latents must have the right number of channels.

    Args:
        trained: the run.
        name: of a copy of the VAE, where it is no longer where it was.
        device: where to compute.

    Raises:
        ValueError: it cannot be read, its place is unknown, it is another one, or there is nothing to decode.
    """
    data, channels = trained.config.data, trained.model.latent[0]
    latent = data.source == "latents" or channels not in (1, 3)
    if not latent and name is not None:
        raise ValueError(f"This run makes images, not latents, so there is nothing for the VAE {name} to decode.")
    if not latent:
        return None
    name = name or data.vae
    if data.path is not None and (data.path / "index.json").exists():
        return open_decoder(read_index(data.path), name, device)
    if name is None:
        raise ValueError(
            f"This run generates latents, and the folder of its training latents, {data.path}, which has their VAE, is "
            "not here; name the VAE, a folder or one on the hub."
        )
    return open_vae(name, device=device, channels=channels)[0]


def check_start(start: Checkpoint, model: torch.nn.Module, network: dict[str, Any], where: Path) -> None:
    """Checks that a run can continue from a checkpoint, its weights apart (see `models.build.load_weights`).

    Args:
        start: the checkpoint.
        model: the network to train.
        network: its description (`models.build.describe`).
        where: folder of the run, for messages.

    Raises:
        ValueError: the checkpoint holds another network, or the optimizer's state of another one.
    """
    if _architecture(start.network) != _architecture(network):
        raise ValueError(
            f"The checkpoint holds another network ({start.network}) than the configuration describes ({network}); "
            "resume it with the settings it was started with."
        )
    sizes = dict(enumerate(p.shape for p in model.parameters()))
    for i, entry in start.optimizer.items():
        if any(i not in sizes or (value.ndim and value.shape != sizes[i]) for value in entry.values()):
            raise ValueError(
                f"The optimizer's state in {where} is that of another network (parameter {i} has another shape); "
                "delete this checkpoint to continue from the one before, or train again into a new folder."
            )


def _architecture(network: dict[str, Any]) -> dict[str, Any]:
    """What determines the weights and their meaning; the number of iterations of an FPDM does not."""
    return {**network, "config": {k: v for k, v in network["config"].items() if k != "iterations"}}
