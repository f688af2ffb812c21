"""Functions that all commands share: exit codes, interruption, missing packages, devices, ranks.

    0    success
    1    a file could not be read or written
    2    bad input, or a package that is not installed
    130  interrupted (Ctrl-C)

__init__.py reports an interruption or a missing package during imports.
"""

from __future__ import annotations

import io
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from functools import partial
from types import FrameType
from typing import TYPE_CHECKING, TypeVar

import tyro

from apps.diffusion import missing_packages
from apps.diffusion.config.checks import flag
from apps.diffusion.files.atomic import exclusive
from apps.diffusion.files.names import reason

if TYPE_CHECKING:
    from apps.diffusion.config.training import Config

R = TypeVar("R")


def run_command(
    name: str, command: Callable[[list[str]], int | None], argv: Sequence[str] | None = None, *, after: str = ""
) -> int:
    """Run a command and return its exit code; see the top of this file.

    Args:
        name: name of the command, which begins its messages.
        command: function that parses the arguments and runs the command; it returns an exit code, or None for 0.
        argv: arguments of the command; None: those of the process.
        after: a sentence printed after an interruption or a failed read or write, about the files that are left.
    """
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")  # a file name may hold bytes that are not text
    try:
        with _interruptible():
            return command(list(sys.argv[1:] if argv is None else argv)) or 0
    except KeyboardInterrupt:
        message, code = f"interrupted. {after}".strip(), 130
    except ModuleNotFoundError as error:
        message, code = missing_packages() or f"the package {error.name} is not installed.", 2
    except ValueError as error:
        spelled = getattr(error, "spelled", None)  # a method of OptionError, which puts flags into the message
        message, code = spelled(partial(flag, None)) if spelled else str(error), 2
    except OSError as error:
        message, code = f"{error}. {after}".strip(), 1
    print(f"{name}: {message}", file=sys.stderr)
    return code


@contextmanager
def _interruptible() -> Iterator[None]:
    """Within the block every error after Ctrl-C is a KeyboardInterrupt: C code may raise another error in its place."""
    came: list[int] = []

    def handle(number: int, frame: FrameType | None) -> None:
        came.append(number)
        signal.default_int_handler(number, frame)

    in_main_thread = threading.current_thread() is threading.main_thread()
    usual = in_main_thread and signal.getsignal(signal.SIGINT) is signal.default_int_handler
    if usual:
        signal.signal(signal.SIGINT, handle)
    try:
        yield
    except Exception:  # of any class, since it is raised again
        if came:
            raise KeyboardInterrupt from None
        raise
    finally:
        if usual:
            signal.signal(signal.SIGINT, signal.default_int_handler)


def parse_request(kind: type[R], name: str, argv: Sequence[str]) -> R:
    """The instance of the dataclass `kind` that the arguments `argv` of the command `name` describe."""
    options = (tyro.conf.CascadeSubcommandArgs,)
    return tyro.cli(kind, args=argv, prog=f"python -m apps.diffusion.{name}", config=options)


def run_request(
    kind: type[R], name: str, command: Callable[[R], None], argv: Sequence[str] | None = None, *, after: str = ""
) -> int:
    """Run a command on the request that its arguments describe; returns the exit code."""
    return run_command(name, lambda args: command(parse_request(kind, name, args)), argv, after=after)


AFTER_TRAINING = "Saved checkpoints are intact; --resume continues a run whose config.json was written."


def run_training(config: Config, resume: bool) -> int:
    """Train in the run's folder, which is locked against a second command; returns the exit code.

    Raises:
        ValueError: RANK and WORLD_SIZE name no process. With a RANK left over from another program, the only process
            would neither lock the folder nor check that it is empty.
    """
    rank, world = from_environment("RANK", 0), from_environment("WORLD_SIZE", 1)
    if not 0 <= rank < world:
        raise ValueError(
            f"The environment has RANK={rank} and WORLD_SIZE={world}; start several processes with torchrun or "
            "accelerate launch, and for one process unset both variables."
        )
    first = rank == 0
    with exclusive(config.out) if first else nullcontext():
        from apps.diffusion.training import run

        return run.run(config, run.start_of(config, resume))


def rank_and_world(rank: int | None = None, world: int | None = None) -> tuple[int, int]:
    """Number of this process and number of processes; where an argument is None, RANK or WORLD_SIZE of torchrun.

    Raises:
        ValueError: the number of this process is not below the number of processes.
    """
    rank = from_environment("RANK", 0) if rank is None else rank
    world = from_environment("WORLD_SIZE", 1) if world is None else world
    if not 0 <= rank < world:
        raise ValueError(
            f"--rank {rank} must lie between 0 and --world {world} minus 1; without the flags, RANK and WORLD_SIZE in "
            "the environment are used."
        )
    return rank, world


def from_environment(name: str, default: int) -> int:
    """The whole number in a variable of the environment, which launchers set.

    Raises:
        ValueError: the variable holds no whole number.
    """
    text = os.environ.get(name, str(default))
    try:
        return int(text)
    except ValueError:
        raise ValueError(f"The environment has {name}={text!r}, which is no whole number; unset it.") from None


def device_of(name: str) -> str:
    """The device of this name. "auto" is the first available of cuda, mps, xpu and cpu; cuda and xpu without a number
    get the number LOCAL_RANK, as torchrun sets it.

    Raises:
        ValueError: the device is not available, or cannot sum a tensor.
    """
    import torch

    if name == "auto":
        found = torch.accelerator.current_accelerator(check_available=True)
        name = found.type if found is not None and found.type in ("cuda", "mps", "xpu") else "cpu"
    device = f"{name}:{os.environ.get('LOCAL_RANK', 0)}" if name in ("cuda", "xpu") else name
    try:
        torch.ones(1, device=device).sum().item()
    except (RuntimeError, AssertionError, ImportError, NotImplementedError) as error:
        raise ValueError(f"--device {name} is not available ({reason(error)}); use cpu, or another device.") from None
    return device
