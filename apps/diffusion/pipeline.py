"""A trained FPDM or DiT as a diffusers pipeline.

    pipe = FixedPointPipeline.from_pretrained(RUN)          # a training run, or what save_pretrained wrote
    pipe(class_labels=[3, 5], num_inference_steps=20, iterations=10, reuse=True, generator=0).images
    pipe.save_pretrained(DIR)                               # model, scheduler, VAE, code and a card, all in DIR
    pipe.push_to_hub("OWNER/NAME")                          # the same folder, uploaded

It samples by sampler.py, as the sample command does: with the seed s as `generator`, image i of a call is
image i of `python -m apps.diffusion.sample RUN --seed s` for the same class and options, to rounding; with
`reproducible=True`, which costs whole chunks of 16, to the last bit. DIR is opened by
`DiffusionPipeline.from_pretrained(DIR, trust_remote_code=True)` too, where this application is not installed.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import torch
from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL
from diffusers.schedulers.scheduling_utils import SchedulerMixin

from apps.diffusion.checkpoint.open_network import open_network, pipeline_options
from apps.diffusion.checkpoint.single_file import single_file
from apps.diffusion.config.sampling import Allocation, OptionError, ParallelSolver, Sampler, SamplingOptions
from apps.diffusion.models.fpdm import FPDM
from apps.diffusion.sampling.keywords import keyword, options_of
from apps.diffusion.sampling.options import SamplingPlan, plan
from apps.diffusion.sampling.pipeline import FixedPointOutput as FixedPointOutput
from apps.diffusion.sampling.pipeline import Output, PipelineCode, SamplingPipeline
from apps.diffusion.sampling.warm_start import Reuse
from apps.diffusion.schedulers.noise_schedule import same_noise
from implicit import AbstractSolver, Stop

_DEFAULTS = ("steps", "iterations", "guidance", "reuse")


class FixedPointPipeline(SamplingPipeline):
    """An FPDM, or the DiT baseline, with its scheduler and, for latents, its VAE.

    Args:
        model: the network, in evaluation mode.
        scheduler: a diffusers scheduler with the network's noise schedule; it also spaces the timesteps.
        vae: decodes latents; None for a network of pixels.
        steps: default number of timesteps.
        iterations: default iterations of the fixed-point layer, one number or one per timestep; None: the model's own.
        guidance: default scale of classifier-free guidance.
        reuse: default start of each solve: False or "off", True or "on", "blended", "extrapolated".
        classes: names of the classes.
    """

    @classmethod
    def from_pretrained(  # pyright: ignore[reportIncompatibleMethodOverride]
        cls,
        source: str | Path,
        *,
        vae: AutoencoderKL | str | Path | None = None,
        scheduler: SchedulerMixin | None = None,
        torch_dtype: torch.dtype | None = None,
    ) -> FixedPointPipeline:
        """The pipeline of a trained network.

        Args:
            source: folder of a pipeline (`save_pretrained`), of a training run or of a model (`convert`), or the name
                of a network of the repository; see checkpoint/open_network.py.
            vae: instead of the folder's own: a model, a folder, or a hub name.
            scheduler: instead of the folder's own.
            torch_dtype: of the network's weights; None leaves them as they are.

        Raises:
            ValueError: no network in the folder, or one that cannot be read.
        """
        pipe = cls._open(source, vae=vae, scheduler=scheduler)
        if torch_dtype is not None:
            pipe.model.to(torch_dtype)
        return pipe

    @classmethod
    def from_run(
        cls,
        run: Path,
        *,
        vae: AutoencoderKL | str | Path | None = None,
        weights: Literal["ema", "model"] = "ema",
        sampler: Sampler | None = None,
    ) -> FixedPointPipeline:
        """The pipeline of a training run's newest checkpoint.

        Args:
            run: the run's folder.
            vae: decodes latents: a model, a folder, or a hub name.
            weights: the averaged weights, or the last ones.
            sampler: None: that of the run.

        Raises:
            ValueError: no run in the folder, or one that cannot be read.
        """
        return cls._open(run, vae=vae, weights=weights, sampler=sampler)

    @classmethod
    def _open(
        cls,
        source: str | Path,
        *,
        vae: AutoencoderKL | str | Path | None = None,
        weights: Literal["ema", "model"] = "ema",
        sampler: Sampler | None = None,
        scheduler: SchedulerMixin | None = None,
    ) -> FixedPointPipeline:
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
        fixed_point = isinstance(opened.model, FPDM)
        iterations = own.iterations[0] if len(own.iterations) == 1 else list(own.iterations)
        reuse = own.value("reuse") if fixed_point else "off"
        return cls(
            opened.model,
            noise,
            decoder,
            own.value("steps"),
            (iterations or None) if fixed_point else None,
            own.value("guidance"),
            {"off": False, "on": True}.get(reuse, reuse),
            opened.classes,
        )

    @property
    def defaults(self) -> dict[str, Any]:
        """The options of a call that does not give them."""
        return {name: self.config[name] for name in _DEFAULTS}

    @torch.no_grad()
    def __call__(
        self,
        class_labels: int | str | Sequence[int | str] | None = None,
        *,
        num_images: int | None = None,
        num_inference_steps: int | None = None,
        generator: torch.Generator | int | None = None,
        guidance_scale: float | None = None,
        guidance_channels: int | None = None,
        iterations: int | Sequence[int] | None = None,
        block_passes: int | None = None,
        macs: float | None = None,
        seconds: float | None = None,
        allocation: Allocation | None = None,
        stop: Stop | Sequence[Stop] | None = None,
        solver: AbstractSolver[Any] | None = None,
        reuse: bool | str | Reuse | None = None,
        timesteps: Sequence[int] | None = None,
        sampler: Sampler | None = None,
        eta: float | None = None,
        parallel: bool | ParallelSolver | None = None,
        parallel_rtol: float | None = None,
        window: int | None = None,
        chunk: int | None = None,
        reproducible: bool = False,
        output_type: Output = "pil",
        return_dict: bool = True,
    ) -> FixedPointOutput | tuple[Any]:
        """Images.

        Args:
            class_labels: the class of each image, or one for all, by number or name; None for an unconditional network.
            num_images: how many; None: one for each label.
            num_inference_steps: how many timesteps; None is the pipeline's own number.
            generator: a seed, or a torch generator, which then advances; None is a fresh seed.
            guidance_scale: of classifier-free guidance; 1 is none, None the pipeline's own.
            guidance_channels: guide the first so many channels; None is all.
            iterations: of the fixed-point layer, at every timestep or one number for each; FPDM only.
            block_passes: a budget of each image instead, in transformer blocks, spent exactly; FPDM only.
            macs: a budget in multiply-accumulates instead; FPDM only.
            allocation: how a budget, or iterations times the timesteps, is shared out from the noisiest timestep
                on (sampling/iteration_budget.py); "measured" by residual curves (sampling/residual_curves.py).
            seconds: a budget in seconds of this machine instead, with allocation "measured"; FPDM only.
            stop: a stopping criterion instead, for all or for each timestep; FPDM only.
            solver: solver of the fixed-point layer; FPDM only.
            reuse: start of each solve: False or "off", True or "on" (the previous timestep's solution), "blended",
                "extrapolated", "history" (and its solver state), or a rule; None: the pipeline's default; FPDM only.
            timesteps: decreasing, instead of num_inference_steps and the scheduler's spacing.
            sampler: another sampler than the pipeline's scheduler, by its name in the sampling command.
            eta: stochasticity of DDIM, 0 to 1.
            parallel: all timesteps at once as one fixed point, by "picard" iteration (True) or triangular
                "anderson" acceleration; for ddim and ddpm (sampling/parallel.py).
            parallel_rtol: relative tolerance of the trajectory; None: 1e-3.
            window: timesteps solved for at once; None: all.
            chunk: images in one call of the network; None: 64, or 16 if reproducible.
            reproducible: the same bits whatever else is generated in a call, in chunks of one size, of which one image
                costs a whole one.
            output_type: "pil", "np", "pt" or "latent"; see FixedPointOutput.
            return_dict: False gives (images,).

        Raises:
            ValueError: labels that do not fit, guidance of an unconditional network, impossible timesteps,
                options of a fixed point for a DiT, several generators.
        """
        options = options_of(
            steps=num_inference_steps,
            timesteps=timesteps,
            guidance=guidance_scale,
            guidance_channels=guidance_channels,
            iterations=iterations,
            block_passes=block_passes,
            macs=macs,
            seconds=seconds,
            allocation=allocation,
            solver=solver,
            reuse=reuse,
            sampler=sampler,
            eta=eta,
            parallel=("picard" if parallel else None) if isinstance(parallel, bool) else parallel,
            parallel_rtol=parallel_rtol,
            window=window,
        )
        warm_start = reuse if isinstance(reuse, Reuse) else None
        chosen = self._plan(options, stop, warm_start)
        arguments = chosen.arguments() | {"chunk": chunk, "reproducible": reproducible}
        return self._generate(class_labels, num_images, generator, arguments, output_type, return_dict)

    def _code(self) -> PipelineCode:
        network = type(self.model)
        return PipelineCode(
            pipeline=SamplingPipeline.__name__,
            pipeline_source=single_file(SamplingPipeline.__module__, SamplingPipeline.__name__),
            model_file=f"modeling_{network.__name__.lower()}",
            model_source=single_file(network.__module__, network.__name__),
        )

    def _plan(self, options: SamplingOptions, stop: Any, warm_start: Reuse | None) -> SamplingPlan:
        """What the options of a call mean, over the defaults of the pipeline."""
        defaults = pipeline_options(self.defaults)
        if stop is not None and options.given().keys() & {"iterations", "block_passes", "macs"}:
            raise ValueError("stop excludes iterations, block_passes and macs; give one of them.")
        try:
            return plan(self.model, self.scheduler, options, defaults=defaults, stop=stop, warm_start=warm_start)
        except OptionError as error:
            raise ValueError(error.spelled(keyword)) from None
