"""Train a diffusion model: `python -m apps.diffusion.train [PRESET] [--flags]`; presets.py has the presets, `digits`
is the default.

A run writes one folder (`--out`): config.json, data.json, checkpoints/, logs/, sheets/, metrics.json, loss.png,
samples.png. `--resume` continues the run in that folder.
"""

from __future__ import annotations

import argparse
import dataclasses
import os
import sys
from collections.abc import Sequence
from contextlib import nullcontext
from operator import attrgetter
from pathlib import Path
from typing import Annotated

import tyro

from apps.diffusion.cli import run_command
from apps.diffusion.config.fixed_point import REGISTRY
from apps.diffusion.config.presets import PRESETS
from apps.diffusion.config.training import Config
from apps.diffusion.files.atomic import exclusive

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
# options that may differ between a run and its continuation: its length, and the use of its result
_EXTENDABLE = ("max_time", "threads", "checkpoint_every", "keep", "track", "sample_every", "sampling", "num_samples")


def main(argv: list[str] | None = None) -> int:
    """The command; returns its exit code: 0, 1 if the disk fails or training diverges, 2 for bad input, 128 + the
    number of the signal that stopped it.
    """

    def command(args: list[str]) -> int:
        config, resume = parse(args)
        first = int(os.environ.get("RANK", 0)) == 0
        with exclusive(config.out) if first else nullcontext():
            from apps.diffusion.training import run

            return run.run(config, run.start_of(config, resume))

    return run_command("train", command, argv, after="Saved checkpoints are intact; --resume continues from the last.")


def parse(argv: Sequence[str]) -> tuple[Config, bool]:
    """The configuration that the arguments describe, and whether to resume.

    Raises:
        ValueError: a preset that does not exist, a value that is not allowed, a resumed run that would become
        another.
    """
    named = bool(argv) and not argv[0].startswith("-") and ":" not in argv[0]
    preset, argv = (argv[0], argv[1:]) if named else ("digits", argv)
    if preset not in PRESETS:
        raise ValueError(f"There is no preset {preset!r}; take one of {', '.join(PRESETS)}.")
    default = PRESETS[preset]()
    early = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    early.add_argument("--resume", action="store_true")
    early.add_argument("--out", type=Path, default=default.out)
    known, _ = early.parse_known_args(argv)
    if not known.resume or "--help" in argv or "-h" in argv:
        config, resume = _parse(argv, default)
        return with_absolute_paths(config), resume
    from apps.diffusion.checkpoint.trained_run import read_config

    saved = with_absolute_paths(dataclasses.replace(read_config(known.out), out=known.out))
    if named and (saved.model.kind, saved.data.source) != (default.model.kind, default.data.source):
        raise ValueError(
            f"The run in {known.out} trains {saved.model.kind} on {saved.data.source}, and the preset {preset} is "
            f"{default.model.kind} on {default.data.source}; leave the preset out to resume this run, or give the "
            "--out of another."
        )
    config = with_absolute_paths(_parse(argv, saved)[0])
    extended = {name: getattr(config, name) for name in _EXTENDABLE}
    extended["optimizer"] = dataclasses.replace(saved.optimizer, images=config.optimizer.images)
    extended["data"] = dataclasses.replace(
        saved.data, path=config.data.path, vae=config.data.vae, workers=config.data.workers
    )
    if dataclasses.replace(saved, **extended) != config:
        raise ValueError(
            f"A run is resumed with the settings it was started with ({config.out / 'config.json'}); only "
            f"optimizer.images, data.path, data.vae, data.workers, {', '.join(_EXTENDABLE)} may be changed. Give "
            "another --out for another run."
        )
    return config, True


def _parse(argv: Sequence[str], default: Config) -> tuple[Config, bool]:
    def command(
        config: Annotated[Config, tyro.conf.arg(name="")] = default, resume: bool = False
    ) -> tuple[Config, bool]:
        """
        Args:
            config: The configuration.
            resume: Continue the run in the folder --out.
        """
        return config, resume

    text = (
        "Train a diffusion model: a Fixed Point Diffusion Model (FPDM), or the DiT baseline. The first argument may "
        f"name a preset, FPDM or the baseline (-dit) on some data; digits is the default: {', '.join(PRESETS)}."
    )
    options = (tyro.conf.CascadeSubcommandArgs,)
    prog = "python -m apps.diffusion.train"
    config, resume = tyro.cli(command, args=argv, prog=prog, description=text, config=options, registry=REGISTRY)
    unused = [name for name in _FPDM_ONLY if attrgetter(name)(config) != attrgetter(name)(default)]
    if config.model.kind == "dit" and unused:
        raise ValueError(
            f"{', '.join(unused)} do not apply to a DiT, which has no fixed point; leave them out, or give "
            "--model.kind fpdm."
        )
    return config, resume


def with_absolute_paths(config: Config) -> Config:
    """The configuration with absolute paths of the data and the VAE, so that the run can be used from any folder. A VAE
    that is no folder here is a name on the hub.
    """
    path, vae = config.data.path, config.data.vae
    data = dataclasses.replace(
        config.data,
        path=None if path is None else path.absolute(),
        vae=str(Path(vae).absolute()) if vae is not None and Path(vae).is_dir() else vae,
    )
    return dataclasses.replace(config, data=data)


if __name__ == "__main__":
    sys.exit(main())
