"""Opening a trained network for sampling, from any of four places.

    a training run                       its newest checkpoint, noise schedule and sampling options
    a network by name                    see pretrained.py
    a pipeline folder                    what FixedPointPipeline.save_pretrained wrote
    a model folder                       what DiT.save_pretrained, FPDM.save_pretrained or the convert command wrote

A model folder has no noise schedule. It is taken for a published network on latents: DiT predicts eps on a linear
schedule, FPDM predicts v on the same schedule rescaled to zero terminal SNR; `prediction` and `zero_snr` override that.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import diffusers
import torch
from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL

from apps.diffusion.checkpoint import pretrained, training_state
from apps.diffusion.checkpoint.readers import Weights, read_model_folder
from apps.diffusion.checkpoint.trained_run import read_config
from apps.diffusion.config.network import Prediction
from apps.diffusion.config.sampling import SamplingOptions
from apps.diffusion.config.training import Config, DataConfig
from apps.diffusion.data.latents import read_index
from apps.diffusion.files import hashing
from apps.diffusion.models import build
from apps.diffusion.models.autoencoder import open_decoder, open_vae
from apps.diffusion.models.dit import DiT
from apps.diffusion.models.fpdm import FPDM
from apps.diffusion.sampling.pipeline_keywords import pipeline_options
from apps.diffusion.sampling.plan import class_numbers
from apps.diffusion.schedulers.noise_levels import is_flow
from apps.diffusion.schedulers.noise_schedule import make_scheduler, scheduler_of

_PIPELINE = ("steps", "iterations", "guidance", "reuse")  # options in a pipeline's index


@dataclass(frozen=True, kw_only=True)
class OpenedNetwork:
    """A network with what sampling needs.

    Attributes:
        model: the network, in evaluation mode, on the CPU.
        scheduler: a diffusers scheduler with its noise schedule.
        options: sampling options of its training run or pipeline.
        decoder: called as decoder(name, device): the VAE of its latents, by default its own; None for pixels,
            and where the folder has no VAE.
        classes: names of its classes; empty where they have none.
        images: images seen in training; None where unknown.
        threads: CPU threads of its run; None for PyTorch's choice.
        config: the configuration of its run; None where there is none.
    """

    model: DiT | FPDM
    scheduler: Any
    options: SamplingOptions
    decoder: Callable[[str | None, str], AutoencoderKL | None]
    classes: tuple[str, ...] = ()
    images: int | None = None
    threads: int | None = None
    config: Config | None = None

    @cached_property
    def digest(self) -> str:
        """SHA-256 of its weights."""
        return hashing.of_tensors(self.model.state_dict())

    def to(self, device: str) -> None:
        """Move the network, and take the number of CPU threads of its run."""
        if self.threads is not None:
            torch.set_num_threads(self.threads)
        torch.nn.Module.to(self.model, torch.device(device))

    def class_cycle(self, given: Sequence[str]) -> Sequence[int]:
        """The classes to cycle through, by number or name, default all; none for an unconditional network.

        Raises:
            ValueError: a class that does not exist, or any for an unconditional network.
        """
        count = self.model.num_classes
        if count == 0 and given:
            raise ValueError("--classes does not apply to this network, which is unconditional; leave it out.")
        return class_numbers("--classes", given, count, self.classes, null=False) or range(count)


def open_network(
    source: str | Path,
    weights: Weights = "ema",
    *,
    prediction: Prediction | None = None,
    zero_snr: bool | None = None,
) -> OpenedNetwork:
    """The network in a folder, or by name.

    Args:
        source: see the top of this file.
        weights: averaged or last weights, of a run.
        prediction: target of a model folder; None: by its class.
        zero_snr: whether a model folder was trained with zero terminal SNR; None: by its class.

    Raises:
        ValueError: no network, one that cannot be read, or arguments that its folder decides.
    """
    folder = pretrained.locate(source)
    is_run = (folder / "checkpoints").is_dir() or (folder / pretrained.RECORD).is_file()
    is_pipeline = not is_run and (folder / "model_index.json").is_file()
    is_model = not is_run and any((folder / file).is_file() for file in ("conversion.json", "config.json"))
    if (is_run or is_pipeline) and (prediction is not None or zero_snr is not None):
        raise ValueError(f"{folder} has a noise schedule of its own; leave out --prediction and --zero-snr.")
    if not is_run and weights != "ema" and (is_pipeline or is_model):
        raise ValueError(f"{folder} holds one set of weights; leave out --weights.")
    if is_pipeline:
        return _of_pipeline(folder)
    if is_model and not (folder / "data.json").exists():
        return _of_model(folder, prediction, zero_snr)
    return open_run(folder, weights)


def open_run(run: str | Path, weights: Weights = "ema") -> OpenedNetwork:
    """The newest checkpoint of a run: its averaged weights, or its last ones. A network that comes with the repository
    stands for its own run, by name or by folder (see pretrained.py); it has averaged weights alone.

    Raises:
        ValueError: no run in the folder, one that cannot be read, or weights of another network.
    """
    run = pretrained.locate(run)
    if (run / pretrained.RECORD).is_file():
        if weights != "ema":
            raise ValueError(f"weights={weights!r} are not in {run}, which holds the averaged ones; leave it at ema.")
        config, images = pretrained.read_record(run)
        model, classes = read_model_folder(run / "model").float(), ()
    else:
        config, state = read_config(run), training_state.newest(run, tensors=(weights,))
        try:
            model = build.rebuild(state.network)
        except (LookupError, TypeError, ValueError) as error:
            raise ValueError(f"The checkpoint in {run} describes no network of this version ({error!r}).") from None
        build.load_weights(model, state.ema if weights == "ema" else state.model, run)
        images, classes = state.progress.images, state.classes
    return OpenedNetwork(
        model=model.eval(),
        scheduler=scheduler_of(config),
        options=config.sampling_options(),
        decoder=partial(_decoder_of_run, config.data, model.latent[0]),
        classes=classes,
        images=images,
        threads=config.threads,
        config=config,
    )


def _decoder_of_run(data: DataConfig, channels: int, name: str | None, device: str) -> AutoencoderKL | None:
    """The VAE of a run's latents, by default the one that encoded them; None for a run of pixels.

    Where the latents lie within reach, a copy must have the same weights; elsewhere its latents must have the right
    number of channels.

    Raises:
        ValueError: it cannot be read, its place is unknown, it is another one, or there is nothing to decode.
    """
    if data.source != "latents" and channels in (1, 3):
        if name is not None:
            raise ValueError(f"This run makes images, not latents, so there is nothing for the VAE {name} to decode.")
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


def _of_pipeline(folder: Path) -> OpenedNetwork:
    file = folder / "model_index.json"
    try:
        index = json.loads(file.read_text())
        noise = getattr(diffusers, index["scheduler"][1])
        own = {name: index[name] for name in _PIPELINE if name in index}
        options = pipeline_options(own | (index.get("sampling") or {}))
        vae = folder / "vae" if index["vae"][0] else None
    except (ValueError, LookupError, TypeError, AttributeError) as error:
        raise ValueError(f"{file} is not the index of a FixedPointPipeline ({error!r}).") from None
    try:
        scheduler = noise.from_pretrained(folder / "scheduler")
    except OSError as error:
        raise ValueError(f"The pipeline in {folder} cannot be read ({error}); save it again.") from None
    model = read_model_folder(folder / "model").float()
    return OpenedNetwork(
        model=model.eval(),
        scheduler=scheduler,
        options=replace(options, sampler="flow") if is_flow(scheduler) else options,
        decoder=partial(_decoder, model, vae),
        classes=tuple(index.get("classes") or ()),
    )


def _of_model(folder: Path, prediction: Prediction | None, zero_snr: bool | None) -> OpenedNetwork:
    model = read_model_folder(folder)
    published = isinstance(model, DiT)
    scheduler = make_scheduler(
        "ddpm",
        prediction=prediction or ("epsilon" if published else "v_prediction"),
        zero_snr=(prediction != "epsilon" and not published) if zero_snr is None else zero_snr,
        spacing="linspace",
        learn_sigma=model.out_channels == 2 * model.latent[0],
    )
    return OpenedNetwork(
        model=model.eval(),
        scheduler=scheduler,
        options=SamplingOptions(),
        decoder=partial(_decoder, model, None),
    )


def _decoder(model: DiT | FPDM, own: Path | None, name: str | None, device: str) -> AutoencoderKL | None:
    """The VAE that `name` names, or a folder's own; None where there is neither."""
    source = name or own
    return None if source is None else open_vae(source, device=device, channels=model.latent[0])[0]
