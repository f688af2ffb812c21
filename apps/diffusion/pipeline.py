"""A trained FPDM or DiT as a diffusers pipeline.

    pipe = FixedPointPipeline.from_pretrained(RUN)          # a training run, or what save_pretrained wrote
    pipe(class_labels=[3, 5], num_inference_steps=20, iterations=10, reuse=True, generator=0).images
    pipe.save_pretrained(DIR)                               # model, scheduler and VAE, all in DIR

It samples by sampler.py, as the sample command does: with the seed s as `generator`, image i of a call is
image i of `python -m apps.diffusion.sample RUN --seed s` for the same class and choices.
"""

from __future__ import annotations

import json
import secrets
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import diffusers
import numpy as np
import torch
from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL
from diffusers.pipelines.pipeline_utils import DiffusionPipeline
from diffusers.schedulers.scheduling_utils import SchedulerMixin
from diffusers.utils.outputs import BaseOutput
from PIL import Image
from safetensors import SafetensorError
from torch import Tensor

from apps.diffusion.checkpoint import pretrained
from apps.diffusion.checkpoint.trained_run import decoder_of, open_run
from apps.diffusion.config.sampling import Sampler
from apps.diffusion.files.images import to_pil
from apps.diffusion.models.autoencoder import decode, open_vae
from apps.diffusion.models.dit import DiT
from apps.diffusion.models.fpdm import FPDM
from apps.diffusion.sampling.generate import scheduler_of
from apps.diffusion.sampling.guidance import Guidance
from apps.diffusion.sampling.iteration_budget import Shape
from apps.diffusion.sampling.keyword_options import labels_for, solve_of, walk_of, whole
from apps.diffusion.sampling.sampler import CHUNK, Effort, SampleResult, sample
from apps.diffusion.sampling.warm_start import Reuse
from implicit import AbstractSolver, Stop

Output = Literal["pil", "np", "pt", "latent"]
_DEFAULTS = ("steps", "iterations", "guidance", "reuse")
_CLASSES = {"DiT": DiT, "FPDM": FPDM}


@dataclass
class FixedPointOutput(BaseOutput):
    """What a call gives.

    Attributes:
        images: a list of pictures ("pil"), an array (n, H, W, C) ("np") or a tensor (n, C, H, W) ("pt") in
            [0, 1], or what the network made, (n, C, h, w), unscaled and not clipped ("latent").
        effort: what sampling cost (see sampler.py).
        seed: as `generator`, it gives the same images again.
    """

    images: Any
    effort: Effort
    seed: int


