"""The diffusers pipeline of a folder that stands alone: labels in, images out, by the sampling loop of sampler.py.

A saved pipeline carries this class and all it uses as one file of code (checkpoint/single_file.py), so that
`DiffusionPipeline.from_pretrained(DIR, trust_remote_code=True)` opens it where `implicit` is installed and this
application is not. `FixedPointPipeline` is this class and opens more than such folders.
"""

from __future__ import annotations

import json
import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Unpack

import torch
from diffusers.image_processor import VaeImageProcessor
from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL
from diffusers.pipelines.pipeline_utils import DiffusionPipeline
from diffusers.schedulers.scheduling_utils import SchedulerMixin
from diffusers.utils.outputs import BaseOutput
from huggingface_hub import HfApi
from torch import Tensor

from apps.diffusion.config.checks import check_word
from apps.diffusion.config.sampling import OptionError, SamplingOptions
from apps.diffusion.config.serialization import to_plain
from apps.diffusion.files.images import to_pil
from apps.diffusion.models.autoencoder import decode
from apps.diffusion.sampling.effort import Effort
from apps.diffusion.sampling.model_card import PipelineCode, model_card
from apps.diffusion.sampling.pipeline_keywords import SamplingKeywords, keyword, options_of, pipeline_options, seed_of
from apps.diffusion.sampling.plan import as_integer, labels_for, plan
from apps.diffusion.sampling.sampler import CHUNK, SampleResult, SamplingPlan, sample
from apps.diffusion.sampling.warm_start import Reuse
from implicit import Stop

Output = Literal["pil", "np", "pt", "latent"]
PIPELINE_CODE = "fixed_point_pipeline"
"""Name of the file of code in the folder of a pipeline, without its suffix."""


@dataclass
class FixedPointOutput(BaseOutput):
    """The result of a call.

    Attributes:
        images: a list of images ("pil"), an array (n, H, W, C) ("np") or a tensor (n, C, H, W) ("pt") in
            [0, 1], or the samples of the network, (n, C, h, w), unscaled and not clipped ("latent").
        effort: what sampling cost (see effort.py).
        seed: as `generator`, it gives the same images again.
    """

    images: Any
    effort: Effort
    seed: int


