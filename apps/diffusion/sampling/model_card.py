"""The model card and the code in the folder of a pipeline."""

from dataclasses import dataclass
from typing import Any

from apps.diffusion.config.sampling import SamplingOptions
from apps.diffusion.schedulers.noise_levels import prediction_kind

_CARD = """---
library_name: diffusers
tags: [diffusion, {tag}]
---
# {kind}

{article} {kind} with {count:,} parameters, {classes}; {space} of shape {shape}. Scheduler: {scheduler}, prediction
`{prediction}`. By default {steps} timesteps, guidance {guidance:g}.

The folder carries its code, `fixed_point_pipeline.py` and a file in `model/`; both need `pip install
implicit-fixed-points diffusers` and nothing else of the project.

```python
from diffusers import DiffusionPipeline

pipe = DiffusionPipeline.from_pretrained(DIRECTORY_OR_REPOSITORY, trust_remote_code=True)
images = pipe({call}, generator=0).images
```

Training data, license of the weights, intended use and scores: not stated.
"""


@dataclass(frozen=True, kw_only=True)
class PipelineCode:
    """The two files of code in the folder of a pipeline.

    Attributes:
        pipeline: name of the pipeline's class in `pipeline_source`.
        pipeline_source: content of the pipeline's file.
        model_file: name of the network's file, without its suffix.
        model_source: content of the network's file.
    """

    pipeline: str
    pipeline_source: str
    model_file: str
    model_source: str


def model_card(model: Any, scheduler: Any, options: SamplingOptions, *, latents: bool) -> str:
    """The model card of a pipeline: network, scheduler, default options, and the code that opens the folder.

    Args:
        model: the network.
        scheduler: the pipeline's scheduler.
        options: the pipeline's default sampling options.
        latents: whether the folder has a VAE.
    """
    kind, (channels, height, width) = type(model).__name__, model.latent
    return _CARD.format(
        kind=kind,
        article="An" if kind == "FPDM" else "A",
        tag=kind.lower(),
        count=sum(p.numel() for p in model.parameters()),
        classes=f"{model.num_classes} classes" if model.num_classes else "unconditional",
        shape=f"{channels} x {height} x {width}",
        space="latents, decoded by the VAE in vae/" if latents else "samples",
        scheduler=type(scheduler).__name__,
        prediction=prediction_kind(scheduler),
        steps=len(options.timesteps) or options.value("steps"),
        guidance=options.value("guidance"),
        call="class_labels=[0, 1]" if model.num_classes else "num_images=2",
    )
