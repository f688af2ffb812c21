"""Opening a trained network for sampling, from any of four places.

    a training run                       its newest checkpoint, noise schedule and sampling options
    a network by name                    see pretrained.py
    a pipeline folder                    what FixedPointPipeline.save_pretrained wrote
    a model folder                       what DiT.save_pretrained, FPDM.save_pretrained or the convert command wrote

A model folder has no noise schedule. It is taken for a published network on latents: DiT predicts eps on a linear
schedule, FPDM predicts v on the same schedule rescaled to zero terminal SNR.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, Literal

import diffusers
import torch
from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL

from apps.diffusion.checkpoint import pretrained
from apps.diffusion.checkpoint.readers import Weights, read_model_folder
from apps.diffusion.checkpoint.trained_run import decoder_of, open_run
from apps.diffusion.config.sampling import SamplingOptions
from apps.diffusion.files import hashing
from apps.diffusion.models.autoencoder import open_vae
from apps.diffusion.models.dit import DiT
from apps.diffusion.models.fpdm import FPDM
from apps.diffusion.sampling.keywords import pipeline_options
from apps.diffusion.sampling.options import class_numbers
from apps.diffusion.schedulers.noise_levels import is_flow
from apps.diffusion.schedulers.noise_schedule import make_scheduler, scheduler_of

Prediction = Literal["v_prediction", "epsilon"]
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
        digest: SHA-256 of its weights.
    """

    model: DiT | FPDM
    scheduler: Any
    options: SamplingOptions
    decoder: Callable[[str | None, str], AutoencoderKL | None]
    classes: tuple[str, ...] = ()
    images: int | None = None
    threads: int | None = None
    digest: str

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
    return _of_run(folder, weights)


def _of_run(folder: Path, weights: Weights) -> OpenedNetwork:
    trained = open_run(folder, weights)
    return OpenedNetwork(
        model=trained.model,
        scheduler=scheduler_of(trained.config),
        options=trained.config.sampling_options(),
        decoder=partial(decoder_of, trained),
        classes=trained.classes,
        images=trained.images,
        threads=trained.config.threads,
        digest=trained.digest,
    )


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
        digest=hashing.of_tensors(model.state_dict()),
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
        digest=hashing.of_tensors(model.state_dict()),
    )


def _decoder(model: DiT | FPDM, own: Path | None, name: str | None, device: str) -> AutoencoderKL | None:
    """The VAE that `name` names, or a folder's own; None where there is neither."""
    source = name or own
    return None if source is None else open_vae(source, device=device, channels=model.latent[0])[0]