class SamplingPipeline(DiffusionPipeline):
    """An FPDM, or the DiT baseline, with its scheduler and, for latents, its VAE.

    Args:
        model: the network, in evaluation mode.
        scheduler: a diffusers scheduler with the network's noise schedule; it also spaces the timesteps.
        vae: decodes latents; None for a network of pixels.
        steps: default number of timesteps; None: 20, or the number that other options determine.
        iterations: default iterations of the fixed-point layer, one number or one per timestep; None: the model's own.
        guidance: default scale of classifier-free guidance.
        reuse: default start of each solve: False or "off", True or "on", "blended", "extrapolated".
        classes: names of the classes.
        sampling: further defaults, as fields of `SamplingOptions` (config/sampling.py): eta, solver, rtol and others.
    """

    model_cpu_offload_seq = "model->vae"
    _optional_components = ["vae"]  # noqa: RUF012 - as diffusers declares it

    def __init__(
        self,
        model: torch.nn.Module,
        scheduler: SchedulerMixin,
        vae: AutoencoderKL | None = None,
        steps: int | None = 20,
        iterations: int | Sequence[int] | None = None,
        guidance: float = 1.0,
        reuse: bool | str = False,
        classes: Sequence[str] | None = None,
        sampling: Mapping[str, Any] | None = None,
    ) -> None:
        super().__init__()
        self.register_modules(model=model.eval(), scheduler=scheduler, vae=vae)
        self.register_to_config(
            steps=steps,
            iterations=iterations,
            guidance=guidance,
            reuse=reuse,
            classes=list(classes or ()) or None,
            # a solver from an index is a dict already
            sampling={n: v if isinstance(v, dict) else to_plain(v, n) for n, v in (sampling or {}).items()},
        )
        pipeline_options(self.defaults)  # raises where they exclude each other

    @property
    def defaults(self) -> dict[str, Any]:
        """The options of a call that does not give them."""
        own = {name: self.config[name] for name in ("steps", "iterations", "guidance", "reuse")}
        return {**own, **self.config["sampling"]}

    @torch.no_grad()
    def __call__(
        self,
        class_labels: int | str | Sequence[int | str] | None = None,
        *,
        num_images: int | None = None,
        generator: torch.Generator | int | None = None,
        stop: Stop | Sequence[Stop] | None = None,
        chunk: int | None = None,
        reproducible: bool = False,
        output_type: Output = "pil",
        return_dict: bool = True,
        **options: Unpack[SamplingKeywords],
    ) -> FixedPointOutput | tuple[Any]:
        """Images.

        Args:
            class_labels: the class of each image, or one for all, by number or name; None for an unconditional network.
            num_images: number of images; None: one for each label.
            generator: a seed, or a torch generator, which then advances; None is a fresh seed.
            stop: stopping criterion instead of iterations, for all timesteps or for each; FPDM only.
            chunk: images in one call of the network; None: 64, or 16 if reproducible.
            reproducible: the same bits whatever else is generated in a call, in chunks of one size, of which one image
                costs a whole one.
            output_type: "pil", "np", "pt" or "latent"; see FixedPointOutput.
            return_dict: False gives (images,).
            options: `SamplingKeywords` (sampling/pipeline_keywords.py), such as num_inference_steps and iterations;
                an option left out, or None, is the pipeline's own.

        Raises:
            ValueError: labels that do not fit, guidance of an unconditional network, impossible timesteps,
                options of a fixed point for a DiT, several generators.
            TypeError: an option that does not exist.
        """
        check_word("output_type", output_type, Output)
        reuse = options.get("reuse")
        chosen = self._plan(options_of(**options), stop, reuse if isinstance(reuse, Reuse) else None)
        model: Any = self.model
        labels = labels_for(class_labels, num_images, model.num_classes, self.config["classes"] or ())
        total = len(labels) if labels is not None else as_integer("num_images", num_images or 1, 1)
        seed = seed_of(generator)
        result = self._sampled(chosen, total, labels, seed, chunk, reproducible)
        images = self._images(result.samples, output_type)
        return FixedPointOutput(images=images, effort=result.effort, seed=seed) if return_dict else (images,)

    def _sampled(
        self,
        plan: SamplingPlan,
        total: int,
        labels: list[int] | None,
        seed: int,
        chunk: int | None,
        reproducible: bool,
    ) -> SampleResult:
        """`total` samples under the pipeline's progress bar."""
        chunk = (CHUNK if reproducible else 4 * CHUNK) if chunk is None else as_integer("chunk", chunk, 1)
        bar_of: Any = self.progress_bar  # untyped: pyright takes it for a decorator
        with bar_of(total=len(plan.timesteps) * -(-total // chunk)) as bar:
            result = sample(
                self.model,
                range(total),
                labels,
                plan=plan,
                seed=seed,
                chunk=chunk,
                reproducible=reproducible,
                device=self._execution_device,
                progress=lambda done, _: bar.update(done - bar.n),
            )
        self.maybe_free_model_hooks()
        return result

    def _plan(self, options: SamplingOptions, stop: Stop | Sequence[Stop] | None, start: Reuse | None) -> SamplingPlan:
        """What the options of a call mean, over the defaults of the pipeline."""
        excluded = options.given().keys() & {"iterations", "block_passes", "macs", "seconds", "allocation"}
        if stop is not None and excluded:
            raise ValueError(f"stop excludes {' and '.join(sorted(excluded))}; give one of them.")
        model: Any = self.model
        defaults = pipeline_options(self.defaults)
        try:
            return plan(model, self.scheduler, options, defaults=defaults, stop=stop, warm_start=start)
        except OptionError as error:
            raise ValueError(error.spelled(keyword)) from None

    def _images(self, x: Tensor, output_type: Output) -> Any:
        if output_type == "latent":
            return x
        if self.vae is not None:
            x = decode(self.vae, x)
        if x.shape[1] not in (1, 3):
            raise ValueError(
                f"The network generates latents of {x.shape[1]} channels, and the pipeline has no VAE; give one "
                '(vae=...), or output_type="latent".'
            )
        if output_type == "pil":  # the rounding of the sampling command
            return [to_pil(image) for image in x]
        return VaeImageProcessor().postprocess(x.float(), output_type=output_type)

    def save_pretrained(self, save_directory: str | Path, **options: Any) -> None:  # pyright: ignore[reportIncompatibleMethodOverride]
        """Write the folder of the pipeline: index, weights, scheduler, VAE, code and a card.

        `options` are those of diffusers. `push_to_hub` is a method of its own here.
        """
        if options.pop("push_to_hub", False):
            raise ValueError("save_pretrained writes a folder only; call pipe.push_to_hub(REPOSITORY) to upload it.")
        folder = Path(save_directory)
        super().save_pretrained(folder, **options)
        # the entries of the index that name code become those of the files beside it
        file = folder / self.config_name
        index = json.loads(file.read_text())
        code = self._code()
        index["_class_name"] = [PIPELINE_CODE, code.pipeline]
        index["model"] = [code.model_file, index["model"][1]]
        index.pop("_name_or_path", None)  # where it was opened
        file.write_text(json.dumps(index, indent=2, sort_keys=True) + "\n")
        (folder / f"{PIPELINE_CODE}.py").write_text(code.pipeline_source)
        (folder / "model" / f"{code.model_file}.py").write_text(code.model_source)
        if not (folder / "README.md").exists():
            defaults = pipeline_options(self.defaults)
            card = model_card(self.model, self.scheduler, defaults, latents=self.vae is not None)
            (folder / "README.md").write_text(card)

    def push_to_hub(  # pyright: ignore[reportIncompatibleMethodOverride]
        self,
        repo_id: str,
        *,
        private: bool | None = None,
        token: str | None = None,
        commit_message: str = "Upload pipeline",
        api: HfApi | None = None,
    ) -> str:
        """Upload the folder that `save_pretrained` writes, its card included, to a repository of the hub.

        Args:
            repo_id: OWNER/NAME; the repository is made if it does not exist.
            private: whether a new repository is private; None: the owner's default.
            token: of the hub; None: the one that is logged in.
            commit_message: of the commit.
            api: client of the hub, or of another server of its protocol; None: the public one.

        Returns:
            The address of the commit.
        """
        api = api or HfApi(token=token)
        repo_id = api.create_repo(repo_id, private=private, exist_ok=True).repo_id
        with tempfile.TemporaryDirectory() as folder:
            self.save_pretrained(folder)
            return str(api.upload_folder(repo_id=repo_id, folder_path=folder, commit_message=commit_message))

    def _code(self) -> PipelineCode:
        """The code of this pipeline: of one that was opened from a folder, the very files it came from."""
        model: Any = self.model
        source, network = (
            Path(str(sys.modules[kind.__module__].__file__)).read_text() for kind in (type(self), type(model))
        )
        return PipelineCode(
            pipeline=type(self).__name__,
            pipeline_source=source,
            model_file=type(model).__module__.rpartition(".")[2],
            model_source=network,
        )