class FixedPointPipeline(DiffusionPipeline):
    """An FPDM, or the DiT baseline, with its scheduler and, for latents, its VAE.

    Args:
        model: the network, in evaluation mode.
        scheduler: from `schedule.make_scheduler`; its timestep_spacing says which timesteps are visited.
        vae: decodes latents; None for a network of pixels.
        steps: timesteps of a call that does not say how many.
        iterations: of the fixed-point layer at each of them, likewise; None is the model's own count.
        guidance: scale of classifier-free guidance, likewise.
        reuse: start from the previous timestep's solution, likewise.
    """

    model_cpu_offload_seq = "model->vae"
    _optional_components = ["vae"]  # noqa: RUF012 - as diffusers declares it

    def __init__(
        self,
        model: DiT | FPDM,
        scheduler: SchedulerMixin,
        vae: AutoencoderKL | None = None,
        steps: int = 20,
        iterations: int | None = None,
        guidance: float = 1.0,
        reuse: bool = False,
    ) -> None:
        super().__init__()
        self.register_modules(model=model.eval(), scheduler=scheduler, vae=vae)
        self.register_to_config(steps=steps, iterations=iterations, guidance=guidance, reuse=reuse)

    @classmethod
    def from_pretrained(  # pyright: ignore[reportIncompatibleMethodOverride]
        cls,
        source: str | Path,
        *,
        vae: AutoencoderKL | str | Path | None = None,
        scheduler: SchedulerMixin | None = None,
        torch_dtype: torch.dtype | None = None,
    ) -> FixedPointPipeline:
        """The pipeline in a folder that `save_pretrained` wrote, or of a training run (see `from_run`).

        Args:
            source: the folder, or the name of a network that comes with the repository (checkpoint/pretrained.py).
            vae: instead of the folder's own: a model, a folder, or a name on the hub.
            scheduler: instead of the folder's own.
            torch_dtype: of the network's weights; None leaves them as they are.

        Raises:
            ValueError: neither a pipeline nor a run, or one that cannot be read.
        """
        folder = pretrained.locate(source)
        if (folder / "checkpoints").is_dir():
            pipe = cls.from_run(folder, vae=vae)
            if torch_dtype is not None:  # diffusers warns of any
                pipe.model.to(torch_dtype)
            return pipe if scheduler is None else cls(pipe.model, scheduler, pipe.vae, **pipe.defaults)
        try:
            index = json.loads((folder / "model_index.json").read_text())
            network, noise = _CLASSES[index["model"][1]], getattr(diffusers, index["scheduler"][1])
            defaults = {name: index[name] for name in _DEFAULTS if name in index}
            has_vae = bool(index["vae"][0])
        except FileNotFoundError:
            raise ValueError(
                f"{folder} holds neither a pipeline (model_index.json) nor a training run (checkpoints); give a folder "
                "that FixedPointPipeline.save_pretrained or python -m apps.diffusion.train wrote."
            ) from None
        except (ValueError, LookupError, TypeError, AttributeError) as error:
            raise ValueError(
                f"{folder / 'model_index.json'} is not that of a FixedPointPipeline ({error!r})."
            ) from None
        try:
            model = network.from_pretrained(folder / "model", torch_dtype=torch_dtype)
            own: Any = scheduler or noise.from_pretrained(folder / "scheduler")
        except (OSError, SafetensorError) as error:
            raise ValueError(f"The pipeline in {folder} cannot be read ({error}); save it again.") from None
        decoder = vae or (folder / "vae" if has_vae else None)
        if isinstance(decoder, str | Path):
            decoder, _ = open_vae(decoder)
        return cls(model, own, decoder, **defaults)

    @property
    def defaults(self) -> dict[str, Any]:
        """What a call does that does not say otherwise."""
        return {name: self.config[name] for name in _DEFAULTS}

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
            vae: decodes latents: a model, a folder, or a name on the hub.
            weights: the averaged weights, or the last ones.
            sampler: how sampling steps; None is the run's own way.

        Raises:
            ValueError: no run in the folder, or one that cannot be read.
        """
        trained = open_run(Path(run), weights)
        own = trained.config.sampling
        scheduler = scheduler_of(trained.config, sampler or own.sampler)
        name = str(vae) if isinstance(vae, str | Path) else None
        decoder = vae if isinstance(vae, AutoencoderKL) else None
        if decoder is None:
            try:
                decoder = decoder_of(trained, name)
            except ValueError as error:
                if name is not None:
                    raise
                warnings.warn(f"{error} Until then, the pipeline has latents alone to give.", stacklevel=2)
        fixed_point = isinstance(trained.model, FPDM)
        return cls(
            trained.model,
            scheduler,
            decoder,
            own.steps,
            own.iterations if fixed_point else None,
            own.guidance,
            own.reuse and fixed_point,
        )

    @torch.no_grad()
    def __call__(
        self,
        class_labels: int | Sequence[int] | None = None,
        *,
        num_images: int | None = None,
        num_inference_steps: int | None = None,
        generator: torch.Generator | int | None = None,
        guidance_scale: float | None = None,
        guidance_channels: int | None = None,
        iterations: int | Sequence[int] | None = None,
        block_passes: int | None = None,
        macs: float | None = None,
        allocation: Shape = "constant",
        stop: Stop | Sequence[Stop] | None = None,
        solver: AbstractSolver[Any] | None = None,
        reuse: bool | Reuse | None = None,
        timesteps: Sequence[int] | None = None,
        eta: float = 0.0,
        chunk: int = CHUNK,
        output_type: Output = "pil",
        return_dict: bool = True,
    ) -> FixedPointOutput | tuple[Any]:
        """Images.

        Args:
            class_labels: the class of each image, or one for all; None for an unconditional network.
            num_images: how many; None: one for each label.
            num_inference_steps: how many timesteps; None is the pipeline's own number.
            generator: a seed, or a torch generator, which then advances; None is a fresh seed.
            guidance_scale: of classifier-free guidance; 1 is none, None the pipeline's own.
            guidance_channels: guide the first so many channels; None is all.
            iterations: of the fixed-point layer, at every timestep or one number for each; FPDM only.
            block_passes: a budget of each image instead, in transformer blocks, spent exactly; FPDM only.
            macs: a budget in multiply-accumulates instead; FPDM only.
            allocation: how a budget, or iterations times the timesteps, is shared out from the noisiest timestep
                on; see allocation.py.
            stop: a tolerance instead, for all or for each timestep; FPDM only.
            solver: how the next iterate is made; FPDM only.
            reuse: start from the previous timestep's solution, or as the rule says; None is the pipeline's own;
                FPDM only.
            timesteps: the array to walk, falling, instead of num_inference_steps and the scheduler's spacing.
            eta: DDIM's share of fresh noise.
            chunk: images computed at a time. A single image costs as much as a chunk, so take 1 for one alone;
                another chunk changes the last bits.
            output_type: "pil", "np", "pt" or "latent"; see FixedPointOutput.
            return_dict: False gives (images,).

        Raises:
            ValueError: labels that do not fit, guidance of an unconditional network, impossible timesteps,
                options of a fixed point for a DiT, several generators.
        """
        model: DiT | FPDM = self.model
        if output_type not in ("pil", "np", "pt", "latent"):
            raise ValueError(f"output_type={output_type!r} is unknown; choose pil, np, pt or latent.")
        labels = labels_for(class_labels, num_images, model.num_classes)
        walk = walk_of(self.scheduler, self.config["steps"], num_inference_steps, timesteps)
        chunk = whole("chunk", chunk, 1)
        guidance = Guidance(
            scale=self.config["guidance"] if guidance_scale is None else guidance_scale, channels=guidance_channels
        )
        solve = solve_of(
            model,
            self.config["iterations"],
            len(walk),
            guided=guidance.doubles,
            iterations=iterations,
            block_passes=block_passes,
            macs=macs,
            allocation=allocation,
            stop=stop,
            solver=solver,
            reuse=self.config["reuse"] if reuse is None else reuse,
        )
        seed = _seed(generator)
        total = len(labels) if labels is not None else whole("num_images", num_images or 1)
        result = self._sampled(
            total,
            labels,
            seed=seed,
            scheduler=self.scheduler,
            timesteps=walk,
            eta=eta,
            guidance=guidance,
            solve=solve,
            device=self._execution_device,
            chunk=chunk,
        )
        self.maybe_free_model_hooks()
        images = self._images(result.samples, output_type)
        return FixedPointOutput(images=images, effort=result.effort, seed=seed) if return_dict else (images,)

    def _sampled(self, total: int, labels: list[int] | None, **choices: Any) -> SampleResult:
        """`sampler.sample` with these choices, under the pipeline's progress bar."""
        bar_of: Any = self.progress_bar  # untyped: pyright takes it for a decorator
        with bar_of(total=len(choices["timesteps"]) * -(-total // choices["chunk"])) as bar:
            return sample(
                self.model, range(total), labels, **choices, progress=lambda done, _: bar.update(done - bar.n)
            )

    def _images(self, x: Tensor, output_type: Output) -> Any:
        if output_type == "latent":
            return x
        if self.vae is not None:
            x = decode(self.vae, x)
        if x.shape[1] not in (1, 3):
            raise ValueError(
                f"The network makes latents of {x.shape[1]} channels, and the pipeline has no VAE to decode them; give "
                'it one (vae=...), or ask for output_type="latent".'
            )
        if output_type == "pil":
            pictures: list[Image.Image] = [to_pil(image) for image in x]
            return pictures
        x = (x.clamp(-1, 1) + 1) / 2
        return x if output_type == "pt" else np.ascontiguousarray(x.permute(0, 2, 3, 1).numpy())


def _seed(generator: torch.Generator | int | None) -> int:
    """What all noise of a call follows from."""
    if generator is None:
        return secrets.randbits(62)
    if isinstance(generator, torch.Generator):
        return int(torch.randint(2**62, (), generator=generator, device=generator.device))
    if isinstance(generator, np.integer):
        generator = int(generator)
    if isinstance(generator, bool) or not isinstance(generator, int) or generator < 0:
        raise ValueError(
            f"generator={generator!r} must be one torch.Generator or a seed, at least 0; every image has its own noise "
            "already."
        )
    return generator
