"""Train a diffusion model: `python -m apps.diffusion.train [PRESET] [--flags]`. The presets are in config/presets.py;
the default is `digits`.

A run writes config.json, data.json, checkpoints/, logs/, grids/, metrics.json, loss.png and samples.png into one folder
(`--out`). `--resume` continues the run in that folder.
"""

import argparse
import dataclasses
import sys
from collections.abc import Sequence
from pathlib import Path

from apps.diffusion.cli import AFTER_TRAINING, run_command, run_training
from apps.diffusion.config.checks import flag
from apps.diffusion.config.command_line import parse_flags, with_absolute_paths
from apps.diffusion.config.presets import PRESETS
from apps.diffusion.config.training import Config

# options that may be changed when a run is resumed: length of training, device, logging and sampling
_EXTENDABLE = (
    "max_time",
    "device",
    "threads",
    "checkpoint_every",
    "keep",
    "track",
    "sample_every",
    "sampling",
    "num_samples",
    "profile",
)


def main(argv: list[str] | None = None) -> int:
    """The command; returns its exit code: 0, 1 if the disk fails or training diverges, 2 for bad input, 128 + the
    number of the signal that stopped it.
    """

    return run_command("train", lambda args: run_training(*parse(args)), argv, after=AFTER_TRAINING)


def parse(argv: Sequence[str]) -> tuple[Config, bool]:
    """The configuration that the arguments describe, and whether to resume.

    Raises:
        ValueError: the preset does not exist, a value is not allowed, or a run is resumed with other settings.
    """
    named = bool(argv) and not argv[0].startswith("-") and ":" not in argv[0]
    preset, argv = (argv[0], argv[1:]) if named else ("digits", argv)
    if preset not in PRESETS:
        raise ValueError(f"There is no preset {preset!r}; give one of {', '.join(PRESETS)}.")
    default = PRESETS[preset]()
    early = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    early.add_argument("--resume", action="store_true")
    early.add_argument("--out", type=Path, default=default.out)
    known, _ = early.parse_known_args(argv)
    if not known.resume or "--help" in argv or "-h" in argv:
        config, resume = parse_flags("train", argv, default)
        return with_absolute_paths(config), resume
    from apps.diffusion.checkpoint.trained_run import read_config

    saved = with_absolute_paths(dataclasses.replace(read_config(known.out), out=known.out))
    if named and (saved.model.kind, saved.data.source) != (default.model.kind, default.data.source):
        raise ValueError(
            f"The run in {known.out} trains {saved.model.kind} on {saved.data.source}, and the preset {preset} is "
            f"{default.model.kind} on {default.data.source}; leave the preset out to resume this run, or give another "
            "run with --out."
        )
    config = with_absolute_paths(parse_flags("train", argv, saved)[0])
    extended = {name: getattr(config, name) for name in _EXTENDABLE}
    extended["optimizer"] = dataclasses.replace(saved.optimizer, images=config.optimizer.images)
    extended["data"] = dataclasses.replace(
        saved.data, path=config.data.path, vae=config.data.vae, workers=config.data.workers
    )
    if saved.teacher is not None and config.teacher is not None:
        extended["teacher"] = config.teacher  # a copy; the checkpoint knows its weights
    if dataclasses.replace(saved, **extended) != config:
        flags = ", ".join(flag(config, name) for name in _EXTENDABLE)
        raise ValueError(
            f"A run is resumed with the settings it was started with ({config.out / 'config.json'}); only "
            f"--optimizer.images, --data.path, --data.vae, --data.workers, --teacher, {flags} may be changed. Give "
            "another --out for another run."
        )
    return config, True


if __name__ == "__main__":
    sys.exit(main())
