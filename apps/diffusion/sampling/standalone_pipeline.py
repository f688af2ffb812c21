"""The diffusers pipeline that a saved folder contains as code; it samples by the loop of sampler.py.

The folder of a saved pipeline contains one file with this class and all definitions that it uses
(checkpoint/single_file.py), so that `DiffusionPipeline.from_pretrained(DIR, trust_remote_code=True)` opens the folder
where `implicit` is installed and this application is not. `FixedPointPipeline` is a subclass that opens training runs
and model folders too.
"""

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
"""Name of the pipeline's code file in the folder of a pipeline, without its suffix."""


@dataclass
class FixedPointOutput(BaseOutput):
    """The result of a call of the pipeline.

    Attributes:
        images: a list of images ("pil"), an array (n, H, W, C) ("np") or a tensor (n, C, H, W) ("pt") in
            [0, 1], or the samples of the network, (n, C, h, w), unscaled and not clipped ("latent").
        effort: cost of sampling (see effort.py).
        seed: the seed of the call; `generator=seed` gives the same images again.
    """

    images: Any
    effort: Effort
    seed: int


class SamplingPipeline(DiffusionPipeline):
    """An FPDM, or the DiT baseline, with its scheduler and, for latents, its VAE.

    Args:
        model: the network, in evaluation mode.
        scheduler: a diffusers scheduler with the network's noise schedule; it also spaces the timesteps.
        vae: VAE that decodes latents; None for a network of pixels.
        steps: default number of timesteps; None: 20, or the number that other options determine.
        iterations: default iterations of the fixed-point layer, one number or one per timestep; None: the number in the
            model's configuration.
        guidance: default scale of classifier-free guidance.
        reuse: default start of each solve: False or "off", True or "on", "blended", "extrapolated", "history".
        classes: names of the classes; None: the classes have no names.
        sampling: default values of other fields of `SamplingOptions` (config/sampling.py), such as eta, solver and
            rtol.
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
            # the solver in a model_index.json is a dict already
            sampling={n: v if isinstance(v, dict) else to_plain(v, n) for n, v in (sampling or {}).items()},
        )
        pipeline_options(self.defaults)  # raises if options exclude each other

    @property
    def defaults(self) -> dict[str, Any]:
        """The default options of a call."""
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
        """Generates images.

        Args:
            class_labels: class of each image, or one class for all, by number or name; None: unconditional network.
            num_images: number of images; None: one image for each label.
            generator: a seed, or a torch generator from which a seed is drawn; None: a random seed.
            stop: stopping criterion of all timesteps, or one per timestep, instead of iterations; FPDM only.
            chunk: number of images in one call of the network; None: 64, or 16 if `reproducible`.
            reproducible: whether an image is equal to the last bit whatever other images a call generates. The network
                is then called on complete chunks, so that one image costs as much as a chunk.
            output_type: "pil", "np", "pt" or "latent"; see FixedPointOutput.
            return_dict: whether to return a FixedPointOutput; False: the tuple (images,).
            options: `SamplingKeywords` (sampling/pipeline_keywords.py), such as num_inference_steps and iterations; an
                option that is left out or None has the pipeline's default.

        Raises:
            ValueError: labels do not fit the network, guidance is given for an unconditional network, timesteps are
                impossible, options of a fixed point are given for a DiT, or several generators are given.
            TypeError: an option does not exist.
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
        """`total` samples, computed under the pipeline's progress bar."""
        chunk = (CHUNK if reproducible else 4 * CHUNK) if chunk is None else as_integer("chunk", chunk, 1)
        bar_of: Any = self.progress_bar  # Any, because pyright infers the type of a decorator
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
        """The plan of a call; options that the call leaves open are the defaults of the pipeline."""
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
                f"The network generates latents of {x.shape[1]} channels, and the pipeline has no VAE; give a VAE "
                '(vae=...), or output_type="latent".'
            )
        if output_type == "pil":  # rounded as in the sampling command
            return [to_pil(image) for image in x]
        return VaeImageProcessor().postprocess(x.float(), output_type=output_type)

    def save_pretrained(self, save_directory: str | Path, **options: Any) -> None:  # pyright: ignore[reportIncompatibleMethodOverride]
        """Write the folder of the pipeline: model_index.json, weights, scheduler, VAE, code and a model card.

        `options` are those of diffusers, without `push_to_hub`, for which there is the method `push_to_hub`.
        """
        if options.pop("push_to_hub", False):
            raise ValueError("save_pretrained writes a folder only; call pipe.push_to_hub(REPOSITORY) to upload it.")
        folder = Path(save_directory)
        super().save_pretrained(folder, **options)
        # entries of model_index.json that name classes: refer to the code files in the folder
        file = folder / self.config_name
        index = json.loads(file.read_text())
        code = self._code()
        index["_class_name"] = [PIPELINE_CODE, code.pipeline]
        index["model"] = [code.model_file, index["model"][1]]
        index.pop("_name_or_path", None)  # the folder from which the pipeline was opened
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
        """Upload the folder that `save_pretrained` writes, with its model card, to a repository of the hub.

        Args:
            repo_id: OWNER/NAME; the repository is made if it does not exist.
            private: whether a new repository is private; None: the owner's default.
            token: access token of the hub; None: the stored token of the logged-in user.
            commit_message: message of the commit.
            api: client of the hub, or of another server with the same protocol; None: the public hub.

        Returns:
            The address of the commit.
        """
        api = api or HfApi(token=token)
        repo_id = api.create_repo(repo_id, private=private, exist_ok=True).repo_id
        with tempfile.TemporaryDirectory() as folder:
            self.save_pretrained(folder)
            return str(api.upload_folder(repo_id=repo_id, folder_path=folder, commit_message=commit_message))

    def _code(self) -> PipelineCode:
        """The code of this pipeline. A pipeline opened from a folder saves the code files of that folder unchanged."""
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
