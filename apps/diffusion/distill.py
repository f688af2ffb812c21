"""Distill a DiT into an FPDM: `python -m apps.diffusion.distill DIT --out RUN`.

DIT is a training run, a pipeline or model folder, a network by name, or a checkpoint file in a published layout. The
FPDM is initialized from the first, the last and a middle block of the DiT and learns the predictions of the DiT
(training/distillation.py). The flags are those of `python -m apps.diffusion.train`. The data are those of the DiT's
training run; without a run they are latents, given by --data.path. RUN becomes a training run, which
`python -m apps.diffusion.train --resume --out RUN` continues.
"""

import sys
from collections.abc import Sequence
from pathlib import Path
from shlex import quote

from apps.diffusion.cli import AFTER_TRAINING, run_command, run_training
from apps.diffusion.config.command_line import parse_flags, with_absolute_paths
from apps.diffusion.config.training import Config


def main(argv: list[str] | None = None) -> int:
    """The command; returns its exit code (see cli.py)."""
    return run_command("distill", lambda args: run_training(*parse(args)), argv, after=AFTER_TRAINING)


def parse(argv: Sequence[str]) -> tuple[Config, bool]:
    """The configuration that the arguments describe, and whether to resume.

    Raises:
        ValueError: the first argument is not a DiT, or a value is not allowed.
    """
    if argv and argv[0] in ("-h", "--help"):
        return parse_flags("distill", ["--help"], Config())
    if not argv or argv[0].startswith("-"):
        got = argv[0] if argv else "none"
        raise ValueError(f"The first argument is the DiT to distill, got {got}; give a folder, a file or a name.")
    from apps.diffusion.training.distillation import student_config

    config, resume = parse_flags("distill", argv[1:], student_config(Path(argv[0])))
    if resume:
        raise ValueError(
            f"--resume is for train: python -m apps.diffusion.train --resume --out {quote(str(config.out))}"
        )
    return with_absolute_paths(config), resume


if __name__ == "__main__":
    sys.exit(main())
