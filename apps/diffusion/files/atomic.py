"""Files and folders that are written whole or not at all.

Each is written under a name of its own, so that several processes may write the same one, and renamed when it
is complete. A disk that is full, or another failure to write, is an OSError whoever writes: safetensors and torch.save
raise errors of their own kinds.
"""

from __future__ import annotations

import os
import secrets
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def file_at_once(path: Path) -> Iterator[Path]:
    """A name to write a file under; it becomes `path` when the block ends well, and vanishes otherwise."""
    partial = _partial(path)
    try:
        yield partial
        with partial.open("rb") as file:
            os.fsync(file.fileno())
        os.replace(partial, path)
    except BaseException as error:
        partial.unlink(missing_ok=True)
        raise_as_os_error(error, path)
        raise


@contextmanager
def folder_at_once(path: Path) -> Iterator[Path]:
    """A folder to write into; it becomes `path`, which may be an empty folder by then, when the block ends
    well, and vanishes otherwise.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = _partial(path)
    partial.mkdir()
    try:
        yield partial
        os.replace(partial, path)
    except BaseException as error:
        shutil.rmtree(partial, ignore_errors=True)
        raise_as_os_error(error, path)
        raise


def raise_as_os_error(error: BaseException, path: Path) -> None:
    """Raise what safetensors or torch.save say of a failed write as the OSError it is; do nothing otherwise."""
    from safetensors import SafetensorError

    torchs = isinstance(error, RuntimeError) and any(w in str(error) for w in ("StreamWriter", "inline_container"))
    if isinstance(error, SafetensorError) or torchs:
        raise OSError(f"{path} could not be written ({str(error).splitlines()[0]})") from None


def abandoned(partial: Path) -> bool:
    """Whether what was begun under this name will not be finished: no other process of this machine is at it."""
    number = partial.name.split(".")[-2].split("-")[0]
    if not number.isdecimal() or int(number) == os.getpid():
        return True
    try:
        os.kill(int(number), 0)  # 0 is no signal: it only asks whether there is such a process
    except ProcessLookupError:
        return True
    except PermissionError:  # there is, and it is another user's
        return False
    return False


def _partial(path: Path) -> Path:
    return path.with_name(f".{path.name}.{os.getpid()}-{secrets.token_hex(4)}.partial")
