"""The flags of the commands `train` and `distill`, made from the fields of `Config`."""

import dataclasses
from collections.abc import Sequence
from itertools import pairwise
from operator import attrgetter
from pathlib import Path
from typing import Annotated

import tyro

from apps.diffusion.config.fixed_point import REGISTRY
from apps.diffusion.config.network import NoiseSchedule
from apps.diffusion.config.presets import PRESETS
from apps.diffusion.config.training import Config

_DESCRIPTIONS = {
    "train": "Train a diffusion model: a Fixed Point Diffusion Model (FPDM), or the DiT baseline. The first argument "
    f"may name a preset, a configuration for a data set (with -dit: the baseline's); default: digits. The presets are "
    f"{', '.join(PRESETS)}.",
    "distill": "Distill a DiT into an FPDM. The first argument is the DiT: a training run, a pipeline or model folder, "
    "a network by name, or a checkpoint file in a published layout.",
}
# options that do not apply to a DiT
_FPDM_ONLY = (
    "grad",
    "solver",
    "stop",
    "model.pre",
    "model.post",
    "model.condition_on_time",
    "model.recurrent_init",
    "sampling.reuse",
)


def parse_flags(name: str, argv: Sequence[str], default: Config) -> tuple[Config, bool]:
    """The configuration that the flags describe, and whether to resume.

    Args:
        name: name of the command, "train" or "distill".
        argv: the flags.
        default: the configuration if there are no flags.

    Raises:
        ValueError: options that apply to an FPDM only, for a DiT.
    """

    # a sampling option that is given removes the default options that it excludes
    flags = (word.partition("=")[0] for word in argv if word.startswith("--sampling."))
    given = [flag.removeprefix("--sampling.").replace("-", "_") for flag in flags]
    default = dataclasses.replace(default, sampling=default.sampling.replaced_by(given))
    # --schedule.kind rectified_flow removes the default's betas and prediction target, which apply to diffusion only
    words = [part for word in argv for part in word.split("=", 1)]
    if ("--schedule.kind", "rectified_flow") in pairwise(words):
        default = dataclasses.replace(default, schedule=NoiseSchedule(timesteps=default.schedule.timesteps))

    def command(
        config: Annotated[Config, tyro.conf.arg(name="")] = default, resume: bool = False
    ) -> tuple[Config, bool]:
        """
        Args:
            config: The configuration.
            resume: Continue the run in the folder --out.
        """
        return config, resume

    options = (tyro.conf.CascadeSubcommandArgs,)
    prog, text = f"python -m apps.diffusion.{name}", _DESCRIPTIONS[name]
    config, resume = tyro.cli(command, args=argv, prog=prog, description=text, config=options, registry=REGISTRY)
    unused = [name for name in _FPDM_ONLY if attrgetter(name)(config) != attrgetter(name)(default)]
    if config.model.kind == "dit" and unused:
        raise ValueError(
            f"{', '.join(unused)} apply to an FPDM only; leave these options out for a DiT, or give --model.kind fpdm."
        )
    return config, resume


def with_absolute_paths(config: Config) -> Config:
    """The configuration with absolute paths of the data, the VAE, `init` and `teacher`, so that the run can be used
    from any working folder. A VAE that is not a folder is a name on the hub and stays as it is.
    """
    path, vae = config.data.path, config.data.vae
    for name in ("init", "teacher"):
        weights: Path | None = getattr(config, name)
        if weights is not None and weights.exists():
            config = dataclasses.replace(config, **{name: weights.absolute()})
    data = dataclasses.replace(
        config.data,
        path=None if path is None else path.absolute(),
        vae=str(Path(vae).absolute()) if vae is not None and Path(vae).is_dir() else vae,
    )
    return dataclasses.replace(config, data=data)
