"""Train a diffusion model: `python -m apps.diffusion.train [PRESET] [--flags]`; presets.py has the presets, `digits`
is the default.

A run writes one folder (`--out`): config.json, data.json, checkpoints/, logs/, sheets/, metrics.json, loss.png,
samples.png. `--resume` continues the run in that folder.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import signal
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from operator import attrgetter
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import tyro

from apps.diffusion.config.presets import PRESETS
from apps.diffusion.config.training import Config
from apps.diffusion.files.lock import alone

if TYPE_CHECKING:
    from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL

    from apps.diffusion.checkpoint.training_state import Checkpoint
    from apps.diffusion.data import DataSet, Images
    from apps.diffusion.training.trainer import Trainer

# what means nothing to a DiT
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
# what may differ between a run and its continuation: how long, and what is done with the result
_EXTENDABLE = ("max_time", "threads", "checkpoint_every", "keep", "track", "sample_every", "sampling")


def main(argv: list[str] | None = None) -> int:
    """The command; returns its exit code: 0, 2 for bad input, 128 + the signal that stopped it."""
    argv = list(sys.argv[1:] if argv is None else argv)
    try:
        config, resume = parse(argv)
        first = int(os.environ.get("RANK", 0)) == 0
        with alone(config.out) if first else nullcontext():
            start = prepare_folder(config, resume)
            return run(config, start)
    except ValueError as error:
        print(f"train: {error}", file=sys.stderr)
        return 2
    except OSError as error:
        print(f"train: {error}; what the run has saved before is intact.", file=sys.stderr)
        return 1


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
        return _parse(argv, default)
    saved = dataclasses.replace(saved_config(known.out), out=known.out)
    if named and (saved.model.kind, saved.data.source) != (default.model.kind, default.data.source):
        raise ValueError(
            f"The run in {known.out} trains {saved.model.kind} on {saved.data.source}, and the preset {preset} is "
            f"{default.model.kind} on {default.data.source}; leave the preset out to resume this run, or give the "
            "--out of another."
        )
    config, _ = _parse(argv, saved)
    extended = {name: getattr(config, name) for name in _EXTENDABLE}
    extended["optimizer"] = dataclasses.replace(saved.optimizer, images=config.optimizer.images)
    extended["data"] = dataclasses.replace(saved.data, path=config.data.path, vae=config.data.vae)
    if dataclasses.replace(saved, **extended) != config:
        raise ValueError(
            f"A run is resumed with the settings it was started with ({config.out / 'config.json'}); only "
            f"optimizer.images, data.path, data.vae, {', '.join(_EXTENDABLE)} may be changed. Give another --out "
            f"for another run."
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

    told = (
        "Train a diffusion model: a Fixed Point Diffusion Model (FPDM), or the DiT baseline. The first argument may "
        f"name a preset, FPDM or the baseline (-dit) on some data; digits is the default: {', '.join(PRESETS)}."
    )
    options = (tyro.conf.CascadeSubcommandArgs,)
    prog = "python -m apps.diffusion.train"
    config, resume = tyro.cli(command, args=argv, prog=prog, description=told, config=options)
    unheeded = [name for name in _FPDM_ONLY if attrgetter(name)(config) != attrgetter(name)(default)]
    if config.model.kind == "dit" and unheeded:
        raise ValueError(f"A DiT has no fixed point and pays no heed to {', '.join(unheeded)}; leave it as it was.")
    return config, resume


def saved_config(run: Path) -> Config:
    """The configuration of the run in this folder."""
    file = run / "config.json"
    if not file.is_file():
        raise ValueError(
            f"{run} holds no run (it has no config.json); give the folder of one, or train one with --out {run}."
        )
    return Config.from_json(file.read_text(), str(file))


def prepare_folder(config: Config, resume: bool) -> Checkpoint | None:
    """Make the run's folder, or find the checkpoint to go on from. Several processes: the first one speaks
    for all.

    Raises:
        ValueError: the folder holds something already and `resume` is not asked for, or it holds nothing to
        resume.
    """
    out = config.out
    if resume:
        from apps.diffusion.checkpoint.training_state import all_of, newest

        return newest(out) if all_of(out) else None
    if int(os.environ.get("RANK", 0)) == 0:
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

    from apps.diffusion.checkpoint import training_state as checkpoint
    from apps.diffusion.training.metric_logger import Logbook
    from apps.diffusion.training.summary import finish, sheet
    from apps.diffusion.training.trainer import Diverged, Trainer

    if config.threads is not None:
        torch.set_num_threads(config.threads)
    images, held_out = load_images(config)
    trainer = Trainer(config, images, start)
    main_process = trainer.accelerator.is_main_process
    decoder = open_decoder(config) if main_process else None
    if main_process:
        open_folder(config, trainer, images, resumed=start is not None)
    logbook = Logbook(trainer, config)
    try:
        with _stop_on_signals(trainer) as caught:
            trainer.run(
                lambda state: checkpoint.save(config.out, state, config.keep),
                logbook.log,
                lambda network: logbook.show(
                    sheet(config, network, images.num_classes, decoder), trainer.progress.images
                ),
            )
    except Diverged as error:
        print(f"train: {error}", file=sys.stderr)
        return 1
    finally:
        logbook.close()
    if trainer.stopping:
        if main_process:
            print(
                f"Stopped at {trainer.progress.images} images; the checkpoint is in {config.out}.\n"
                f"Continue:      python -m apps.diffusion.train --resume --out {config.out}"
            )
        return 128 + (caught[0] if caught else signal.SIGTERM)  # another process may have been the one to be told
    network = trainer.averaged()
    if network is not None:
        finish(config, trainer, network, images, held_out, decoder, began)
    trainer.accelerator.wait_for_everyone()
    trainer.accelerator.end_training()
    return 0


def open_folder(config: Config, trainer: Trainer, images: DataSet, resumed: bool) -> None:
    """Note in the run's folder what it is, and say so.

    Raises:
        ValueError: the run has learnt from other images.
    """
    from apps.diffusion.checkpoint.training_state import write_atomically
    from apps.diffusion.models import build

    note_data(config.out, build.fingerprint(images))
    write_atomically(config.out / "config.json", config.to_json())
    count = sum(p.numel() for p in trainer.model.parameters())
    classes = f"in {images.num_classes} classes" if images.num_classes else "without classes"
    print(
        f"{'Resuming' if resumed else 'Training'} {trainer.network['class']} with {count:,} parameters on "
        f"{len(images)} images of {' x '.join(map(str, images.shape))} {classes}; the run's folder is {config.out}.",
        flush=True,
    )


def load_images(config: Config) -> tuple[DataSet, Images | None]:
    """The images to train on, and those held out; says which pictures are left out.

    Raises:
        ValueError: nothing that can be used, or guidance of images without classes.
    """
    from tqdm import tqdm

    from apps.diffusion.data.image_folder import Pixels, told
    from apps.diffusion.models import build

    quiet = config.data.source != "folder" or int(os.environ.get("RANK", 0)) > 0
    with tqdm(desc="reading", unit="img", disable=quiet, mininterval=0.5 if sys.stderr.isatty() else 20) as bar:

        def progress(done: int, total: int) -> None:
            bar.total = total
            bar.update(done - bar.n)

        images, held_out = build.images(config.data, progress)
    if isinstance(images, Pixels) and images.skipped and not quiet:
        print(told(images.skipped, len(images) + len(images.skipped)), file=sys.stderr)
    if not images.num_classes and config.sampling.guidance != 1:
        raise ValueError(
            f"Sampling.guidance = {config.sampling.guidance:g} needs classes, and these images have none; leave it "
            "at 1."
        )
    return images, held_out


def open_decoder(config: Config) -> AutoencoderKL | None:
    """The VAE that decodes sample grids; None for pixels, and where the VAE is out of reach and nobody named it.

    Raises:
        ValueError: the VAE that --data.vae names cannot be read, or is another one.
    """
    if config.data.source != "latents" or config.data.path is None:
        return None
    from apps.diffusion.models.autoencoder import open_decoder as open_vae

    try:
        return open_vae(config.data.path, config.data.vae)
    except ValueError as error:
        if config.data.vae is not None:
            raise
        print(f"train: there will be no pictures of samples: {error} --data.vae names a copy.", file=sys.stderr)
        return None


def note_data(out: Path, found: dict[str, Any]) -> None:
    """Note in the run's folder what it learns from, or compare with what is noted there.

    Raises:
        ValueError: the run has learnt from other images.
    """
    from apps.diffusion.checkpoint.training_state import write_atomically

    out.mkdir(parents=True, exist_ok=True)
    note = out / "data.json"
    if not note.exists():
        write_atomically(note, json.dumps(found, indent=2) + "\n")
        return
    try:
        before = json.loads(note.read_text())
    except ValueError:
        raise ValueError(f"{note} is damaged; delete it to go on with the images there are now.") from None
    if before != found:
        raise ValueError(
            f"The run in {out} has learnt from other images ({before}) than there are now ({found}); give their folder "
            "with --data.path, or another --out for another run."
        )


@contextmanager
def _stop_on_signals(trainer: Trainer) -> Iterator[list[int]]:
    """Within the block, SIGTERM and Ctrl-C have the trainer stop after its step; a second one kills.

    The list holds the signals that came.
    """
    caught: list[int] = []

    def handle(number: int, frame: Any) -> None:
        caught.append(number)
        trainer.asked = True
        signal.signal(number, signal.SIG_DFL)

    before = {number: signal.signal(number, handle) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield caught
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


if __name__ == "__main__":
    sys.exit(main())
