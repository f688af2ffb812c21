"""A trained FPDM or DiT as a diffusers pipeline.

    pipe = FixedPointPipeline.from_pretrained(RUN)          # a training run, or what save_pretrained wrote
    pipe(class_labels=[3, 5], num_inference_steps=20, iterations=10, reuse=True, generator=0).images
    pipe.save_pretrained(DIR)                               # model, scheduler, VAE, code and a card, all in DIR
    pipe.push_to_hub("OWNER/NAME")                          # the same folder, uploaded

The pipeline and the sample command use the same loop (sampler.py): with the seed s as `generator`, image i of a call is
image i of `python -m apps.diffusion.sample RUN --seed s` for the same class and options, to rounding. With
`reproducible=True` the two are equal to the last bit, and sampling computes whole chunks of 16. Where this application
is not installed, `DiffusionPipeline.from_pretrained(DIR, trust_remote_code=True)` opens DIR.
"""

import warnings
from pathlib import Path

import torch
from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL
from diffusers.schedulers.scheduling_utils import SchedulerMixin

from apps.diffusion.checkpoint.open_network import open_network
from apps.diffusion.checkpoint.readers import Weights
from apps.diffusion.checkpoint.single_file import single_file
from apps.diffusion.config.sampling import Sampler
from apps.diffusion.models.fpdm import FPDM
from apps.diffusion.sampling.model_card import PipelineCode
from apps.diffusion.sampling.standalone_pipeline import FixedPointOutput as FixedPointOutput
from apps.diffusion.sampling.standalone_pipeline import SamplingPipeline
from apps.diffusion.schedulers.noise_schedule import same_noise


class FixedPointPipeline(SamplingPipeline):
    """A `SamplingPipeline` that also opens training runs, model folders and networks of the repository."""

    @classmethod
    def from_pretrained(  # pyright: ignore[reportIncompatibleMethodOverride]
        cls,
        source: str | Path,
        *,
        vae: AutoencoderKL | str | Path | None = None,
        scheduler: SchedulerMixin | None = None,
        torch_dtype: torch.dtype | None = None,
    ) -> "FixedPointPipeline":
        """The pipeline of a trained network.

        Args:
            source: folder of a pipeline (`save_pretrained`), of a training run or of a model (`convert`), or the name
                of a network of the repository; see checkpoint/open_network.py.
            vae: VAE that decodes latents: a model, a folder, or a hub name; None: the folder's own.
            scheduler: scheduler of the pipeline; None: the folder's own.
            torch_dtype: dtype of the network's weights; None leaves the weights as they are.

        Raises:
            ValueError: the folder holds no network, or the network cannot be read.
        """
        pipe = cls._open(source, vae=vae, scheduler=scheduler)
        if torch_dtype is not None:
            torch.nn.Module.to(pipe.model, dtype=torch_dtype)
        return pipe

    @classmethod
    def from_run(
        cls,
        run: Path,
        *,
        vae: AutoencoderKL | str | Path | None = None,
        weights: Weights = "ema",
        sampler: Sampler | None = None,
    ) -> "FixedPointPipeline":
        """The pipeline of a training run's newest checkpoint.

        Args:
            run: the run's folder.
            vae: VAE that decodes latents: a model, a folder, or a hub name; None: the run's own.
            weights: "ema", the averaged weights, or "model", the weights after the last step.
            sampler: name of the sampler; None: the sampler of the run.

        Raises:
            ValueError: the folder holds no run, or the run cannot be read.
        """
        return cls._open(run, vae=vae, weights=weights, sampler=sampler)

    @classmethod
    def _open(
        cls,
        source: str | Path,
        *,
        vae: AutoencoderKL | str | Path | None = None,
        weights: Weights = "ema",
        sampler: Sampler | None = None,
        scheduler: SchedulerMixin | None = None,
    ) -> "FixedPointPipeline":
        opened = open_network(source, weights)
        own = opened.options
        chosen = sampler or own.sampler
        noise = scheduler or (opened.scheduler if chosen is None else same_noise(opened.scheduler, chosen))
        decoder = vae if isinstance(vae, AutoencoderKL) else None
        if decoder is None:
            try:
                decoder = opened.decoder(None if vae is None else str(vae), "cpu")
            except ValueError as error:
                if vae is not None:
                    raise
                warnings.warn(f"{error} Until then, the pipeline returns latents only.", stacklevel=3)
        # the scheduler determines sampler and spacing; a given sampler or scheduler does not take the run's eta either
        left_out = {"sampler", "spacing", *(() if sampler is scheduler is None else ("eta",))}
        if not isinstance(opened.model, FPDM):
            left_out |= set(own.fixed_point_options())
        given = {name: value for name, value in own.given().items() if name not in left_out}
        counts, reuse = given.pop("iterations", ()), str(given.pop("reuse", "off"))
        return cls(
            opened.model,
            noise,
            decoder,
            steps=given.pop("steps", None if own.timesteps else own.value("steps")),
            iterations=(counts[0] if len(counts) == 1 else list(counts)) or None,
            guidance=given.pop("guidance", own.value("guidance")),
            reuse={"off": False, "on": True}.get(reuse, reuse),
            classes=opened.classes,
            sampling=given,
        )

    def _code(self) -> PipelineCode:
        network = type(self.model)
        return PipelineCode(
            pipeline=SamplingPipeline.__name__,
            pipeline_source=single_file(SamplingPipeline.__module__, SamplingPipeline.__name__),
            model_file=f"modeling_{network.__name__.lower()}",
            model_source=single_file(network.__module__, network.__name__),
        )
