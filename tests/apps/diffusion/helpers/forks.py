"""Functions called in forks of a process that has imported the application already, as torchrun starts them.

Starting a process and importing torch and diffusers takes ten seconds, a fork almost no time. `Forks` is used by the
tests. Run as a program, this file reads one call per line: {"call": "module:function", "arguments": [...], "processes":
number, "log": file or null, "largest": bytes or null, "environment": {...}}. The program prints the id of the call's
first process and, when all processes have ended, the largest exit code. A process may write no file larger than
`largest`.
"""

import importlib
import json
import os
import resource
import socket
import subprocess
import sys
import traceback
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[4]


class Forks:
    """A process that forks; `environment` is added to this one's."""

    def __init__(self, folder: Path | None = None, **environment: str) -> None:
        added = {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", **environment}
        self.parent = subprocess.Popen(
            [sys.executable, __file__],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            cwd=folder,
            env=os.environ | added,
        )

    def start(
        self,
        call: str,
        *arguments: Any,
        processes: int = 1,
        log: Path | None = None,
        largest: int | None = None,
        environment: dict[str, str] | None = None,
    ) -> int:
        """Start a call; the id of its first process."""
        assert self.parent.stdin is not None
        order = {"call": call, "arguments": arguments, "processes": processes, "log": log, "largest": largest}
        self.parent.stdin.write(json.dumps({**order, "environment": environment or {}}, default=str) + "\n")
        self.parent.stdin.flush()
        return self._number()

    def end(self) -> int:
        """The exit code of the call, when it has ended."""
        return self._number()

    def run(self, call: str, *arguments: Any, **options: Any) -> int:
        """The exit code of a call."""
        self.start(call, *arguments, **options)
        return self.end()

    def close(self) -> None:
        self.parent.kill()
        self.parent.communicate()

    def _number(self) -> int:
        assert self.parent.stdout is not None
        return int(self.parent.stdout.readline())


def _ranks(processes: int) -> list[dict[str, str]]:
    """The environment that `accelerate launch` gives each process."""
    if processes == 1:
        return [{}]
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free.getsockname()[1])}
    common = {"WORLD_SIZE": str(processes), **address}
    return [{**common, "RANK": str(rank), "LOCAL_RANK": str(rank)} for rank in range(processes)]


def _fork(call: str, arguments: list[Any], log: str | None, largest: int | None) -> None:
    """Call and end this process with the result, or 70 after an exception, as exit code."""
    if log is None:
        os.dup2(2, 1)  # the output of the parent holds numbers alone
    else:
        with open(log, "a") as file:
            os.dup2(file.fileno(), 1)
            os.dup2(file.fileno(), 2)
    if largest is not None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (largest, largest))
    code = 70
    try:
        module, _, name = call.partition(":")
        code = getattr(importlib.import_module(module), name)(*arguments) or 0
    except BaseException:
        traceback.print_exc()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def _serve() -> None:
    import torch

    commands = ("encode", "evaluate", "sample", "train", "checkpoint.open_network", "training.run")
    for module in (*(f"apps.diffusion.{name}" for name in commands), "sklearn.datasets", "torch.utils.tensorboard"):
        importlib.import_module(module)
    torch.set_num_threads(1)
    for line in sys.stdin:
        order = json.loads(line)
        pids, further = [], order.pop("environment")
        for environment in _ranks(order.pop("processes")):
            pids.append(os.fork())
            if pids[-1] == 0:
                os.environ.update(environment | further)
                _fork(**order)
        print(pids[0], flush=True)
        print(max((os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) for pid in pids), key=abs), flush=True)


if __name__ == "__main__":
    _serve()
