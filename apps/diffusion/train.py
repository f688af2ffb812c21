"""Train a diffusion model: `python -m apps.diffusion.train [PRESET] [--flags]`, where a preset is `digits`
(the default) or `digits-dit`.

A run writes one folder (`--out`): config.json, checkpoints/, metrics.json, loss.png, samples.png. `--resume`
continues the run in that folder.
"""

from __future__ import annotations

import dataclasses
import os
import signal
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import tyro

from .config import Config
from .presets import PRESETS

if TYPE_CHECKING:
    from .checkpoint import Checkpoint
    from .trainer import Trainer

# what may differ between a run and its continuation: how long, and what is done with the result
_EXTENDABLE = ("max_time", "threads", "checkpoint_every", "keep", "sampling")


def main(argv: list[str] | None = None) -> int:
    """The command; returns its exit code: 0, 2 for bad input, 128 + the signal that stopped it."""
    argv = list(sys.argv[1:] if argv is None else argv)
    try:
        config, resume = parse(argv)
        start = prepare_folder(config, resume)
        return run(config, start)
    except ValueError as error:
        print(f"train: {error}", file=sys.stderr)
        return 2
    except OSError as error:
        print(f"train: {error}; what the run has saved before is intact.", file=sys.stderr)
        return 1


def parse(argv: list[str]) -> tuple[Config, bool]:
    """The configuration that the arguments describe, and whether to resume.

    Raises:
        ValueError: a preset that does not exist, a value that is not allowed, a resumed run that would become
        another.
    """
    preset = argv.pop(0) if argv and not argv[0].startswith("-") and ":" not in argv[0] else "digits"
    if preset not in PRESETS:
        raise ValueError(f"There is no preset {preset!r}; take one of {', '.join(PRESETS)}.")
    config, resume = _parse(argv, PRESETS[preset]())
    if not resume:
        return config, False
    saved = saved_config(config.out)
    config, _ = _parse(argv, dataclasses.replace(saved, out=config.out))
    extended = {name: getattr(config, name) for name in _EXTENDABLE}
    images = dataclasses.replace(saved.optimisation, images=config.optimisation.images)
    if dataclasses.replace(saved, **extended, optimisation=images, out=config.out) != config:
        raise ValueError(
            f"A run is resumed with the settings it was started with ({config.out / 'config.json'}); only "
            f"optimisation.images, {', '.join(_EXTENDABLE)} may be changed. Give another --out for another "
            f"run."
        )
    return config, True


def _parse(argv: list[str], default: Config) -> tuple[Config, bool]:
    def command(
        config: Annotated[Config, tyro.conf.arg(name="")] = default, resume: bool = False
    ) -> tuple[Config, bool]:
        """Train a diffusion model: a Fixed Point Diffusion Model (FPDM), or the DiT baseline.

        The first argument may name a preset: digits (FPDM on handwritten digits, the default) or digits-dit
        (the baseline).

        Args:
            config: The configuration.
            resume: Continue the run in the folder --out.
        """
        return config, resume

    options = (tyro.conf.CascadeSubcommandArgs, tyro.conf.FlagCreatePairsOff)
    return tyro.cli(command, args=argv, prog="python -m apps.diffusion.train", config=options)


def saved_config(run: Path) -> Config:
    """The configuration of the run in this folder."""
    file = run / "config.json"
    if not file.is_file():
        raise ValueError(
            f"{run} holds no run (it has no config.json); give the folder of one, or train one with --out {run}."
        )
    return Config.from_json(file.read_text())


def prepare_folder(config: Config, resume: bool) -> Checkpoint | None:
    """Make the run's folder, or find the checkpoint to go on from. Several processes: the first one speaks
    for all.

    Raises:
        ValueError: the folder holds something already and `resume` is not asked for, or it holds nothing to
        resume.
    """
    out = config.out
    if resume:
        from .checkpoint import all_of, newest

        return newest(out) if all_of(out) else None
    if int(os.environ.get("RANK", 0)) == 0:
        if out.exists() and not out.is_dir():
            raise ValueError(f"--out {out} is a file; give a folder.")
        if out.exists() and any(out.iterdir()):
            what = "a run" if (out / "config.json").exists() else "files"
            raise ValueError(
                f"{out} holds {what} already, and nothing is overwritten: continue it with --resume, give "
                f"another folder "
                f"with --out, or delete {out}."
            )
    return None


def run(config: Config, start: Checkpoint | None) -> int:
    """Train, sample, score, draw; returns the exit code."""
    began = time.monotonic()
    import torch

    from . import build, checkpoint
    from .report import finish
    from .trainer import Diverged, Trainer

    if config.threads is not None:
        torch.set_num_threads(config.threads)
    images, held_out = build.images(config.data)
    trainer = Trainer(config, images, start)
    main_process = trainer.accelerator.is_main_process
    if main_process:
        config.out.mkdir(parents=True, exist_ok=True)
        checkpoint.write_atomically(config.out / "config.json", config.to_json())
        count = sum(p.numel() for p in trainer.model.parameters())
        print(
            f"{'Resuming' if start else 'Training'} {trainer.network['class']} with {count:,} parameters on "
            f"{len(images)} images "
            f"of {' x '.join(map(str, images.shape))} in {images.num_classes} classes; the run's folder is "
            f"{config.out}.",
            flush=True,
        )
    try:
        with _stop_on_signals(trainer) as caught:
            trainer.run(lambda state: checkpoint.save(config.out, state, config.keep))
    except Diverged as error:
        print(f"train: {error}", file=sys.stderr)
        return 1
    if caught:
        if main_process:
            print(
                f"Stopped at {trainer.progress.images} images; the checkpoint is in {config.out}.\n"
                f"Continue:      python -m apps.diffusion.train --resume --out {config.out}"
            )
        return 128 + caught[0]
    if main_process:
        finish(config, trainer, images, held_out, began)
    trainer.accelerator.wait_for_everyone()
    trainer.accelerator.end_training()
    return 0


@contextmanager
def _stop_on_signals(trainer: Trainer) -> Iterator[list[int]]:
    """Within the block, SIGTERM and Ctrl-C have the trainer stop after its step; a second one kills.

    The list holds the signals that came.
    """
    caught: list[int] = []

    def handle(number: int, frame: Any) -> None:
        caught.append(number)
        trainer.stopping = True
        signal.signal(number, signal.SIG_DFL)

    before = {number: signal.signal(number, handle) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield caught
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


if __name__ == "__main__":
    sys.exit(main())
