"""Shared by the commands: exit codes, interruption, missing packages, devices, ranks.

    0    success
    1    the disk failed
    2    bad input, or a package that is not installed
    130  interrupted (Ctrl-C)

An interruption or a missing package is reported in one line from the first import on (see __init__.py).
"""

from __future__ import annotations

import io
import os
import sys
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from typing import TYPE_CHECKING, TypeVar

import tyro

from apps.diffusion import missing_packages
from apps.diffusion.files.atomic import exclusive

if TYPE_CHECKING:
    from apps.diffusion.config.training import Config

R = TypeVar("R")


def run_command(
    name: str, command: Callable[[list[str]], int | None], argv: Sequence[str] | None = None, *, after: str = ""
) -> int:
    """Run a command and return its exit code; see the top of this file.

    Args:
        name: of the command, which begins its messages.
        command: parses and runs; it returns an exit code, or None for 0.
        argv: arguments; None: those of the process.
        after: what an interruption or a failed disk leaves, as a sentence.
    """
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")  # names of files may have bytes that are no text
    try:
        return command(list(sys.argv[1:] if argv is None else argv)) or 0
    except KeyboardInterrupt:
        message, code = f"interrupted. {after}".strip(), 130
    except ModuleNotFoundError as error:
        message, code = missing_packages() or f"the package {error.name} is not installed.", 2
    except ValueError as error:
        spelled = getattr(error, "spelled", None)  # of an OptionError
        message, code = spelled(flag) if spelled else str(error), 2
    except OSError as error:
        message, code = f"{error}. {after}".strip(), 1
    print(f"{name}: {message}", file=sys.stderr)
    return code


def parse_request(kind: type[R], name: str, argv: Sequence[str]) -> R:
    """The request of class `kind` that the arguments of the command `name` describe."""
    options = (tyro.conf.CascadeSubcommandArgs,)
    return tyro.cli(kind, args=argv, prog=f"python -m apps.diffusion.{name}", config=options)


def run_request(
    kind: type[R], name: str, command: Callable[[R], None], argv: Sequence[str] | None = None, *, after: str = ""
) -> int:
    """Run a command on the request that its arguments describe; returns its exit code."""
    return run_command(name, lambda args: command(parse_request(kind, name, args)), argv, after=after)


AFTER_TRAINING = "Saved checkpoints are intact; --resume continues a run whose config.json was written."


def run_training(config: Config, resume: bool) -> int:
    """Train in the run's folder, which one command at a time may use; returns the exit code."""
    first = int(os.environ.get("RANK", 0)) == 0
    with exclusive(config.out) if first else nullcontext():
        from apps.diffusion.training import run

        return run.run(config, run.start_of(config, resume))


def flag(name: str) -> str:
    """The flag of an option: max_evals is --max-evals."""
    return "--" + name.replace("_", "-")


def rank_and_world(rank: int | None = None, world: int | None = None) -> tuple[int, int]:
    """Number of this process and number of processes; None: RANK and WORLD_SIZE, as torchrun sets them.

    Raises:
        ValueError: the number is not below the number of processes.
    """
    rank = int(os.environ.get("RANK", 0)) if rank is None else rank
    world = int(os.environ.get("WORLD_SIZE", 1)) if world is None else world
    if not 0 <= rank < world:
        raise ValueError(f"--rank {rank} must lie between 0 and --world {world} minus 1.")
    return rank, world


def device_of(name: str) -> str:
    """The device by this name; "auto": the first available one of cuda, mps, xpu and cpu. A name without a number means
    the device of this process (LOCAL_RANK).

    Raises:
        ValueError: it is not available, or a sum of one number fails on it.
    """
    import torch

    if name == "auto":
        found = torch.accelerator.current_accelerator(check_available=True)
        name = found.type if found is not None and found.type in ("cuda", "mps", "xpu") else "cpu"
    device = f"{name}:{os.environ.get('LOCAL_RANK', 0)}" if name in ("cuda", "xpu") else name
    try:
        torch.ones(1, device=device).sum().item()
    except (RuntimeError, AssertionError, ImportError, NotImplementedError) as error:
        reason = str(error).split("\n")[0][:200]
        raise ValueError(f"--device {name} is not available ({reason}); use cpu, or another device.") from None
    return device
