"""Opening a trained network for sampling, from one of four sources.

    a training run                       its newest checkpoint, noise schedule and sampling options
    a network by name                    see pretrained.py
    a pipeline folder                    written by FixedPointPipeline.save_pretrained
    a model folder                       written by DiT.save_pretrained, FPDM.save_pretrained or the convert command

A model folder stores no noise schedule. The network is assumed to be a published network on latents: a DiT predicts eps
with the linear schedule, an FPDM predicts v with the same schedule rescaled to zero terminal SNR. `prediction` and
`zero_snr` override these assumptions.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import diffusers
import torch
from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL

from apps.diffusion.checkpoint import pretrained, training_state
from apps.diffusion.checkpoint.readers import Weights, check_finite, read_model_folder
from apps.diffusion.checkpoint.trained_run import read_config
from apps.diffusion.config.network import Prediction
from apps.diffusion.config.sampling import SamplingOptions
from apps.diffusion.config.serialization import from_plain, to_plain
from apps.diffusion.config.training import Config, DataConfig
from apps.diffusion.data.latents import read_index
from apps.diffusion.files import hashing
from apps.diffusion.files.json_file import read_object
from apps.diffusion.files.names import reason
from apps.diffusion.models import build
from apps.diffusion.models.autoencoder import open_decoder, open_vae
from apps.diffusion.models.dit import DiT
from apps.diffusion.models.fpdm import FPDM
from apps.diffusion.sampling.pipeline_keywords import pipeline_options
from apps.diffusion.sampling.plan import class_numbers
from apps.diffusion.schedulers.noise_levels import is_flow
from apps.diffusion.schedulers.noise_schedule import make_scheduler, scheduler_of

_PIPELINE = ("steps", "iterations", "guidance", "reuse")  # options stored in a pipeline's model_index.json


@dataclass(frozen=True, kw_only=True)
class OpenedNetwork:
    """A network, its scheduler, its VAE and its sampling options.

    Attributes:
        model: the network, in evaluation mode; on the CPU until `to` is called.
        scheduler: a diffusers scheduler with the network's noise schedule.
        options: sampling options of the training run or pipeline.
        decoder: function (name or None, device) -> VAE that decodes latents. With the name None the function returns
            the network's own VAE; it returns None for a network of pixels, and if the folder has no VAE.
        classes: names of the classes; empty if the classes have no names.
        images: number of images seen in training; None if unknown.
        threads: CPU threads of the training run; None: PyTorch's number.
        config: configuration of the training run; None if the source is not a training run.
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
        """SHA-256 of the weights."""
        return hashing.of_tensors(self.model.state_dict())

    def to(self, device: str) -> None:
        """Move the network to a device, and set PyTorch's number of CPU threads to that of the training run."""
        if self.threads is not None:
            torch.set_num_threads(self.threads)
        torch.nn.Module.to(self.model, torch.device(device))

    def class_cycle(self, given: Sequence[str]) -> Sequence[int]:
        """Numbers of the classes to cycle through.

        Args:
            given: classes by number or name; empty: all classes.

        Returns:
            The numbers; empty for an unconditional network.

        Raises:
            ValueError: a class does not exist, or a class is given for an unconditional network.
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
        weights: "ema", the averaged weights of a run, or "model", the weights after the last step.
        prediction: prediction target of a network from a model folder; None: that of the published class.
        zero_snr: whether a network from a model folder was trained with zero terminal SNR; None: as the published
            class.

    Raises:
        ValueError: the folder holds no network, the network cannot be read, or an argument is given that the folder
            determines.
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
    """The network of a run's newest checkpoint, or a network of the repository by name or folder (see pretrained.py).

    Args:
        run: folder of a training run, or a network of the repository.
        weights: "ema", the averaged weights, or "model", the weights after the last step (of a training run only).

    Raises:
        ValueError: the folder holds no run, the run cannot be read, or its weights belong to another network.
    """
    run = pretrained.locate(run)
    if (run / pretrained.RECORD).is_file():
        if weights != "ema":
            raise ValueError(f"weights={weights!r} are not in {run}, which holds averaged weights only; give ema.")
        config, images = pretrained.read_record(run)
        model = read_model_folder(run / "model").float()
        classes = _read_index(run)[1] if (run / "model_index.json").is_file() else ()
    else:
        config, state = read_config(run), training_state.newest(run, tensors=(weights,))
        try:
            model = build.rebuild(state.network)
        except (LookupError, TypeError, ValueError) as error:
            raise ValueError(f"The checkpoint in {run} describes no network of this version ({error!r}).") from None
        chosen = state.ema if weights == "ema" else state.model
        check_finite(chosen, run)
        build.load_weights(model, chosen, run)
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
    """The VAE that decodes a run's latents: `name`, or the VAE that encoded the latents; None for a run of pixels.

    If the folder of the training latents exists here, the weights of the VAE are compared with those that it records;
    else only the number of latent channels is checked.

    Raises:
        ValueError: the VAE cannot be read, its folder is unknown, it is not the VAE of the latents, or a VAE is given
            for a network of pixels.
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
            f"This run generates latents, and the folder of its training latents, {data.path}, which names their VAE, "
            "is not here; give the VAE as a folder or as a name on the hub."
        )
    return open_vae(name, device=device, channels=channels)[0]


def _of_pipeline(folder: Path) -> OpenedNetwork:
    index, classes = _read_index(folder)
    try:
        noise = getattr(diffusers, index["scheduler"][1])
        own = {name: index[name] for name in _PIPELINE if name in index}
        options = pipeline_options(own | (index.get("sampling") or {}))
        options = from_plain(SamplingOptions, to_plain(options), "sampling")  # raises for a value of another type
        vae = folder / "vae" if index["vae"][0] else None
    except (ValueError, LookupError, TypeError, AttributeError) as error:
        raise _no_index(folder, error) from None
    file = folder / "scheduler" / "scheduler_config.json"
    try:
        scheduler = noise.from_config(read_object(file))
    except Exception as error:  # diffusers computes with values of any type, and raises errors of many types
        raise ValueError(f"{file} describes no {index['scheduler'][1]} ({reason(error)}); save it again.") from None
    model = read_model_folder(folder / "model").float()
    return OpenedNetwork(
        model=model.eval(),
        scheduler=scheduler,
        options=replace(options, sampler="flow") if is_flow(scheduler) else options,
        decoder=partial(_decoder, model, vae),
        classes=classes,
    )


def _read_index(folder: Path) -> tuple[dict[str, Any], tuple[str, ...]]:
    """The content of model_index.json of a pipeline folder, and the names of the classes in it.

    Raises:
        ValueError: the file holds no JSON object, or the classes are no names.
    """
    try:
        index = read_object(folder / "model_index.json")
        return index, from_plain(tuple[str, ...], index.get("classes") or [], "classes")
    except ValueError as error:
        raise _no_index(folder, error) from None


def _no_index(folder: Path, error: Exception) -> ValueError:
    return ValueError(
        f"{folder / 'model_index.json'} is not the index of a FixedPointPipeline ({error}); save the pipeline again."
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
    """The VAE `name`, or `own`, the VAE of the network's folder, if `name` is None; None if both are None."""
    source = name or own
    return None if source is None else open_vae(source, device=device, channels=model.latent[0])[0]
